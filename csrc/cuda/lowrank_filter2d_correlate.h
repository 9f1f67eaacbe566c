// Correlation of a gradient with the padded image, k x k lags, by one warp over kTile columns:
//   G[i, j] = sum_{y,x} g[y, x] padded[y + i, x + j]
// A row of the image meets the last kShifts rows of the gradient, which the warp keeps in registers.
#pragma once
#include "cuda/lowrank_filter2d.h"

namespace vqfast {

constexpr int kTile = 128;  // columns of a warp

// As of floats in device.h.
__device__ __forceinline__ double warp_sum(double value) {
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step);
  return value;
}

// The part of G that a warp sums, shifts [i, i + kShifts) of all j < K, in fp32: 4 columns of a row to a thread.
template <class T, int K>
struct Correlation {
  static constexpr int kShifts = K <= 7 ? K : K <= 9 ? 5 : K <= 15 ? 4 : 3;  // as many sums as registers hold
  static constexpr int kStages = 2, kMaxWarps = 4;
  static constexpr int kRadius = K / 2, kHalo = round_up(kRadius, 4);
  struct Image {
    float at[4 + K - 1];
  };
  struct Grad {
    float at[4];
  };
  float sums[kShifts][K] = {};
  double total = 0.0;

  static __device__ __forceinline__ Image image(const float* row, int lane) {
    Image x;
#pragma unroll
    for (int v = 0; v <= kHalo / 2; ++v) {
      const auto values = load<4>(row + 4 * (lane + v));
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (const int at = 4 * v + c - (kHalo - kRadius); at >= 0 && at < 4 + K - 1) x.at[at] = values[c];
    }
    return x;
  }
  static __device__ __forceinline__ Grad grad(const float* row, int lane) {
    const auto values = load<4>(row + 4 * lane);
    return {{values[0], values[1], values[2], values[3]}};
  }
  __device__ __forceinline__ void add(int i, const Image& x, const Grad& g) {
#pragma unroll
    for (int j = 0; j < K; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[i][j] += g.at[c] * x.at[c + j];
  }
  __device__ __forceinline__ void add_total(const Grad& g) { total += (g.at[0] + g.at[1]) + (g.at[2] + g.at[3]); }

  // The sums over the warp, [kShifts, K], then that of g.
  __device__ __forceinline__ void store_sums(double* to, float*, int lane) {
#pragma unroll
    for (int i = 0; i < kShifts; ++i)
#pragma unroll
      for (int j = 0; j < K; ++j) {
        const double sum = warp_sum(double(sums[i][j]));
        if (lane == 0) to[i * K + j] = sum;
      }
    const double sum = warp_sum(total);
    if (lane == 0) to[kShifts * K] = sum;
  }
};

// The same in 16 bits, on tensor cores. Of a row, with A[a', n] = x[8 n + a'] and B[n, a] = g[8 n + a] for its 16
// groups n of 8 columns,
//   P_i = A B,  G[i, j] = sum_a P_i[a + j, a]
template <class T, int K>
struct TensorCorrelation {
  static constexpr int kShifts = K <= 9 ? K : 8;
  static constexpr int kStages = 3, kMaxWarps = 6;  // within 99 KB, all that some GPUs have
  static constexpr int kRadius = K / 2, kHalo = round_up(kRadius, 8);
  static constexpr int kBlocks = (K + 7 + 15) / 16;  // of 16 rows a'
  struct Image {
    uint32_t at[kBlocks][4];
  };
  struct Grad {
    uint32_t at[2];
  };
  float sums[kShifts][kBlocks][4] = {}, total[4] = {};

  static __device__ __forceinline__ uint32_t pair(const T* from) {  // two groups, the same place in both
    uint16_t low, high;
    std::memcpy(&low, from, sizeof low), std::memcpy(&high, from + 8, sizeof high);
    return low | uint32_t(high) << 16;
  }
  // The loads of a warp go to 64 adjacent bytes: 16 (lane % 4) + lane / 4 elements from a common start.
  static __device__ __forceinline__ Image image(const T* row, int lane) {
    Image x;
    const T* from = row + kHalo - kRadius + 16 * (lane % 4) + lane / 4;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i) x.at[b][i] = pair(from + 16 * b + 8 * (i % 2) + 64 * (i / 2));
    return x;
  }
  static __device__ __forceinline__ Grad grad(const T* row, int lane) {
    const T* from = row + 16 * (lane % 4) + lane / 4;
    return {{pair(from), pair(from + 64)}};
  }
  __device__ __forceinline__ void add(int i, const Image& x, const Grad& g) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) mma_m16n8k16<T>(sums[i][b], x.at[b], g.at);
  }
  __device__ __forceinline__ void add_total(const Grad& g) {
    constexpr uint32_t kOnes = std::is_same_v<T, torch::headeronly::Half> ? 0x3c003c00 : 0x3f803f80;
    const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
    mma_m16n8k16<T>(total, ones, g.at);
  }

  // The sums over the warp, [kShifts, K], then that of g. `scratch`: [16 kBlocks, 8].
  __device__ __forceinline__ void store_sums(double* to, float* scratch, int lane) {
#pragma unroll
    for (int i = 0; i < kShifts; ++i) {
      __syncwarp();
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int d = 0; d < 4; ++d)
          scratch[(16 * b + lane / 4 + 8 * (d / 2)) * 8 + 2 * (lane % 4) + d % 2] = sums[i][b][d];
      __syncwarp();
      if (lane < K) {
        float sum = 0.f;
#pragma unroll
        for (int a = 0; a < 8; ++a) sum += scratch[(a + lane) * 8 + a];
        to[i * K + lane] = sum;
      }
    }
    const double sum = warp_sum(lane < 4 ? total[0] + total[1] : 0.f);
    if (lane == 0) to[kShifts * K] = sum;
  }
};

template <class T, int K>
using CorrelationOf = std::conditional_t<std::is_same_v<T, float>, Correlation<T, K>, TensorCorrelation<T, K>>;

}  // namespace vqfast
