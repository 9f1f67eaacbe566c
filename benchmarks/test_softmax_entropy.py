"""softmax_entropy beside log_softmax, eager and compiled."""

import pytest
import torch

from benchmarks.rows import FORWARD, Benchmark, Work, rows
from vqfast.testing.cases.softmax_entropy import OPERATOR

PEERS = ("log_softmax", "log_softmax-compiled")


def work(inputs, direction):
    """Forward, per logit: subtract the maximum, exp, add it, multiply and add its product with the logit: 5. Backward:
    subtract, exp, and p (log p + H) dH: 5. Logits are read in each direction, their gradient is written."""
    logits = inputs["logits"]
    if direction == FORWARD:
        return Work(5 * logits.numel(), logits.nbytes)
    return Work(10 * logits.numel(), 3 * logits.nbytes)


BENCHMARK = Benchmark(OPERATOR, ("logits",), work)
WIDE, ONE_ROW = OPERATOR.benchmarks
ROWS = [
    *rows(BENCHMARK, WIDE, PEERS),
    *rows(BENCHMARK, WIDE, PEERS, torch.bfloat16),
    *rows(BENCHMARK, ONE_ROW, PEERS),
    *rows(BENCHMARK, ONE_ROW, PEERS, torch.bfloat16),
    *rows(BENCHMARK, WIDE, PEERS, direction=FORWARD),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_softmax_entropy(row, measure):
    measure(row)
