"""linear_softmax_entropy beside linear, then log_softmax, eager and compiled."""

import pytest
import torch

from benchmarks.rows import FORWARD, Benchmark, Work, rows
from vqfast.testing.cases.linear_softmax_entropy import OPERATOR

PEERS = ("log_softmax", "log_softmax-compiled")


def work(inputs, direction):
    """One product of N D V for the logits; the gradient takes two more, sum_i p_i w_i and sum_i p_i z_i w_i. These can
    be gathered while the logits are, so the head is read once in either direction."""
    hidden, weight = inputs["hidden"], inputs["weight"]
    products, tensors = (1, hidden.nbytes) if direction == FORWARD else (3, 2 * hidden.nbytes)
    return Work(products * 2 * hidden.shape[0] * weight.numel(), weight.nbytes + tensors)


BENCHMARK = Benchmark(OPERATOR, ("hidden",), work)
EIGHT, ONE = OPERATOR.benchmarks
ROWS = [
    *rows(BENCHMARK, EIGHT, PEERS),
    *rows(BENCHMARK, EIGHT, PEERS, torch.bfloat16),
    *rows(BENCHMARK, ONE, PEERS),
    *rows(BENCHMARK, ONE, PEERS, torch.bfloat16),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_linear_softmax_entropy(row, measure):
    measure(row)
