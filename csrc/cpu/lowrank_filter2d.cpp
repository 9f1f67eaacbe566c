// Low-rank depthwise filter mixed with the image, and its gradients.
//   K = sum_r u_r v_r^T,  F = K * padded x (cross-correlation),  y = gain (x + mix (F - x)) + bias
// Backward needs one k x k correlation per plane, G[i,j] = sum g[y,x] padded[y+i,x+j]; every parameter gradient
// follows from G and sum g. The image gradient, when asked for, is the adjoint filter with its borders folded back.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/lowrank_filter2d.h"
#include "common/rows.h"

namespace vqfast {
namespace {

struct Tone {
  float mix, gain, bias;
};

struct Rows {  // row y starts at data + y * stride
  const float* data;
  int64_t stride;
};

}  // namespace
}  // namespace vqfast

#define VQ_LOOPS "cpu/lowrank_filter2d_loops.h"
#include "common/each_target.h"
#include "cpu/lowrank_filter2d_correlate.h"

namespace vqfast {
namespace {

constexpr int64_t kBlockRows = 16;           // rows filtered along x before they are filtered along y
constexpr int64_t kStripFloats = 6 << 10;    // of these rows: 24 KB, what a first-level cache of 32 KB has room for
constexpr int64_t kStripStep = 4 * kLanes;   // columns that the loops take at once
constexpr int64_t kBandRows = 32;            // rows of one task of the gradient, summed in fp32
constexpr int64_t kFlushRows = 8;            // of these, as many as rank 1 sums in fp32
constexpr int64_t kMinTaskPixels = 1 << 14;  // below it a second thread costs more than it saves

// Source index of padded position i in [-p, n + p), or -1 for a zero.
int64_t source_index(int64_t i, int64_t n, Padding padding) {
  if (i >= 0 && i < n) return i;
  if (padding == Padding::kReflect) return i < 0 ? -i : 2 * (n - 1) - i;
  if (padding == Padding::kReplicate) return i < 0 ? 0 : n - 1;
  return -1;
}

// A parameter that is shared, one per sample, or (where `inner` is 1) one per sample and channel: [], [B] or [B, C] of
// blocks of `inner` floats; `absent` where it was not given.
struct Parameter {
  const float* data;
  int64_t sample_stride = 0, channel_stride = 0;
  Parameter(const Tensor& tensor, int64_t inner, int64_t inner_dims) : data(tensor.const_data_ptr<float>()) {
    const int64_t lead = tensor.dim() - inner_dims;
    if (lead == 2) channel_stride = inner;
    if (lead >= 1) sample_stride = inner * (lead == 2 ? tensor.size(1) : 1);
  }
  Parameter(const std::optional<Tensor>& tensor, const float& absent) : data(&absent) {
    if (tensor) *this = Parameter(*tensor, 1, 0);
  }
  int64_t offset(int64_t sample, int64_t channel) const { return sample * sample_stride + channel * channel_stride; }
  const float* at(int64_t sample, int64_t channel) const { return data + offset(sample, channel); }
};

constexpr float kOne = 1.f, kZero = 0.f;

struct Arguments : FilterArguments {
  using FilterArguments::FilterArguments;
  int64_t radius = taps / 2;

  int64_t bands(int64_t rows) const { return (rows + kBandRows - 1) / kBandRows; }
  int64_t grain(int64_t task_rows) const {
    return std::max<int64_t>(1, kMinTaskPixels / std::max<int64_t>(1, task_rows * width));
  }

  // The parameters of one plane.
  const float* plane_taps(const Tensor& tensor, int64_t plane) const {
    return Parameter(tensor, rank * taps, 2).at(plane / channels, 0);
  }
  Tone tone(int64_t plane) const {
    const int64_t sample = plane / channels, channel = plane % channels;
    return {*Parameter(mix, 1, 0).at(sample, channel), *Parameter(gain, kOne).at(sample, channel),
            *Parameter(bias, kZero).at(sample, channel)};
  }

