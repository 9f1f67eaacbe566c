"""Correctness before timing: ours and the peer against float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.peers import PEERS
from benchmarks.rows import STEP, Benchmark, Call, Row
from vqfast import backends
from vqfast.testing.cases import Case, Inputs
from vqfast.testing.tolerances import BAND, assert_close_to_exact

PEER_BAND = 32
"""Roundings allowed to a peer. Peers round intermediate results to the activation dtype where vqfast keeps float32."""


class Subject(NamedTuple):
    """A case in a dtype: its arguments and what every implementation must return for them."""

    inputs: Inputs
    weights: Tensor  # gradient of the result
    eager: dict[str, Tensor]  # of the reference in the dtype
    exact: dict[str, Tensor]  # of the reference in float64


@functools.lru_cache(maxsize=1)  # rows of a group follow each other; two heads of 32000 classes need not be held
def subject(benchmark: Benchmark, case: Case, dtype: torch.dtype, device: str = "cpu") -> Subject:
    op = benchmark.op
    inputs = op.inputs(case, dtype, device)
    for name in benchmark.leaves:
        inputs[name].requires_grad_()
    with torch.no_grad():
        result = op.function(**inputs, backend="reference")
    # The gradient of half the squared norm: with random ones the sums that make a parameter's gradient cancel, and what
    # is left of them is smaller than their rounding.
    weights = result.clone()
    eager, exact = (outputs(on_backend(benchmark, x, "reference"), weights) for x in (inputs, in_float64(inputs)))
    return Subject(inputs, weights, eager, exact)


def on_backend(benchmark: Benchmark, inputs: Inputs, name: str) -> Call:
    function = functools.partial(benchmark.op.function, **inputs, backend=name)
    return Call(function, {leaf: inputs[leaf] for leaf in benchmark.leaves})


def in_float64(inputs: Inputs) -> Inputs:
    """The same values, already rounded to the dtype under test."""

    def convert(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return {name: convert(value) for name, value in inputs.items()}


def outputs(call: Call, weights: Tensor) -> dict[str, Tensor]:
    """The result and the gradients of its sum weighted by `weights`."""
    result = call.function()
    grads = torch.autograd.grad(result, list(call.leaves.values()), weights.to(result))
    return {"result": result.detach(), **{f"d{name}": grad for name, grad in zip(call.leaves, grads, strict=True)}}


def checked(row: Row, name: str) -> Call:
    """Implementation `name` of the row's operator on the row's inputs.

    Raises:
        AssertionError: its result or a gradient is further from float64 than the reference in the row's dtype and a
            band of roundings (`vqfast.testing.tolerances`), wider for a peer.
    """
    inputs, weights, eager, exact = subject(row.benchmark, row.case, row.dtype, row.device)
    if name in backends.BACKENDS:
        call, band = on_backend(row.benchmark, inputs, name), BAND
    else:
        peer, band = PEERS[row.benchmark.op.name][name], PEER_BAND
        call = peer.bind(inputs, row.benchmark.leaves)
        if peer.itself:
            eager = outputs(call, weights)
            exact = outputs(peer.bind(in_float64(inputs), row.benchmark.leaves), weights)
    for output, actual in outputs(call, weights).items():
        assert_close_to_exact(f"{name}: {output}", actual, eager[output], exact[output], row.dtype, band)
    return call


def step(call: Call, weights: Tensor, direction: str) -> Callable[[], None]:
    """What is timed: the forward, or forward and backward."""
    leaves = list(call.leaves.values())

    def forward() -> None:
        with torch.no_grad():
            call.function()

    def forward_and_backward() -> None:
        result = call.function()
        torch.autograd.grad(result, leaves, grad)

    if direction == STEP:
        with torch.no_grad():
            grad = weights.to(call.function())
        return forward_and_backward
    return forward
