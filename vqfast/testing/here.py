"""Which backends this process tests."""

from __future__ import annotations

import os

import torch

from vqfast import backends

REQUIRED = tuple(name for name in os.environ.get("VQFAST_REQUIRE", "").split(",") if name)
"""Backends whose absence is a failure and not a skip. Beside those of `vqfast.backends.NATIVE`: triton-interpret and
cuda-emulated, GPU kernels on the CPU in processes of their own (tests/ops/test_without_gpu.py)."""


def missing(name: str, operator: str) -> str | None:
    """Why backend `name` cannot be tested here; None if it can."""
    if name == "reference":
        return None
    return backends.unavailable(name, operator, device(name), torch.float32)


def device(name: str) -> str:
    """Device that tests of backend `name` put tensors on."""
    return backends.NATIVE.get(name, "cpu")


def on_cpu(operator: str, kernels: tuple[str, ...]) -> list[str]:
    """Those of `kernels_here` that take CPU tensors: a GPU's, too, where they are interpreted or emulated."""
    return [name for name in kernels_here(operator, kernels) if device(name) == "cpu"]


def kernels_here(operator: str, kernels: tuple[str, ...]) -> list[str]:
    """Those of the backends that run here or must. One that is missing is reported once, not by every test."""
    return [name for name in kernels if name in REQUIRED or missing(name, operator) is None]
