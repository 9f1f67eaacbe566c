// Bottleneck adapter with feature-wise modulation, and its gradients.
//   h = x D^T,  z = (1 + scale) o h + shift,  a = act(z),  y = x + a U^T
//   da = dy U,  dz = act'(z) o da,  dh = (1 + scale) o dz,  dx = dy + dh D,  dD = dh^T x,  dU = dy^T a,
//   dscale = sum of h o dz, dshift = sum of dz over the rows of a sample
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/checks.h"

namespace vqfast {
namespace {

enum class Activation : int64_t { kGelu, kSilu, kRelu };  // as ACTIVATIONS of contract.py

}  // namespace
}  // namespace vqfast

#define VQ_LOOPS "cpu/film_adapter_loops.h"
#include "common/each_target.h"

namespace vqfast {
namespace {

constexpr int64_t kMaxRank = 128;
constexpr int64_t kBlockRows = 16;
constexpr int64_t kMinTaskSize = 1 << 15;  // values; below it a second thread costs more than it saves

struct __attribute__((visibility("hidden"))) Arguments {  // as Tensor is
  Tensor x, down, up, scale, shift;
  Activation activation;
  int64_t rows = 1, width, rank, samples;

  Arguments(const Tensor& x_, const Tensor& down_, const Tensor& up_, const Tensor& scale_, const Tensor& shift_,
            int64_t activation_)
      : x(torch::stable::contiguous(x_)),
        down(torch::stable::contiguous(down_)),
        up(torch::stable::contiguous(up_)),
        scale(torch::stable::contiguous(scale_)),
        shift(torch::stable::contiguous(shift_)),
        activation(Activation(activation_)) {
    check_float32(down, "down"), check_float32(up, "up"), check_float32(scale, "scale"), check_float32(shift, "shift");
    STD_TORCH_CHECK(x.dim() >= 1 && down.dim() == 2 && down.size(1) == x.size(-1),
                    "x must be [..., K] and down [r, K]");
    rank = down.size(0), width = down.size(1);
    STD_TORCH_CHECK(rank >= 1 && rank <= kMaxRank, "r must be 1 to 128");
    STD_TORCH_CHECK(up.dim() == 2 && up.size(0) == width && up.size(1) == rank, "up must be [K, r]");
    STD_TORCH_CHECK((scale.dim() == 1 || scale.dim() == 2) && scale.size(-1) == rank, "scale must be [r] or [B, r]");
    samples = scale.numel() / rank;
    STD_TORCH_CHECK(shift.dim() == scale.dim() && shift.numel() == scale.numel() && shift.size(-1) == rank,
                    "shift must have the shape of scale");
    STD_TORCH_CHECK(scale.dim() == 1 || (x.dim() == 3 && x.size(0) == samples), "x must be [B, M, K]");
    STD_TORCH_CHECK(activation_ >= 0 && activation_ <= 2, "activation must be 0 to 2");
    for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  }

  // U^T, [r][whole vectors of K]
  Buffer<float> up_rows() const {
    const int64_t stride = whole_vectors(width);
    Buffer<float> result(rank * stride);
    const float* u = up.const_data_ptr<float>();
    for (int64_t k = 0; k < width; ++k)
      for (int64_t r = 0; r < rank; ++r) result[r * stride + k] = u[k * rank + r];
    return result;
  }

