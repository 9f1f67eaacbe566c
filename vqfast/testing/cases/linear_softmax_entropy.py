"""Cases of linear_softmax_entropy: one and several positions, odd sizes."""

from __future__ import annotations

from vqfast.ops import linear_softmax_entropy
from vqfast.testing.cases import Case, OperatorCases, normal


def _case(name: str, rows: int, width: int, classes: int, *, bias: bool = False) -> Case:
    return Case(
        name,
        lambda g: {
            "hidden": normal(g, rows, width),
            "weight": normal(g, classes, width, scale=2 * width**-0.5),
            "bias": normal(g, classes) if bias else None,
        },
    )


OPERATOR = OperatorCases(
    name="linear_softmax_entropy",
    function=linear_softmax_entropy,
    activations=frozenset({"hidden", "weight", "bias"}),
    differentiable=("hidden",),
    kernels=("cpu", "triton"),
    cases=(
        _case("one_position", 1, 64, 500),
        _case("one_position_bias", 1, 33, 257, bias=True),
        _case("positions_bias", 5, 33, 257, bias=True),
        _case("positions_in_two_groups", 37, 24, 130, bias=True),
        _case("slices_positions_in_two_passes", 11, 40, 1000, bias=True),
        _case("width_of_one", 7, 1, 300),
        _case("one_class", 2, 8, 1),
        _case("empty", 0, 8, 10),
    ),
    benchmarks=(_case("8x1024x32000", 8, 1024, 32000), _case("1x1024x32000", 1, 1024, 32000)),
    gpu_benchmarks=tuple(
        _case(f"{rows}x4096x{classes}", rows, 4096, classes) for classes in (32000, 152064) for rows in (1, 8, 32)
    ),
    scaling=(
        *(_case(f"vocabulary={classes}", 8, 256, classes) for classes in (8000, 32000, 128000)),
        *(_case(f"batch={rows}", rows, 256, 32000) for rows in (1, 4, 16, 64)),
    ),
)
