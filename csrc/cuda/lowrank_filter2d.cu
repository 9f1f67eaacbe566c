// Low-rank depthwise filter mixed with the image:
//   F = sum_r (u_r v_r^T) * padded x (cross-correlation),  y = gain (x + mix (F - x)) + bias
// A thread marches down a strip of a few columns. Every padded row is filtered along x and added to the k outputs it
// meets, which wait in registers; so nothing but the row itself comes from shared memory, copied a few rows ahead.
#include <algorithm>

#include "cuda/lowrank_filter2d.h"

namespace vqfast {
namespace {

constexpr int kThreads = 128;
constexpr int kStageRows = 4, kStages = 4;      // rows of a strip that are copied at once; such stages in shared memory
constexpr int kMaxLanes = 64, kMaxStrips = 32;  // of a tile
constexpr int kMinRows = 4, kMaxRows = 64;      // of a strip: k - 1 more are filtered along x
constexpr int kBlocksWanted = kMultiprocessors * 3;  // all at once on the GPU

// A block makes one tile: `strips` strips of `rows` rows, one above the other, `lanes` threads across.
struct Tiling {
  int lanes, strips, rows, tiles_x, tiles_y;
};

template <class T, int K>
struct Shape {
  static constexpr int kVector = kVectorBytes / int(sizeof(T));
  static constexpr int kColumns = K <= 9 ? kVector : 4;  // of a thread: k times as many outputs wait in registers
  static constexpr int kRadius = K / 2;
  static constexpr int kReach = round_up(kRadius, kColumns);  // columns beside its own that a thread reads
  static constexpr int kHalo = round_up(kRadius, kVector);
  static constexpr int kTaps = round_up(K, 4);
};

// vector[i]. Two bfloat16 in a word are floats with one instruction each.
template <class T, int N>
__device__ __forceinline__ float as_float(const Vector<T, N>& vector, int i) {
  if constexpr (!std::is_same_v<T, torch::headeronly::BFloat16>) return static_cast<float>(vector[i]);
  uint32_t word;
  std::memcpy(&word, &vector[i - i % 2], sizeof word);
  word = i % 2 ? word & 0xffff0000 : word << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// state[i] += tap_i h for i < k. With SHIFT also state[i] = state[i + 1]: the row below comes next.
template <bool SHIFT, int K, int COLUMNS>
__device__ __forceinline__ void add_row(float (&state)[K + 1][COLUMNS], const float (&window)[COLUMNS + K - 1], int k,
                                        const float* taps_y, const float* taps_x) {
  float h[COLUMNS] = {};
#pragma unroll
  for (int j = 0; j < K; ++j) {
    if (k < K && (j < (K - k) / 2 || j >= (K + k) / 2)) continue;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) h[c] += taps_x[j] * window[c + j];
  }
#pragma unroll
  for (int i = 0; i < K; ++i) {
    if (i >= k) continue;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) state[i][c] = state[i + SHIFT][c] + taps_y[i] * h[c];
  }
}

// K taps, or with EXACT false any number up to K.
template <class T, int K, bool EXACT>
__global__ void __launch_bounds__(kThreads, K <= 15 ? 3 : 2)
    filter_kernel(const T* image, T* result, Filter f, Tiling tiling, bool adjoint, bool vectors) {
  using S = Shape<T, K>;
  constexpr int kColumns = S::kColumns;
  const int k = EXACT ? K : f.taps, radius = k / 2;
  const int strip = int(threadIdx.x) / tiling.lanes, lane = int(threadIdx.x) % tiling.lanes;
  const int tile = int(blockIdx.x) / tiling.tiles_x, plane = tile / tiling.tiles_y;
  const int sample = plane / f.channels, channel = plane % f.channels;
  const int columns = tiling.lanes * kColumns, stride = columns + 2 * S::kHalo;
  const int left = int(blockIdx.x) % tiling.tiles_x * columns, x = left + lane * kColumns;
  const int top = (tile % tiling.tiles_y * tiling.strips + strip) * tiling.rows;
  const int below = f.height - top, rows = strip >= tiling.strips ? 0 : below < tiling.rows ? below : tiling.rows;
  const int steps = rows > 0 ? rows + k - 1 : 0, stages = (tiling.rows + k - 1 + kStageRows - 1) / kStageRows;
  const int64_t offset = int64_t(plane) * f.height * f.width;
  const Plane<T> source{image + offset, f.height, f.width, adjoint ? Padding::kZeros : f.padding, vectors};
  T* to = result + offset + int64_t(top - k + 1) * f.width + x;

  const float mix = *f.mix.at(sample), gain = f.gain.value(sample, channel, 1.f);
  const float bias = adjoint ? 0.f : f.bias.value(sample, channel, 0.f), keep = gain * (1.f - mix);

  // [R, 2, kTaps]: u_r from the last tap on, times gain mix; v_r in the middle.
  float* taps = reinterpret_cast<float*>(shared_memory());
  for (int i = int(threadIdx.x); i < f.rank * S::kTaps; i += kThreads) {
    const int r = i / S::kTaps, j = i % S::kTaps, jx = j - (S::kRadius - radius);
    const float *u = f.taps_y.at(sample) + r * k, *v = f.taps_x.at(sample) + r * k;
    float* tap = taps + 2 * r * S::kTaps + j;
    tap[0] = j < k ? gain * mix * u[adjoint ? j : k - 1 - j] : 0.f;
    tap[S::kTaps] = jx >= 0 && jx < k ? v[adjoint ? k - 1 - jx : jx] : 0.f;
  }

  T* ring = reinterpret_cast<T*>(taps + 2 * f.rank * S::kTaps);  // [kStages, strips, kStageRows, stride]
  const auto slot = [&](int stage) { return ring + (stage % kStages * tiling.strips + strip) * kStageRows * stride; };
  const auto start = [&](int stage) {
    for (int i = 0; i < kStageRows; ++i) {
      const int step = stage * kStageRows + i;
      if (step < steps)
        source.load_row(slot(stage) + i * stride, top + step - radius, left - S::kHalo, stride, lane, tiling.lanes);
    }
    commit_copies();
  };
  const auto pad = [&](int stage) {
    if (stage * kStageRows < steps)
      source.template pad_rows<S::kRadius>(slot(stage), kStageRows, stride, S::kHalo, left, left + columns, radius,
                                           lane, tiling.lanes);
  };

  float state[K + 1][kColumns];  // state[i], i < k: of the output that i more rows are added to; from k on the bias
#pragma unroll
  for (int i = 0; i <= K; ++i)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) state[i][c] = bias;

