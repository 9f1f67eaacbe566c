"""lowrank_filter2d beside dense and separable convolution and shifted slices, eager and compiled."""

import pytest
import torch

from benchmarks.rows import FORWARD, Benchmark, Work, rows
from vqfast.testing.cases.lowrank_filter2d import OPERATOR

PEERS = ("dense", "separable", "slices", "dense-compiled", "separable-compiled", "slices-compiled")


def work(inputs, direction):
    """Per pixel, R kernels of k taps. Forward: 2 k multiply-adds per rank, or k^2 of the dense kernel, and the mix: 4.
    Backward, image frozen: v_r * x again, u_r^T * g, and a sum of k products with either: 4 k per rank; or k^2 products
    of g with the shifted image, from which the gradients of all taps follow. Two more for that of mix.
    The image is read and the result written, then image and gradient are read."""
    image, taps = inputs["image"], inputs["taps_y"].shape[-1]
    rank = inputs["taps_y"].shape[-2]
    forward = 2 * min(2 * taps * rank, taps**2) + 4
    if direction == FORWARD:
        return Work(forward * image.numel(), 2 * image.nbytes)
    backward = 2 * min(4 * taps * rank, taps**2) + 2
    return Work((forward + backward) * image.numel(), 4 * image.nbytes)


BENCHMARK = Benchmark(OPERATOR, ("taps_y", "taps_x", "mix"), work)
SMALL, LARGE, OWN = OPERATOR.benchmarks
ROWS = [
    *rows(BENCHMARK, SMALL, PEERS),
    *rows(BENCHMARK, SMALL, PEERS, torch.bfloat16),
    *rows(BENCHMARK, LARGE, PEERS),
    *rows(BENCHMARK, OWN, PEERS),
    *rows(BENCHMARK, SMALL, PEERS, direction=FORWARD),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_lowrank_filter2d(row, measure):
    measure(row)
