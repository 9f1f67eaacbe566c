// Entropy of softmax(W h + bias) for a few rows h, and its gradient in h, in one pass over W; logits are never stored.
//   z = W h + bias,   e = exp(z - m) with a running maximum m,   c = z - a running mean,   E[f] = sum_i e_i f_i / sum_i
//   e_i H = log sum_i e_i - E[z - m],   dH/dh = -(E[c w] - E[c] E[w])
// W is cut into a fixed number of slices that are summed apart and joined in order, whatever the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/rows.h"
#include "common/softmax_sums.h"

namespace vqfast {
namespace {

constexpr int64_t kSlices = 16;          // of W
constexpr int64_t kMinSliceRows = 256;   // a slice of fewer rows costs more to join than it saves
constexpr int64_t kBlock = kLanes;       // rows of W taken at once: one vector of logits
constexpr int64_t kMaxPositions = 8;     // rows h of one pass over W
constexpr int64_t kSumsBytes = 4 << 20;  // of all slices' sums, which limits the positions where D is large

// Sums of one slice for one position: SoftmaxSums, and with them the two sums over rows of W.
//   first [D] = sum_i e_i w_i,  second [D] = sum_i e_i (z_i - centre) w_i
struct Sums {
  SoftmaxSums* softmax;  // [positions]
  float* rows;           // [positions][2][width]: first, second
};

}  // namespace
}  // namespace vqfast

#define VQ_LOOPS "cpu/linear_softmax_entropy_loops.h"
#include "common/each_target.h"

namespace vqfast {
namespace {

// One slice of W: `rows` rows from `w`.
template <class T>
void add_slice(const T* w, const T* bias, int64_t rows, int64_t depth, int64_t positions, const float* h, int64_t width,
               bool gradient, Sums sums) {
  static thread_local Buffer<T> padded;
  static thread_local Buffer<float> copy;
  copy.resize(std::is_same_v<T, float> ? 0 : kBlock * width);
  for (int64_t r = 0; r < rows; r += kBlock) {
    const int64_t count = std::min(kBlock, rows - r);
    float shift[kBlock];
    for (int64_t i = 0; i < kBlock; ++i)
      shift[i] = i >= count ? -std::numeric_limits<float>::infinity() : bias ? float(bias[r + i]) : 0.f;
    const T* block = w + r * depth;
    if (count == kBlock && depth == width) {
      VQ_CALL(add_block, positions, block, depth, h, shift, width, gradient, copy.data(), sums);
      continue;
    }
    padded.assign(kBlock * width, T(0.f));  // rows of whole vectors, zeros below the last row
    for (int64_t i = 0; i < count; ++i) std::copy_n(block + i * depth, depth, padded.data() + i * width);
    VQ_CALL(add_block, positions, padded.data(), width, h, shift, width, gradient, copy.data(), sums);
  }
}

std::tuple<Tensor, Tensor> linear_softmax_entropy_fwd(const Tensor& hidden_, const Tensor& weight_,
                                                      const std::optional<Tensor>& bias_, bool hidden_grad) {
  const Tensor hidden = torch::stable::contiguous(hidden_), weight = torch::stable::contiguous(weight_);
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && weight.size(0) >= 1,
                  "hidden must be [N, D] and weight [V, D] with V >= 1");
  STD_TORCH_CHECK(weight.scalar_type() == hidden.scalar_type(), "weight must have the dtype of hidden");
  std::optional<Tensor> bias;
  if (bias_) {
    bias = torch::stable::contiguous(*bias_);
    STD_TORCH_CHECK(bias->scalar_type() == hidden.scalar_type() && bias->numel() == weight.size(0),
                    "bias must be [V] in the dtype of hidden");
  }
  const int64_t positions = hidden.size(0), depth = hidden.size(1), classes = weight.size(0);
  const int64_t width = whole_vectors(depth), row_sums = hidden_grad ? 2 * width : 0;
  Tensor entropy = torch::stable::new_empty(hidden, {positions}, ScalarType::Float);
  Tensor d_hidden = hidden_grad ? torch::stable::new_empty(hidden, {positions, depth}, ScalarType::Float)
                                : torch::stable::new_empty(hidden, {0}, ScalarType::Float);

  const int64_t slice_rows = std::max(kMinSliceRows, (classes + kSlices * kBlock - 1) / (kSlices * kBlock) * kBlock);
  const int64_t slices = (classes + slice_rows - 1) / slice_rows;
  const int64_t group =
      std::clamp<int64_t>(kSumsBytes / (slices * std::max<int64_t>(1, row_sums) * sizeof(float)), 1, kMaxPositions);
  Buffer<float> h(group * width), rows(slices * group * row_sums);
  std::vector<SoftmaxSums> softmax(slices * group);
  std::vector<double> e_w(hidden_grad ? depth : 0), e_cw(e_w.size());
  for_activation_dtype(hidden, "hidden", [&](auto element) {
    using T = decltype(element);
    const T *w = weight.const_data_ptr<T>(), *b = bias ? bias->const_data_ptr<T>() : nullptr;
    for (int64_t first = 0; first < positions; first += group) {
      const int64_t count = std::min(group, positions - first);
      for (int64_t p = 0; p < count; ++p)
        load_row(hidden.const_data_ptr<T>() + (first + p) * depth, h.data() + p * width, depth);
      std::fill(softmax.begin(), softmax.end(), SoftmaxSums{});
      torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
          const int64_t row = s * slice_rows;
          float* own = rows.data() + s * group * row_sums;
          std::fill_n(own, group * row_sums, 0.f);
          add_slice(w + row * depth, b ? b + row : nullptr, std::min(slice_rows, classes - row), depth, count, h.data(),
                    width, hidden_grad, {softmax.data() + s * group, own});
        }
      });
      for (int64_t p = 0; p < count; ++p) {
        const SoftmaxSums& top = largest(softmax.data() + p, slices, group);
        std::fill(e_w.begin(), e_w.end(), 0.0), std::fill(e_cw.begin(), e_cw.end(), 0.0);
        double total = 0.0, moment = 0.0;
        for (int64_t s = 0; s < slices; ++s) {
          const Rescaled part(softmax[s * group + p], top.max, top.centre);
          total += part.weight, moment += part.moment;
          const float *a = rows.data() + (s * group + p) * row_sums, *c = a + width;
          for (size_t d = 0; d < e_w.size(); ++d) {
            e_w[d] += part.factor * a[d];
            e_cw[d] += part.factor * (c[d] + part.step * a[d]);
          }
        }
        entropy.mutable_data_ptr<float>()[first + p] =
            float(std::log(total) - moment / total + (double(top.max) - top.centre));
        for (size_t d = 0; d < e_w.size(); ++d)
          d_hidden.mutable_data_ptr<float>()[(first + p) * depth + d] =
              float(-(e_cw[d] - moment / total * e_w[d]) / total);
      }
    }
  });
  return {entropy, d_hidden};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vqfast_cpu, CPU, m) {
  m.impl("linear_softmax_entropy_fwd", TORCH_BOX(&linear_softmax_entropy_fwd));
}

}  // namespace vqfast
