"""Filter presets to start a step from, and the images they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vqfast import ops
from vqfast.nn import MIX_RANGE, SIGMA_MIN, START_SIGMA, gaussian_taps
from vqfast.tuning.objective import over_positions

RANGE_TAIL = 0.02  # share of the pixel values that a stretch sends below 0, and above 1
FLAT_RANGE = 2 / 255  # an image with less has nothing to stretch but rounding errors
QUANTILE_SAMPLES = 1 << 16  # pixel values a quantile is taken over; an even stride thins out larger images


@dataclass(frozen=True)
class Preset:
    """A Gaussian of `sigma` pixels mixed in with `mix` (negative: sharpen), then the range of the pixels.

    stretch=True sets gain and bias so that the 2nd and 98th percentile of the filtered image go to 0 and 1.
    """

    name: str
    sigma: float = START_SIGMA
    mix: float = 0.0
    stretch: bool = False

    def __post_init__(self) -> None:
        if not SIGMA_MIN <= self.sigma < float("inf"):
            raise ValueError(f"sigma must be at least {SIGMA_MIN} pixels; got {self.sigma}")
        if not MIX_RANGE[0] <= self.mix <= MIX_RANGE[1]:
            raise ValueError(f"mix must be between {MIX_RANGE[0]} and {MIX_RANGE[1]}; got {self.mix}")


IDENTITY = Preset("identity")
DEFAULT_PRESETS = (
    IDENTITY,
    *(Preset(f"blur {sigma}", sigma, 1.0) for sigma in (0.7, 1.0, 1.5, 2.0)),
    Preset("stretch", stretch=True),
    *(Preset(f"blur {sigma}, stretch", sigma, 1.0, stretch=True) for sigma in (1.0, 1.5, 2.0)),
)
"""The untouched image and blurs, with the range as it is and stretched. Chosen on validation: docs/tuning.md."""

VOTE_POWER = 4  # 8 does as well on validation; 1 lets weak candidates outvote a sure one (docs/defaults.md)


class Candidates(NamedTuple):
    """Images of P presets for B samples, preset by preset, with the tone each one needed."""

    pixels: Tensor  # [P * B, C, H, W], normalised
    gain: Tensor  # [P * B]
    bias: Tensor  # [P * B]


def render(presets: Sequence[Preset], pixels: Tensor, taps: int, mean: Tensor, std: Tensor) -> Candidates:
    """Apply every preset to every image.

    Args:
        pixels: [B, C, H, W], normalised by mean and std [C].
        taps: length of the Gaussian taps.
    """
    batch, count = pixels.shape[0], len(presets)
    each = torch.arange(count, device=pixels.device).repeat_interleave(batch)
    table = torch.tensor([(p.sigma, p.mix) for p in presets], device=pixels.device)
    sigma, mix = table[each].unbind(-1)
    row = gaussian_taps(sigma.log(), taps)[:, None]
    mean, std = mean[:, None, None], std[:, None, None]
    raw = pixels.float() * std + mean
    filtered = ops.lowrank_filter2d(raw.repeat(count, 1, 1, 1), row, row, mix)
    gain, bias = torch.ones(count, batch, device=raw.device), torch.zeros(count, batch, device=raw.device)
    if stretched := [i for i, preset in enumerate(presets) if preset.stretch]:
        tones = _stretch(filtered.unflatten(0, (count, batch))[stretched].flatten(0, 1))
        gain[stretched], bias[stretched] = (tone.view(-1, batch) for tone in tones)
    gain, bias = gain.flatten(), bias.flatten()
    toned = gain[:, None, None, None] * filtered + bias[:, None, None, None]
    images = ((toned - mean) / std).to(pixels.dtype)
    for i, preset in enumerate(presets):
        if preset.mix == 0 and not preset.stretch:  # bit for bit, not through a round of the normalisation
            images[i * batch : (i + 1) * batch] = pixels
    return Candidates(images, gain, bias)


def _stretch(images: Tensor) -> tuple[Tensor, Tensor]:
    """gain and bias, [N], that send the quantiles of each image to 0 and 1; 1 and 0 for a flat image.

    Quantiles as torch.quantile's, from the few values beyond them: it sorts all, which takes ten times as long.
    """
    values = images.flatten(1)
    values = values[:, :: -(-values.shape[1] // QUANTILE_SAMPLES)]
    place = RANGE_TAIL * (values.shape[1] - 1)
    beyond = min(int(place) + 2, values.shape[1])
    low, high = (
        torch.lerp(tail[:, int(place)], tail[:, beyond - 1], place % 1)
        for tail in (values.topk(beyond, largest=False).values, values.topk(beyond).values)
    )
    gain = torch.where(high - low > FLAT_RANGE, 1 / (high - low), 1.0)
    return gain, torch.where(high - low > FLAT_RANGE, -low * gain, 0.0)


def margins(logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Logit difference between the first and the second token, averaged over the valid positions, and the first token
    at the first position: [P, B] each, from logits [P, B, n, V] and valid [B, n]."""
    top = logits.float().topk(2, -1)
    return over_positions(top.values[..., 0] - top.values[..., 1], valid), top.indices[:, :, 0, 0]


def select(logits: Tensor, valid: Tensor) -> Tensor:
    """Which of P candidates each of B samples starts from: a vote on the answer, weighted by confidence.

    With a_p the most likely first token of candidate p and m_p its margin over the runner-up (logit difference,
    averaged over the valid positions), the answer with the largest sum of m_p^4 wins, and of the candidates that gave
    it the one of largest margin is taken. By lowest entropy alone, one over-confident candidate beats all others.

    Args:
        logits: [P, B, n, V] at the answer positions. valid: [B, n], bool.

    Returns:
        [B], index of the candidate; 0 where no candidate is finite.

    Source: this project; measured beside lowest entropy in docs/defaults.md.
    """
    margin, answer = margins(logits, valid)
    margin = margin.nan_to_num(nan=-1.0, posinf=-1.0)
    same = answer[:, None] == answer  # [P, P, B]
    votes = (same * margin.clamp_min(0) ** VOTE_POWER).sum(1)  # of each candidate's answer
    return torch.where(votes == votes.amax(0), margin, -2.0).argmax(0)
