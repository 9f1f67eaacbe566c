// Low-rank depthwise filter mixed with the image, and its gradients.
//   K = sum_r u_r v_r^T,  F = K * padded x (cross-correlation),  y = gain (x + mix (F - x)) + bias
// Backward needs one k x k correlation per plane, G[i,j] = sum g[y,x] padded[y+i,x+j]; every parameter gradient
// follows from G and sum g. The image gradient, when asked for, is the adjoint filter with its borders folded back.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/loops.h"

namespace vqfast {
namespace {

constexpr int64_t kBandRows = 32;            // rows of one task: small enough for the cache, large against the halo
constexpr int64_t kMinTaskPixels = 1 << 14;  // below it a second thread costs more than it saves

enum class Padding : int64_t { kReflect = 0, kReplicate = 1, kZeros = 2 };

// Source index of padded position i in [-p, n + p), or -1 for a zero.
int64_t source_index(int64_t i, int64_t n, Padding padding) {
  if (i >= 0 && i < n) return i;
  if (padding == Padding::kReflect) return i < 0 ? -i : 2 * (n - 1) - i;
  if (padding == Padding::kReplicate) return i < 0 ? 0 : n - 1;
  return -1;
}

// out[x] (+)= sum_j taps[j] in[x + j * stride]
VQ_MULTIVERSION void correlate_taps(const float* in, const float* taps, float* out, int64_t n, int64_t k,
                                    int64_t stride, bool accumulate) {
  constexpr int64_t kBlock = 64;
  for (int64_t x0 = 0; x0 < n; x0 += kBlock) {
    const int64_t width = std::min(kBlock, n - x0);
    float sum[kBlock] = {};
    for (int64_t j = 0; j < k; ++j) {
      const float tap = taps[j];
      const float* source = in + x0 + j * stride;
      if (width == kBlock) {
        for (int64_t x = 0; x < kBlock; ++x) sum[x] += tap * source[x];
      } else {
        for (int64_t x = 0; x < width; ++x) sum[x] += tap * source[x];
      }
    }
    for (int64_t x = 0; x < width; ++x) out[x0 + x] = accumulate ? out[x0 + x] + sum[x] : sum[x];
  }
}

// sums[j] += sum_x g[x] in[x + j]
VQ_MULTIVERSION void correlate_rows(const float* g, const float* in, double* sums, int64_t n, int64_t k) {
  int64_t j = 0;
  for (; j + 4 <= k; j += 4) {
    float a = 0.f, b = 0.f, c = 0.f, d = 0.f;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t x = 0; x < n; ++x) {
      a += g[x] * in[x + j];
      b += g[x] * in[x + j + 1];
      c += g[x] * in[x + j + 2];
      d += g[x] * in[x + j + 3];
    }
    sums[j] += a, sums[j + 1] += b, sums[j + 2] += c, sums[j + 3] += d;
  }
  for (; j < k; ++j) {
    float a = 0.f;
#pragma omp simd reduction(+ : a)
    for (int64_t x = 0; x < n; ++x) a += g[x] * in[x + j];
    sums[j] += a;
  }
}

VQ_MULTIVERSION float row_sum(const float* g, int64_t n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t x = 0; x < n; ++x) sum += g[x];
  return sum;
}

// Reads a parameter of shape [1 or B, 1 or C, ...] at (sample, channel).
struct Parameter {
  const float* data;
  int64_t sample_stride, channel_stride;
  Parameter(const Tensor& tensor, int64_t inner, bool per_channel)
      : data(tensor.const_data_ptr<float>()),
        sample_stride(tensor.size(0) > 1 ? inner * (per_channel ? tensor.size(1) : 1) : 0),
        channel_stride(per_channel && tensor.size(1) > 1 ? inner : 0) {}
  int64_t offset(int64_t sample, int64_t channel) const { return sample * sample_stride + channel * channel_stride; }
  const float* at(int64_t sample, int64_t channel) const { return data + offset(sample, channel); }
};

// The arguments of forward and backward, checked and contiguous.
struct Arguments {
  Tensor image, taps_y, taps_x, mix, gain, bias;
  int64_t batch, channels, height, width, rank, taps, radius, padded_width;
  Padding padding;

