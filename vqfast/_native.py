"""Finds and loads the kernels of each backend; says why they are absent."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import torch

TARGETS = ("portable", "avx2", "avx512")  # values of VQFAST_CPU_TARGET: widest instruction set (not of dct.h)
LIBRARIES = {name: Path(__file__).with_name(file) for name, file in (("cpu", "_C.abi3.so"), ("cuda", "_cuda.abi3.so"))}
LOWEST_CAPABILITY = (8, 0)  # of a GPU: bfloat16 and its matrix instructions

# For development without a GPU, read once: the process then runs GPU kernels on CPU tensors, slowly.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("VQFAST_EMULATED_CUDA")  # a library that tests/emulation built


@functools.cache
def load(backend: str) -> str | None:
    """Load the kernels of a native backend once. Returns None when they are there, else the reason why not.

    Raises:
        ValueError: the environment variable VQFAST_CPU_TARGET names no instruction set.
    """
    if backend == "cpu":
        if (limit := os.environ.get("VQFAST_CPU_TARGET")) not in (None, *TARGETS):
            raise ValueError(f"VQFAST_CPU_TARGET must be one of {', '.join(TARGETS)}; got {limit!r}")
        return _load_library(LIBRARIES["cpu"], "cpu")
    if backend == "cuda":
        return (
            _load_library(Path(EMULATED), "cuda") if EMULATED else _no_gpu() or _load_library(LIBRARIES["cuda"], "cuda")
        )
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None if INTERPRETED else _no_gpu()


def _load_library(library: Path, build: str) -> str | None:
    if not library.exists():
        return (
            f"no {build} kernels in this install (build them: VQFAST_BUILD={build} pip install --no-build-isolation .)"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load with torch {torch.__version__} (rebuild: pip install .): {error}"
    return None


def _no_gpu() -> str | None:
    """Why no GPU can be used; None where one can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA (install a CUDA build of torch)"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU (check the driver and CUDA_VISIBLE_DEVICES)"
    for index in range(torch.cuda.device_count()):
        if (capability := torch.cuda.get_device_capability(index)) < LOWEST_CAPABILITY:
            return (
                f"GPU {index}, {torch.cuda.get_device_name(index)}, has compute capability {capability[0]}."
                f"{capability[1]}, the kernels need 8.0 (hide it: CUDA_VISIBLE_DEVICES)"
            )
    return None