  // Values [left - radius, left + count + radius) of row y of a padded plane: in place where they lie in the image,
  // else written to `buffer`. Beyond the padding there are zeros.
  template <class T>
  const float* padded_row(const T* plane, int64_t y, int64_t left, int64_t count, float* buffer) const {
    const int64_t source = source_index(y, height, padding), begin = left - radius, end = left + count + radius;
    if (source < 0) {
      std::fill_n(buffer, end - begin, 0.f);
      return buffer;
    }
    const T* row = plane + source * width;
    if constexpr (std::is_same_v<T, float>)
      if (begin >= 0 && end <= width) return row + begin;
    const int64_t first = std::clamp<int64_t>(begin, 0, width), last = std::clamp<int64_t>(end, 0, width);
    load_row(row + first, buffer + first - begin, last - first);
    const auto fill_edge = [&](int64_t from, int64_t to) {
      for (int64_t x = from; x < to; ++x) {
        const int64_t i = x < width + radius ? source_index(x, width, padding) : -1;
        buffer[x - begin] = i < 0 ? 0.f : static_cast<float>(row[i]);
      }
    };
    fill_edge(begin, first);
    fill_edge(last, end);
    return buffer;
  }
};

// Filters columns [left, left + width) of rows [first, last) along x, and hands them on for the filter along y.
//   padded(y): pointer to the padded row y, width + k - 1 values
//   emit(y, count, in): in [count + k - 1][rank][width] holds rows y - radius and on; count is 1 or 2
template <class Padded, class Emit>
void filter_strip(const float* taps_x, int64_t rank, int64_t k, int64_t width, int64_t first, int64_t last,
                  Padded padded, Emit emit) {
  static thread_local Buffer<float> filtered;
  const int64_t halo = k - 1, row_size = rank * width;
  filtered.resize((halo + kBlockRows) * row_size);
  for (int64_t y = first; y < last; y += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, last - y), kept = y == first ? 0 : halo;
    std::copy_n(filtered.data() + kBlockRows * row_size, kept * row_size, filtered.data());
    for (int64_t i = kept; i < halo + rows; ++i)
      VQ_CALL(filter_row, padded(y - halo / 2 + i), taps_x, rank, k, filtered.data() + i * row_size, width);
    for (int64_t i = 0; i < rows; i += 2) emit(y + i, std::min<int64_t>(2, rows - i), filtered.data() + i * row_size);
  }
}

// Columns of a strip: few enough that the rows of filter_strip stay in the first-level cache.
int64_t strip_width(int64_t rank, int64_t k) {
  return std::max<int64_t>(1, kStripFloats / ((kBlockRows + k - 1) * rank * kStripStep)) * kStripStep;
}

template <class T>
void filter_rows(const Arguments& a, int64_t plane, int64_t first, int64_t last, const T* pixels, T* result) {
  static thread_local Buffer<float> padded, rows;
  const float *taps_x = a.plane_taps(a.taps_x, plane), *taps_y = a.plane_taps(a.taps_y, plane);
  const Tone tone = a.tone(plane);
  const int64_t strip = strip_width(a.rank, a.taps);
  padded.resize(strip + a.taps), rows.resize(4 * strip);
  for (int64_t left = 0; left < a.width; left += strip) {
    const int64_t columns = std::min(strip, a.width - left), width = whole_vectors(columns);
    const bool in_place = std::is_same_v<T, float> && columns == width;
    filter_strip(
        taps_x, a.rank, a.taps, width, first, last,
        [&](int64_t y) {
          // A strip jumps from row to row, which hardware does not foresee.
          const int64_t ahead = std::min(y + kBlockRows, a.height - 1) * a.width + left;
          for (int64_t x = 0; x < columns; x += 64 / sizeof(T))
            __builtin_prefetch(pixels + ahead + x), __builtin_prefetch(result + ahead + x, 1);
          return a.padded_row(pixels, y, left, width, padded.data());
        },
        [&](int64_t y, int64_t count, const float* in) {
          const float* image[2];
          float* out[2];
          for (int64_t i = 0; i < count; ++i) {
            const int64_t offset = (y + i) * a.width + left;
            image[i] = rows.data() + i * strip, out[i] = rows.data() + (2 + i) * strip;
            if constexpr (std::is_same_v<T, float>)
              if (in_place) image[i] = pixels + offset, out[i] = result + offset;
            if (!in_place) load_row(pixels + offset, rows.data() + i * strip, columns);
          }
          VQ_CALL(filter_columns, in, taps_y, a.rank, a.taps, width, tone, count, image, out);
          if (!in_place)
            for (int64_t i = 0; i < count; ++i) store_row(out[i], result + (y + i) * a.width + left, columns);
        });
  }
}

Tensor lowrank_filter2d_fwd(const Tensor& image, const Tensor& taps_y, const Tensor& taps_x, const Tensor& mix,
                            const std::optional<Tensor>& gain, const std::optional<Tensor>& bias, int64_t padding) {
  const Arguments a(image, taps_y, taps_x, mix, gain, bias, padding);
  Tensor out = torch::stable::new_empty(a.image, a.image.sizes());
  for_activation_dtype(a.image, "image", [&](auto element) {
    using T = decltype(element);
    const T* pixels = a.image.template const_data_ptr<T>();
    T* result = out.template mutable_data_ptr<T>();
    const int64_t rows = a.planes() * a.height, area = a.height * a.width;
    torch::stable::parallel_for(0, rows, std::max(a.grain(1), a.taps), [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t plane = begin / a.height, first = begin % a.height;
        const int64_t last = std::min(a.height, first + end - begin);
        filter_rows(a, plane, first, last, pixels + plane * area, result + plane * area);
        begin += last - first;
      }
    });
  });
  return out;
}

