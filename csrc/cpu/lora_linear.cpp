// Linear layer with a frozen base and a low-rank update, and its gradients. The base products are the vendor's; around
// them
//   t = x A^T,   y += s t B^T;        ds = s dy B,   dx += ds A,   dA = ds^T x,   dB = s dy^T t
// in fp32, for one adapter or one per run of rows (a sample).
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/lora_linear.h"

#define VQ_LOOPS "cpu/low_rank_loops.h"
#include "common/each_target.h"

namespace vqfast {
namespace {

constexpr int64_t kMinTaskSize = 1 << 15;  // values; below it a second thread costs more than it saves

// Consecutive rows of one sample.
struct Run {
  int64_t sample, begin, end;
};

struct Arguments : LoRAArguments {
  float scaling;
  std::vector<Run> runs;

  Arguments(const Tensor& x, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scaling_,
            const std::optional<Tensor>& offsets)
      : LoRAArguments(x, weight, lora_a, lora_b, offsets), scaling(float(scaling_)) {
    const int32_t* at = row_offsets ? row_offsets->const_data_ptr<int32_t>() : nullptr;
    for (int64_t s = 0, last = 0; s < samples; ++s) {
      if (at) {  // in x and apart, whatever the offsets say
        const int64_t begin = std::clamp<int64_t>(at[s], last, rows);
        last = std::clamp<int64_t>(at[s + 1], begin, rows);
        runs.push_back({s, begin, last});
      } else {
        runs.push_back({s, s * rows / samples, (s + 1) * rows / samples});
      }
    }
  }

  // B = 0, as every episode starts: then y is the base's, dA is 0 and nothing is added to dx.
  bool zero_b() const {
    const float* b = lora_b.const_data_ptr<float>();
    return std::all_of(b, b + lora_b.numel(), [](float value) { return value == 0; });
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
    const bool plain = a.zero_b();
    a.for_blocks([&](int64_t sample, int64_t m, int64_t rows) {
      VQ_CALL(shrink, in.row(m), in.stride, rows, factors.row(sample * a.rank), factors.stride, a.rank, in.stride,
              shrunk + m * a.rank);
      if (plain) return;
      VQ_CALL(expand, out.row(m), out.row(m), out.stride, rows, shrunk + m * a.rank, a.rank,
              b.data() + sample * a.rank * out.stride, out.stride, out.stride);
    });
    if (!plain) out.write_back();
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
    const bool plain = a.zero_b();
    Buffer<float> ds(plain ? 0 : a.rows * a.rank);
    if (plain) {
      std::fill_n(d_a.mutable_data_ptr<float>(), d_a.numel(), 0.f);
    } else {
      const Buffer<float> b = a.scaled_b();
      a.for_blocks([&](int64_t sample, int64_t m, int64_t rows) {
        float* own = ds.data() + m * a.rank;
        VQ_CALL(shrink, dy.row(m), dy.stride, rows, b.data() + sample * a.rank * dy.stride, dy.stride, a.rank,
                dy.stride, own);
        if (x_grad)
          VQ_CALL(expand, dx.row(m), dx.row(m), dx.stride, rows, own, a.rank, factors.row(sample * a.rank),
                  factors.stride, dx.stride);
      });
      if (x_grad) dx.write_back();
    }

    // Every task owns some columns of dA or dB and walks over all rows, so the order of a sum is always the same.
    const Rows<float> da(d_a.mutable_data_ptr<float>(), a.samples * a.rank, a.inputs);
    Buffer<float> db(a.samples * a.rank * dy.stride);
    const float* shrunk = t.const_data_ptr<float>();
    constexpr int64_t kColumns = 4 * kLanes;
    const int64_t tasks_a = plain ? 0 : (in.stride + kColumns - 1) / kColumns,
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
    if (!plain) da.write_back();
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
