"""Which implementation of an operator runs, and why. Decided here and nowhere else."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from vqfast import _native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# name -> device it runs on, in order of preference there. "reference" is plain PyTorch and runs everywhere.
NATIVE = {
    "cpu": "cpu",
    "cuda": "cpu" if _native.EMULATED else "cuda",
    "triton": "cpu" if _native.INTERPRETED else "cuda",
}
BACKENDS = ("reference", *NATIVE)
OPERATORS: list[str] = []  # filled by vqfast.ops as operators are defined

_selected: ContextVar[str | None] = ContextVar("vqfast_backend", default=None)


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run this call. There is no silent fallback."""


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} (or None for automatic choice); got {name!r}")


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run every operator inside the block on backend `name`; None restores the automatic choice.

    The choice belongs to the current thread or async task. A compiled function keeps the backend it was traced with.

    Raises:
        ValueError: unknown name.
    """
    if name is not None:
        _check_name(name)
    token = _selected.set(name)
    try:
        yield
    finally:
        _selected.reset(token)


def selected() -> str | None:
    """The backend that the innermost `backend` block of this thread or task asks for."""
    return _selected.get()


def unavailable(name: str, operator: str, device: str, dtype: torch.dtype) -> str | None:
    """Why native backend `name` cannot run `operator` on `device` with activations of `dtype`; None if it can."""
    if (reason := _native.load(name)) is not None:
        return reason
    if device != NATIVE[name]:
        return f"backend {name!r} runs on {NATIVE[name]} tensors, the input is on {device}"
    if not _has_kernel(name, operator):
        return f"{operator} has no {name} kernel"
    if dtype not in DTYPES:
        return f"backend {name!r} takes {', '.join(map(str, DTYPES))}; got {dtype}"
    return None


@functools.cache
def _has_kernel(name: str, operator: str) -> bool:
    """Whether native backend `name`, loaded, implements `operator`."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"vqfast_{name}::{operator}_fwd", NATIVE[name].upper())


def choose(operator: str, device: str, dtype: torch.dtype, requested: str | None) -> str:
    """Name of the backend for this call: `requested`, else the `backend()` block's, else the first native one that can.

    Raises:
        ValueError: unknown name.
        BackendUnavailableError: the backend asked for cannot run this call.
    """
    name = requested if requested is not None else _selected.get()
    if name is None:
        for candidate in NATIVE:
            if NATIVE[candidate] == device and unavailable(candidate, operator, device, dtype) is None:
                return candidate
        return "reference"
    _check_name(name)
    if name != "reference" and (reason := unavailable(name, operator, device, dtype)) is not None:
        raise BackendUnavailableError(f"{operator}: {reason}. Use backend='reference', or None to let vqfast choose.")
    return name


# Dynamo cannot read a ContextVar: it calls `choose` while tracing and keeps the answer. This attribute is what
# torch.compiler.assume_constant_result sets; calling that would import torch._dynamo (about a second).
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def build_info() -> dict[str, object]:
    """What is installed and compiled, and which backend each operator takes on each device, and why.

    Returns:
        `versions`: name -> version. `backends`: name -> None if its kernels are loaded, else the reason they are not.
        `operators`: operator -> device -> {"backend", "why"} for float32 activations.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "versions": {
            "vqfast": installed_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
        "backends": {name: _native.load(name) for name in NATIVE},
        "operators": {op: {device: _explain(op, device) for device in devices} for op in OPERATORS},
    }


def installed_version() -> str:
    """Version of the installed package."""
    try:
        return importlib.metadata.version("vqfast")
    except importlib.metadata.PackageNotFoundError:  # run from a folder that is on the path but not installed
        return "0+uninstalled"


def _explain(operator: str, device: str) -> dict[str, str]:
    chosen = choose(operator, device, torch.float32, None)
    if chosen != "reference":
        return {"backend": chosen, "why": "compiled kernel loaded" if _selected.get() is None else "vqfast.backend()"}
    reasons = [
        f"{name}: {reason}"
        for name, runs_on in NATIVE.items()
        if runs_on == device and (reason := unavailable(name, operator, device, torch.float32))
    ]
    return {"backend": chosen, "why": "; ".join(reasons)}
