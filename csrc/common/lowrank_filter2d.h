// The arguments of lowrank_filter2d, as every kernel takes them.
#pragma once
#include <torch/csrc/stable/library.h>

#include <optional>
#include <utility>

#include "common/checks.h"

namespace vqfast {

constexpr int kMaxTaps = 31;

enum class Padding : int { kReflect = 0, kReplicate = 1, kZeros = 2 };

// Checked and contiguous.
struct __attribute__((visibility("hidden"))) FilterArguments {  // as Tensor is
  Tensor image, taps_y, taps_x, mix;
  std::optional<Tensor> gain, bias;
  int64_t batch, channels, height, width, rank, taps;
  Padding padding;

  FilterArguments(const Tensor& image_, const Tensor& taps_y_, const Tensor& taps_x_, const Tensor& mix_,
                  const std::optional<Tensor>& gain_, const std::optional<Tensor>& bias_, int64_t padding_)
      : image(torch::stable::contiguous(image_)),
        taps_y(torch::stable::contiguous(taps_y_)),
        taps_x(torch::stable::contiguous(taps_x_)),
        mix(torch::stable::contiguous(mix_)),
        gain(contiguous(gain_)),
        bias(contiguous(bias_)) {
    constexpr int64_t kMaxRank = 8;
    STD_TORCH_CHECK(image.dim() == 4, "image must be [B, C, H, W]");
    batch = image.size(0), channels = image.size(1), height = image.size(2), width = image.size(3);
    STD_TORCH_CHECK(taps_y.dim() == 2 || (taps_y.dim() == 3 && taps_y.size(0) == batch),
                    "taps must be [R, k] or [B, R, k]");
    rank = taps_y.size(-2), taps = taps_y.size(-1);
    STD_TORCH_CHECK(rank >= 1 && rank <= kMaxRank, "the rank must be 1 to ", kMaxRank);
    STD_TORCH_CHECK(taps % 2 == 1 && taps <= kMaxTaps, "the number of taps must be odd and at most ", kMaxTaps);
    STD_TORCH_CHECK(taps_x.dim() == taps_y.dim() && taps_x.size(0) == taps_y.size(0) && taps_x.size(-2) == rank &&
                        taps_x.size(-1) == taps,
                    "taps_x must have the shape of taps_y");
    STD_TORCH_CHECK(mix.dim() == 0 || (mix.dim() == 1 && mix.size(0) == batch), "mix must be a scalar or [B]");
    STD_TORCH_CHECK(padding_ >= 0 && padding_ <= 2, "padding must be 0 (reflect), 1 (replicate) or 2 (zeros)");
    padding = static_cast<Padding>(padding_);
    STD_TORCH_CHECK(padding != Padding::kReflect || (height > taps / 2 && width > taps / 2),
                    "reflect padding needs an image larger than k / 2");
    STD_TORCH_CHECK(padding != Padding::kReplicate || (height > 0 && width > 0), "replicate padding needs pixels");
    for (const auto& [tensor, name] : {std::pair{&gain, "gain"}, {&bias, "bias"}}) {
      if (!*tensor) continue;
      const Tensor& t = **tensor;
      STD_TORCH_CHECK(t.dim() <= 2 && (t.dim() < 1 || t.size(0) == batch) && (t.dim() < 2 || t.size(1) == channels),
                      name, " must be a scalar, [B] or [B, C]");
      check_float32(t, name);
    }
    for (const auto& [tensor, name] : {std::pair{&taps_y, "taps_y"}, {&taps_x, "taps_x"}, {&mix, "mix"}})
      check_float32(*tensor, name);
  }

  int64_t planes() const { return batch * channels; }

 private:
  static std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
    return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
  }
};

}  // namespace vqfast
