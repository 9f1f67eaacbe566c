// Low-rank gain on the DCT spectrum of every channel, and its gradients.
//   X = C_H x C_W^T,  M = 1 + sum_r a_r b_r^T,  y = C_H^T (M o X) C_W  (o: elementwise)
//   G = C_H g C_W^T,  dM = sum over channels of G o X,  da_r = dM b_r,  db_r = dM^T a_r,  dx = C_H^T (M o G) C_W
// A transform is a pass over blocks of 16 rows and one over blocks of 16 columns. Gain and gradients are part of the
// latter: neither M nor dM is ever held for a whole image.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cpu/dct.h"

namespace vqfast {
namespace {

constexpr int64_t kMaxRank = 8;
constexpr int64_t kMinTaskPixels = 1 << 13;  // below it a second thread costs more than it saves

// z[i] <- (1 + sum_r a[r, i] b[r]) o row i of `count` adjacent columns.
VQ_MULTIVERSION void load_gained_columns(const float* corner, int64_t stride, int64_t count, int64_t n, const float* a,
                                         const Point* b, int64_t rank, Point* z) {
  for (int64_t i = 0; i < n; ++i) {
    Point gain = {spread(1.f), spread(1.f)};
    for (int64_t r = 0; r < rank; ++r) gain = gain + a[r * n + i] * b[r];
    z[i] = gain * load_point(corner + i * stride, count);
  }
}

// product[i] += g[i] o row i of `count` adjacent columns.
VQ_MULTIVERSION void accumulate_columns(const Point* g, const float* corner, int64_t stride, int64_t count, int64_t n,
                                        Point* product) {
  for (int64_t i = 0; i < n; ++i) product[i] = product[i] + g[i] * load_point(corner + i * stride, count);
}

// da[r, i] = <product[i], b[r]>,  db[r] = sum_i a[r, i] product[i].
VQ_MULTIVERSION void contract_columns(const Point* product, int64_t n, const float* a, const Point* b, int64_t rank,
                                      float* da, Point* db) {
  std::fill_n(db, rank, Point{});
  for (int64_t i = 0; i < n; i += 4) {
    const int64_t rows = n - i < 4 ? n - i : 4;
    for (int64_t r = 0; r < rank; ++r) {
      Quad quads[4] = {};
      for (int64_t t = 0; t < rows; ++t) {
        db[r] = db[r] + a[r * n + i + t] * product[i + t];
        const HalfVec v = product[i + t].re * b[r].re + product[i + t].im * b[r].im;
        Quad parts[2];
        std::memcpy(parts, &v, sizeof v);
        quads[t] = parts[0] + parts[1];
      }
      transpose(quads);
      const Quad sums = (quads[0] + quads[1]) + (quads[2] + quads[3]);
      std::memcpy(da + r * n + i, &sums, sizeof(float) * rows);
    }
  }
}

// The planes of [B, C, H, W] and what both passes over them need.
struct Planes {
  int64_t batch, channels, height, width;
  Dct vertical, horizontal;

  explicit Planes(const Tensor& image)
      : batch(image.size(0)),
        channels(image.size(1)),
        height(image.size(2)),
        width(image.size(3)),
        vertical(height),
        horizontal(width) {}

  int64_t blocks() const { return (width + kLines - 1) / kLines; }

  // `count` buffers, each long enough for a block of lines of either axis; one set per thread.
  template <size_t count>
  std::array<Point*, count> buffers() const {
    static thread_local std::vector<Point> points;
    const int64_t n = std::max(height, width);
    points.resize(count * n);
    std::array<Point*, count> result;
    for (size_t i = 0; i < count; ++i) result[i] = points.data() + i * n;
    return result;
  }

