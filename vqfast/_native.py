"""Finds and loads the compiled operators; says why they are absent."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

TARGETS = ("portable", "avx2", "avx512")  # values of VQFAST_CPU_TARGET: widest instruction set (not of dct.h)
LIBRARY = Path(__file__).with_name("_C.abi3.so")


@functools.cache
def load() -> str | None:
    """Load the compiled library once. Returns None when it is loaded, else the reason why it is not.

    Raises:
        ValueError: the environment variable VQFAST_CPU_TARGET names no instruction set.
    """
    if (limit := os.environ.get("VQFAST_CPU_TARGET")) not in (None, *TARGETS):
        raise ValueError(f"VQFAST_CPU_TARGET must be one of {', '.join(TARGETS)}; got {limit!r}")
    if not LIBRARY.exists():
        return "no compiled code in this install (build it: VQFAST_BUILD=cpu pip install .)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load with torch {torch.__version__} (rebuild: pip install .): {error}"
    return None
