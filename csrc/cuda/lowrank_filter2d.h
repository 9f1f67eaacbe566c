// What forward and backward of lowrank_filter2d share: arguments, padded rows in shared memory.
#pragma once
#include <climits>
#include <optional>

#include "common/lowrank_filter2d.h"
#include "cuda/device.h"

namespace vqfast {

constexpr int kMultiprocessors = 132;  // that a grid is sized for (H100, H200); it runs on any other number

constexpr int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

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

struct Arguments : FilterArguments {
  template <class... Given>
  explicit Arguments(const Given&... given) : FilterArguments(given...) {
    STD_TORCH_CHECK(planes() <= INT_MAX && height <= INT_MAX / 4 && width <= INT_MAX / 4, "image is too large");
  }

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
