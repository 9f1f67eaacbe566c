"""Cases of lora_linear: shared adapters, one per sample, packed rows (a sample with no row among them)."""

from __future__ import annotations

import torch

from vqfast.ops import lora_linear
from vqfast.testing.cases import Case, Inputs, OperatorCases, normal


def _case(
    name: str, lead: tuple[int, ...], inputs: int, outputs: int, rank: int, *, samples: int | None = None,
    offsets: tuple[int, ...] | None = None, bias: bool = True,
) -> Case:  # fmt: skip
    def make(g: torch.Generator | None) -> Inputs:
        own = () if samples is None else (samples,)
        drawn = {
            "x": normal(g, *lead, inputs),
            "weight": normal(g, outputs, inputs, scale=inputs**-0.5),
            "bias": normal(g, outputs) if bias else None,
            "lora_a": normal(g, *own, rank, inputs, scale=inputs**-0.5),
            "lora_b": normal(g, *own, outputs, rank),
            "scaling": 2.0,
        }
        return drawn if offsets is None else drawn | {"row_offsets": torch.tensor(offsets, dtype=torch.int32)}

    return Case(name, make)


OPERATOR = OperatorCases(
    name="lora_linear",
    function=lora_linear,
    activations=frozenset({"x", "weight", "bias"}),
    differentiable=("x", "lora_a", "lora_b"),
    kernels=("cpu", "cuda", "triton"),
    cases=(
        _case("tokens", (2, 17), 24, 40, 4),
        _case("rows_no_bias", (5,), 16, 16, 8, bias=False),
        _case("one_row", (1,), 7, 3, 1),
        _case("vector", (), 9, 5, 2),
        _case("own", (3, 10), 24, 20, 4, samples=3),
        _case("packed", (12,), 24, 20, 4, samples=3, offsets=(0, 5, 5, 12)),
        _case("packed_one_sample", (4,), 8, 8, 2, samples=1, offsets=(0, 4)),
        _case("packed_blocks", (70,), 24, 20, 4, samples=4, offsets=(0, 40, 40, 57, 70)),
        _case("vectors_rank_12", (37,), 96, 144, 12),
        _case("own_rank_8_vectors", (2, 21), 64, 32, 8, samples=2),
        _case("empty", (0,), 6, 4, 2),
        _case("packed_empty", (0,), 6, 4, 2, samples=2, offsets=(0, 0, 0)),
    ),
    benchmarks=(
        _case("577x1024x1024-r8", (577,), 1024, 1024, 8),
        _case("16x197x768x768-r8-own", (16, 197), 768, 768, 8, samples=16),
    ),
    gpu_benchmarks=(
        _case("577x1024x1024-r8", (577,), 1024, 1024, 8),
        _case("32x577x1024x1024-r8-own", (32, 577), 1024, 1024, 8, samples=32),
        _case("8192x1024x1024-r64", (8192,), 1024, 1024, 64),
    ),
    scaling=(
        *(_case(f"rank={rank}", (577,), 1024, 1024, rank) for rank in (4, 8, 16, 32, 64)),
        *(_case(f"batch={batch}", (batch, 197), 384, 384, 8, samples=batch) for batch in (1, 4, 16, 64)),
    ),
)
