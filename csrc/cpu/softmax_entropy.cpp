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
#include "common/loops.h"
#include "common/softmax_sums.h"

namespace vqfast {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kChunk = 4096;           // classes of one task: read twice, the second time from the nearest cache
constexpr int64_t kMinTaskSize = 1 << 14;  // classes; below it a second thread costs more than it saves

// Calls body(vector, index) for all of z, then body(vector filled up with -inf, index, count) for a last partial
// vector.
template <class T, class Body, class Tail>
VQ_INLINE void for_vectors(const T* z, int64_t n, Body body, Tail tail) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(load(z + i), i);
  if (i == n) return;
  float rest[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) rest[j] = i + j < n ? float(z[i + j]) : -std::numeric_limits<float>::infinity();
  tail(load(rest), i, n - i);
}

template <class T>
VQ_INLINE SoftmaxSums chunk_sums_of(const T* z, int64_t n) {
  Vec max = broadcast(-std::numeric_limits<float>::infinity());
  const auto greater = [&](Vec v, int64_t, auto...) { max = v > max ? v : max; };
  for_vectors(z, n, greater, greater);
  SoftmaxSums sums;
  sums.max = horizontal_max(max);
  const float shift = sums.centre = sums.shift();
  Vec weight = {}, moment = {};
  const auto add = [&](Vec v, int64_t, auto...) {
    const Vec d = v - shift, e = exp_nonpositive(d);
    weight += e, moment += e * clamp_exponent(d);
  };
  for_vectors(z, n, add, add);
  sums.weight = horizontal_sum(weight), sums.moment = horizontal_sum(moment);
  return sums;
}

struct Row {
  float max, log_sum, entropy, grad;
};

template <class T>
VQ_INLINE void chunk_gradient_of(const T* z, T* dz, int64_t n, Row row) {
  const auto gradient = [&](Vec v) {
    const Vec log_p = (v - row.max) - row.log_sum;  // never z - lse: it rounds at |lse|
    return log_p < kExpMin ? Vec{} : -row.grad * exp_nonpositive(log_p) * (log_p + row.entropy);
  };
  for_vectors(
      z, n, [&](Vec v, int64_t i) { store(dz + i, gradient(v)); },
      [&](Vec v, int64_t i, int64_t count) {
        T out[kLanes];
        store(out, gradient(v));
        std::copy_n(out, count, dz + i);
      });
}

VQ_MULTIVERSION SoftmaxSums chunk_sums(const float* z, int64_t n) { return chunk_sums_of(z, n); }
VQ_MULTIVERSION SoftmaxSums chunk_sums(const Half* z, int64_t n) { return chunk_sums_of(z, n); }
VQ_MULTIVERSION SoftmaxSums chunk_sums(const BFloat16* z, int64_t n) { return chunk_sums_of(z, n); }
VQ_MULTIVERSION void chunk_gradient(const float* z, float* dz, int64_t n, Row row) { chunk_gradient_of(z, dz, n, row); }
VQ_MULTIVERSION void chunk_gradient(const Half* z, Half* dz, int64_t n, Row row) { chunk_gradient_of(z, dz, n, row); }
VQ_MULTIVERSION void chunk_gradient(const BFloat16* z, BFloat16* dz, int64_t n, Row row) {
  chunk_gradient_of(z, dz, n, row);
}

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
      partial[task] = chunk_sums(data + row * classes + first, n);
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
      chunk_gradient(data + offset, result + offset, n, {m[row], l[row], h[row], g[row]});
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
