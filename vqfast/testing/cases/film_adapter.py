"""Cases of film_adapter: one modulation, or one per sample; bottlenecks and widths that are no whole vectors."""

from __future__ import annotations

import torch

from vqfast.ops import film_adapter
from vqfast.testing.cases import Case, Inputs, OperatorCases, normal


def _case(
    name: str, lead: tuple[int, ...], width: int, rank: int, *, samples: int | None = None, activation: str = "gelu"
) -> Case:
    def make(g: torch.Generator | None) -> Inputs:
        own = (rank,) if samples is None else (samples, rank)
        return {
            "x": normal(g, *lead, width),
            "down": normal(g, rank, width, scale=width**-0.5),
            "up": normal(g, width, rank, scale=rank**-0.5),
            "scale": normal(g, *own, scale=0.5),
            "shift": normal(g, *own),
            "activation": activation,
        }

    return Case(name, make)


OPERATOR = OperatorCases(
    name="film_adapter",
    function=film_adapter,
    activations=frozenset({"x"}),
    differentiable=("x", "down", "up", "scale", "shift"),
    kernels=("cpu", "triton"),
    cases=(
        _case("tokens", (2, 17), 24, 4),
        _case("own", (3, 10), 24, 5, samples=3),
        _case("own_blocks", (2, 37), 96, 16, samples=2),
        _case("silu", (33,), 32, 8, activation="silu"),
        _case("relu", (2, 9), 20, 3, samples=2, activation="relu"),
        _case("one_row", (1,), 7, 1),
        _case("vector", (), 9, 2),
        _case("wide_bottleneck", (18,), 40, 70),
        _case("empty", (0,), 6, 4),
        _case("own_empty", (2, 0), 6, 4, samples=2),
    ),
    benchmarks=(
        _case("577x1024-r16", (577,), 1024, 16),
        _case("16x197x768-r16-own", (16, 197), 768, 16, samples=16),
    ),
    gpu_benchmarks=(
        _case("577x1024-r16", (577,), 1024, 16),
        _case("32x577x1024-r16-own", (32, 577), 1024, 16, samples=32),
        _case("32x577x1024-r64-own", (32, 577), 1024, 64, samples=32),
    ),
)