// Rows [first, last) of a plane of gradients as fp32 rows of whole vectors with zeros behind; in place where they are
// that.
template <class T>
Rows gradient_rows(const Arguments& a, const T* plane, int64_t first, int64_t last, Buffer<float>& buffer) {
  if constexpr (std::is_same_v<T, float>)
    if (a.width % kLanes == 0) return {plane + first * a.width, a.width};
  const int64_t stride = whole_vectors(a.width);
  buffer.assign((last - first) * stride, 0.f);
  for (int64_t y = first; y < last; ++y) load_row(plane + y * a.width, buffer.data() + (y - first) * stride, a.width);
  return {buffer.data(), stride};
}

// What the parameter gradients of one plane follow from.
struct PlaneSums {
  std::vector<double> d_u, d_v;    // [R, k]: G v_r and G^T u_r
  double filtered, centre, total;  // <G, K>, G[p, p], sum g
};

// Moves the sums of a few rows, lanes apart, to doubles: no long sum is kept in fp32.
void flush(Buffer<float>& lanes, double* sums) {
  for (size_t i = 0; i < lanes.size(); i += kLanes) {
    float part[kLanes / 2];
    for (int64_t j = 0; j < kLanes / 2; ++j) part[j] = lanes[i + j] + lanes[i + j + kLanes / 2];
    sums[i / kLanes] +=
        double(part[0] + part[4]) + double(part[1] + part[5]) + double(part[2] + part[6]) + double(part[3] + part[7]);
  }
  std::fill(lanes.begin(), lanes.end(), 0.f);
}

// Rank 1: du, dv, G[p, p] and sum g of every (plane, band of padded rows), without G.
constexpr int64_t rank1_size(int64_t k) { return 2 * k + 2; }

template <class T>
void rank1_band(const Arguments& a, int64_t plane, int64_t band, const T* pixels, const T* grads, double* sums) {
  static thread_local Buffer<float> padded, rows, lanes, zeros;
  const int64_t k = a.taps, width = whole_vectors(a.width);
  const int64_t begin = band * kBandRows, end = std::min(begin + kBandRows, a.height + k - 1);  // padded rows
  const int64_t first = std::max<int64_t>(0, begin - k + 1), last = std::min(end, a.height);    // rows of g they meet
  padded.resize(width + k), zeros.assign(width, 0.f), lanes.assign(rank1_size(k) * kLanes, 0.f);
  const Rows g = gradient_rows(a, grads, first, last, rows);
  const float *u = a.plane_taps(a.taps_y, plane), *v = a.plane_taps(a.taps_x, plane);
  const float* meeting[kMaxTaps];
  for (int64_t y = begin; y < end; ++y) {
    for (int64_t i = 0; i < k; ++i)
      meeting[i] = y - i >= 0 && y - i < a.height ? g.data + (y - i - first) * g.stride : zeros.data();
    VQ_CALL(rank1_row, meeting, a.padded_row(pixels, y - a.radius, 0, width, padded.data()), u, v, k, width,
            lanes.data());
    if ((y - begin) % kFlushRows == kFlushRows - 1) flush(lanes, sums);
  }
  flush(lanes, sums);
}

PlaneSums rank1_sums(const Arguments& a, int64_t plane, const std::vector<double>& sums) {
  const int64_t k = a.taps;
  const auto d_v = sums.begin() + k;
  PlaneSums out{{sums.begin(), d_v}, {d_v, d_v + k}, 0.0, sums[2 * k], sums[2 * k + 1]};
  const float* u = a.plane_taps(a.taps_y, plane);
  for (int64_t i = 0; i < k; ++i) out.filtered += double(u[i]) * out.d_u[i];
  return out;
}