  for (int stage = 0; stage < kStages - 1; ++stage) start(stage);
  wait_for_copies<kStages - 2>();
  __syncthreads();
  pad(0);
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_copies<kStages - 3>();
    __syncthreads();  // stage is padded, stage + 1 has arrived, nobody reads stage - 1
    start(stage + kStages - 1);
    pad(stage + 1);
    if (x >= f.width) continue;
    const T* row = slot(stage) + S::kHalo - S::kReach + lane * kColumns;
#pragma unroll 1
    for (int step = stage * kStageRows; step < (stage + 1) * kStageRows && step < steps;
         ++step, row += stride, to += f.width) {
      float window[kColumns + K - 1];
#pragma unroll
      for (int v = 0; v <= 2 * S::kReach / kColumns; ++v) {
        const auto values = load<kColumns>(row + v * kColumns);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int at = v * kColumns + c - (S::kReach - S::kRadius);
          if (at >= 0 && at < kColumns + K - 1) window[at] = as_float(values, c);
        }
      }
      add_row<true, K>(state, window, k, taps, taps + S::kTaps);
      for (int r = 1; r < f.rank; ++r)
        add_row<false, K>(state, window, k, taps + 2 * r * S::kTaps, taps + (2 * r + 1) * S::kTaps);
#pragma unroll
      for (int i = 0; i < K; ++i)
        if (i == radius)
#pragma unroll
          for (int c = 0; c < kColumns; ++c) state[i][c] += keep * window[S::kRadius + c];
      if (step < k - 1) continue;
      Vector<T, kColumns> out;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) out[c] = static_cast<T>(state[0][c]);
      if (vectors) {
        store(to, out);
      } else {
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          if (x + c < f.width) to[c] = out[c];
      }
    }
  }
}