  // Calls body(task) for tasks of `pixels` each, in parallel.
  template <class Body>
  void for_tasks(int64_t tasks, int64_t pixels, Body body) const {
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kMinTaskPixels / std::max<int64_t>(1, pixels)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t task = begin; task < end; ++task) body(task);
                                });
  }

  // Transforms every row of `in` to one of `out`, which may be the same memory. A block is of one plane: lines travel
  // in pairs, and what is not finite in one may not reach another sample.
  template <class In, class Out, class Transform>
  void for_rows(const In* in, Out* out, const int32_t* load_order, const int32_t* store_order,
                Transform transform) const {
    const int64_t row_blocks = (height + kLines - 1) / kLines;
    for_tasks(batch * channels * row_blocks, kLines * width, [&](int64_t task) {
      static thread_local std::vector<float> staging;  // rows in fp32, and those beyond the last one
      staging.resize(kLines * width);
      const int64_t y = task % row_blocks * kLines, first = task / row_blocks * height + y;
      const int64_t count = std::min(kLines, height - y);
      const float* sources[kLines];
      float* targets[kLines];
      for (int64_t i = 0; i < kLines; ++i) {
        sources[i] = targets[i] = staging.data() + i * width;
        if (i >= count) {
          std::fill_n(targets[i], width, 0.f);
          continue;
        }
        if constexpr (std::is_same_v<In, float>)
          sources[i] = in + (first + i) * width;
        else
          load_row(in + (first + i) * width, targets[i], width);
        if constexpr (std::is_same_v<Out, float>) targets[i] = out + (first + i) * width;
      }
      const auto [z, other, scratch] = buffers<3>();
      load_rows(sources, width, load_order, z);
      store_rows(transform(z, other, scratch), width, store_order, targets);
      if constexpr (!std::is_same_v<Out, float>)
        for (int64_t i = 0; i < count; ++i) store_row(targets[i], out + (first + i) * width, width);
    });
  }

  template <class T>
  void forward_rows(const T* image, float* half) const {
    for_rows(image, half, horizontal.order.data(), horizontal.identity.data(),
             [&](Point* z, Point* other, Point* scratch) { return forward_lines(horizontal, z, other, scratch); });
  }

  // Coefficients of `count` adjacent columns.
  Point* forward_columns(const float* corner, int64_t count, Point* z, Point* other, Point* scratch) const {
    load_columns(corner, width, count, height, vertical.order.data(), z);
    return forward_lines(vertical, z, other, scratch);
  }
};

// gain_y [R, H] and gain_x [R, W], or [B, R, H] and [B, R, W], checked and contiguous.
struct Gains {
  Tensor y, x;
  int64_t rank, samples;

  Gains(const Tensor& gain_y, const Tensor& gain_x, const Planes& p)
      : y(torch::stable::contiguous(gain_y)), x(torch::stable::contiguous(gain_x)) {
    STD_TORCH_CHECK(y.dim() == 2 || (y.dim() == 3 && y.size(0) == p.batch), "gain_y must be [R, H] or [B, R, H]");
    STD_TORCH_CHECK(x.dim() == y.dim(), "gain_x must be [R, W] or [B, R, W], as gain_y");
    samples = y.dim() == 3 ? p.batch : 1, rank = y.size(-2);
    STD_TORCH_CHECK(x.size(0) == y.size(0) && x.size(-2) == rank, "gain_x must have the samples and rank of gain_y");
    STD_TORCH_CHECK(y.size(-1) == p.height && x.size(-1) == p.width, "gains must have one value per row and column");
    STD_TORCH_CHECK(rank <= kMaxRank, "the rank must be at most ", kMaxRank);
    check_float32(y, "gain_y"), check_float32(x, "gain_x");
  }

  int64_t set(int64_t sample) const { return samples == 1 ? 0 : sample; }
  const float* rows(int64_t sample) const { return y.const_data_ptr<float>() + set(sample) * rank * y.size(-1); }

  // b_r of `count` columns from `first`.
  std::array<Point, kMaxRank> columns(int64_t sample, int64_t first, int64_t count) const {
    std::array<Point, kMaxRank> points = {};
    const float* values = x.const_data_ptr<float>() + set(sample) * rank * x.size(-1) + first;
    for (int64_t r = 0; r < rank; ++r) points[r] = load_point(values + r * x.size(-1), count);
    return points;
  }
};

