"""Modules that own the tuned parameters: filters and gains in front of the vision encoder, LoRA on its linear layers.

Such a module holds one set of parameters or, with `samples=B`, one set per sample of a batch of B. For training:
predictive regularisation of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast import ops
from vqfast.ops.lora_linear import reference

SIGMA_MIN = 0.3  # pixels; below it Gaussian taps are the identity to within 1 %
MIX_RANGE = (-1.0, 1.0)
START_SIGMA = 2.0  # pixels; the best of 0.7, 1, 1.5 and 2 on validation (docs/defaults.md)


def gaussian_taps(log_sigma: Tensor, taps: int) -> Tensor:
    """Gaussian taps of odd length `taps`, summing to 1: [..., taps] from `log_sigma` [...] (sigma in pixels)."""
    return _gaussian(log_sigma, _gaussian_exponent(taps).to(log_sigma))


def _gaussian_exponent(taps: int) -> Tensor:
    """-t^2 / 2 at the taps' positions t, [taps]."""
    return -0.5 * (torch.arange(taps) - taps // 2).square()


def _gaussian(log_sigma: Tensor, exponent: Tensor) -> Tensor:
    return torch.softmax(exponent * (-2 * log_sigma).exp()[..., None], -1)


def _start_sigma(taps: int, sigma: float | None) -> float:
    return min(START_SIGMA, taps / 3) if sigma is None else sigma


class _MixedFilter(nn.Module):
    """y = gain (x + mix (F - x)) + bias on raw pixels x in [0, 1]; a subclass gives the taps of F."""

    unit_sum = False  # the taps' kernel sums to 1 whatever the parameters

    def __init__(self, samples: int | None) -> None:
        super().__init__()
        shape = () if samples is None else (samples,)
        self.mix = nn.Parameter(torch.zeros(shape))
        self.gain = nn.Parameter(torch.ones(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(shape), requires_grad=False)

    def taps(self) -> tuple[Tensor, Tensor]:
        """taps_y and taps_x, [R, k] or [B, R, k]."""
        raise NotImplementedError

    def set_gaussian_(self, sigma: Tensor) -> None:
        """Set the taps to a Gaussian of `sigma` pixels, [] or [B]."""
        raise NotImplementedError

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring the parameters back into their ranges, as after an optimiser's step."""
        self.mix.clamp_(*MIX_RANGE)

    def forward(self, image: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """Filter `image` [B, C, H, W].

        With `mean` and `std` [C], image and result are normalised pixels, (raw - mean) / std. The filter still acts on
        the raw ones, through a bias per channel (S = sum of K):

            bias'_c = (gain mean_c (1 + mix (S - 1)) + bias - mean_c) / std_c
        """
        taps_y, taps_x = self.taps()
        bias: Tensor = self.bias
        if mean is not None and std is not None:
            kept: Tensor = self.gain
            if not self.unit_sum:
                total = (taps_y.sum(-1) * taps_x.sum(-1)).sum(-1)
                kept = self.gain * (1 + self.mix * (total - 1))
            bias = (torch.addcmul(self.bias[..., None] - mean, kept[..., None], mean) / std).expand(image.shape[0], -1)
        return ops.lowrank_filter2d(image, taps_y, taps_x, self.mix, self.gain, bias)


class GaussianFilter(_MixedFilter):
    """Gaussian blur of learnable width, mixed with the image; rank 1 because a Gaussian is separable.

        u = v = normalised exp(-t^2 / (2 sigma^2)),    y = gain (x + mix (F - x)) + bias

    Starts as the exact identity (mix 0, gain 1, bias 0). gain and bias are frozen unless made to require grad.

    Args:
        taps: odd number of taps k, 3 to 31.
        samples: one set of parameters per sample of a batch; None for one set in all.
        sigma: start width in pixels, default 2 or k / 3; kept as log_sigma, range 0.3 to k / 3. mix: range -1 to 1.

    Source: VQ-TTT, arXiv 2506.15645; ranges and start values are this project's.
    """

    unit_sum = True

    def __init__(self, taps: int = 7, *, samples: int | None = None, sigma: float | None = None) -> None:
        super().__init__(samples)
        self.length = taps
        self.log_sigma = nn.Parameter(torch.full_like(self.mix, math.log(_start_sigma(taps, sigma))))
        self.register_buffer("exponent", _gaussian_exponent(taps), persistent=False)

    def taps(self) -> tuple[Tensor, Tensor]:
        row = _gaussian(self.log_sigma, self.get_buffer("exponent"))[..., None, :]
        return row, row

    @torch.no_grad()
    def set_gaussian_(self, sigma: Tensor) -> None:
        self.log_sigma.copy_(sigma.log())

    @torch.no_grad()
    def clamp_(self) -> None:
        super().clamp_()
        self.log_sigma.clamp_(math.log(SIGMA_MIN), math.log(self.length / 3))


class LowRankFilter(_MixedFilter):
    """Free taps: K = sum_r u_r v_r^T of rank at most R, mixed with the image.

    Starts as the exact identity: u_1 v_1^T is a Gaussian under mix 0. Further terms have u_r = 0 and v_r a cosine of
    r - 1 half waves, so that they add nothing at first and still receive a gradient (as in LoRA).

    Args:
        taps: odd number of taps k, 3 to 31. rank: R, 1 to 8 and at most k.
        samples, sigma: as for GaussianFilter.

    Source: this project, after VQ-TTT, arXiv 2506.15645.
    """

    def __init__(self, taps: int = 7, rank: int = 2, *, samples: int | None = None, sigma: float | None = None) -> None:
        super().__init__(samples)
        lead = () if samples is None else (samples,)
        self.taps_y = nn.Parameter(torch.zeros(*lead, rank, taps))
        self.taps_x = nn.Parameter(torch.zeros(*lead, rank, taps))
        self.set_gaussian_(torch.full(lead, _start_sigma(taps, sigma)))

    def taps(self) -> tuple[Tensor, Tensor]:
        return self.taps_y, self.taps_x

    @torch.no_grad()
    def set_gaussian_(self, sigma: Tensor) -> None:
        rank, length = self.taps_y.shape[-2:]
        order = torch.arange(rank, device=sigma.device)[:, None]
        position = torch.arange(length, device=sigma.device) + 0.5
        self.taps_y.zero_()
        self.taps_x.copy_(torch.cos(math.pi * order * position / length) / length)
        row = gaussian_taps(sigma.log(), length)
        self.taps_y[..., 0, :] = row
        self.taps_x[..., 0, :] = row


class SpectralGain(nn.Module):
    """Low-rank gain on the cosine spectrum of every channel: y = C_H^T ((1 + sum_r a_r b_r^T) o (C_H x C_W^T)) C_W.

    a_r and b_r are kept at a few knots from frequency 0 to the highest, and interpolated linearly to H and W: one set
    of parameters serves every resolution. Starts as the identity to within rounding: a_r = 0, and b_r a cosine of r - 1
    half waves, so that every a_r receives a gradient of its own (b_r receives one once a_r has moved, as in LoRA).

    Args:
        knots: number of knots per axis, at least 2. rank: R, 1 to 8 and at most knots.
        samples: one set of parameters per sample of a batch; None for one set in all.

    Source: this project.
    """

    def __init__(self, knots: int = 8, rank: int = 1, *, samples: int | None = None) -> None:
        super().__init__()
        lead = () if samples is None else (samples,)
        order, position = torch.arange(rank)[:, None], torch.arange(knots) + 0.5
        start = torch.cos(math.pi * order * position / knots)
        self.gain_y = nn.Parameter(torch.zeros(*lead, rank, knots))
        self.gain_x = nn.Parameter(start.expand(*lead, -1, -1).clone())

    def forward(
        self,
        image: Tensor,
        spectrum: Tensor | None = None,
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> Tensor:
        """Filter `image` [B, C, H, W]; `spectrum`: `ops.dct2(image)`, if the image stays constant over many calls.

        With `mean` and `std` [C], image and result are normalised pixels, and the gain acts on the raw ones: their mean
        is constant over the image, so it passes with the gain of frequency 0, 1 + sum_r a_r[0] b_r[0].
        """
        height, width = image.shape[-2:]
        gain_y, gain_x = _interpolated(self.gain_y, height), _interpolated(self.gain_x, width)
        filtered = ops.spectral_gain2d(image, gain_y, gain_x, spectrum=spectrum)
        if mean is None or std is None:
            return filtered
        added = (self.gain_y[..., 0] * self.gain_x[..., 0]).sum(-1)  # [] or [B], to the gain of frequency 0
        return filtered + (added[..., None] * (mean / std))[..., None, None].to(filtered.dtype)


def _interpolated(knots: Tensor, length: int) -> Tensor:
    """[..., R, knots] -> [..., R, length], linear between the knots, the ends kept."""
    rows = knots.reshape(1, -1, knots.shape[-1])
    return F.interpolate(rows, size=length, mode="linear", align_corners=True).reshape(*knots.shape[:-1], length)


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update: y = x W^T + bias + (alpha / rank) (x A^T) B^T.

    A is drawn uniformly within 1 / sqrt(K) (as nn.Linear is) and B starts at zero, so the layer starts as its base.

    Args:
        base: the layer, with in_features K and out_features N; its own parameters are used detached and never changed.
        rank, alpha: r and the numerator of the scaling.
        samples: one adapter per sample, for x [B, M, K]; None for a shared one. All samples start from the same A.
        thirds: of a fused query-key-value layer, those (0, 1, 2) that take an adapter of rank r each; empty: the layer
            takes one. With several, A is [n r, K] and B [n N / 3, r], one adapter after another.
        generator: source of A.

    Source: LoRA, arXiv 2106.09685.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        samples: int | None = None,
        thirds: tuple[int, ...] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        inputs, outputs = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        weight: Tensor = base.weight  # type: ignore[assignment]
        self.base = base
        self.scaling = alpha / rank
        self.thirds = thirds
        bound = inputs**-0.5
        parts = len(thirds) or 1
        start = torch.empty(parts * rank, inputs).uniform_(-bound, bound, generator=generator)
        lead = () if samples is None else (samples,)
        outputs = outputs // 3 * parts if thirds else outputs
        self.lora_a = nn.Parameter(start.expand(*lead, -1, -1).clone().to(weight.device))
        self.lora_b = nn.Parameter(torch.zeros(*lead, outputs, rank, device=weight.device))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole layer, [..., R, K] and [..., N, R]; B of several thirds is block diagonal, R = n r."""
        return self.lora_a, whole_lora_b(self.lora_b, self.thirds)

    def forward(
        self,
        x: Tensor,
        row_offsets: Tensor | None = None,
        base_forward: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """[..., K] -> [..., N] in the dtype of x.

        Args:
            row_offsets: of packed rows x [T, K], as for `ops.lora_linear`.
            base_forward: for a base that is no plain nn.Linear (quantised, wrapped): x W^T + bias. The update is added
                in plain PyTorch.
        """
        lora_a, lora_b = self.matrices()
        if base_forward is not None:
            return base_forward(x) + self.scaling * reference.update(x, lora_a, lora_b, row_offsets)
        weight, bias = self.base.get_parameter("weight").detach(), self.base._parameters.get("bias")
        detached = None if bias is None else bias.detach()
        return ops.lora_linear(x, weight, detached, lora_a, lora_b, self.scaling, row_offsets=row_offsets)


def whole_lora_b(lora_b: Tensor, thirds: tuple[int, ...]) -> Tensor:
    """[..., n N / 3, r] of the thirds of a fused layer -> [..., N, n r]: each in its rows and columns, else zero."""
    if not thirds:
        return lora_b
    rank = lora_b.shape[-1]
    length = lora_b.shape[-2] // len(thirds)
    placed = [
        F.pad(part, (i * rank, (len(thirds) - 1 - i) * rank, third * length, (2 - third) * length))
        for i, (third, part) in enumerate(zip(thirds, lora_b.split(length, -2), strict=True))
    ]
    return torch.stack(placed).sum(0) if len(placed) > 1 else placed[0]


class CodecAdapter(nn.Module):
    """Adapter behind a block of a vision encoder that is told how the image was compressed.

        y = x + U gelu((1 + scale_c) o (D x) + shift_c)        (`ops.film_adapter`)

    c is a row of two tables, one for every known codec and level, and row 0 for "unknown". U, scale and shift start at
    0: y = x.

    Args:
        width, bottleneck: K and r: D [r, K], U [K, r].
        conditions: known pairs of codec and level; the tables are [conditions + 1, r].

    Source: universal adaptor of arXiv 2512.20901; bottleneck and FiLM are this project's form of it.
    """

    def __init__(self, width: int, bottleneck: int, conditions: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.down = nn.Parameter(torch.empty(bottleneck, width).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(width, bottleneck))
        self.scale = nn.Parameter(torch.zeros(conditions + 1, bottleneck))
        self.shift = nn.Parameter(torch.zeros(conditions + 1, bottleneck))

    def forward(self, x: Tensor, condition: Tensor | int = 0) -> Tensor:
        """[..., K] -> [..., K] under one row of the tables, or [B, M, K] with a row per sample, int64 [B]."""
        if isinstance(condition, Tensor):
            condition = condition.to(self.scale.device)
        return ops.film_adapter(x, self.down, self.up, self.scale[condition], self.shift[condition])


class PredictiveHead(nn.Sequential):
    """Two-layer MLP f(h) = W_2 GELU(W_1 h + b_1) + b_2 for `predictive_loss`: [..., d] -> [..., d], d = `width`.

    Trained with the model, dropped at inference.

    Source: predictive regularisation, arXiv 2603.20808; the width d of the hidden layer and GELU are this project's
    reading.
    """

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


def predictive_loss(
    model_output: object, layer: int, visual_positions: Tensor, head: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Predictive regularisation: how far a layer's visual tokens are from predicting the language model's input.

        loss = -(1/N) sum_i cos(f(h^l_i), stopgrad(h^0_i)),    i over the N visual positions

    -1 to 1, float32. Its gradient reaches the layers up to `layer`, and f. Every position is computed, so NaN or
    infinity at any, visual or not, makes the loss NaN.

    Args:
        model_output: of a transformers model called with `output_hidden_states=True`: `hidden_states` holds h^0 to h^L,
            [B, T, d] each.
        layer: l, counted as in `hidden_states`: 1 to L. 0, the language model's input, is the target.
        visual_positions: [B, T] bool, True where a visual token stands: `input_ids == model.config.image_token_id`.
            On any device. That there is one at all is checked where the mask is: on a GPU that waits for it.
        head: f, as `PredictiveHead`; None for the identity.

    Raises:
        ValueError: no hidden states, a layer out of range, a mask of another shape or without any True.
        TypeError: a mask that is not bool.

    Source: arXiv 2603.20808.
    """
    states: tuple[Tensor, ...] | None = getattr(model_output, "hidden_states", None)
    if states is None:
        raise ValueError("model_output has no hidden_states; call the model with output_hidden_states=True")
    if not 1 <= layer < len(states):
        raise ValueError(
            f"layer must be 1 to {len(states) - 1}, counted as in hidden_states, whose 0 is the target; got {layer}"
        )
    hidden = states[layer]
    if visual_positions.dtype != torch.bool:
        raise TypeError(f"visual_positions must be bool; got {visual_positions.dtype}")
    if visual_positions.shape != hidden.shape[:-1]:
        raise ValueError(
            f"visual_positions must be [B, T], the first axes of the hidden states, {list(hidden.shape[:-1])}; "
            f"got {list(visual_positions.shape)}"
        )
    if not visual_positions.any():
        raise ValueError("visual_positions has no True; leave the loss out for a batch without images")
    prediction = hidden if head is None else head(hidden)
    cosine = ops.cosine_alignment(prediction, states[0].to(prediction))
    # All positions, weighted by 0 or 1: indexing would copy the rows of both, and wait for a GPU to count them.
    weight = visual_positions.to(cosine)
    return -(cosine * weight).sum() / weight.sum()
