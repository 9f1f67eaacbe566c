// Cosine of the angle between a prediction p and a target t over the last axis, and its gradient in the prediction.
//   c = <p, t> / (max(|p|, eps) max(|t|, eps));   dp = dc (t / max(|t|, eps) - c p / |p|) / |p|,   0 where |p| < eps
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common/checks.h"

namespace vqfast {
namespace {

constexpr int64_t kBlock = 4096;  // values whose sums are kept in float

struct Products {  // of one row
  double pp = 0.0, tt = 0.0, pt = 0.0;
};

struct Row {  // what the gradient of one row needs
  float grad, cosine, inverse_p, inverse_t;
};

}  // namespace
}  // namespace vqfast

#define VQ_LOOPS "cpu/cosine_alignment_loops.h"
#include "common/each_target.h"

namespace vqfast {
namespace {

constexpr double kEps = 1e-8;
constexpr int64_t kMinTaskSize = 1 << 14;  // values; below it a second thread costs more than it saves

// Checked and contiguous.
struct __attribute__((visibility("hidden"))) Arguments {  // as Tensor is
  Tensor prediction, target;
  int64_t width, rows;

  Arguments(const Tensor& prediction_, const Tensor& target_)
      : prediction(torch::stable::contiguous(prediction_)), target(torch::stable::contiguous(target_)) {
    STD_TORCH_CHECK(prediction.dim() >= 1 && prediction.size(-1) >= 1, "prediction must be [..., D] with D >= 1");
    STD_TORCH_CHECK(target.scalar_type() == prediction.scalar_type(), "target must have the dtype of prediction");
    STD_TORCH_CHECK(std::ranges::equal(target.sizes(), prediction.sizes()), "target must have the shape of prediction");
    width = prediction.size(-1), rows = prediction.numel() / width;
  }

  // Calls body(row) for every row, in parallel.
  template <class Body>
  void for_rows(Body body) const {
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kMinTaskSize / width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) body(row);
    });
  }
};

// For rows whose squares overflow in float.
template <class T>
Products products_in_double(const T* p, const T* t, int64_t n) {
  Products sums;
  for (int64_t i = 0; i < n; ++i) {
    const double x = float(p[i]), y = float(t[i]);
    sums.pp += x * x, sums.tt += y * y, sums.pt += x * y;
  }
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> cosine_alignment_fwd(const Tensor& prediction_, const Tensor& target_) {
  const Arguments given(prediction_, target_);
  const auto sizes = given.prediction.sizes();
  const std::vector<int64_t> shape(sizes.begin(), sizes.end() - 1);
  Tensor cosine = torch::stable::new_empty(given.prediction, shape, ScalarType::Float);
  Tensor inverse_p = torch::stable::new_empty(given.prediction, shape, ScalarType::Float);
  Tensor inverse_t = torch::stable::new_empty(given.prediction, shape, ScalarType::Float);
  float *c = cosine.mutable_data_ptr<float>(), *ip = inverse_p.mutable_data_ptr<float>();
  float* it = inverse_t.mutable_data_ptr<float>();
  for_activation_dtype(given.prediction, "prediction", [&](auto element) {
    using T = decltype(element);
    const T *p = given.prediction.const_data_ptr<T>(), *t = given.target.const_data_ptr<T>();
    given.for_rows([&](int64_t row) {
      const int64_t first = row * given.width;
      Products sums = VQ_CALL(row_products, p + first, t + first, given.width);
      if (!std::isfinite(sums.pp) || !std::isfinite(sums.tt))
        sums = products_in_double(p + first, t + first, given.width);
      const double norm_p = std::sqrt(sums.pp), norm_t = std::max(std::sqrt(sums.tt), kEps);
      c[row] = float(sums.pt / (std::max(norm_p, kEps) * norm_t));
      ip[row] = norm_p < kEps ? 0.f : float(1.0 / norm_p);
      it[row] = float(1.0 / norm_t);
    });
  });
  return {cosine, inverse_p, inverse_t};
}

Tensor cosine_alignment_bwd(const Tensor& grad_, const Tensor& prediction_, const Tensor& target_,
                            const Tensor& cosine_, const Tensor& inverse_p_, const Tensor& inverse_t_) {
  const Arguments given(prediction_, target_);
  const Tensor grad = torch::stable::contiguous(grad_), cosine = torch::stable::contiguous(cosine_);
  const Tensor inverse_p = torch::stable::contiguous(inverse_p_), inverse_t = torch::stable::contiguous(inverse_t_);
  for (const auto& [tensor, name] :
       {std::pair{&grad, "grad"}, {&cosine, "cosine"}, {&inverse_p, "inverse_p"}, {&inverse_t, "inverse_t"}}) {
    check_float32(*tensor, name);
    STD_TORCH_CHECK(tensor->numel() == given.rows, name, " must have one value per row of prediction");
  }
  Tensor out = torch::stable::new_empty(given.prediction, given.prediction.sizes());
  const float *g = grad.const_data_ptr<float>(), *c = cosine.const_data_ptr<float>();
  const float *ip = inverse_p.const_data_ptr<float>(), *it = inverse_t.const_data_ptr<float>();
  for_activation_dtype(given.prediction, "prediction", [&](auto element) {
    using T = decltype(element);
    const T *p = given.prediction.const_data_ptr<T>(), *t = given.target.const_data_ptr<T>();
    T* dp = out.mutable_data_ptr<T>();
    given.for_rows([&](int64_t row) {
      const int64_t first = row * given.width;
      const Row values{g[row], c[row], ip[row], it[row]};
      VQ_CALL(row_gradient, p + first, t + first, dp + first, given.width, values);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vqfast_cpu, CPU, m) {
  m.impl("cosine_alignment_fwd", TORCH_BOX(&cosine_alignment_fwd));
  m.impl("cosine_alignment_bwd", TORCH_BOX(&cosine_alignment_bwd));
}

}  // namespace vqfast
