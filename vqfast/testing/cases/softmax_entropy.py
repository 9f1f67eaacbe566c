"""Cases of softmax_entropy: sizes around a vector and the 1024-value chunk, extreme logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vqfast.ops import softmax_entropy
from vqfast.testing.cases import Case, OperatorCases, normal


def _case(name: str, *shape: int, scale: float = 3.0, change: Callable[[Tensor], Tensor] = lambda z: z) -> Case:
    return Case(name, lambda g: {"logits": change(normal(g, *shape, scale=scale))})


def _early_peak(z: Tensor) -> Tensor:
    return torch.cat([z[:, :5] + 200, z[:, 5:]], -1)


def _mask_half(z: Tensor) -> Tensor:
    return z.masked_fill(torch.arange(z.shape[-1], device=z.device) % 2 == 1, -torch.inf)


OPERATOR = OperatorCases(
    name="softmax_entropy",
    function=softmax_entropy,
    activations=frozenset({"logits"}),
    differentiable=("logits",),
    kernels=("cpu", "triton"),
    cases=(
        _case("rows", 4, 1000),
        _case("one_row", 1, 31),
        _case("vector", 2049),
        _case("one_class", 3, 1),
        _case("three_axes", 2, 3, 1025),
        _case("confident", 3, 65, scale=60.0),
        _case("far_from_zero", 2, 40, change=lambda z: z + 200),
        _case("masked", 3, 50, change=_mask_half),
        _case("peak_in_the_first_chunk", 2, 3000, change=_early_peak),
        _case("empty", 0, 7),
    ),
    benchmarks=(_case("32x32000", 32, 32000), _case("1x152064", 1, 152064)),
    gpu_benchmarks=(_case("32x152064", 32, 152064), _case("256x152064", 256, 152064), _case("1x152064", 1, 152064)),
    scaling=(
        *(_case(f"vocabulary={classes}", 8, classes) for classes in (8000, 32000, 128000)),
        *(_case(f"batch={rows}", rows, 32000) for rows in (1, 4, 16, 64)),
    ),
)