// C_H image C_W^T; half: memory for the pass between, may be spectrum.
void dct2(const Planes& p, const Tensor& image, float* half, float* spectrum) {
  for_activation_dtype(image, "image",
                       [&](auto element) { p.forward_rows(image.const_data_ptr<decltype(element)>(), half); });
  p.for_tasks(p.batch * p.channels * p.blocks(), kLines * p.height, [&](int64_t task) {
    const int64_t x = task % p.blocks() * kLines, corner = task / p.blocks() * p.height * p.width + x;
    const int64_t count = std::min(kLines, p.width - x);
    const auto [z, other, scratch] = p.buffers<3>();
    store_columns(p.forward_columns(half + corner, count, z, other, scratch), p.height, p.vertical.identity.data(),
                  spectrum + corner, p.width, count);
  });
}

// C_H^T (M o spectrum) C_W; half: memory for the pass between, may be spectrum or, of fp32, the image.
void gained_inverse(const Planes& p, const Gains& gains, const float* spectrum, float* half, Tensor& image) {
  p.for_tasks(p.batch * p.channels * p.blocks(), kLines * p.height, [&](int64_t task) {
    const int64_t plane = task / p.blocks(), sample = plane / p.channels, x = task % p.blocks() * kLines;
    const int64_t corner = plane * p.height * p.width + x, count = std::min(kLines, p.width - x);
    const auto b = gains.columns(sample, x, count);
    const auto [z, other, scratch] = p.buffers<3>();
    load_gained_columns(spectrum + corner, p.width, count, p.height, gains.rows(sample), b.data(), gains.rank, z);
    store_columns(inverse_lines(p.vertical, z, other, scratch), p.height, p.vertical.order.data(), half + corner,
                  p.width, count);
  });
  for_activation_dtype(image, "image", [&](auto element) {
    p.for_rows(half, image.mutable_data_ptr<decltype(element)>(), p.horizontal.identity.data(),
               p.horizontal.order.data(),
               [&](Point* z, Point* other, Point* scratch) { return inverse_lines(p.horizontal, z, other, scratch); });
  });
}

void check_image(const Tensor& image, const char* name) {
  STD_TORCH_CHECK(image.dim() == 4 && image.size(2) > 0 && image.size(3) > 0, name,
                  " must be [B, C, H, W] with at least one pixel");
}

Tensor dct2_fwd(const Tensor& image_) {
  check_image(image_, "image");
  const Tensor image = torch::stable::contiguous(image_);
  Tensor spectrum = torch::stable::new_empty(image, image.sizes(), ScalarType::Float);
  float* values = spectrum.mutable_data_ptr<float>();
  dct2(Planes(image), image, values, values);
  return spectrum;
}

// The result, and the spectrum of the image where none was given (else an empty tensor).
std::tuple<Tensor, Tensor> spectral_gain2d_fwd(const Tensor& image_, const std::optional<Tensor>& spectrum_,
                                               const Tensor& gain_y, const Tensor& gain_x) {
  check_image(image_, "image");
  const Planes p(image_);
  const Gains gains(gain_y, gain_x, p);
  Tensor out = torch::stable::new_empty(image_, image_.sizes());
  const Tensor half = out.scalar_type() == ScalarType::Float
                          ? out
                          : torch::stable::new_empty(image_, image_.sizes(), ScalarType::Float);
  if (spectrum_) {
    const Tensor spectrum = torch::stable::contiguous(*spectrum_);
    check_float32(spectrum, "spectrum");
    STD_TORCH_CHECK(spectrum.numel() == out.numel(), "spectrum must have the shape of image");
    gained_inverse(p, gains, spectrum.const_data_ptr<float>(), half.mutable_data_ptr<float>(), out);
    return {out, torch::stable::new_empty(image_, {0}, ScalarType::Float)};
  }
  const Tensor image = torch::stable::contiguous(image_);
  Tensor spectrum = torch::stable::new_empty(image, image.sizes(), ScalarType::Float);
  float* values = spectrum.mutable_data_ptr<float>();
  dct2(p, image, values, values);
  gained_inverse(p, gains, values, half.mutable_data_ptr<float>(), out);
  return {out, spectrum};
}

