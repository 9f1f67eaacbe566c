"""Search for a stream of similar images: few presets per image, and evidence that is pooled over the stream."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vqfast.tuning.candidates import margins

RATE = 0.01  # the means look back about 100 samples: 0.05 loses a point, 0.005 gains 0.1 and follows later
OWN = 0.1  # share of the sample's own margin; at 0.4 an over-confident wrong preset wins too often
OPENING = 4  # samples that every preset is evaluated on before the means decide


class Stream:
    """Which presets to evaluate for the next image of a stream, and which of them to take.

    With m_p the margin of preset p (logit difference between the first and the second token, averaged over the valid
    positions) and E the presets evaluated for a sample, the pooled means follow

        mean_p += rate (m_p - mean_p - b),   b = average over q in E of (m_q - mean_q),   rate = max(RATE, 1 / count_p)

    where b is what the sample adds to every preset, so that presets seen on different samples stay comparable. Taken
    is the p in E of largest OWN m_p + (1 - OWN) mean_p. Evaluated are the untouched image, the preset of largest mean
    and those not evaluated for longest; nothing is drawn at random. The state is three numbers per preset.

    A preset that is not finite counts as one of margin 0; a sample without a finite preset changes no mean.

    Args:
        presets: P; preset 0 is the untouched image.
        evaluations: presets per image after the first `OPENING` samples, which see all.

    Raises:
        ValueError: no presets, or fewer than three evaluations.

    Source: this project; measured in docs/stream.md.
    """

    def __init__(self, presets: int, evaluations: int = 4) -> None:
        if presets < 1:
            raise ValueError(f"presets must be at least 1; got {presets}")
        if evaluations < 3:
            raise ValueError(
                f"evaluations must be at least 3 (the untouched image, the best and one other); got {evaluations}"
            )
        self.presets, self.evaluations = presets, evaluations
        self.reset()

    def reset(self) -> None:
        """Forget the stream."""
        self.images = 0
        self.means = torch.zeros(self.presets, dtype=torch.float64)  # [P], logits; only differences mean anything
        self.counts = torch.zeros(self.presets, dtype=torch.int64)  # [P], samples each was evaluated on
        self.last = torch.zeros(self.presets, dtype=torch.int64)  # [P], value of `images` after its last evaluation

    def ask(self) -> list[int]:
        """Presets to evaluate for the next image, or for every image of the next batch, in ascending order."""
        if int(self.counts.min()) < OPENING:
            return list(range(self.presets))
        asked = {0, int(self.means.argmax())}
        last = self.last.tolist()
        longest = sorted(set(range(self.presets)) - asked, key=lambda preset: (last[preset], preset))
        return sorted(asked.union(longest[: self.evaluations - len(asked)]))

    def choose(self, indices: Sequence[int], logits: Tensor, valid: Tensor) -> Tensor:
        """Learn from the presets that were evaluated and choose one of them for every sample.

        Args:
            indices: E presets, as `ask` gave them.
            logits: [E, B, n, V] at the answer positions. valid: [B, n], bool.

        Returns:
            [B], the chosen preset of each sample, on the device of the logits; 0 where none is finite.
        """
        if len(indices) != logits.shape[0] or not set(indices) <= set(range(self.presets)):
            raise ValueError(
                f"indices must be {logits.shape[0]} presets from 0 to {self.presets - 1}, one for each of the logits; "
                f"got {list(indices)}"
            )
        margin = margins(logits, valid)[0].cpu().double()  # [E, B]; the only transfer
        finite, rows = margin.isfinite(), torch.tensor(indices)
        margin, usable = margin.where(finite, 0.0), finite.any(0)
        self.images += logits.shape[1]
        if samples := int(usable.sum()):
            self.counts[rows] += samples
            self.last[rows] = self.images
            rate = (samples / self.counts[rows]).clamp_min(1 - (1 - RATE) ** samples)
            off = margin[:, usable].mean(1) - self.means[rows]
            self.means[rows] += rate * (off - off.mean())
        score = (OWN * margin + (1 - OWN) * self.means[rows, None]).where(finite, -torch.inf)
        return rows[score.argmax(0)].where(usable, 0).to(logits.device)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        lists = {name: getattr(self, name).tolist() for name in ("means", "counts", "last")}
        return {"images": self.images, **lists}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was called.

        Raises:
            ValueError: the state is not one of as many presets; nothing is changed.
        """
        names = ("images", "means", "counts", "last")
        if set(state) != set(names):
            raise ValueError(f"a state has the keys {', '.join(names)}; got {', '.join(map(str, state)) or 'none'}")
        for name in names:
            values, size = ([state[name]], 1) if name == "images" else (state[name], self.presets)
            whole = name != "means"
            if not (isinstance(values, list) and len(values) == size and all(_number(x, whole) for x in values)):
                kind = "whole numbers from 0" if whole else "finite numbers"
                raise ValueError(f"{name} of a stream of {self.presets} presets must be {size} {kind}; got {values!r}")
        try:
            means = torch.tensor(state["means"], dtype=torch.float64)
            counts, last = torch.tensor(state["counts"]), torch.tensor(state["last"])
        except (OverflowError, RuntimeError) as error:
            raise ValueError(f"a state has 64-bit whole numbers; got {state}") from error
        self.images, self.means, self.counts, self.last = state["images"], means, counts, last

    def __repr__(self) -> str:
        each = int(self.counts.sum()) / max(self.images, 1)
        means = ", ".join(f"{mean:+.2f}" for mean in self.means.tolist())
        return f"Stream({self.images} images, {each:.1f} of {self.presets} presets each, means [{means}])"


def _number(value: object, whole: bool) -> bool:
    if whole:
        return type(value) is int and value >= 0
    return isinstance(value, int | float) and math.isfinite(value)
