"""Finds and loads the compiled operators; says why they are absent."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.abi3.so")


@functools.cache
def load() -> str | None:
    """Load the compiled library once. Returns None when it is loaded, else the reason why it is not."""
    if not LIBRARY.exists():
        return "no compiled code in this install (build it: VQFAST_BUILD=cpu pip install .)"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load with torch {torch.__version__} (rebuild: pip install .): {error}"
    return None