  Arguments(const Tensor& image_, const Tensor& taps_y_, const Tensor& taps_x_, const Tensor& mix_, const Tensor& gain_,
            const Tensor& bias_, int64_t padding_)
      : image(torch::stable::contiguous(image_)),
        taps_y(torch::stable::contiguous(taps_y_)),
        taps_x(torch::stable::contiguous(taps_x_)),
        mix(torch::stable::contiguous(mix_)),
        gain(torch::stable::contiguous(gain_)),
        bias(torch::stable::contiguous(bias_)) {
    STD_TORCH_CHECK(image.dim() == 4, "image must be [B, C, H, W]");
    STD_TORCH_CHECK(taps_y.dim() == 3 && taps_x.dim() == 3, "taps must be [1 or B, R, k]");
    STD_TORCH_CHECK(mix.dim() == 1 && gain.dim() == 2 && bias.dim() == 2,
                    "mix must be [1 or B]; gain and bias [1 or B, 1 or C]");
    batch = image.size(0), channels = image.size(1), height = image.size(2), width = image.size(3);
    rank = taps_y.size(1), taps = taps_y.size(2), radius = taps / 2, padded_width = width + 2 * radius;
    STD_TORCH_CHECK(taps % 2 == 1, "the number of taps must be odd");
    STD_TORCH_CHECK(taps_x.size(0) == taps_y.size(0) && taps_x.size(1) == rank && taps_x.size(2) == taps,
                    "taps_x must have the shape of taps_y");
    STD_TORCH_CHECK(padding_ >= 0 && padding_ <= 2, "padding must be 0 (reflect), 1 (replicate) or 2 (zeros)");
    padding = static_cast<Padding>(padding_);
    STD_TORCH_CHECK(padding != Padding::kReflect || (height > radius && width > radius),
                    "reflect padding needs an image larger than k / 2");
    STD_TORCH_CHECK(padding != Padding::kReplicate || (height > 0 && width > 0), "replicate padding needs pixels");
    for (const auto& [tensor, name] : {std::pair{&taps_y, "taps_y"}, {&mix, "mix"}, {&gain, "gain"}, {&bias, "bias"}})
      STD_TORCH_CHECK(tensor->size(0) == 1 || tensor->size(0) == batch, name, " must have 1 or B samples");
    for (const auto& [tensor, name] : {std::pair{&gain, "gain"}, {&bias, "bias"}})
      STD_TORCH_CHECK(tensor->size(1) == 1 || tensor->size(1) == channels, name, " must have 1 or C channels");
    for (const auto& [tensor, name] :
         {std::pair{&taps_y, "taps_y"}, {&taps_x, "taps_x"}, {&mix, "mix"}, {&gain, "gain"}, {&bias, "bias"}})
      check_float32(*tensor, name);
  }

  int64_t planes() const { return batch * channels; }
  int64_t bands() const { return (height + kBandRows - 1) / kBandRows; }
  int64_t grain(int64_t task_rows) const {
    return std::max<int64_t>(1, kMinTaskPixels / std::max<int64_t>(1, task_rows * width));
  }

  // Rows [first, last) of the padded plane, last - first rows of padded_width values.
  template <class T>
  void load_padded(const T* plane, int64_t first, int64_t last, float* out) const {
    for (int64_t y = first; y < last; ++y, out += padded_width) {
      const int64_t source = source_index(y, height, padding);
      if (source < 0) {
        std::fill_n(out, padded_width, 0.f);
        continue;
      }
      float* row = out + radius;
      load_row(plane + source * width, row, width);
      for (int64_t x = 1; x <= radius; ++x) {
        const int64_t left = source_index(-x, width, padding), right = source_index(width - 1 + x, width, padding);
        row[-x] = left < 0 ? 0.f : row[left];
        row[width - 1 + x] = right < 0 ? 0.f : row[right];
      }
    }
  }

  // Calls body(plane, first row, last row) for bands of rows, in parallel.
  template <class Body>
  void for_bands(Body body) const {
    torch::stable::parallel_for(0, planes() * bands(), grain(kBandRows), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task % bands() * kBandRows;
        body(task, task / bands(), first, std::min(first + kBandRows, height));
      }
    });
  }
};