std::tuple<Tensor, Tensor, Tensor> spectral_gain2d_bwd(const Tensor& grad_, const Tensor& spectrum_,
                                                       const Tensor& gain_y, const Tensor& gain_x, bool image_grad) {
  check_image(grad_, "grad");
  const Tensor grad = torch::stable::contiguous(grad_), spectrum = torch::stable::contiguous(spectrum_);
  const Planes p(grad);
  const Gains gains(gain_y, gain_x, p);
  check_float32(spectrum, "spectrum");
  STD_TORCH_CHECK(spectrum.numel() == grad.numel(), "spectrum must have the shape of grad");
  const float* x_values = spectrum.const_data_ptr<float>();
  const Tensor transformed = torch::stable::new_empty(grad, grad.sizes(), ScalarType::Float);
  float* g_values = transformed.mutable_data_ptr<float>();
  for_activation_dtype(grad, "grad",
                       [&](auto element) { p.forward_rows(grad.const_data_ptr<decltype(element)>(), g_values); });

  const int64_t row_size = gains.rank * p.height, column_size = gains.rank * p.width;
  std::vector<float> partial_y(p.batch * p.blocks() * row_size), partial_x(p.batch * column_size);
  p.for_tasks(p.batch * p.blocks(), p.channels * kLines * p.height, [&](int64_t task) {
    const int64_t sample = task / p.blocks(), x = task % p.blocks() * kLines, count = std::min(kLines, p.width - x);
    const auto [product, z, other, scratch] = p.buffers<4>();
    std::fill_n(product, p.height, Point{});
    for (int64_t channel = 0; channel < p.channels; ++channel) {
      const int64_t corner = (sample * p.channels + channel) * p.height * p.width + x;
      const Point* g = p.forward_columns(g_values + corner, count, z, other, scratch);
      accumulate_columns(g, x_values + corner, p.width, count, p.height, product);
      if (image_grad) store_columns(g, p.height, p.vertical.identity.data(), g_values + corner, p.width, count);
    }
    const auto b = gains.columns(sample, x, count);
    Point d_b[kMaxRank];
    contract_columns(product, p.height, gains.rows(sample), b.data(), gains.rank, partial_y.data() + task * row_size,
                     d_b);
    for (int64_t r = 0; r < gains.rank; ++r)
      store_point(d_b[r], partial_x.data() + sample * column_size + r * p.width + x, count);
  });

  // Blocks are added in order, so the result does not depend on the number of threads.
  Tensor d_image = image_grad ? torch::stable::new_empty(grad, grad.sizes()) : torch::stable::new_empty(grad, {0});
  Tensor d_y = torch::stable::new_empty(gains.y, gains.y.sizes()),
         d_x = torch::stable::new_empty(gains.x, gains.x.sizes());
  float *d_rows = d_y.mutable_data_ptr<float>(), *d_columns = d_x.mutable_data_ptr<float>();
  std::fill_n(d_rows, d_y.numel(), 0.f), std::fill_n(d_columns, d_x.numel(), 0.f);
  for (int64_t sample = 0; sample < p.batch; ++sample) {
    for (int64_t block = 0; block < p.blocks(); ++block)
      for (int64_t i = 0; i < row_size; ++i)
        d_rows[gains.set(sample) * row_size + i] += partial_y[(sample * p.blocks() + block) * row_size + i];
    for (int64_t i = 0; i < column_size; ++i)
      d_columns[gains.set(sample) * column_size + i] += partial_x[sample * column_size + i];
  }
  if (image_grad) gained_inverse(p, gains, g_values, g_values, d_image);
  return {d_image, d_y, d_x};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vqfast_cpu, CPU, m) {
  m.impl("dct2_fwd", TORCH_BOX(&dct2_fwd));
  m.impl("spectral_gain2d_fwd", TORCH_BOX(&spectral_gain2d_fwd));
  m.impl("spectral_gain2d_bwd", TORCH_BOX(&spectral_gain2d_bwd));
}

}  // namespace vqfast
