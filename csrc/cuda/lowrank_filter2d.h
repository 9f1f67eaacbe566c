// What forward and backward of lowrank_filter2d share: arguments, padded rows in shared memory.
#pragma once
#include <climits>
#include <optional>
#include <utility>

#include "cuda/device.h"

namespace vqfast {

constexpr int kMaxTaps = 31;
constexpr int kMultiprocessors = 132;  // that a grid is sized for (H100, H200); it runs on any other number

constexpr int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

enum class Padding : int { kReflect = 0, kReplicate = 1, kZeros = 2 };

// Source index of padded position i in [-p, n + p), or -1 for a zero.
__device__ __forceinline__ int source_index(int i, int n, Padding padding) {
  if (i >= 0 && i < n) return i;
  if (padding == Padding::kReflect) return i < 0 ? -i : 2 * (n - 1) - i;
  if (padding == Padding::kReplicate) return i < 0 ? 0 : n - 1;
  return -1;
}

// A parameter that is shared, one per sample, or one per sample and channel: [], [B] or [B, C] of blocks of `inner`
// floats. No data where it was not given.
struct Parameter {
  const float* data = nullptr;
  int64_t sample_stride = 0, channel_stride = 0;

  Parameter(const std::optional<Tensor>& tensor, int64_t inner = 1, int64_t inner_dims = 0) {
    if (!tensor) return;
    data = tensor->const_data_ptr<float>();
    const int64_t lead = tensor->dim() - inner_dims;
    if (lead == 2) channel_stride = inner;
    if (lead >= 1) sample_stride = inner * (lead == 2 ? tensor->size(1) : 1);
  }
  __device__ const float* at(int sample, int channel = 0) const {
    return data + sample * sample_stride + channel * channel_stride;
  }
  __device__ float value(int sample, int channel, float absent) const { return data ? *at(sample, channel) : absent; }
};

// The arguments as kernels take them.
struct Filter {
  Parameter taps_y, taps_x, mix, gain, bias;
  int channels, height, width, rank, taps;
  Padding padding;
};

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// The arguments of forward and backward, checked and contiguous.
struct __attribute__((visibility("hidden"))) Arguments {  // as Tensor is
  Tensor image, taps_y, taps_x, mix;
  std::optional<Tensor> gain, bias;
  int64_t batch, channels, height, width, rank, taps;
  Padding padding;

  Arguments(const Tensor& image_, const Tensor& taps_y_, const Tensor& taps_x_, const Tensor& mix_,
            const std::optional<Tensor>& gain_, const std::optional<Tensor>& bias_, int64_t padding_)
      : image(torch::stable::contiguous(image_)),
        taps_y(torch::stable::contiguous(taps_y_)),
        taps_x(torch::stable::contiguous(taps_x_)),
        mix(torch::stable::contiguous(mix_)),
        gain(contiguous(gain_)),
        bias(contiguous(bias_)) {
    STD_TORCH_CHECK(image.dim() == 4, "image must be [B, C, H, W]");
    batch = image.size(0), channels = image.size(1), height = image.size(2), width = image.size(3);
    STD_TORCH_CHECK(planes() <= INT_MAX && height <= INT_MAX / 4 && width <= INT_MAX / 4, "image is too large");
    STD_TORCH_CHECK(taps_y.dim() == 2 || (taps_y.dim() == 3 && taps_y.size(0) == batch),
                    "taps must be [R, k] or [B, R, k]");
    rank = taps_y.size(-2), taps = taps_y.size(-1);
    STD_TORCH_CHECK(rank >= 1 && rank <= 8, "the rank must be 1 to 8");
    STD_TORCH_CHECK(taps % 2 == 1 && taps <= kMaxTaps, "the number of taps must be odd and at most ", kMaxTaps);
    STD_TORCH_CHECK(taps_x.dim() == taps_y.dim() && taps_x.size(0) == taps_y.size(0) && taps_x.size(-2) == rank &&
                        taps_x.size(-1) == taps,
                    "taps_x must have the shape of taps_y");
    STD_TORCH_CHECK(mix.dim() == 0 || (mix.dim() == 1 && mix.size(0) == batch), "mix must be a scalar or [B]");
    STD_TORCH_CHECK(padding_ >= 0 && padding_ <= 2, "padding must be 0 (reflect), 1 (replicate) or 2 (zeros)");
    padding = static_cast<Padding>(padding_);
    STD_TORCH_CHECK(padding != Padding::kReflect || (height > taps / 2 && width > taps / 2),
                    "reflect padding needs an image larger than k / 2");
    STD_TORCH_CHECK(padding != Padding::kReplicate || (height > 0 && width > 0), "replicate padding needs pixels");
    for (const auto& [tensor, name] : {std::pair{&gain, "gain"}, {&bias, "bias"}}) {
      if (!*tensor) continue;
      const Tensor& t = **tensor;
      STD_TORCH_CHECK(t.dim() <= 2 && (t.dim() < 1 || t.size(0) == batch) && (t.dim() < 2 || t.size(1) == channels),
                      name, " must be a scalar, [B] or [B, C]");
      check_float32(t, name);
    }
    for (const auto& [tensor, name] : {std::pair{&taps_y, "taps_y"}, {&taps_x, "taps_x"}, {&mix, "mix"}})
      check_float32(*tensor, name);
  }