Tensor lowrank_filter2d_fwd(const Tensor& image, const Tensor& taps_y, const Tensor& taps_x, const Tensor& mix,
                            const Tensor& gain, const Tensor& bias, int64_t padding) {
  const Arguments a(image, taps_y, taps_x, mix, gain, bias, padding);
  Tensor out = torch::stable::new_empty(a.image, a.image.sizes());
  const int64_t k = a.taps, halo_rows = kBandRows + 2 * a.radius;
  const Parameter u(a.taps_y, a.rank * k, false), v(a.taps_x, a.rank * k, false), m(a.mix, 1, false);
  const Parameter gains(a.gain, 1, true), biases(a.bias, 1, true);
  for_activation_dtype(a.image, "image", [&](auto element) {
    using T = decltype(element);
    const T* pixels = a.image.template const_data_ptr<T>();
    T* result = out.template mutable_data_ptr<T>();
    a.for_bands([&](int64_t, int64_t plane, int64_t first, int64_t last) {
      static thread_local std::vector<float> padded, blurred, row;
      padded.resize(halo_rows * a.padded_width), blurred.resize(kBandRows * a.width);
      row.resize(halo_rows * a.width);
      const int64_t sample = plane / a.channels, channel = plane % a.channels;
      const T* source = pixels + plane * a.height * a.width;
      const int64_t rows = last - first;
      a.load_padded(source, first - a.radius, last + a.radius, padded.data());
      for (int64_t r = 0; r < a.rank; ++r) {
        for (int64_t y = 0; y < rows + 2 * a.radius; ++y)
          correlate_taps(padded.data() + y * a.padded_width, v.at(sample, channel) + r * k, row.data() + y * a.width,
                         a.width, k, 1, false);
        for (int64_t y = 0; y < rows; ++y)
          correlate_taps(row.data() + y * a.width, u.at(sample, channel) + r * k, blurred.data() + y * a.width, a.width,
                         k, a.width, r > 0);
      }
      const float mixed = *m.at(sample, channel), scale = *gains.at(sample, channel),
                  shift = *biases.at(sample, channel);
      for (int64_t y = 0; y < rows; ++y) {
        const float* x = padded.data() + (y + a.radius) * a.padded_width + a.radius;
        float* f = blurred.data() + y * a.width;
        for (int64_t i = 0; i < a.width; ++i) f[i] = scale * (x[i] + mixed * (f[i] - x[i])) + shift;
        store_row(f, result + (plane * a.height + first + y) * a.width, a.width);
      }
    });
  });
  return out;
}

// G of every (plane, band) with sum g behind it: k * k + 1 doubles each.
template <class T>
std::vector<double> band_correlations(const Arguments& a, const T* pixels, const T* grads) {
  const int64_t k = a.taps, size = k * k + 1;
  std::vector<double> partial(a.planes() * a.bands() * size, 0.0);
  a.for_bands([&](int64_t task, int64_t plane, int64_t first, int64_t last) {
    static thread_local std::vector<float> padded, g;
    padded.resize((kBandRows + 2 * a.radius) * a.padded_width), g.resize(a.width);
    double* sums = partial.data() + task * size;
    a.load_padded(pixels + plane * a.height * a.width, first - a.radius, last + a.radius, padded.data());
    for (int64_t y = first; y < last; ++y) {
      load_row(grads + (plane * a.height + y) * a.width, g.data(), a.width);
      sums[k * k] += row_sum(g.data(), a.width);
      for (int64_t i = 0; i < k; ++i)
        correlate_rows(g.data(), padded.data() + (y - first + i) * a.padded_width, sums + i * k, a.width, k);
    }
  });
  return partial;
}

