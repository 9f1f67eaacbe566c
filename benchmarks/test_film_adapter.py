"""film_adapter beside the same layers of PyTorch, eager and compiled, and beside the block that it follows."""

import pytest
import torch

from benchmarks.peers import BLOCK
from benchmarks.rows import FORWARD, Benchmark, Work, rows
from vqfast.testing.cases.film_adapter import OPERATOR

PEERS = ("linears", "linears-compiled")


def work(inputs, direction):
    """Forward, M rows: 2 M r K twice. Backward: that for da and dx, and for dD and dU. x and the adapter are read, y is
    written; then x, dy and the adapter are read, dx and the adapter's gradients written."""
    x, adapter = inputs["x"], inputs["down"].nbytes + inputs["up"].nbytes
    products = 4 * x.numel() * inputs["down"].shape[0]
    if direction == FORWARD:
        return Work(products, 2 * x.nbytes + adapter)
    return Work(3 * products, 5 * x.nbytes + 3 * adapter)


BENCHMARK = Benchmark(OPERATOR, ("x", "down", "up", "scale", "shift"), work)
SHARED, OWN = OPERATOR.benchmarks
ROWS = [
    *rows(BENCHMARK, SHARED, PEERS),
    *rows(BENCHMARK, SHARED, PEERS, torch.bfloat16),
    *rows(BENCHMARK, OWN, PEERS),
    *rows(BENCHMARK, SHARED, (*PEERS, BLOCK), direction=FORWARD),
    *rows(BENCHMARK, OWN, (*PEERS, BLOCK), direction=FORWARD),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_film_adapter(row, measure):
    measure(row)
