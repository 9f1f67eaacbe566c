"""lora_linear beside peft's layer and hand-written forms, and beside the frozen layer alone."""

import pytest
import torch

from benchmarks.rows import FORWARD, Benchmark, Work, rows
from vqfast.testing.cases.lora_linear import OPERATOR

SHARED_PEERS = ("peft", "addmm", "textbook-compiled", "plain")
OWN_PEERS = ("bmm", "vmap", "bmm-compiled", "plain")


def work(inputs, direction):
    """Forward, M rows: M N K of the base, M r (N + K) of the update. Backward: M N K for dx, M r (N + K) each for dx
    and for the adapters' gradients. x, the base and the adapters are read, y written; then x, the base, the adapters
    and dy read, dx and the adapters' gradients written."""
    x, weight = inputs["x"], inputs["weight"]
    adapters = inputs["lora_a"].nbytes + inputs["lora_b"].nbytes
    outputs, features = weight.shape
    rank, lines = inputs["lora_b"].shape[-1], x.numel() // features
    base, update = 2 * lines * outputs * features, 2 * lines * rank * (outputs + features)
    y_bytes = lines * outputs * x.element_size()
    if direction == FORWARD:
        return Work(base + update, x.nbytes + weight.nbytes + adapters + y_bytes)
    return Work(2 * base + 3 * update, 3 * x.nbytes + 2 * weight.nbytes + 3 * adapters + 2 * y_bytes)


BENCHMARK = Benchmark(OPERATOR, ("x", "lora_a", "lora_b"), work)
SHARED, OWN = OPERATOR.benchmarks
ROWS = [
    *rows(BENCHMARK, SHARED, SHARED_PEERS),
    *rows(BENCHMARK, SHARED, SHARED_PEERS, torch.bfloat16),
    *rows(BENCHMARK, OWN, OWN_PEERS),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_lora_linear(row, measure):
    measure(row)