  int64_t planes() const { return batch * channels; }
  Filter filter() const {
    const Parameter u(taps_y, rank * taps, 2), v(taps_x, rank * taps, 2);
    return {u,           v,          Parameter(mix), Parameter(gain), Parameter(bias), int(channels),
            int(height), int(width), int(rank),      int(taps),       padding};
  }
};

// out [B, C, H, W] = the filter on `in`; or its adjoint, exact where no padding folds back: reversed taps, zeros
// outside, no bias. Two contiguous tensors that share no memory.
void filter_image(const Arguments& a, const Tensor& in, const Tensor& out, bool adjoint);

// 16 bytes from global to shared memory, there once wait_for_copies says so.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#ifdef VQ_EMULATED
  emulation::copy_async(shared, global, kVectorBytes);
#else
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#endif
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
#ifdef VQ_EMULATED
  emulation::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the last PENDING groups of this thread have arrived.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
#ifdef VQ_EMULATED
  emulation::wait_for_copies(PENDING);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// One plane in global memory, whose rows `lanes` threads copy to shared memory together.
template <class T>
struct Plane {
  const T* data;
  int height, width;
  Padding padding;
  bool vectors;  // rows start and end on whole vectors

  // Starts copying columns [left, left + columns) of row y in [-p, height + p), those that lie in the image.
  __device__ __forceinline__ void load_row(T* row, int y, int left, int columns, int lane, int lanes) const {
    constexpr int kVector = kVectorBytes / int(sizeof(T));
    const int source = source_index(y, height, padding);
    const int begin = left > 0 ? left : 0, end = left + columns < width ? left + columns : width;
    const T* from = data + int64_t(source) * width;
    row -= left;
    if (source < 0) {
#pragma unroll 1
      for (int x = begin + lane; x < end; x += lanes) row[x] = T(0.f);
    } else if (vectors) {
#pragma unroll 1  // once, in most cases
      for (int x = begin + lane * kVector; x < end; x += lanes * kVector) copy_async(row + x, from + x);
    } else {
      for (int x = begin + lane; x < end; x += lanes) row[x] = from[x];
    }
  }

  // Columns [left - radius, right + radius) of `count` rows that lie on the padding, from those that have arrived.
  // A row starts with column left - halo; radius <= RADIUS.
  template <int RADIUS>
  __device__ __forceinline__ void pad_rows(T* rows, int count, int stride, int halo, int left, int right, int radius,
                                           int lane, int lanes) const {
    if (left - radius >= 0 && right + radius <= width) return;
    rows += halo - left;
#pragma unroll 1
    for (int i = lane; i < count * 2 * RADIUS; i += lanes) {
      const int e = i % (2 * RADIUS), distance = e % RADIUS, x = e < RADIUS ? -1 - distance : width + distance;
      if (distance >= radius || x < left - radius || x >= right + radius) continue;
      T* row = rows + i / (2 * RADIUS) * stride;
      const int source = source_index(x, width, padding);
      row[x] = source < 0 ? T(0.f) : row[source];
    }
  }
};

}  // namespace vqfast
