"""What is measured: an operator's benchmark and its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vqfast import backends
from vqfast.testing.cases import Case, Inputs, OperatorCases

FORWARD, STEP = DIRECTIONS = ("fwd", "fwd+bwd")


class Work(NamedTuple):
    """The least that an algorithm known for the operator computes and moves."""

    flops: float
    bytes: float


class Call(NamedTuple):
    """An implementation with its arguments bound, and the tensors whose gradient a step takes."""

    function: Callable[[], Tensor]
    leaves: dict[str, Tensor]


@dataclass(frozen=True)
class Benchmark:
    """An operator, the inputs that a tuning step needs the gradient of, and its work in a direction."""

    op: OperatorCases
    leaves: tuple[str, ...]
    work: Callable[[Inputs, str], Work]


@dataclass(frozen=True)
class Row:
    """One line of pytest-benchmark's table: an implementation, which is a backend of vqfast or a peer."""

    benchmark: Benchmark
    case: Case
    dtype: torch.dtype
    direction: str
    implementation: str
    device: str = "cpu"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def group(self) -> str:
        return f"{self.benchmark.op} {self.case} {self.dtype_name} {self.direction}"

    def __str__(self) -> str:
        return f"{self.case}-{self.dtype_name}-{self.direction}-{self.implementation}"


def rows(
    benchmark: Benchmark, case: Case, peers: Iterable[str], dtype: torch.dtype = torch.float32, direction: str = STEP
) -> list[Row]:
    """A row per backend that can run the operator, then one per peer."""
    names = (*available(benchmark.op, dtype), *peers)
    return [Row(benchmark, case, dtype, direction, name) for name in names]


def available(op: OperatorCases, dtype: torch.dtype, device: str = "cpu") -> list[str]:
    """The backends that run `op` here, the one that vqfast chooses first."""
    native = [name for name in backends.NATIVE if backends.unavailable(name, op.name, device, dtype) is None]
    return [*native, "reference"]
