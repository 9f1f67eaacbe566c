// The arguments of lora_linear, as every kernel takes them, and the vendor's product.
#pragma once
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>

#include "common/checks.h"

namespace vqfast {

// Checked and contiguous, but for the weight, which is the vendor's to read.
struct __attribute__((visibility("hidden"))) LoRAArguments {  // as Tensor is
  Tensor x, weight, lora_a, lora_b;
  std::optional<Tensor> row_offsets;
  int64_t rows = 1, inputs, outputs, rank, samples;

  LoRAArguments(const Tensor& x_, const Tensor& weight_, const Tensor& lora_a_, const Tensor& lora_b_,
                const std::optional<Tensor>& row_offsets_)
      : x(torch::stable::contiguous(x_)),
        weight(weight_),
        lora_a(torch::stable::contiguous(lora_a_)),
        lora_b(torch::stable::contiguous(lora_b_)) {
    constexpr int64_t kMaxRank = 64;
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
    for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
    if (row_offsets_) {
      row_offsets = torch::stable::contiguous(*row_offsets_);
      STD_TORCH_CHECK(row_offsets->scalar_type() == ScalarType::Int && row_offsets->numel() == samples + 1,
                      "row_offsets must be int32 [B + 1]");
    } else {
      STD_TORCH_CHECK(samples == 1 || (x.dim() == 3 && x.size(0) == samples), "x must be [B, M, K]");
    }
  }
};

inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace vqfast
