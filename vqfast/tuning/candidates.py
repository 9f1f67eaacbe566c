"""Filter presets to start a step from, and the images they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vqfast import ops
from vqfast.integrations.layouts import Layout, stacked
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
    """Images behind presets, with the tone each sample needed."""

    pixels: Tensor  # laid out as they were, normalised
    gain: Tensor  # [S]
    bias: Tensor  # [S]


def render(presets: Sequence[Preset], pixels: Tensor, taps: int, mean: Tensor, std: Tensor) -> Candidates:
    """`apply_presets` of every preset to every image of [B, C, H, W], preset by preset: [P B, C, H, W]."""
    repeated = pixels.repeat(len(presets), 1, 1, 1)
    each = [preset for preset in presets for _ in pixels]
    return apply_presets(each, stacked(repeated, (1,) * len(each)), repeated, taps, mean, std)


def apply_presets(
    presets: Sequence[Preset], layout: Layout, pixels: Tensor, taps: int, mean: Tensor, std: Tensor
) -> Candidates:
    """Apply a preset to the images of each sample.

    Args:
        presets: of each of S samples.
        layout: of the pixels, normalised by mean and std [C].
        taps: length of the Gaussian taps.
    """
    table = torch.tensor([(p.sigma, p.mix) for p in presets], device=pixels.device)
    rows = gaussian_taps(table[:, 0].log(), taps)[:, None]
    channels = mean[:, None, None], std[:, None, None]
    filtered: list[Tensor] = []
    for samples, images in layout.groups:
        by_channel = images.unflatten(1, (-1, len(mean))).float()
        raw = (by_channel * channels[1] + channels[0]).flatten(1, 2)
        filtered.append(ops.lowrank_filter2d(raw, rows[samples], rows[samples], table[samples, 1]))
    gain, bias = torch.ones(len(presets), device=pixels.device), torch.zeros(len(presets), device=pixels.device)
    stretched = [i for i, preset in enumerate(presets) if preset.stretch]
    if stretched and max(layout.counts) == 1 and len(layout.groups) == 1:
        gain[stretched], bias[stretched] = _stretch(filtered[0][stretched].flatten(1))
    elif stretched:
        for i in stretched:
            own = [
                _picture(images[i - samples.start], f[i - samples.start], len(mean))
                for (samples, images), f in zip(layout.groups, filtered, strict=True)
                if samples.start <= i < samples.stop
            ]
            gain[i], bias[i] = (tone[0] for tone in _stretch(torch.cat(own)[None]))
    result = []
    for (samples, images), raw in zip(layout.groups, filtered, strict=True):
        toned = gain[samples, None, None, None] * raw + bias[samples, None, None, None]
        normalised = (toned.unflatten(1, (-1, len(mean))) - channels[0]) / channels[1]
        result.append(normalised.flatten(1, 2).to(images.dtype))
        for i, preset in enumerate(presets[samples]):
            if preset.mix == 0 and not preset.stretch:  # bit for bit, not through a round of the normalisation
                result[-1][i] = images[i]
    return Candidates(layout.restore(result), gain, bias)


def _picture(images: Tensor, filtered: Tensor, channels: int) -> Tensor:
    """Values of filtered tiles [n C, H, W] without what pads them: rows and columns of a tile that are constant."""
    tiles, values = images.unflatten(0, (-1, channels)), filtered.unflatten(0, (-1, channels))
    rows, columns = ((tiles.amax(axis) != tiles.amin(axis)).any(1) for axis in (-1, -2))  # [n, H], [n, W]
    there = (rows[:, :, None] & columns[:, None, :])[:, None].expand_as(values)
    picture: Tensor = values[there] if bool(there.any()) else values.flatten()
    return picture


def _stretch(values: Tensor) -> tuple[Tensor, Tensor]:
    """gain and bias, [N], that send the quantiles of each row of [N, pixels] to 0 and 1; 1 and 0 for a flat one.

    Quantiles as torch.quantile's, from the few values beyond them: it sorts all, which takes ten times as long.
    """
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
