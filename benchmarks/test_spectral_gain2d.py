"""spectral_gain2d beside a gain on the Fourier transform, both with the image's transform taken once."""

import math

import pytest

from benchmarks.rows import FORWARD, Benchmark, Work, rows
from vqfast.ops import dct2
from vqfast.testing.cases import Case
from vqfast.testing.cases.spectral_gain2d import OPERATOR

PEERS = ("rfft",)


def work(inputs, direction):
    """Per pixel of a plane of P, R ranks: 5/2 log2 P for a fast transform of real values, 2 R for the gain, 1 to apply.
    Backward: one transform of the gradient, 1 for its product with the spectrum, 4 R for the sums over rows and
    columns. The spectrum is read and the image written, then spectrum and gradient are read."""
    image, rank = inputs["image"], inputs["gain_y"].shape[-2]
    transform = 2.5 * math.log2(image.shape[-2] * image.shape[-1])
    forward, backward = transform + 2 * rank + 1, transform + 4 * rank + 1
    moved = inputs["spectrum"].nbytes + image.nbytes
    if direction == FORWARD:
        return Work(forward * image.numel(), moved)
    return Work((forward + backward) * image.numel(), 2 * moved)


def with_spectrum(case: Case) -> Case:
    """The case with the image's spectrum, as a tuner that keeps the image constant passes it."""

    def make(generator):
        inputs = case.make(generator)
        return inputs | {"spectrum": dct2(inputs["image"])}

    return Case(case.name, make)


BENCHMARK = Benchmark(OPERATOR, ("gain_y", "gain_x"), work)
ROWS = [row for case in OPERATOR.benchmarks for row in rows(BENCHMARK, with_spectrum(case), PEERS)]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_spectral_gain2d(row, measure):
    measure(row)
