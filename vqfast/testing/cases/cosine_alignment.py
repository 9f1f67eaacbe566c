"""Cases of cosine_alignment: widths around a vector, a block of sums and a tile of rows; targets without direction."""

from __future__ import annotations

import torch

from vqfast.ops import cosine_alignment
from vqfast.testing.cases import Case, Inputs, OperatorCases, normal


def _case(name: str, *shape: int, scale: float = 1.0, near: float = 0.0, zero_target: bool = False) -> Case:
    """Target: `near` times the prediction, and noise; `zero_target`: its first row is 0."""

    def make(g: torch.Generator | None) -> Inputs:
        prediction = normal(g, *shape, scale=scale)
        target = near * prediction + normal(g, *shape)
        if zero_target:
            target[0] = 0
        return {"prediction": prediction, "target": target}

    return Case(name, make)


OPERATOR = OperatorCases(
    name="cosine_alignment",
    function=cosine_alignment,
    activations=frozenset({"prediction", "target"}),
    differentiable=("prediction",),
    kernels=("cpu", "triton"),
    cases=(
        _case("rows", 7, 64),
        _case("three_axes", 2, 3, 33),
        _case("one_row", 1, 1025, near=1.0),
        _case("vector", 300, near=-1.0),
        _case("narrow", 1300, 3),
        _case("wide", 2, 9001),
        _case("aligned", 5, 40, near=30.0),
        _case("opposed", 5, 40, near=-3.0),
        _case("large", 4, 50, scale=1e4),
        _case("target_without_direction", 3, 20, zero_target=True),
        _case("empty", 0, 7),
    ),
    benchmarks=(_case("4608x1024", 4608, 1024), _case("576x4096", 576, 4096)),
    gpu_benchmarks=(_case("18432x1024", 18432, 1024), _case("18432x4096", 18432, 4096), _case("576x4096", 576, 4096)),
    scaling=(
        *(_case(f"width={width}", 576, width) for width in (256, 1024, 4096, 16384)),
        *(_case(f"rows={rows}", rows, 1024) for rows in (144, 576, 2304, 9216)),
    ),
)