// Strips as long as leave enough blocks for the whole GPU.
Tiling tile(const Arguments& a, int columns, int vector) {
  Tiling t;
  t.tiles_x = int(parts(a.width, int64_t(columns) * kMaxLanes));
  t.lanes = round_up(int(parts(a.width, t.tiles_x)), vector) / columns;
  t.strips = int(std::min<int64_t>({parts(a.height, kMinRows), kThreads / t.lanes, kMaxStrips}));
  const int64_t wanted = std::max<int64_t>(kBlocksWanted / (a.planes() * t.tiles_x), 1);
  const int64_t rows = std::clamp<int64_t>(parts(a.height, wanted * t.strips), kMinRows, kMaxRows);
  t.tiles_y = int(parts(a.height, rows * t.strips));
  t.rows = int(parts(a.height, int64_t(t.tiles_y) * t.strips));
  return t;
}

template <class T, int K, bool EXACT = true>
void run(const Arguments& a, const Tensor& in, const Tensor& out, bool adjoint) {
  using S = Shape<T, K>;
  const T* from = in.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  const Tiling t = tile(a, S::kColumns, S::kVector);
  const int64_t stride = t.lanes * S::kColumns + 2 * S::kHalo;
  const int64_t shared = 2 * a.rank * S::kTaps * sizeof(float) + kStages * t.strips * kStageRows * stride * sizeof(T);
  const bool vectors = a.width % S::kVector == 0 && aligned(from) && aligned(to);
  const int64_t blocks = a.planes() * t.tiles_x * t.tiles_y;
  STD_TORCH_CHECK(blocks <= INT_MAX, "image is too large");
  launch(&filter_kernel<T, K, EXACT>, dim3(unsigned(blocks)), kThreads, shared, in, from, to, a.filter(), t, adjoint,
         vectors);
}

Tensor lowrank_filter2d_fwd(const Tensor& image, const Tensor& taps_y, const Tensor& taps_x, const Tensor& mix,
                            const std::optional<Tensor>& gain, const std::optional<Tensor>& bias, int64_t padding) {
  const DeviceGuard guard(image);
  const Arguments a(image, taps_y, taps_x, mix, gain, bias, padding);
  Tensor out = torch::stable::new_empty(a.image, a.image.sizes());
  filter_image(a, a.image, out, false);
  return out;
}

}  // namespace

void filter_image(const Arguments& a, const Tensor& in, const Tensor& out, bool adjoint) {
  if (in.numel() == 0) return;
  for_activation_dtype(in, "image", [&](auto element) {
    using T = decltype(element);
    switch (a.taps) {
      case 3: return run<T, 3>(a, in, out, adjoint);
      case 5: return run<T, 5>(a, in, out, adjoint);
      case 7: return run<T, 7>(a, in, out, adjoint);
      case 9: return run<T, 9>(a, in, out, adjoint);
      case 15: return run<T, 15>(a, in, out, adjoint);
      default: return run<T, kMaxTaps, false>(a, in, out, adjoint);
    }
  });
}

}  // namespace vqfast

STABLE_TORCH_LIBRARY_IMPL(vqfast_cuda, VQ_CUDA_KEY, m) {
  m.impl("lowrank_filter2d_fwd", TORCH_BOX(&vqfast::lowrank_filter2d_fwd));
}
