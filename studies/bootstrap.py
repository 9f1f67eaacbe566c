"""Percentile bootstrap of a statistic of several images, seeds or both, drawn anew together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RESAMPLES = 999


class Estimate(NamedTuple):
    """A statistic and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(statistic: Callable[..., float], *sizes: int) -> Estimate:
    """`statistic` of one array of indices per size: of all of them in order, and its interval over drawn ones.

    With sizes (images, seeds), images and seeds are drawn independently of each other, as in a crossed design. What is
    drawn is the same for one tuple of sizes, so that statistics can be compared.

    Source: A. B. Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1, 2007.
    """
    rng = np.random.default_rng(0)
    drawn = [statistic(*(rng.integers(size, size=size) for size in sizes)) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Estimate(float(statistic(*map(np.arange, sizes))), float(low), float(high))
