// What a block of lora_linear's kernels does with its rows: which they are, and the three products around them.
#pragma once
#include "cuda/device.h"

namespace vqfast {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize;
constexpr int kRanks = 8;                            // of a product on the tensor cores, a group
constexpr int kColumns = 4;                          // of a thread
constexpr int kWarpRows = 4;                         // that a warp reads at once, 8 threads a row
constexpr int kThreadRows = 4;                       // whose loads a thread has in flight
constexpr int kPassColumns = kWarps * 8 * kColumns;  // of a block at once
// Rows of a block: from 16, those of a product and of a warp's loads in flight, to 128, a product for every warp.
constexpr int kLowestShift = 4, kHighestShift = 7, kMostRows = 1 << kHighestShift;
constexpr int kMaxTiles = 4;  // of the columns; each costs the product with an adapter once more
constexpr int kBlocks = 512;  // wanted: about four per multiprocessor of an H100 or H200

// Blocks that a multiprocessor holds at once: so many that no register spills.
template <class T, bool kWhole>
constexpr int kResident = kWhole && sizeof(T) == 2 ? 3 : 2;

// Rows of x, dx (inputs) or of y, dy (outputs), and the tiles that blocks divide their columns into.
struct Side {
  int width, tile, tiles;
};

struct Problem {
  Side inputs, outputs;
  int64_t rows;
  const int32_t* offsets;                        // [B + 1], or null:
  int64_t sample_rows;                           // samples have so many rows
  int sample_blocks;                             // and blocks each
  int samples, rank, groups, block_rows, shift;  // block_rows = 2^shift
  int64_t padded_inputs, padded_width;           // columns of dA, and of dA and dB, in scratch: whole vectors
  float scaling;
};

// Rows of a sample, and the first of its blocks.
struct Run {
  int sample, block;
  int64_t begin, end;
};

// The first run of a sample from `sample` on that ends behind `block`. Offsets are cut so that they rise and lie in x.
// Sample s of packed rows has the blocks from begin / block_rows + s on: enough for its rows, and known without a sum
// over the samples before.
__device__ Run find_run(const Problem& p, int sample, int block) {
  if (!p.offsets) {
    const int s = block < 0 ? sample : block / p.sample_blocks;
    return {s, s * p.sample_blocks, s * p.sample_rows, (s + 1) * p.sample_rows};
  }
  const auto cut = [&](int at, int64_t lowest) {
    const int64_t offset = p.offsets[at];
    return offset < lowest ? lowest : offset > p.rows ? p.rows : offset;
  };
  int64_t begin = cut(0, 0), end = cut(1, begin);
  int s = 0;
  while (s + 1 < p.samples && (s < sample || block > (end >> p.shift) + s)) {
    ++s;
    begin = end, end = cut(s + 1, begin);
  }
  return {s, int(begin >> p.shift) + s, begin, end};
}

struct Rows {
  int sample, count;
  int64_t first;
};

// Those of a block; none where it is one too many.
__device__ Rows find_rows(const Problem& p, int block) {
  const Run run = find_run(p, 0, block);
  const int64_t first = run.begin + int64_t(block - run.block) * p.block_rows, left = run.end - first;
  if (block < run.block || left <= 0) return {run.sample, 0, 0};
  return {run.sample, int(left < p.block_rows ? left : p.block_rows), first};
}

// Those of a tile.
struct Columns {
  int begin, end;
  __device__ Columns(const Side& side, int tile) : begin(tile * side.tile), end(begin + side.tile) {
    if (end > side.width) end = side.width;
  }
};

// N values, 0 from the `count`th on. Those of whole rows are aligned, and `count` is a number of vectors.
template <int N, bool kWhole, class T>
__device__ __forceinline__ Vector<T, N> load_up_to(int count, const T* from) {
  constexpr int kPart = !kWhole ? 1 : N * sizeof(T) > kVectorBytes ? kVectorBytes / sizeof(T) : N;
  Vector<T, N> result{};
#pragma unroll
  for (int i = 0; i < N; i += kPart) {
    if (i >= count) continue;
    const auto part = load<kPart>(from + i);
#pragma unroll
    for (int j = 0; j < kPart; ++j) result[i + j] = part[j];
  }
  return result;
}

// lora_a of a sample, [rank][width].
template <bool kWhole>
struct AdapterA {
  const float* data;
  int rank;
  const Side& side;

  // Values of rank r from column `at` on.
  __device__ __forceinline__ Vector<float, 8> row(int r, int at) const {
    return load_up_to<8, kWhole>(r < rank ? side.width - at : 0, data + int64_t(r) * side.width + at);
  }
  // The same of a thread's columns and 8 ranks from r on.
  __device__ __forceinline__ void columns(float (&out)[kRanks][kColumns], int r, int at) const {
    const float* from = data + int64_t(r) * side.width + at;
#pragma unroll
    for (int i = 0; i < kRanks; ++i) {
      const auto values = load_up_to<kColumns, kWhole>(r + i < rank ? side.width - at : 0, from + i * side.width);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[i][c] = values[c];
    }
  }
};

// lora_b of a sample, [width][rank], read the same way.
template <bool kWhole>
struct AdapterB {
  const float* data;
  int rank;
  const Side& side;

