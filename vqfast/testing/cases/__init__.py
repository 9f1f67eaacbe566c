"""Inputs of every operator, one file each: read by the tests and by the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One set of arguments. `make` draws it in float64 from a seeded generator; shapes alone where that is None."""

    name: str
    make: Callable[[torch.Generator | None], Inputs]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class OperatorCases:
    """An operator with its cases."""

    name: str
    function: Callable[..., Tensor]
    activations: frozenset[str]  # arguments in the activation dtype; other float tensors are parameters (float32)
    differentiable: tuple[str, ...]
    kernels: tuple[str, ...]  # native backends that implement it
    cases: tuple[Case, ...]
    benchmarks: tuple[Case, ...] = ()  # large shapes, which only the benchmarks draw
    gpu_benchmarks: tuple[Case, ...] = ()
    scaling: tuple[Case, ...] = ()  # named "axis=value", in rising order of each axis

    def __str__(self) -> str:
        return self.name

    def inputs(self, case: Case, dtype: torch.dtype, device: str = "cpu", *, requires_grad: bool = False) -> Inputs:
        """The arguments of `case` with activations in `dtype`; the differentiable ones as leaves if asked for."""
        where = device if device == "cuda" else "cpu"  # large cases are drawn where they are used
        drawn = case.make(None if device == "meta" else torch.Generator(where).manual_seed(0))
        return {name: self._convert(name, value, dtype, device, requires_grad) for name, value in drawn.items()}

    def _convert(self, name: str, value: Any, dtype: torch.dtype, device: str, requires_grad: bool) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            parameter = torch.float64 if dtype == torch.float64 else torch.float32
            value = value.to(dtype if name in self.activations else parameter)
        return value.to(device).requires_grad_(requires_grad and name in self.differentiable)


def normal(generator: torch.Generator | None, *shape: int, scale: float = 1.0) -> Tensor:
    if generator is None:
        return torch.empty(shape, dtype=torch.float64, device="meta")
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)


def all_operators() -> tuple[OperatorCases, ...]:
    from vqfast.testing.cases import (
        cosine_alignment,
        film_adapter,
        linear_softmax_entropy,
        lora_linear,
        lowrank_filter2d,
        softmax_entropy,
        spectral_gain2d,
    )

    modules = (
        lowrank_filter2d,
        spectral_gain2d,
        lora_linear,
        softmax_entropy,
        linear_softmax_entropy,
        film_adapter,
        cosine_alignment,
    )
    return tuple(module.OPERATOR for module in modules)
