// Entropy of softmax(z) over the last axis, and its gradient.
//   log p_i = z_i - m - log sum_j exp(z_j - m), m = max z;   H = -sum_i p_i log p_i;   dH/dz_i = -p_i (log p_i + H)
// A class with z = -inf has p = 0 and adds nothing.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/softmax_sums.h"

namespace vqfast {
namespace {

struct Row {  // what the gradient of one row of logits needs
  float max, log_sum, entropy, grad;
};

}  // namespace
}  // namespace vqfast

#define VQ_LOOPS "cpu/softmax_entropy_loops.h"
#include "common/each_target.h"

namespace vqfast {
namespace {

constexpr int64_t kChunk = 4096;           // classes of one task: read twice, the second time from the nearest cache
constexpr int64_t kMinTaskSize = 1 << 14;  // classes; below it a second thread costs more than it saves

std::vector<int64_t> leading_shape(const Tensor& logits) {
  const auto sizes = logits.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.size(-1) >= 1, "logits must be [..., V] with V >= 1");
}

// Calls body(row, chunk, first class, classes) for every chunk of every row, in parallel: one long row keeps every
// thread busy, and where a chunk ends depends on the number of classes alone.
template <class Body>
void for_chunks(int64_t rows, int64_t classes, Body body) {
  const int64_t chunks = (classes + kChunk - 1) / kChunk;
  const int64_t grain = std::max<int64_t>(1, kMinTaskSize / std::min(classes, kChunk));
  torch::stable::parallel_for(0, rows * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % chunks * kChunk;
      body(task / chunks, task, first, std::min(kChunk, classes - first));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> softmax_entropy_fwd(const Tensor& logits_) {
  check_logits(logits_);
  const Tensor logits = torch::stable::contiguous(logits_);
  const int64_t classes = logits.size(-1), rows = logits.numel() / classes, chunks = (classes + kChunk - 1) / kChunk;
  const auto shape = leading_shape(logits);
  Tensor entropy = torch::stable::new_empty(logits, shape, ScalarType::Float);
  Tensor max_logit = torch::stable::new_empty(logits, shape, ScalarType::Float);
  Tensor log_sum = torch::stable::new_empty(logits, shape, ScalarType::Float);
  std::vector<SoftmaxSums> partial(rows * chunks);
  for_activation_dtype(logits, "logits", [&](auto element) {
    const auto* data = logits.const_data_ptr<decltype(element)>();
    for_chunks(rows, classes, [&](int64_t row, int64_t task, int64_t first, int64_t n) {
      partial[task] = VQ_CALL(chunk_sums, data + row * classes + first, n);
    });
  });
  for (int64_t row = 0; row < rows; ++row) {
    const SoftmaxSums* parts = partial.data() + row * chunks;
    const float max = largest(parts, chunks).max;
    double weight = 0.0, moment = 0.0;
    for (int64_t i = 0; i < chunks; ++i) {
      const Rescaled part(parts[i], max, max);
      weight += part.weight, moment += part.moment;
    }
    max_logit.mutable_data_ptr<float>()[row] = max;
    log_sum.mutable_data_ptr<float>()[row] = float(std::log(weight));
    entropy.mutable_data_ptr<float>()[row] = float(std::log(weight) - moment / weight);
  }
  return {entropy, max_logit, log_sum};
}

Tensor softmax_entropy_bwd(const Tensor& grad_, const Tensor& logits_, const Tensor& entropy_, const Tensor& max_logit_,
                           const Tensor& log_sum_) {
  check_logits(logits_);
  const Tensor grad = torch::stable::contiguous(grad_), logits = torch::stable::contiguous(logits_);
  const Tensor entropy = torch::stable::contiguous(entropy_), max_logit = torch::stable::contiguous(max_logit_);
  const Tensor log_sum = torch::stable::contiguous(log_sum_);
  const int64_t classes = logits.size(-1), rows = logits.numel() / classes;
  for (const auto& [tensor, name] :
       {std::pair{&grad, "grad"}, {&entropy, "entropy"}, {&max_logit, "max_logit"}, {&log_sum, "log_sum"}}) {
    check_float32(*tensor, name);
    STD_TORCH_CHECK(tensor->numel() == rows, name, " must have one value per row of logits");
  }
  Tensor out = torch::stable::new_empty(logits, logits.sizes());
  const float *g = grad.const_data_ptr<float>(), *h = entropy.const_data_ptr<float>();
  const float *m = max_logit.const_data_ptr<float>(), *l = log_sum.const_data_ptr<float>();
  for_activation_dtype(logits, "logits", [&](auto element) {
    using T = decltype(element);
    const T* data = logits.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    for_chunks(rows, classes, [&](int64_t row, int64_t, int64_t first, int64_t n) {
      const int64_t offset = row * classes + first;
      VQ_CALL(chunk_gradient, data + offset, result + offset, n, Row{m[row], l[row], h[row], g[row]});
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vqfast_cpu, CPU, m) {
  m.impl("softmax_entropy_fwd", TORCH_BOX(&softmax_entropy_fwd));
  m.impl("softmax_entropy_bwd", TORCH_BOX(&softmax_entropy_bwd));
}

}  // namespace vqfast
