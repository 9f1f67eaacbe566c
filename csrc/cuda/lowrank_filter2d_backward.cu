// Gradients of lowrank_filter2d. Those of parameters follow from sum g and one correlation of a plane,
//   G[i, j] = sum_{y,x} g[y, x] padded[y + i, x + j]
//   dK = gain mix G,  du_r = dK v_r,  dv_r = dK^T u_r,  dmix = gain (<G, K> - c),  dgain = c + mix (<G, K> - c)
// with c = G[p, p]. The image gradient is the adjoint filter with its borders folded back.
#include <algorithm>
#include <tuple>

#include "cuda/lowrank_filter2d.h"
#include "cuda/lowrank_filter2d_correlate.h"

namespace vqfast {
namespace {

constexpr int kMinRows = 8;  // of a warp: it reads kShifts - 1 rows of g more
constexpr int kWarpsWanted = kMultiprocessors * 16;
constexpr int kFinishThreads = 512;

// What a plane is shared out in: a unit is `rows` padded rows, kTile columns and a group of shifts, for one warp.
struct Units {
  int tiles, groups, strips, rows;
  int blocks, warps;  // of a plane; of a block
  __device__ int count() const { return tiles * groups * strips; }
};

// partial [planes, blocks, k^2 + 1]: G and sum g, of the units of each block.
template <class T, int K>
__global__ void __launch_bounds__(CorrelationOf<T, K>::kMaxWarps* kWarpSize)
    correlate(const T* image, const T* grad, double* partial, Filter f, Units units, bool vectors) {
  using C = CorrelationOf<T, K>;
  constexpr int kShifts = C::kShifts, kImage = kTile + 2 * C::kHalo, kRow = kImage + kTile;  // a row of x, one of g
  constexpr int kRing = C::kStages * kShifts * kRow, kSums = kShifts * K + 1;
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int k = f.taps, radius = k / 2, plane = int(blockIdx.x) / units.blocks;
  const int first_unit = int(blockIdx.x) % units.blocks * units.warps, unit = first_unit + warp;
  T* ring = reinterpret_cast<T*>(shared_memory()) + warp * kRing;
  double* sums = reinterpret_cast<double*>(reinterpret_cast<T*>(shared_memory()) + units.warps * kRing);

  if (unit < units.count()) {
    const int shift = unit % units.groups * kShifts, left = unit / units.groups % units.tiles * kTile;
    const int top = unit / units.groups / units.tiles * units.rows, below = f.height + k - 1 - top;
    const int steps = (below < units.rows ? below : units.rows) + kShifts - 1;
    const int stages = (steps + kShifts - 1) / kShifts;
    const int64_t offset = int64_t(plane) * f.height * f.width;
    const Plane<T> x_plane{image + offset, f.height, f.width, f.padding, vectors};
    const Plane<T> g_plane{grad + offset, f.height, f.width, Padding::kZeros, vectors};

    // At a step, the padded row top + step - (kShifts - 1) of x meets the rows of g from `shift` above it upwards.
    const auto slot = [&](int stage) { return ring + stage % C::kStages * kShifts * kRow; };
    const auto start = [&](int stage) {
      for (int i = 0; i < kShifts; ++i) {
        const int step = stage * kShifts + i, y = top + step - (kShifts - 1);
        if (step >= steps) break;
        T* row = slot(stage) + i * kRow;
        if (step >= kShifts - 1) x_plane.load_row(row, y - radius, left - C::kHalo, kImage, lane, kWarpSize);
        g_plane.load_row(row + kImage, y - shift, left, kTile, lane, kWarpSize);
      }
      commit_copies();
    };

    constexpr int kVector = kVectorBytes / int(sizeof(T));
    const Vector<T> zeros{};  // beside the image, where nothing is copied
    for (int i = lane * kVector; i < kRing; i += kWarpSize * kVector) store(ring + i, zeros);
    __syncwarp();

    C correlation;
    typename C::Grad g[kShifts];
    for (int stage = 0; stage < C::kStages - 1; ++stage) start(stage);
    for (int stage = 0; stage < stages; ++stage) {
      wait_for_copies<C::kStages - 2>();
      __syncwarp();  // stage has arrived, nobody reads stage - 1
      start(stage + C::kStages - 1);
      x_plane.template pad_rows<C::kRadius>(slot(stage), kShifts, kRow, C::kHalo, left, left + kTile, radius, lane,
                                            kWarpSize);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kShifts; ++i) {
        const int step = stage * kShifts + i;
        const T* row = slot(stage) + i * kRow;
        if (step >= steps) continue;
        g[i] = C::grad(row + kImage, lane);
        if (step < kShifts - 1) continue;
        const auto x = C::image(row, lane);
#pragma unroll
        for (int above = 0; above < kShifts; ++above) correlation.add(above, x, g[(i - above + kShifts) % kShifts]);
        correlation.add_total(g[i]);
      }
    }
    correlation.store_sums(sums + warp * kSums, reinterpret_cast<float*>(ring), lane);
  }
  __syncthreads();

