"""Statistics of answers: accuracy with its interval, paired tests, calibration, Bjontegaard metric, gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from bjontegaard import bd_psnr
from numpy.typing import ArrayLike
from scipy import stats
from torchmetrics.functional.classification import binary_calibration_error

RESAMPLES = 9999  # of bootstrap and permutations; p-values are multiples of 1/5000
BINS = 15  # of the calibration error; C. Guo et al., On Calibration of Modern Neural Networks, ICML 2017
BELOW_ONE = 1 - 1e-6  # torchmetrics puts a confidence of exactly 1 into a bin of its own


class Interval(NamedTuple):
    """A fraction and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


class Gaps(NamedTuple):
    """What compression costs, and how much of it adaptation gets back: total = information + generalisation."""

    total: float
    information: float
    generalisation: float


def accuracy(right: ArrayLike, images: ArrayLike | None = None) -> Interval:
    """Share of right answers with a 95 % interval.

    right: bool, [images], one question each: Wilson score interval. [images, questions]: answers on one image are not
    independent, so whole images are drawn anew (percentile bootstrap, 9999 draws, seeded). Where every image has the
    same share, as when all is right, that would have no width: Wilson, with images as the sample.
    images: where they have different numbers of questions, the image of every answer (name or number), right's shape.

    Source: E. B. Wilson, JASA 22, 1927; C. A. Field and A. H. Welsh, Bootstrapping Clustered Data, JRSS B 69, 2007.

    Raises:
        ValueError: no answers, more than two dimensions, values that are not bool, images of another shape.
    """
    counts, sizes = right_per_image(right, images, "right")
    mean = int(counts.sum()) / int(sizes.sum())
    if sizes.max() == 1 or np.ptp(counts / sizes) == 0:
        interval = stats.binomtest(round(mean * len(sizes)), len(sizes)).proportion_ci(0.95, method="wilson")
        return Interval(mean, float(interval.low), float(interval.high))

    def share(counts: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
        return counts.sum(axis) / sizes.sum(axis)

    drawn = stats.bootstrap(
        (counts, sizes), share, paired=True, n_resamples=RESAMPLES, batch=1000, method="percentile", rng=0
    ).confidence_interval
    return Interval(mean, float(drawn.low), float(drawn.high))


def paired_test(a: ArrayLike, b: ArrayLike, images: ArrayLike | None = None) -> float:
    """Two-sided p-value of "a and b are right equally often", on the same questions about the same images.

    a, b: bool, [images] or [images, questions]. Permutation test: an image's answers of a and b are swapped, those of
    all its questions together. Exact where at most 13 images differ in their number of right answers, else 9999
    seeded draws. With one question per image this is McNemar's exact test. images: as of `accuracy`.

    Raises:
        ValueError: shapes that differ, no answers, more than two dimensions, values that are not bool.
    """
    if np.shape(a) != np.shape(b):
        raise ValueError(f"a and b must have the same shape, image by image; got {np.shape(a)} and {np.shape(b)}")
    counts = np.stack([right_per_image(a, images, "a")[0], right_per_image(b, images, "b")[0]])
    counts = counts[:, counts[0] != counts[1]]  # the others add nothing to the statistic, swapped or not
    if counts.shape[1] < 2:
        return 1.0

    def difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return (a - b).sum(axis)

    test = stats.permutation_test(
        tuple(counts), difference, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES, batch=1000, rng=0
    )
    return float(test.pvalue)


def calibration_error(confidence: ArrayLike, right: ArrayLike) -> float:
    """Expected calibration error: mean of |share right - mean confidence| over 15 equal bins, weighted by their size.

    confidence: probability of the answer that was given, 0 to 1; right: bool, same shape.

    Raises:
        ValueError: shapes that differ, no answers, confidences outside 0 to 1.
    """
    given, outcome = np.asarray(confidence, np.float64), np.asarray(right)
    if given.shape != outcome.shape or not given.size:
        raise ValueError(f"confidence and right must have one shape, not empty; got {given.shape} and {outcome.shape}")
    if not ((given >= 0) & (given <= 1)).all():
        raise ValueError(f"confidence must be a probability, 0 to 1; got {given.min()} to {given.max()}")
    if outcome.dtype != bool:
        raise ValueError(f"right must be bool, one value per answer; got {outcome.dtype}")
    given = np.minimum(given, BELOW_ONE)
    error = binary_calibration_error(torch.from_numpy(given), torch.from_numpy(outcome).long(), n_bins=BINS)
    return float(error)


def bd_metric(
    bpp_a: Sequence[float], accuracy_a: Sequence[float], bpp_b: Sequence[float], accuracy_b: Sequence[float]
) -> float:
    """Bjontegaard metric: mean height of curve b over curve a over the bit rates that both reach.

    (1 / (r1 - r0)) * integral from r0 to r1 of b(r) - a(r), r = log bits per pixel; a and b are monotone cubic (PCHIP)
    interpolants. In the unit of the accuracies: fractions in, fraction out. The order of the points does not matter.

    Source: G. Bjontegaard, VCEG-M33, 2001, by the package bjontegaard.

    Raises:
        ValueError: fewer than two points on a curve, bits per pixel that are not positive or occur twice, values that
            are not finite, rates that do not overlap.
    """
    curves = []
    for name, bpp, height in (("a", bpp_a, accuracy_a), ("b", bpp_b, accuracy_b)):
        rate, metric = np.asarray(bpp, np.float64), np.asarray(height, np.float64)
        if rate.ndim != 1 or rate.shape != metric.shape or len(rate) < 2:
            raise ValueError(
                f"curve {name} must have at least two points of one rate and one accuracy each; "
                f"got shapes {rate.shape} and {metric.shape}"
            )
        if not np.isfinite([rate, metric]).all() or rate.min() <= 0 or len(np.unique(rate)) < len(rate):
            raise ValueError(
                f"curve {name} must be finite, its bits per pixel positive and distinct; got {rate.tolist()}"
            )
        order = rate.argsort()
        curves += [rate[order], metric[order]]
    low, high = max(curves[0][0], curves[2][0]), min(curves[0][-1], curves[2][-1])
    if low >= high:
        raise ValueError(
            "the curves share no range of bits per pixel, so they cannot be compared: "
            f"a has {curves[0][0]:g} to {curves[0][-1]:g}, b {curves[2][0]:g} to {curves[2][-1]:g}"
        )
    return float(bd_psnr(*curves, method="pchip", require_matching_points=False, min_overlap=0))


def gaps(original: float, compressed: float, adapted: float) -> Gaps:
    """The gap between original and compressed images, split by what an adapted model gets back.

    total = original - compressed, information = original - adapted (lost with the bits), generalisation = adapted -
    compressed (there, but unused by the model as it is). In the unit of the accuracies; each can be negative.

    Source: arXiv 2512.20901.
    """
    return Gaps(original - compressed, original - adapted, adapted - compressed)


def right_per_image(right: ArrayLike, images: ArrayLike | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Right answers of each image and its number of questions, [images] both; arguments as of `accuracy`.

    Raises:
        ValueError: no answers, more than two dimensions, values that are not bool, images of another shape.
    """
    array = np.asarray(right)
    if array.dtype != bool or array.ndim not in (1, 2) or not array.size:
        raise ValueError(
            f"{name} must be bool, [images] or [images, questions], not empty; got {array.dtype} {list(array.shape)}"
        )
    if images is None:
        table = array.reshape(len(array), -1)
        return table.sum(1), np.full(len(table), table.shape[1])
    if np.shape(images) != array.shape:
        raise ValueError(
            f"images must name the image of every answer, {list(array.shape)}; got {list(np.shape(images))}"
        )
    index = np.unique(np.ravel(images), return_inverse=True)[1]
    return np.bincount(index, array.ravel()).astype(int), np.bincount(index)