// Any rank: G and sum g of every (plane, band of rows).
constexpr int64_t correlation_size(int64_t k) { return k * k + 1; }

template <class T>
void correlation_band(const Arguments& a, int64_t plane, int64_t band, const T* pixels, const T* grads, double* sums) {
  static thread_local Buffer<float> padded, rows, lanes, scratch;
  const int64_t k = a.taps, first = band * kBandRows, last = std::min(first + kBandRows, a.height);
  const int64_t multiple = int64_t{1} << halvings(k), lags = (k + multiple - 1) / multiple * multiple;
  const int64_t count = last - first, width = whole_vectors(a.width), in_width = whole_vectors(width + k);
  padded.assign((count + lags - 1) * in_width, 0.f);
  for (int64_t y = 0; y < count + k - 1; ++y) {
    float* row = padded.data() + y * in_width;
    const float* found = a.padded_row(pixels, first + y - a.radius, 0, width, row);
    if (found != row) std::copy_n(found, width + k - 1, row);
  }
  lanes.assign(lags * k * kLanes, 0.f);
  scratch.resize(correlate_scratch(count, lags, k, width, in_width));
  const Rows g = gradient_rows(a, grads, first, last, rows);
  correlate(g, count, {padded.data(), in_width}, lags, k, width, in_width, lanes.data(), scratch.data());
  lanes.resize(k * k * kLanes);
  flush(lanes, sums);
  lanes.assign(kLanes, 0.f);
  VQ_CALL(row_sums, g, count, width, lanes.data());
  flush(lanes, sums + k * k);
}

PlaneSums correlation_sums(const Arguments& a, int64_t plane, const std::vector<double>& sums) {
  const int64_t k = a.taps;
  PlaneSums out{std::vector<double>(a.rank * k), std::vector<double>(a.rank * k), 0.0, sums[a.radius * k + a.radius],
                sums[k * k]};
  const float *u = a.plane_taps(a.taps_y, plane), *v = a.plane_taps(a.taps_x, plane);
  for (int64_t r = 0; r < a.rank; ++r)
    for (int64_t i = 0; i < k; ++i)
      for (int64_t j = 0; j < k; ++j) {
        const double g = sums[i * k + j];
        out.filtered += double(u[r * k + i]) * v[r * k + j] * g;
        out.d_u[r * k + i] += v[r * k + j] * g;
        out.d_v[r * k + j] += u[r * k + i] * g;
      }
  return out;
}

