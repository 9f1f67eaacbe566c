// Linear layer with a frozen base and a low-rank update, and its gradients. The base products are the vendor's; around
// them, in one launch forward and two backward,
//   t = x A^T,   y += s t B^T;        ds = s dy B,   dx += ds A,   dA = ds^T x,   dB = s dy^T t
// A block has rows of one sample and either columns of y forward, of x backward (t or ds is found anew by every block
// of the same rows), or of dy backward. Its shares of dA and dB go to scratch; the last launch adds them in order.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/lora_linear.h"
#include "cuda/lora_linear_blocks.h"

namespace vqfast {
namespace {

template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, kResident<T, kWhole>)
    forward_kernel(const T* x, const float* lora_a, const float* lora_b, T* y, float* t, Problem p) {
  const int tile = int(blockIdx.x % p.outputs.tiles);
  const Rows rows = find_rows(p, int(blockIdx.x / p.outputs.tiles));
  if (rows.count == 0) return;
  const AdapterA<kWhole> a{lora_a + int64_t(rows.sample) * p.rank * p.inputs.width, p.rank, p.inputs};
  const AdapterB<kWhole> b{lora_b + int64_t(rows.sample) * p.rank * p.outputs.width, p.rank, p.outputs};
  float* weights = reinterpret_cast<float*>(shared_memory());
  shrink<kWhole>(x + rows.first * p.inputs.width, rows.count, a, p, p.scaling, weights,
                 tile == 0 ? t + rows.first * p.rank : nullptr);
  expand<kWhole>(y + rows.first * p.outputs.width, rows.count, b, p, weights, Columns(p.outputs, tile));
}

// partial: [blocks of rows][r][dA, dB], each row whole vectors.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kThreads, kResident<T, kWhole>)
    backward_kernel(const T* grad, const T* x, const float* lora_a, const float* lora_b, const float* t, T* d_x,
                    float* partial, Problem p) {
  const int tiles = p.inputs.tiles + p.outputs.tiles, tile = int(blockIdx.x % tiles), block = int(blockIdx.x / tiles);
  const bool of_inputs = tile < p.inputs.tiles;
  const Rows rows = find_rows(p, block);
  if (rows.count == 0) return;
  const T* own_grad = grad + rows.first * p.outputs.width;
  float* weights = reinterpret_cast<float*>(shared_memory());
  if (of_inputs) {
    const AdapterA<kWhole> a{lora_a + int64_t(rows.sample) * p.rank * p.inputs.width, p.rank, p.inputs};
    const AdapterB<kWhole> b{lora_b + int64_t(rows.sample) * p.rank * p.outputs.width, p.rank, p.outputs};
    shrink<kWhole>(own_grad, rows.count, b, p, p.scaling, weights, nullptr);
    if (d_x) expand<kWhole>(d_x + rows.first * p.inputs.width, rows.count, a, p, weights, Columns(p.inputs, tile));
  } else {
    for_weights(p, [&](int i, int row, int r) {
      weights[i] = row < rows.count && r < p.rank ? t[(rows.first + row) * p.rank + r] : 0.f;
    });
    __syncthreads();
  }
  const Side side = of_inputs ? p.inputs : p.outputs;
  outer<kWhole>(of_inputs ? x + rows.first * p.inputs.width : own_grad, rows.count, side, p, weights,
                partial + block * p.rank * p.padded_width + (of_inputs ? 0 : p.padded_inputs),
                Columns(side, of_inputs ? tile : tile - p.inputs.tiles));
}

// dA and s dB of a sample from the shares of its blocks.
__global__ void __launch_bounds__(kThreads) reduce_kernel(const float* partial, float* d_a, float* d_b, Problem p) {
  const int64_t width = p.padded_width, size = p.rank * width;
  const int sample_blocks = int((size + kThreads - 1) / kThreads);
  const int64_t i = int64_t(blockIdx.x % sample_blocks) * kThreads + threadIdx.x;
  const Run run = find_run(p, int(blockIdx.x / sample_blocks), -1);
  if (i >= size) return;
  const int64_t rank = i / width, at = i % width, column = at - p.padded_inputs;
  const int blocks = int((run.end - run.begin + p.block_rows - 1) >> p.shift);
  float sum = 0.f;
#pragma unroll 8
  for (int block = 0; block < blocks; ++block) sum += partial[(run.block + block) * size + i];
  if (at < p.inputs.width) d_a[(run.sample * p.rank + rank) * p.inputs.width + at] = sum;
  if (column >= 0 && column < p.outputs.width)
    d_b[(int64_t(run.sample) * p.outputs.width + column) * p.rank + rank] = p.scaling * sum;
}

// The arguments, and how they are divided into blocks.
struct Arguments : LoRAArguments {
  Problem problem;
  int64_t row_blocks;
  bool whole;  // every row is vectors of 8, and all are aligned

