"""Cases of spectral_gain2d: every radix of the transform, primes, lines of one point, blocks with a tail."""

from __future__ import annotations

import torch

from vqfast.ops import spectral_gain2d
from vqfast.testing.cases import Case, Inputs, OperatorCases, normal


def _case(name: str, shape: tuple[int, int, int, int], rank: int, *, own: bool = False) -> Case:
    def make(g: torch.Generator | None) -> Inputs:
        batch, _, height, width = shape
        lead = (batch,) if own else ()
        return {
            "image": normal(g, *shape),
            "gain_y": normal(g, *lead, rank, height, scale=0.5),
            "gain_x": normal(g, *lead, rank, width, scale=0.5),
        }

    return Case(name, make)


OPERATOR = OperatorCases(
    name="spectral_gain2d",
    function=spectral_gain2d,
    activations=frozenset({"image"}),
    differentiable=("image", "gain_y", "gain_x"),
    kernels=("cpu", "triton"),
    cases=(
        _case("radix_4_and_2_own", (2, 3, 16, 32), 2, own=True),
        _case("radix_3_and_5", (1, 2, 45, 60), 1),
        _case("radix_7_rank_8", (2, 1, 14, 49), 8),
        _case("primes", (1, 2, 11, 37), 3),
        _case("large_prime_factors", (1, 1, 26, 66), 2),
        _case("one_row", (1, 2, 1, 33), 1),
        _case("one_column_own", (3, 1, 18, 1), 2, own=True),
        _case("one_pixel", (2, 2, 1, 1), 1),
        _case("several_tasks", (2, 3, 84, 100), 4),
        _case("empty_batch", (0, 3, 8, 8), 1),
        _case("no_channels", (1, 0, 4, 6), 1),
    ),
    gpu_benchmarks=(
        _case("1x3x336x336-r4", (1, 3, 336, 336), 4),
        _case("32x3x336x336-r4-own", (32, 3, 336, 336), 4, own=True),
    ),
    benchmarks=(_case("1x3x336x336-r4", (1, 3, 336, 336), 4),),
)
