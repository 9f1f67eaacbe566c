// Linear layer with a frozen base and a low-rank update, and its gradients. The base products are the vendor's; around
// them
//   t = x A^T,   y += s t B^T;        ds = s dy B,   dx += ds A,   dA = ds^T x,   dB = s dy^T t
// in fp32, for one adapter or one per run of rows (a sample).
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"

#define VQ_LOOPS "cpu/lora_linear_loops.h"
#include "common/each_target.h"

namespace vqfast {
namespace {

constexpr int64_t kMinTaskSize = 1 << 15;  // values; below it a second thread costs more than it saves
constexpr int64_t kMaxRank = 64;

// A matrix [rows, width] whose rows are whole vectors: the tensor itself, or a copy with zeros behind every row.
template <class T>
class Rows {
 public:
  int64_t stride;
  T* data;

  Rows(T* tensor, int64_t rows, int64_t width)
      : stride(whole_vectors(width)), data(tensor), tensor_(tensor), rows_(rows), width_(width) {
    if (stride == width) return;
    copy_.assign(rows * stride, T(0.f));
    for (int64_t m = 0; m < rows; ++m) std::copy_n(tensor + m * width, width, copy_.data() + m * stride);
    data = copy_.data();
  }
  Rows(const Rows&) = delete;
  void write_back() const {
    if (data != tensor_)
      for (int64_t m = 0; m < rows_; ++m) std::copy_n(data + m * stride, width_, tensor_ + m * width_);
  }
  T* row(int64_t m) const { return data + m * stride; }

 private:
  T* tensor_;
  int64_t rows_, width_;
  Buffer<T> copy_;
};

// Consecutive rows of one sample.
struct Run {
  int64_t sample, begin, end;
};

// The arguments of forward and backward, checked and contiguous.
struct Arguments {
  Tensor x, weight, lora_a, lora_b;
  int64_t rows, inputs, outputs, rank, samples;
  float scaling;
  std::vector<Run> runs;