  partial += int64_t(blockIdx.x) * (k * k + 1);
  for (int e = int(threadIdx.x); e <= k * k; e += int(blockDim.x)) {
    double sum = 0.0;
    for (int w = 0; w < units.warps && first_unit + w < units.count(); ++w) {
      const int shift = (first_unit + w) % units.groups * kShifts, i = e / k - shift;
      const double* found = sums + w * kSums;
      if (e < k * k && i >= 0 && i < kShifts) sum += found[i * K + e % k + C::kRadius - radius];
      if (e == k * k && shift == 0) sum += found[kShifts * K];
    }
    partial[e] = sum;
  }
}

// The gradients of parameters, and of how many sets of taps or values each consists: every one of them is a sum over
// as many planes.
struct Gradients {
  float *taps_y, *taps_x, *mix, *gain, *bias;
  int taps_count, mix_count, gain_count, bias_count;
};

__device__ __forceinline__ double kernel_at(const Filter& f, int sample, int e) {
  const float *u = f.taps_y.at(sample) + e / f.taps, *v = f.taps_x.at(sample) + e % f.taps;
  double sum = 0.0;
  for (int r = 0; r < f.rank; ++r) sum += double(u[r * f.taps]) * v[r * f.taps];
  return sum;
}

// One set of taps or one value per block. What a row of partial [planes, blocks, k^2 + 1] adds to it is its sum of g,
// or its G K scale + G[p, p] offset, where K is 1 for taps.
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish(const double* partial, int planes, int blocks, Filter f, Gradients d) {
  enum class Of { kTaps, kMix, kGain, kBias } of = Of::kTaps;
  int index = int(blockIdx.x), count = d.taps_count;
  if (index >= count) index -= count, of = Of::kMix, count = d.mix_count;
  if (of == Of::kMix && index >= count) index -= count, of = Of::kGain, count = d.gain_count;
  if (of == Of::kGain && index >= count) index -= count, of = Of::kBias, count = d.bias_count;

  constexpr int kWarps = kFinishThreads / kWarpSize, kBatch = 8;  // loads in flight
  const int warp = int(threadIdx.x) / kWarpSize, lane = int(threadIdx.x) % kWarpSize;
  const int k = f.taps, area = k * k, begin = planes / count * index * blocks, end = begin + planes / count * blocks;
  double* sums = reinterpret_cast<double*>(shared_memory());  // [kWarps, 32]
  double* d_kernel = sums + kFinishThreads;                   // [k, k]
  const bool of_kernel = of == Of::kMix || of == Of::kGain, own_taps = f.taps_y.sample_stride != 0;
  double total = 0.0;
  for (int chunk = of == Of::kBias ? area : 0; chunk < area + (of == Of::kBias); chunk += kWarpSize) {
    const int e = chunk + lane;
    const bool used = of == Of::kBias ? e == area : e < area, centre = of_kernel && e == area / 2;
    const double kernel = of_kernel && used && !own_taps ? kernel_at(f, 0, e) : 1.0;
    double sum = 0.0;
    for (int first = begin + warp; first < end; first += kFinishThreads) {  // 32 rows, kWarps apart
      const int own_row = first + lane * kWarps, plane = (own_row < end ? own_row : first) / blocks;
      const int own_sample = plane / f.channels;
      const double mix = *f.mix.at(own_sample), gain = f.gain.value(own_sample, plane % f.channels, 1.f);
      const double own_scale = of == Of::kTaps ? gain * mix : of == Of::kMix ? gain : of == Of::kGain ? mix : 1.0;
      const double own_offset = of == Of::kMix ? -gain : 1.0 - mix;
      for (int i = 0; i < kWarpSize && first + i * kWarps < end; i += kBatch) {
        double found[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int row = first + (i + b) * kWarps;
          found[b] = row < end && used ? partial[int64_t(row) * (area + 1) + e] : 0.0;
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const double scale = __shfl_sync(kWholeWarp, own_scale, i + b);
          const double offset = __shfl_sync(kWholeWarp, own_offset, i + b);
          const int sample = __shfl_sync(kWholeWarp, own_sample, i + b);
          if (first + (i + b) * kWarps >= end || !used) continue;
          const double of_taps = of_kernel && own_taps ? kernel_at(f, sample, e) : kernel;
          sum += (scale * of_taps + (centre ? offset : 0.0)) * found[b];
        }
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (warp == 0) {
      sum = 0.0;
      for (int w = 0; w < kWarps; ++w) sum += sums[w * kWarpSize + lane];
      if (of == Of::kTaps && used) d_kernel[e] = sum;
      total += sum;
    }
    __syncthreads();
  }

  if (of == Of::kTaps) {
    const int size = f.rank * k;
    for (int i = int(threadIdx.x); i < 2 * size; i += kFinishThreads) {
      const bool vertical = i < size;
      const int at = i % size, r = at / k, tap = at % k;
      const float* other = (vertical ? f.taps_x : f.taps_y).at(index) + r * k;
      double sum = 0.0;
      for (int j = 0; j < k; ++j) sum += other[j] * d_kernel[vertical ? tap * k + j : j * k + tap];
      (vertical ? d.taps_y : d.taps_x)[int64_t(index) * size + at] = static_cast<float>(sum);
    }
  } else if (warp == 0) {
    sums[lane] = total;
    __syncwarp();
    total = 0.0;
    for (int i = 0; i < kWarpSize; ++i) total += sums[i];
    if (lane == 0) (of == Of::kMix ? d.mix : of == Of::kGain ? d.gain : d.bias)[index] = static_cast<float>(total);
  }
}

// Sum of the taps through which place `from` of the output reads place `to` of the image.
__device__ __forceinline__ float tap_between(const float* taps, int k, int from, int to, int n, Padding padding) {
  float sum = 0.f;
  for (int i = 0; i < k; ++i)
    if (source_index(from + i - k / 2, n, padding) == to) sum += taps[i];
  return sum;
}

// The image gradient where the padding folds back: k / 2 + 1 pixels along the border. The others stay as they are.
template <class T>
__global__ void fold_border(const T* grad, T* result, int64_t pixels, Filter f) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, area = int64_t(f.height) * f.width;
  if (index >= pixels) return;
  const int plane = int(index / area), y = int(index % area / f.width), x = int(index % area % f.width);
  const int k = f.taps, radius = k / 2, sample = plane / f.channels, channel = plane % f.channels;
  if (y > radius && y < f.height - 1 - radius && x > radius && x < f.width - 1 - radius) return;
  grad += plane * area;
  float adjoint = 0.f;
  for (int r = 0; r < f.rank; ++r) {
    const float *u = f.taps_y.at(sample) + r * k, *v = f.taps_x.at(sample) + r * k;
    for (int gy = y > radius ? y - radius : 0; gy <= y + radius && gy < f.height; ++gy) {
      float row = 0.f;
      for (int gx = x > radius ? x - radius : 0; gx <= x + radius && gx < f.width; ++gx)
        row += tap_between(v, k, gx, x, f.width, f.padding) * static_cast<float>(grad[int64_t(gy) * f.width + gx]);
      adjoint += tap_between(u, k, gy, y, f.height, f.padding) * row;
    }
  }
  const float mix = *f.mix.at(sample), gain = f.gain.value(sample, channel, 1.f);
  const float g = static_cast<float>(grad[int64_t(y) * f.width + x]);
  result[index] = static_cast<T>(gain * (g + mix * (adjoint - g)));
}

template <class C>
Units share_out(const Arguments& a) {
  Units u;
  const int64_t rows = a.height + a.taps - 1;
  u.tiles = int(parts(a.width, kTile)), u.groups = int(parts(a.taps, C::kShifts));
  const int64_t per_strip = int64_t(u.tiles) * u.groups;
  const int64_t wanted = std::max<int64_t>(kMinRows, parts(a.planes() * per_strip * rows, kWarpsWanted));
  u.strips = int(std::max<int64_t>(1, parts(rows, wanted)));
  u.rows = int(parts(rows, u.strips));
  u.blocks = int(parts(per_strip * u.strips, C::kMaxWarps));
  u.warps = u.blocks ? int(parts(per_strip * u.strips, u.blocks)) : 0;
  return u;
}

// G and sum g of every plane: [planes, blocks, k^2 + 1].
template <class T, int K>
Tensor correlations(const Arguments& a, const Tensor& grad) {
  using C = CorrelationOf<T, K>;
  constexpr int kRing = C::kStages * C::kShifts * (2 * kTile + 2 * C::kHalo), kSums = C::kShifts * K + 1;
  const Units u = share_out<C>(a);
  const int64_t blocks = a.planes() * u.blocks, shared = u.warps * (kRing * sizeof(T) + kSums * sizeof(double));
  STD_TORCH_CHECK(blocks <= INT_MAX, "image is too large");
  Tensor partial = torch::stable::new_empty(a.mix, {a.planes(), u.blocks, a.taps * a.taps + 1}, ScalarType::Double);
  const T *image = a.image.template const_data_ptr<T>(), *g = grad.const_data_ptr<T>();
  const bool vectors = a.width % (kVectorBytes / sizeof(T)) == 0 && aligned(image) && aligned(g);
  launch(&correlate<T, K>, dim3(unsigned(blocks)), u.warps * kWarpSize, shared, grad, image, g,
         partial.mutable_data_ptr<double>(), a.filter(), u, vectors);
  return partial;
}

template <class T>
Tensor correlations(const Arguments& a, const Tensor& grad) {
  if (a.taps <= 5) return correlations<T, 5>(a, grad);
  if (a.taps <= 7) return correlations<T, 7>(a, grad);
  if (a.taps <= 9) return correlations<T, 9>(a, grad);
  if (a.taps <= 15) return correlations<T, 15>(a, grad);
  return correlations<T, kMaxTaps>(a, grad);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lowrank_filter2d_bwd(
    const Tensor& grad_, const Tensor& image, const Tensor& taps_y, const Tensor& taps_x, const Tensor& mix,
    const std::optional<Tensor>& gain, const std::optional<Tensor>& bias, int64_t padding, bool image_grad) {
  const DeviceGuard guard(image);
  const Arguments a(image, taps_y, taps_x, mix, gain, bias, padding);
  const Tensor grad = torch::stable::contiguous(grad_);
  STD_TORCH_CHECK(grad.scalar_type() == a.image.scalar_type() && grad.numel() == a.image.numel(),
                  "grad must have the shape and dtype of image");
  const auto empty_like = [&](const std::optional<Tensor>& like) {
    return like ? torch::stable::new_empty(*like, like->sizes()) : torch::stable::new_empty(a.mix, {0});
  };
  Tensor d_image = image_grad ? empty_like(a.image) : torch::stable::new_empty(a.image, {0});
  Tensor d_u = empty_like(a.taps_y), d_v = empty_like(a.taps_x), d_mix = empty_like(a.mix);
  Tensor d_gain = empty_like(a.gain), d_bias = empty_like(a.bias);
  const Filter f = a.filter();
  for_activation_dtype(a.image, "image", [&](auto element) {
    using T = decltype(element);
    const Tensor partial = correlations<T>(a, grad);
    const Gradients d{d_u.mutable_data_ptr<float>(),
                      d_v.mutable_data_ptr<float>(),
                      d_mix.mutable_data_ptr<float>(),
                      d_gain.mutable_data_ptr<float>(),
                      d_bias.mutable_data_ptr<float>(),
                      int(a.taps_y.numel() / (a.rank * a.taps)),
                      int(a.mix.numel()),
                      int(d_gain.numel()),
                      int(d_bias.numel())};
    const int values = d.taps_count + d.mix_count + d.gain_count + d.bias_count;
    launch(&finish, dim3(unsigned(values)), kFinishThreads, (kFinishThreads + a.taps * a.taps) * sizeof(double), grad,
           partial.const_data_ptr<double>(), int(a.planes()), int(partial.size(1)), f, d);
    if (!image_grad) return;
    filter_image(a, grad, d_image, true);
    constexpr int kThreads = 256;
    if (a.padding != Padding::kZeros)
      launch(&fold_border<T>, dim3(unsigned(parts(grad.numel(), kThreads))), kThreads, 0, grad,
             grad.const_data_ptr<T>(), d_image.mutable_data_ptr<T>(), grad.numel(), f);
  });
  return {d_image, d_u, d_v, d_mix, d_gain, d_bias};
}

}  // namespace
}  // namespace vqfast

STABLE_TORCH_LIBRARY_IMPL(vqfast_cuda, VQ_CUDA_KEY, m) {
  m.impl("lowrank_filter2d_bwd", TORCH_BOX(&vqfast::lowrank_filter2d_bwd));
}
