"""cosine_alignment beside F.cosine_similarity with a detached target, eager and compiled."""

import pytest
import torch

from benchmarks.rows import FORWARD, Benchmark, Work, rows
from vqfast.testing.cases.cosine_alignment import OPERATOR

PEERS = ("cosine_similarity", "cosine_similarity-compiled")


def work(inputs, direction):
    """Forward, per value: three products and their sums: 6. Backward: both rows over their lengths, their difference
    and its factor: 4. Prediction and target are read in each direction, the gradient is written."""
    prediction = inputs["prediction"]
    if direction == FORWARD:
        return Work(6 * prediction.numel(), 2 * prediction.nbytes)
    return Work(10 * prediction.numel(), 5 * prediction.nbytes)


BENCHMARK = Benchmark(OPERATOR, ("prediction",), work)
TOKENS, WIDE = OPERATOR.benchmarks
ROWS = [
    *rows(BENCHMARK, TOKENS, PEERS),
    *rows(BENCHMARK, TOKENS, PEERS, torch.bfloat16),
    *rows(BENCHMARK, WIDE, PEERS),
    *rows(BENCHMARK, WIDE, PEERS, torch.bfloat16),
    *rows(BENCHMARK, TOKENS, PEERS, direction=FORWARD),
    *rows(BENCHMARK, WIDE, PEERS, direction=FORWARD),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_cosine_alignment(row, measure):
    measure(row)