  Arguments(const Tensor& x_, const Tensor& weight_, const Tensor& lora_a_, const Tensor& lora_b_, double scaling_,
            const std::optional<Tensor>& row_offsets)
      : x(torch::stable::contiguous(x_)),
        weight(weight_),
        lora_a(torch::stable::contiguous(lora_a_)),
        lora_b(torch::stable::contiguous(lora_b_)),
        scaling(float(scaling_)) {
    STD_TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1),
                    "x must be [..., K] and weight [N, K]");
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "weight must have the dtype of x");
    check_float32(lora_a, "lora_a"), check_float32(lora_b, "lora_b");
    outputs = weight.size(0), inputs = weight.size(1);
    STD_TORCH_CHECK(lora_a.dim() == 2 || lora_a.dim() == 3, "lora_a must be [r, K] or [B, r, K]");
    samples = lora_a.dim() == 3 ? lora_a.size(0) : 1, rank = lora_a.size(-2);
    STD_TORCH_CHECK(rank >= 1 && rank <= kMaxRank && lora_a.size(-1) == inputs, "lora_a must be [r, K] or [B, r, K]");
    STD_TORCH_CHECK(
        lora_b.dim() == lora_a.dim() && lora_b.numel() == samples * outputs * rank && lora_b.size(-1) == rank,
        "lora_b must be [N, r] or [B, N, r]");
    rows = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
    if (row_offsets) {
      const Tensor offsets = torch::stable::contiguous(*row_offsets);
      STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Int && offsets.numel() == samples + 1,
                      "row_offsets must be int32 [B + 1]");
      const int32_t* at = offsets.const_data_ptr<int32_t>();
      for (int64_t s = 0, last = 0; s < samples; ++s) {  // in x and apart, whatever the offsets say
        const int64_t begin = std::clamp<int64_t>(at[s], last, rows);
        last = std::clamp<int64_t>(at[s + 1], begin, rows);
        runs.push_back({s, begin, last});
      }
    } else {
      STD_TORCH_CHECK(samples == 1 || (x.dim() == 3 && x.size(0) == samples), "x must be [B, M, K]");
      for (int64_t s = 0; s < samples; ++s) runs.push_back({s, s * rows / samples, (s + 1) * rows / samples});
    }
  }

  // s B^T of every sample, [samples][r][whole vectors of N].
  Buffer<float> scaled_b() const {
    const int64_t stride = whole_vectors(outputs);
    Buffer<float> result(samples * rank * stride);
    const float* b = lora_b.const_data_ptr<float>();
    torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s)
        for (int64_t r = 0; r < rank; ++r)
          for (int64_t n = 0; n < outputs; ++n)
            result[(s * rank + r) * stride + n] = scaling * b[(s * outputs + n) * rank + r];
    });
    return result;
  }

  // Calls body(sample, first row, rows) for blocks of rows, in parallel.
  template <class Body>
  void for_blocks(Body body) const {
    constexpr int64_t kBlockRows = 16;
    std::vector<Run> blocks;
    for (const Run& run : runs)
      for (int64_t m = run.begin; m < run.end; m += kBlockRows)
        blocks.push_back({run.sample, m, std::min(m + kBlockRows, run.end)});
    const int64_t grain = std::max<int64_t>(1, kMinTaskSize / (kBlockRows * std::max<int64_t>(1, inputs)));
    torch::stable::parallel_for(0, int64_t(blocks.size()), grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(blocks[i].sample, blocks[i].begin, blocks[i].end - blocks[i].begin);
    });
  }
};

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor> lora_linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                           const Tensor& lora_a, const Tensor& lora_b, double scaling,
                                           const std::optional<Tensor>& row_offsets) {
  const Arguments a(x, weight, lora_a, lora_b, scaling, row_offsets);
  Tensor y = torch::stable::contiguous(linear(a.x, weight, bias));
  std::vector<int64_t> shape(a.x.sizes().begin(), a.x.sizes().end());
  shape.back() = a.rank;
  Tensor t = torch::stable::new_empty(a.x, shape, ScalarType::Float);
  float* shrunk = t.mutable_data_ptr<float>();
  if (row_offsets) std::fill_n(shrunk, a.rows * a.rank, 0.f);  // rows that belong to no sample
  for_activation_dtype(a.x, "x", [&](auto element) {
    using T = decltype(element);
    const Rows<T> in(const_cast<T*>(a.x.template const_data_ptr<T>()), a.rows, a.inputs);
    const Rows<T> out(y.template mutable_data_ptr<T>(), a.rows, a.outputs);
    const Rows<float> factors(const_cast<float*>(a.lora_a.const_data_ptr<float>()), a.samples * a.rank, a.inputs);
    const Buffer<float> b = a.scaled_b();
    a.for_blocks([&](int64_t sample, int64_t m, int64_t rows) {
      VQ_CALL(shrink, in.row(m), in.stride, rows, factors.row(sample * a.rank), factors.stride, a.rank, in.stride,
              shrunk + m * a.rank);
      VQ_CALL(expand, out.row(m), out.stride, rows, shrunk + m * a.rank, a.rank,
              b.data() + sample * a.rank * out.stride, out.stride, out.stride);
    });
    out.write_back();
  });
  return {y, t};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_bwd(const Tensor& grad_, const Tensor& x, const Tensor& weight,
                                                   const Tensor& lora_a, const Tensor& lora_b, const Tensor& t_,
                                                   double scaling, const std::optional<Tensor>& row_offsets,
                                                   bool x_grad) {
  const Arguments a(x, weight, lora_a, lora_b, scaling, row_offsets);
  const Tensor grad = torch::stable::contiguous(grad_), t = torch::stable::contiguous(t_);
  STD_TORCH_CHECK(grad.scalar_type() == a.x.scalar_type() && grad.numel() == a.rows * a.outputs,
                  "grad must have the shape and dtype of y");
  check_float32(t, "t");
  STD_TORCH_CHECK(t.numel() == a.rows * a.rank, "t must be [..., r]");
  Tensor d_x =
      x_grad ? torch::stable::contiguous(torch::stable::matmul(grad, weight)) : torch::stable::new_empty(a.x, {0});
  Tensor d_a = torch::stable::new_empty(a.lora_a, a.lora_a.sizes());
  Tensor d_b = torch::stable::new_empty(a.lora_b, a.lora_b.sizes());
  for_activation_dtype(a.x, "x", [&](auto element) {
    using T = decltype(element);
    const Rows<T> in(const_cast<T*>(a.x.template const_data_ptr<T>()), a.rows, a.inputs);
    const Rows<T> dy(const_cast<T*>(grad.const_data_ptr<T>()), a.rows, a.outputs);
    const Rows<T> dx(x_grad ? d_x.template mutable_data_ptr<T>() : nullptr, x_grad ? a.rows : 0, a.inputs);
    const Rows<float> factors(const_cast<float*>(a.lora_a.const_data_ptr<float>()), a.samples * a.rank, a.inputs);
    const Buffer<float> b = a.scaled_b();
    Buffer<float> ds(a.rows * a.rank);
    a.for_blocks([&](int64_t sample, int64_t m, int64_t rows) {
      float* own = ds.data() + m * a.rank;
      VQ_CALL(shrink, dy.row(m), dy.stride, rows, b.data() + sample * a.rank * dy.stride, dy.stride, a.rank, dy.stride,
              own);
      if (x_grad)
        VQ_CALL(expand, dx.row(m), dx.stride, rows, own, a.rank, factors.row(sample * a.rank), factors.stride,
                dx.stride);
    });
    if (x_grad) dx.write_back();

    // Every task owns some columns of dA or dB and walks over all rows, so the order of a sum is always the same.
    const Rows<float> da(d_a.mutable_data_ptr<float>(), a.samples * a.rank, a.inputs);
    Buffer<float> db(a.samples * a.rank * dy.stride);
    const float* shrunk = t.const_data_ptr<float>();
    constexpr int64_t kColumns = 4 * kLanes;
    const int64_t tasks_a = (in.stride + kColumns - 1) / kColumns,
                  tasks = tasks_a + (dy.stride + kColumns - 1) / kColumns;
    torch::stable::parallel_for(0, a.samples * tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const Run run = a.runs[task / tasks];
        const int64_t first = run.sample * a.rank, count = run.end - run.begin;
        if (const int64_t d = task % tasks * kColumns; task % tasks < tasks_a)
          VQ_CALL(outer, in.row(run.begin) + d, in.stride, count, ds.data() + run.begin * a.rank, a.rank,
                  da.row(first) + d, da.stride, std::min(kColumns, in.stride - d));
        else
          VQ_CALL(outer, dy.row(run.begin) + d - tasks_a * kColumns, dy.stride, count, shrunk + run.begin * a.rank,
                  a.rank, db.data() + first * dy.stride + d - tasks_a * kColumns, dy.stride,
                  std::min(kColumns, dy.stride - (d - tasks_a * kColumns)));
      }
    });
    da.write_back();
    float* out = d_b.mutable_data_ptr<float>();
    for (int64_t s = 0; s < a.samples; ++s)
      for (int64_t n = 0; n < a.outputs; ++n)
        for (int64_t r = 0; r < a.rank; ++r)
          out[(s * a.outputs + n) * a.rank + r] = a.scaling * db[(s * a.rank + r) * dy.stride + n];
  });
  return {d_x, d_a, d_b};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vqfast_cpu, CPU, m) {
  m.impl("lora_linear_fwd", TORCH_BOX(&lora_linear_fwd));
  m.impl("lora_linear_bwd", TORCH_BOX(&lora_linear_bwd));
}

}  // namespace vqfast