  __device__ __forceinline__ Vector<float, 8> row(int r, int at) const {
    const float* from = data + int64_t(at) * rank + r;
    Vector<float, 8> result;
#pragma unroll
    for (int i = 0; i < 8; ++i) result[i] = r < rank && at + i < side.width ? from[i * rank] : 0.f;
    return result;
  }
  __device__ __forceinline__ void columns(float (&out)[kRanks][kColumns], int r, int at) const {
    const float* from = data + int64_t(at) * rank + r;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int count = at + c < side.width ? rank - r : 0;
      const auto values = kWhole && rank % 4 == 0 ? load_up_to<kRanks, true>(count, from + c * rank)
                                                  : load_up_to<kRanks, false>(count, from + c * rank);
#pragma unroll
      for (int i = 0; i < kRanks; ++i) out[i][c] = values[i];
    }
  }
};

// d += x a^T of one warp, [16, 32] x [8, 32]^T. With g = lane / 4 and q = lane % 4, low, high and a are columns 8q to
// 8q + 7 of x's rows g and g + 8 and of a's row g; d as in mma_m16n8k16. As x and a order their columns alike, what a
// thread loads are fragments of two such products. a is rounded to x's dtype.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const Vector<T, 8>& low, const Vector<T, 8>& high,
                                         const Vector<float, 8>& a) {
  if constexpr (std::is_same_v<T, float>) {
    const int lane = threadIdx.x % kWarpSize, x_lane = lane / 4 * 4, a_lane = lane % 4 * 8;
#pragma unroll
    for (int k = 0; k < 32; ++k) {
      const float x_low = __shfl_sync(kWholeWarp, low[k % 8], x_lane + k / 8);
      const float x_high = __shfl_sync(kWholeWarp, high[k % 8], x_lane + k / 8);
      const float a_even = __shfl_sync(kWholeWarp, a[k % 8], a_lane + k / 8);
      const float a_odd = __shfl_sync(kWholeWarp, a[k % 8], a_lane + 4 + k / 8);
      d[0] += x_low * a_even, d[1] += x_low * a_odd;
      d[2] += x_high * a_even, d[3] += x_high * a_odd;
    }
  } else {
    Vector<T, 8> rounded;
#pragma unroll
    for (int i = 0; i < 8; ++i) rounded[i] = static_cast<T>(a[i]);
    const auto pair = [](const Vector<T, 8>& of, int i) {
      uint32_t word;
      memcpy(&word, of.values + 2 * i, sizeof word);
      return word;
    };
#pragma unroll
    for (int i = 0; i < 4; i += 2)
      mma_m16n8k16<T>(d, {pair(low, i), pair(high, i), pair(low, i + 1), pair(high, i + 1)},
                      {pair(rounded, i), pair(rounded, i + 1)});
  }
}

// Weights of a block, its rows of t or ds, lie in shared memory as [rank / 8][row][rank % 8], so that no two of the
// four rows a warp reads share a bank.
__device__ __forceinline__ Vector<float, kRanks> load_weights(const float* weights, const Problem& p, int group,
                                                              int row) {
  return load_up_to<kRanks, true>(kRanks, weights + ((group << p.shift) + row) * kRanks);
}

// Calls body(index, row, rank) for all of them.
template <class Body>
__device__ __forceinline__ void for_weights(const Problem& p, Body body) {
  for (int i = threadIdx.x; i < p.groups * p.block_rows * kRanks; i += kThreads)
    body(i, i / kRanks & (p.block_rows - 1), (i / kRanks >> p.shift) * kRanks + i % kRanks);
}

// weights = scale x a^T for `rows` rows of x; x a^T itself to `t` if there is one. Warps that share 16 rows share out
// their columns.
template <bool kWhole, class T, class Adapter>
__device__ __forceinline__ void shrink(const T* x, int rows, const Adapter& adapter, const Problem& p, float scale,
                                       float* weights, float* t) {
  constexpr int kSteps = sizeof(T) == 2 ? 2 : 1;  // whose loads are in flight
  const Side& side = adapter.side;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, tiles = p.block_rows / 16;
  const int row = warp % tiles * 16 + lane / 4, part = warp / tiles, parts = kWarps / tiles;
  const T* own_x = x + int64_t(row) * side.width;
  for (int group = 0; group < p.groups; ++group) {
    float d[4] = {};
    for (int first = 32 * part; first < side.width; first += 32 * parts * kSteps) {
      Vector<T, 8> low[kSteps], high[kSteps];
      Vector<float, 8> a[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int at = first + 32 * parts * i + lane % 4 * 8;
        low[i] = load_up_to<8, kWhole>(row < rows ? side.width - at : 0, own_x + at);
        high[i] = load_up_to<8, kWhole>(row + 8 < rows ? side.width - at : 0, own_x + 8 * side.width + at);
        a[i] = adapter.row(group * kRanks + lane / 4, at);
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) multiply(d, low[i], high[i], a[i]);
    }
    float* own = weights + (((part * p.groups + group) << p.shift) + row) * kRanks + lane % 4 * 2;
    own[0] = d[0], own[1] = d[1];
    own[8 * kRanks] = d[2], own[8 * kRanks + 1] = d[3];
  }
  __syncthreads();
  const int stride = p.groups * p.block_rows * kRanks;
  for_weights(p, [&](int i, int row, int r) {
    float sum = weights[i];
    for (int other = 1; other < parts; ++other) sum += weights[other * stride + i];
    const bool inside = row < rows && r < p.rank;
    if (t && inside) t[row * p.rank + r] = sum;
    weights[i] = inside ? scale * sum : 0.f;  // 0 times inf is no 0
  });
  __syncthreads();
}

