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

namespace vqfast {
namespace {

constexpr int64_t kChunk = 1024;           // fp32 values of one row held on the stack
constexpr int64_t kMinTaskSize = 1 << 14;  // elements; below it a second thread costs more than it saves

struct Sums {
  float weight = 0.f;  // sum_i exp(z_i - max)
  float moment = 0.f;  // sum_i exp(z_i - max) (z_i - max)
};

VQ_MULTIVERSION float row_max(const float* z, int64_t n, float start) {
  float result = start;
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < n; ++i) result = z[i] > result ? z[i] : result;
  return result;
}

VQ_MULTIVERSION Sums row_sums(const float* z, int64_t n, float max) {
  float weight = 0.f, moment = 0.f;
#pragma omp simd reduction(+ : weight, moment)
  for (int64_t i = 0; i < n; ++i) {
    const float d = z[i] - max, e = exp_nonpositive(d);
    weight += e;
    moment += e == 0.f ? 0.f : e * d;
  }
  return {weight, moment};
}

VQ_MULTIVERSION void row_gradient(const float* z, float* dz, int64_t n, float max, float log_sum, float entropy,
                                  float grad) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float log_p = (z[i] - max) - log_sum, p = exp_nonpositive(log_p);  // never z - lse: it rounds at |lse|
    dz[i] = p == 0.f ? 0.f : -grad * p * (log_p + entropy);
  }
}

// Calls body(values, offset, count) for consecutive fp32 pieces of one row.
template <class T, class Body>
void for_chunks(const T* row, int64_t n, Body body) {
  if constexpr (std::is_same_v<T, float>) {
    body(row, 0, n);
  } else {
    float chunk[kChunk];
    for (int64_t i = 0; i < n; i += kChunk) {
      const int64_t count = std::min(kChunk, n - i);
      load_row(row + i, chunk, count);
      body(chunk, i, count);
    }
  }
}

std::vector<int64_t> leading_shape(const Tensor& logits) {
  const auto sizes = logits.sizes();
  return {sizes.begin(), sizes.end() - 1};
}

void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() >= 1 && logits.size(-1) >= 1, "logits must be [..., V] with V >= 1");
}

std::tuple<Tensor, Tensor, Tensor> softmax_entropy_fwd(const Tensor& logits_) {
  check_logits(logits_);
  const Tensor logits = torch::stable::contiguous(logits_);
  const int64_t classes = logits.size(-1), rows = logits.numel() / classes;
  const auto shape = leading_shape(logits);
  Tensor entropy = torch::stable::new_empty(logits, shape, ScalarType::Float);
  Tensor max_logit = torch::stable::new_empty(logits, shape, ScalarType::Float);
  Tensor log_sum = torch::stable::new_empty(logits, shape, ScalarType::Float);
  float* entropy_out = entropy.mutable_data_ptr<float>();
  float* max_out = max_logit.mutable_data_ptr<float>();
  float* log_sum_out = log_sum.mutable_data_ptr<float>();
  for_activation_dtype(logits, "logits", [&](auto element) {
    using T = decltype(element);
    const T* data = logits.const_data_ptr<T>();
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kMinTaskSize / classes), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* z = data + row * classes;
        float max = -std::numeric_limits<float>::infinity();
        for_chunks(z, classes, [&](const float* v, int64_t, int64_t n) { max = row_max(v, n, max); });
        Sums total;
        for_chunks(z, classes, [&](const float* v, int64_t, int64_t n) {
          const Sums part = row_sums(v, n, max);
          total.weight += part.weight;
          total.moment += part.moment;
        });
        max_out[row] = max;
        log_sum_out[row] = std::log(total.weight);
        entropy_out[row] = log_sum_out[row] - total.moment / total.weight;
      }
    });
  });
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
  const float* g = grad.const_data_ptr<float>();
  const float* h = entropy.const_data_ptr<float>();
  const float* m = max_logit.const_data_ptr<float>();
  const float* l = log_sum.const_data_ptr<float>();
  for_activation_dtype(logits, "logits", [&](auto element) {
    using T = decltype(element);
    const T* data = logits.const_data_ptr<T>();
    T* result = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kMinTaskSize / classes), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* target = result + row * classes;
        for_chunks(data + row * classes, classes, [&](const float* v, int64_t offset, int64_t n) {
          if constexpr (std::is_same_v<T, float>) {
            row_gradient(v, target, n, m[row], l[row], h[row], g[row]);
          } else {
            float dz[kChunk];
            row_gradient(v, dz, n, m[row], l[row], h[row], g[row]);
            store_row(dz, target + offset, n);
          }
        });
      }
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