  // Calls body(first row, rows, scale, shift) for blocks of rows of one sample, in parallel; scale and shift are laid
  // out as h is, [rows][r].
  template <class Body>
  void for_blocks(Body body) const {
    const int64_t own = rows / std::max<int64_t>(1, samples), blocks = (own + kBlockRows - 1) / kBlockRows;
    const int64_t grain = std::max<int64_t>(1, kMinTaskSize / (kBlockRows * std::max<int64_t>(1, width)));
    torch::stable::parallel_for(0, samples * blocks, grain, [&](int64_t begin, int64_t end) {
      float modulation[2][kBlockRows * kMaxRank + kLanes] = {};
      int64_t laid_out = -1;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / blocks, first = i % blocks * kBlockRows;
        if (sample != laid_out)
          for (int64_t m = 0; m < kBlockRows; ++m) {
            std::copy_n(scale.const_data_ptr<float>() + sample * rank, rank, modulation[0] + m * rank);
            std::copy_n(shift.const_data_ptr<float>() + sample * rank, rank, modulation[1] + m * rank);
          }
        laid_out = sample;
        body(sample * own + first, std::min(kBlockRows, own - first), modulation[0], modulation[1]);
      }
    });
  }
};

std::tuple<Tensor, Tensor> film_adapter_fwd(const Tensor& x, const Tensor& down, const Tensor& up, const Tensor& scale,
                                            const Tensor& shift, int64_t activation) {
  const Arguments a(x, down, up, scale, shift, activation);
  Tensor y = torch::stable::new_empty(a.x, a.x.sizes());
  std::vector<int64_t> shape(a.x.sizes().begin(), a.x.sizes().end());
  shape.back() = a.rank;
  Tensor h = torch::stable::new_empty(a.x, shape, ScalarType::Float);
  float* shrunk = h.mutable_data_ptr<float>();
  for_activation_dtype(a.x, "x", [&](auto element) {
    using T = decltype(element);
    const Rows<T> in(const_cast<T*>(a.x.template const_data_ptr<T>()), a.rows, a.width);
    const Rows<T> out(y.template mutable_data_ptr<T>(), a.rows, a.width);
    const Rows<float> factors(const_cast<float*>(a.down.const_data_ptr<float>()), a.rank, a.width);
    const Buffer<float> u = a.up_rows();
    a.for_blocks([&](int64_t m, int64_t rows, const float* gain, const float* offset) {
      float own[kBlockRows * kMaxRank + kLanes] = {}, active[kBlockRows * kMaxRank + kLanes];
      VQ_CALL(shrink, in.row(m), in.stride, rows, factors.data, factors.stride, a.rank, in.stride, own);
      VQ_CALL(film, a.activation, own, gain, offset, active, whole_vectors(rows * a.rank));
      VQ_CALL(expand, in.row(m), out.row(m), out.stride, rows, active, a.rank, u.data(), out.stride, out.stride);
      std::copy_n(own, rows * a.rank, shrunk + m * a.rank);
    });
    out.write_back();
  });
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> film_adapter_bwd(const Tensor& grad_, const Tensor& x,
                                                                    const Tensor& h_, const Tensor& down,
                                                                    const Tensor& up, const Tensor& scale,
                                                                    const Tensor& shift, int64_t activation,
                                                                    bool x_grad, bool parameter_grads) {
  const Arguments a(x, down, up, scale, shift, activation);
  const Tensor grad = torch::stable::contiguous(grad_), h = torch::stable::contiguous(h_);
  STD_TORCH_CHECK(grad.scalar_type() == a.x.scalar_type() && grad.numel() == a.x.numel(),
                  "grad must have the shape and dtype of x");
  check_float32(h, "h");
  STD_TORCH_CHECK(h.numel() == a.rows * a.rank, "h must be [..., r]");
  Tensor d_x = x_grad ? torch::stable::new_empty(a.x, a.x.sizes()) : torch::stable::new_empty(a.x, {0});
  const auto like = [&](const Tensor& parameter) {
    return parameter_grads ? torch::stable::new_empty(parameter, parameter.sizes())
                           : torch::stable::new_empty(parameter, {0});
  };
  Tensor d_down = like(a.down), d_up = like(a.up), d_scale = like(a.scale), d_shift = like(a.shift);
  const float* shrunk = h.const_data_ptr<float>();
  Buffer<float> dz(a.rows * a.rank), dh(a.rows * a.rank), active(a.rows * a.rank);
  for_activation_dtype(a.x, "x", [&](auto element) {
    using T = decltype(element);
    const Rows<T> in(const_cast<T*>(a.x.template const_data_ptr<T>()), a.rows, a.width);
    const Rows<T> dy(const_cast<T*>(grad.const_data_ptr<T>()), a.rows, a.width);
    const Rows<T> dx(x_grad ? d_x.template mutable_data_ptr<T>() : nullptr, x_grad ? a.rows : 0, a.width);
    const Rows<float> factors(const_cast<float*>(a.down.const_data_ptr<float>()), a.rank, a.width);
    const Buffer<float> u = a.up_rows();
    a.for_blocks([&](int64_t m, int64_t rows, const float* gain, const float* offset) {
      constexpr int64_t kBlock = kBlockRows * kMaxRank + kLanes;
      float da[kBlock] = {}, own_h[kBlock] = {}, own_a[kBlock], own_dz[kBlock], own_dh[kBlock];
      const int64_t n = rows * a.rank, at = m * a.rank;
      std::copy_n(shrunk + at, n, own_h);
      VQ_CALL(shrink, dy.row(m), dy.stride, rows, u.data(), dy.stride, a.rank, dy.stride, da);
      VQ_CALL(film_gradient, a.activation, own_h, gain, offset, da, own_a, own_dz, own_dh, whole_vectors(n));
      if (x_grad)
        VQ_CALL(expand, dy.row(m), dx.row(m), dx.stride, rows, own_dh, a.rank, factors.data, factors.stride, dx.stride);
      std::copy_n(own_a, n, active.data() + at);
      std::copy_n(own_dz, n, dz.data() + at);
      std::copy_n(own_dh, n, dh.data() + at);
    });
    if (x_grad) dx.write_back();
    if (!parameter_grads) return;

    // Every task owns some columns of dD or dU and walks over all rows, so the order of a sum is always the same.
    const Rows<float> dd(d_down.mutable_data_ptr<float>(), a.rank, a.width);
    Buffer<float> du(a.rank * dy.stride);
    constexpr int64_t kColumns = 4 * kLanes;
    const int64_t tasks = (dy.stride + kColumns - 1) / kColumns;
    torch::stable::parallel_for(0, 2 * tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t d = task % tasks * kColumns, count = std::min(kColumns, dy.stride - d);
        if (task < tasks)
          VQ_CALL(outer, in.row(0) + d, in.stride, a.rows, dh.data(), a.rank, dd.data + d, dd.stride, count);
        else
          VQ_CALL(outer, dy.row(0) + d, dy.stride, a.rows, active.data(), a.rank, du.data() + d, dy.stride, count);
      }
    });
    dd.write_back();
    float* out = d_up.mutable_data_ptr<float>();
    for (int64_t k = 0; k < a.width; ++k)
      for (int64_t r = 0; r < a.rank; ++r) out[k * a.rank + r] = du[r * dy.stride + k];
  });
  const int64_t own = a.rows / std::max<int64_t>(1, a.samples);
  for (int64_t s = 0; parameter_grads && s < a.samples; ++s) {
    double d_modulation[2][kMaxRank] = {};
    for (int64_t i = s * own * a.rank; i < (s + 1) * own * a.rank; i += a.rank)
      for (int64_t r = 0; r < a.rank; ++r)
        d_modulation[0][r] += shrunk[i + r] * dz[i + r], d_modulation[1][r] += dz[i + r];
    std::copy_n(d_modulation[0], a.rank, d_scale.mutable_data_ptr<float>() + s * a.rank);
    std::copy_n(d_modulation[1], a.rank, d_shift.mutable_data_ptr<float>() + s * a.rank);
  }
  return {d_x, d_down, d_up, d_scale, d_shift};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vqfast_cpu, CPU, m) {
  m.impl("film_adapter_fwd", TORCH_BOX(&film_adapter_fwd));
  m.impl("film_adapter_bwd", TORCH_BOX(&film_adapter_bwd));
}

}  // namespace vqfast