// y += weights a for `rows` rows. A group of ranks that is alone stays in registers.
template <bool kWhole, class T, class Adapter>
__device__ __forceinline__ void expand(T* y, int rows, const Adapter& adapter, const Problem& p, const float* weights,
                                       Columns columns) {
  const Side& side = adapter.side;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int at = columns.begin + (warp * 8 + lane % 8) * kColumns; at < columns.end; at += kPassColumns) {
    float factors[kRanks][kColumns];
    for (int first = lane / 8; first < rows; first += kWarpRows * kThreadRows) {
      T* own = y + int64_t(first) * side.width + at;
      Vector<T, kColumns> values[kThreadRows];
      float sums[kThreadRows][kColumns];
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i)
        values[i] = load_up_to<kColumns, kWhole>(first + kWarpRows * i < rows ? side.width - at : 0,
                                                 own + kWarpRows * i * side.width);
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[i][c] = static_cast<float>(values[i][c]);
      for (int group = 0; group < p.groups; ++group) {
        if (first < kWarpRows || p.groups > 1) adapter.columns(factors, group * kRanks, at);
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
          const auto weight = load_weights(weights, p, group, first + kWarpRows * i);
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
#pragma unroll
            for (int c = 0; c < kColumns; ++c) sums[i][c] += weight[r] * factors[r][c];
        }
      }
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
        if (first + kWarpRows * i >= rows) continue;
        T* to = own + kWarpRows * i * side.width;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) values[i][c] = static_cast<T>(sums[i][c]);
        if constexpr (kWhole)
          store(to, values[i]);
        else
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
            if (at + c < side.width) to[c] = values[i][c];
      }
    }
  }
}

// out[r][column] = sum of weights[row][r] x[row][column] over `rows` rows, each row of `out` whole vectors.
template <bool kWhole, class T>
__device__ __forceinline__ void outer(const T* x, int rows, const Side& side, const Problem& p, const float* weights,
                                      float* out, Columns columns) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  for (int first = columns.begin + warp * 8 * kColumns; first < columns.end; first += kPassColumns) {
    const int at = first + lane % 8 * kColumns;
    for (int group = 0; group < p.groups; ++group) {
      float sums[kRanks][kColumns] = {};
      for (int top = lane / 8; top < rows; top += kWarpRows * kThreadRows) {
        const T* own = x + int64_t(top) * side.width + at;
        Vector<T, kColumns> values[kThreadRows];
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i)
          values[i] = load_up_to<kColumns, kWhole>(top + kWarpRows * i < rows ? side.width - at : 0,
                                                   own + kWarpRows * i * side.width);
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
          const auto weight = load_weights(weights, p, group, top + kWarpRows * i);
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
#pragma unroll
            for (int c = 0; c < kColumns; ++c) sums[r][c] += weight[r] * static_cast<float>(values[i][c]);
        }
      }
      // The four threads of a column add up: each keeps half of the ranks, then a quarter.
      const bool upper = lane & 16, odd = lane & 8;
      Vector<float, kColumns> half[kRanks / 2], quarter[kRanks / 4];
#pragma unroll
      for (int r = 0; r < kRanks / 2; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float low = sums[r][c], high = sums[r + kRanks / 2][c];
          half[r][c] = (upper ? high : low) + __shfl_xor_sync(kWholeWarp, upper ? low : high, 16);
        }
#pragma unroll
      for (int r = 0; r < kRanks / 4; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const float low = half[r][c], high = half[r + kRanks / 4][c];
          quarter[r][c] = (odd ? high : low) + __shfl_xor_sync(kWholeWarp, odd ? low : high, 8);
        }
        const int rank = group * kRanks + lane / 8 * (kRanks / 4) + r;
        if (rank < p.rank && at < columns.end) store(out + rank * p.padded_width + at, quarter[r]);
      }
    }
  }
}

}  // namespace
}  // namespace vqfast