// dx = gain ((1 - mix) g + mix F^T g): each axis scatters through its taps and folds the border back.
template <class T>
void image_gradient(const Arguments& a, const Parameter& u, const Parameter& v, const Parameter& m,
                    const Parameter& gains, const T* grads, T* result) {
  torch::stable::parallel_for(0, a.planes(), a.grain(a.height), [&](int64_t begin, int64_t end) {
    const int64_t k = a.taps, area = a.height * a.width;
    std::vector<float> g(area), scattered(area), adjoint(area);
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t sample = plane / a.channels, channel = plane % a.channels;
      load_row(grads + plane * area, g.data(), area);
      std::fill(adjoint.begin(), adjoint.end(), 0.f);
      for (int64_t r = 0; r < a.rank; ++r) {
        const float *taps_x = v.at(sample, channel) + r * k, *taps_y = u.at(sample, channel) + r * k;
        std::fill(scattered.begin(), scattered.end(), 0.f);
        for (int64_t j = 0; j < k; ++j)
          for (int64_t x = 0; x < a.width; ++x) {
            const int64_t target = source_index(x + j - a.radius, a.width, a.padding);
            if (target < 0) continue;
            for (int64_t y = 0; y < a.height; ++y) scattered[y * a.width + target] += taps_x[j] * g[y * a.width + x];
          }
        for (int64_t i = 0; i < k; ++i)
          for (int64_t y = 0; y < a.height; ++y) {
            const int64_t target = source_index(y + i - a.radius, a.height, a.padding);
            if (target < 0) continue;
            for (int64_t x = 0; x < a.width; ++x)
              adjoint[target * a.width + x] += taps_y[i] * scattered[y * a.width + x];
          }
      }
      const float mixed = *m.at(sample, channel), scale = *gains.at(sample, channel);
      for (int64_t i = 0; i < area; ++i) adjoint[i] = scale * (g[i] + mixed * (adjoint[i] - g[i]));
      store_row(adjoint.data(), result + plane * area, area);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lowrank_filter2d_bwd(
    const Tensor& grad_, const Tensor& image, const Tensor& taps_y, const Tensor& taps_x, const Tensor& mix,
    const Tensor& gain, const Tensor& bias, int64_t padding, bool image_grad) {
  const Arguments a(image, taps_y, taps_x, mix, gain, bias, padding);
  const Tensor grad = torch::stable::contiguous(grad_);
  STD_TORCH_CHECK(grad.scalar_type() == a.image.scalar_type() && grad.numel() == a.image.numel(),
                  "grad must have the shape and dtype of image");
  const int64_t k = a.taps, size = k * k + 1;
  const Parameter u(a.taps_y, a.rank * k, false), v(a.taps_x, a.rank * k, false), m(a.mix, 1, false);
  const Parameter gains(a.gain, 1, true), biases(a.bias, 1, true);

  Tensor d_image =
      image_grad ? torch::stable::new_empty(a.image, a.image.sizes()) : torch::stable::new_empty(a.image, {0});
  std::vector<double> partial;
  for_activation_dtype(a.image, "image", [&](auto element) {
    using T = decltype(element);
    const T* grads = grad.const_data_ptr<T>();
    partial = band_correlations(a, a.image.template const_data_ptr<T>(), grads);
    if (image_grad) image_gradient(a, u, v, m, gains, grads, d_image.template mutable_data_ptr<T>());
  });

  // Planes are added in order in double, so the result does not depend on the number of threads.
  std::vector<double> d_u(a.taps_y.numel()), d_v(a.taps_x.numel()), d_mix(a.mix.numel()), d_gain(a.gain.numel()),
      d_bias(a.bias.numel()), total(size);
  const int64_t centre = a.radius * k + a.radius;
  for (int64_t plane = 0; plane < a.planes(); ++plane) {
    std::fill(total.begin(), total.end(), 0.0);
    for (int64_t band = 0; band < a.bands(); ++band)
      for (int64_t i = 0; i < size; ++i) total[i] += partial[(plane * a.bands() + band) * size + i];
    const int64_t sample = plane / a.channels, channel = plane % a.channels;
    const float *taps_u = u.at(sample, channel), *taps_v = v.at(sample, channel);
    const double mixed = *m.at(sample, channel), scale = *gains.at(sample, channel);
    double filtered = 0.0;  // <G, K>
    for (int64_t r = 0; r < a.rank; ++r)
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) {
          const double g = total[i * k + j], weight = scale * mixed * g;
          filtered += double(taps_u[r * k + i]) * taps_v[r * k + j] * g;
          d_u[u.offset(sample, channel) + r * k + i] += weight * taps_v[r * k + j];
          d_v[v.offset(sample, channel) + r * k + j] += weight * taps_u[r * k + i];
        }
    d_mix[m.offset(sample, channel)] += scale * (filtered - total[centre]);
    d_gain[gains.offset(sample, channel)] += (1.0 - mixed) * total[centre] + mixed * filtered;
    d_bias[biases.offset(sample, channel)] += total[k * k];
  }
  const auto as_tensor = [](const std::vector<double>& values, const Tensor& like) {
    Tensor out = torch::stable::new_empty(like, like.sizes());
    std::copy(values.begin(), values.end(), out.mutable_data_ptr<float>());
    return out;
  };
  return {d_image,
          as_tensor(d_u, a.taps_y),
          as_tensor(d_v, a.taps_x),
          as_tensor(d_mix, a.mix),
          as_tensor(d_gain, a.gain),
          as_tensor(d_bias, a.bias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vqfast_cpu, CPU, m) {
  m.impl("lowrank_filter2d_fwd", TORCH_BOX(&lowrank_filter2d_fwd));
  m.impl("lowrank_filter2d_bwd", TORCH_BOX(&lowrank_filter2d_bwd));
}

}  // namespace vqfast