  Arguments(const Tensor& x_, const Tensor& weight_, const Tensor& lora_a_, const Tensor& lora_b_, double scaling,
            const std::optional<Tensor>& offsets)
      : LoRAArguments(x_, weight_, lora_a_, lora_b_, offsets) {
    const int64_t sample_rows = rows / std::max<int64_t>(1, samples);
    const auto blocks_of = [&](int shift) {
      if (samples == 0) return int64_t(0);
      return row_offsets ? (rows >> shift) + samples : samples * ((sample_rows + (1 << shift) - 1) >> shift);
    };
    // Fewer rows cost more scratch, more tiles another product each: rows first, down to half the blocks that are
    // wanted.
    int shift = kHighestShift;
    while (shift > kLowestShift && (2 * blocks_of(shift) < kBlocks || 2 * sample_rows <= 1 << shift)) --shift;
    row_blocks = blocks_of(shift);
    const int64_t wanted = std::clamp<int64_t>(kBlocks / std::max<int64_t>(1, row_blocks), 1, kMaxTiles);
    const auto side = [&](int64_t width) {
      const int64_t passes = std::max<int64_t>(1, (width + kPassColumns - 1) / kPassColumns);
      const int64_t tile_passes = (passes + wanted - 1) / wanted;
      return Side{int(width), int(tile_passes * kPassColumns), int((passes + tile_passes - 1) / tile_passes)};
    };
    const auto padded = [](int64_t width) { return (width + kColumns - 1) / kColumns * kColumns; };
    whole = inputs % 8 == 0 && outputs % 8 == 0 && aligned(x.const_data_ptr()) && aligned(lora_a.const_data_ptr()) &&
            aligned(lora_b.const_data_ptr());
    problem = {
        .inputs = side(inputs),
        .outputs = side(outputs),
        .rows = rows,
        .offsets = row_offsets ? row_offsets->const_data_ptr<int32_t>() : nullptr,
        .sample_rows = sample_rows,
        .sample_blocks = samples ? int(row_blocks / samples) : 0,
        .samples = int(samples),
        .rank = int(rank),
        .groups = int((rank + kRanks - 1) / kRanks),
        .block_rows = 1 << shift,
        .shift = shift,
        .padded_inputs = padded(inputs),
        .padded_width = padded(inputs) + padded(outputs),
        .scaling = float(scaling),
    };
  }

  // Of the sums of all warps; the weights of a block take no more.
  int64_t shared_bytes() const { return problem.groups * kMostRows * kRanks * int64_t(sizeof(float)); }
};

// t of rows that belong to no sample is left as it is: nothing reads it.
std::tuple<Tensor, Tensor> lora_linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                           const Tensor& lora_a, const Tensor& lora_b, double scaling,
                                           const std::optional<Tensor>& row_offsets) {
  const DeviceGuard guard(x);
  const Arguments a(x, weight, lora_a, lora_b, scaling, row_offsets);
  Tensor y = torch::stable::contiguous(linear(a.x, weight, bias));
  std::vector<int64_t> shape(a.x.sizes().begin(), a.x.sizes().end());
  shape.back() = a.problem.rank;
  Tensor t = torch::stable::new_empty(a.x, shape, ScalarType::Float);
  for_activation_dtype(a.x, "x", [&](auto element) {
    using T = decltype(element);
    launch(a.whole ? forward_kernel<T, true> : forward_kernel<T, false>,
           dim3(unsigned(a.row_blocks * a.problem.outputs.tiles)), kThreads, a.shared_bytes(), a.x,
           a.x.const_data_ptr<T>(), a.lora_a.const_data_ptr<float>(), a.lora_b.const_data_ptr<float>(),
           y.mutable_data_ptr<T>(), t.mutable_data_ptr<float>(), a.problem);
  });
  return {y, t};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_bwd(const Tensor& grad_, const Tensor& x, const Tensor& weight,
                                                   const Tensor& lora_a, const Tensor& lora_b, const Tensor& t_,
                                                   double scaling, const std::optional<Tensor>& row_offsets,
                                                   bool x_grad) {
  const DeviceGuard guard(x);
  Arguments a(x, weight, lora_a, lora_b, scaling, row_offsets);
  Problem& p = a.problem;
  const Tensor grad = torch::stable::contiguous(grad_), t = torch::stable::contiguous(t_);
  STD_TORCH_CHECK(grad.scalar_type() == a.x.scalar_type() && grad.numel() == p.rows * p.outputs.width,
                  "grad must have the shape and dtype of y");
  check_float32(t, "t");
  STD_TORCH_CHECK(t.numel() == p.rows * p.rank, "t must be [..., r]");
  const bool whole = a.whole && aligned(grad.const_data_ptr());
  Tensor d_x =
      x_grad ? torch::stable::contiguous(torch::stable::matmul(grad, weight)) : torch::stable::new_empty(a.x, {0});
  Tensor d_a = torch::stable::new_empty(a.lora_a, a.lora_a.sizes());
  Tensor d_b = torch::stable::new_empty(a.lora_b, a.lora_b.sizes());
  const int64_t share = p.rank * p.padded_width;
  Tensor partial = torch::stable::new_empty(a.lora_a, {a.row_blocks * share});
  for_activation_dtype(a.x, "x", [&](auto element) {
    using T = decltype(element);
    launch(whole ? backward_kernel<T, true> : backward_kernel<T, false>,
           dim3(unsigned(a.row_blocks * (p.inputs.tiles + p.outputs.tiles))), kThreads, a.shared_bytes(), a.x,
           grad.const_data_ptr<T>(), a.x.const_data_ptr<T>(), a.lora_a.const_data_ptr<float>(),
           a.lora_b.const_data_ptr<float>(), t.const_data_ptr<float>(), x_grad ? d_x.mutable_data_ptr<T>() : nullptr,
           partial.mutable_data_ptr<float>(), p);
  });
  launch(reduce_kernel, dim3(unsigned(p.samples * ((share + kThreads - 1) / kThreads))), kThreads, 0, a.x,
         partial.const_data_ptr<float>(), d_a.mutable_data_ptr<float>(), d_b.mutable_data_ptr<float>(), p);
  return {d_x, d_a, d_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vqfast_cuda, VQ_CUDA_KEY, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&lora_linear_bwd));
}

}  // namespace vqfast