// dx = gain ((1 - mix) g + mix F^T g). F^T is the filter with reversed taps over g with zeros around it; its outermost
// rows and columns lie on the padding and are folded back to the pixels that the padding repeats.
template <class T>
void image_gradient(const Arguments& a, const T* grads, T* result) {
  torch::stable::parallel_for(0, a.planes(), a.grain(a.height), [&](int64_t begin, int64_t end) {
    const int64_t k = a.taps, area = a.height * a.width, width = whole_vectors(a.width + k - 1);
    Buffer<float> g(area), adjoint(area), u(a.rank * k), v(a.rank * k), rows(2 * width);
    Buffer<float> padded(width + k - 1), zeros(width + k - 1);
    for (int64_t plane = begin; plane < end; ++plane) {
      load_row(grads + plane * area, g.data(), area);
      std::fill(adjoint.begin(), adjoint.end(), 0.f);
      for (int64_t r = 0; r < a.rank; ++r) {
        std::reverse_copy(a.plane_taps(a.taps_y, plane) + r * k, a.plane_taps(a.taps_y, plane) + (r + 1) * k,
                          &u[r * k]);
        std::reverse_copy(a.plane_taps(a.taps_x, plane) + r * k, a.plane_taps(a.taps_x, plane) + (r + 1) * k,
                          &v[r * k]);
      }
      filter_strip(
          v.data(), a.rank, k, width, -a.radius, a.height + a.radius,
          [&](int64_t y) -> const float* {
            if (y < 0 || y >= a.height) return zeros.data();
            std::copy_n(g.data() + y * a.width, a.width, padded.data() + k - 1);
            return padded.data();
          },
          [&](int64_t y, int64_t count, const float* in) {
            const float* none[2] = {zeros.data(), zeros.data()};
            float* out[2] = {rows.data(), rows.data() + width};
            VQ_CALL(filter_columns, in, u.data(), a.rank, k, width, {1.f, 1.f, 0.f}, count, none, out);
            for (int64_t i = 0; i < count; ++i) {
              const int64_t target = source_index(y + i, a.height, a.padding);
              if (target < 0) continue;
              float* row = adjoint.data() + target * a.width;
              for (int64_t x = -a.radius; x < 0; ++x)
                if (const int64_t to = source_index(x, a.width, a.padding); to >= 0) row[to] += out[i][x + a.radius];
              for (int64_t x = 0; x < a.width; ++x) row[x] += out[i][x + a.radius];
              for (int64_t x = a.width; x < a.width + a.radius; ++x)
                if (const int64_t to = source_index(x, a.width, a.padding); to >= 0) row[to] += out[i][x + a.radius];
            }
          });
      const Tone tone = a.tone(plane);
      for (int64_t i = 0; i < area; ++i) adjoint[i] = tone.gain * (g[i] + tone.mix * (adjoint[i] - g[i]));
      store_row(adjoint.data(), result + plane * area, area);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lowrank_filter2d_bwd(
    const Tensor& grad_, const Tensor& image, const Tensor& taps_y, const Tensor& taps_x, const Tensor& mix,
    const std::optional<Tensor>& gain, const std::optional<Tensor>& bias, int64_t padding, bool image_grad) {
  const Arguments a(image, taps_y, taps_x, mix, gain, bias, padding);
  const Tensor grad = torch::stable::contiguous(grad_);
  STD_TORCH_CHECK(grad.scalar_type() == a.image.scalar_type() && grad.numel() == a.image.numel(),
                  "grad must have the shape and dtype of image");
  const int64_t k = a.taps;
  // Multiply-adds per pixel: 4 k for rank 1 without G; k^2, less what halving the lags saves, with it.
  const bool rank1 = a.rank == 1 && k > 5;
  const int64_t bands = a.bands(rank1 ? a.height + k - 1 : a.height);
  const int64_t size = rank1 ? rank1_size(k) : correlation_size(k);

  Tensor d_image =
      image_grad ? torch::stable::new_empty(a.image, a.image.sizes()) : torch::stable::new_empty(a.image, {0});
  std::vector<double> partial(a.planes() * bands * size);
  for_activation_dtype(a.image, "image", [&](auto element) {
    using T = decltype(element);
    const T *pixels = a.image.template const_data_ptr<T>(), *grads = grad.const_data_ptr<T>();
    torch::stable::parallel_for(0, a.planes() * bands, a.grain(kBandRows), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t plane = task / bands, offset = plane * a.height * a.width;
        (rank1 ? rank1_band<T> : correlation_band<T>)(a, plane, task % bands, pixels + offset, grads + offset,
                                                      partial.data() + task * size);
      }
    });
    if (image_grad) image_gradient(a, grads, d_image.template mutable_data_ptr<T>());
  });

  // Bands and planes are added in order in double, so the result does not depend on the number of threads.
  const Parameter u(a.taps_y, a.rank * k, 2), m(a.mix, 1, 0), gains(a.gain, kOne), biases(a.bias, kZero);
  std::vector<double> d_u(a.taps_y.numel()), d_v(a.taps_x.numel()), d_mix(a.mix.numel()),
      d_gain(a.gain ? a.gain->numel() : 1), d_bias(a.bias ? a.bias->numel() : 1), sums(size);
  for (int64_t plane = 0; plane < a.planes(); ++plane) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t band = 0; band < bands; ++band)
      for (int64_t i = 0; i < size; ++i) sums[i] += partial[(plane * bands + band) * size + i];
    const PlaneSums found = rank1 ? rank1_sums(a, plane, sums) : correlation_sums(a, plane, sums);
    const int64_t sample = plane / a.channels, channel = plane % a.channels;
    const Tone tone = a.tone(plane);
    const double weight = double(tone.gain) * tone.mix;
    for (int64_t i = 0; i < a.rank * k; ++i) {
      d_u[u.offset(sample, 0) + i] += weight * found.d_u[i];
      d_v[u.offset(sample, 0) + i] += weight * found.d_v[i];
    }
    d_mix[m.offset(sample, channel)] += tone.gain * (found.filtered - found.centre);
    d_gain[gains.offset(sample, channel)] += (1.0 - tone.mix) * found.centre + tone.mix * found.filtered;
    d_bias[biases.offset(sample, channel)] += found.total;
  }
  const auto as_tensor = [&](const std::vector<double>& values, const std::optional<Tensor>& like) {
    if (!like) return torch::stable::new_empty(a.taps_y, {0});
    Tensor out = torch::stable::new_empty(*like, like->sizes());
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
