"""What a measurement depends on beside the code: the processor, its rates, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
COPIED_VALUES = 1 << 26  # 256 MB of float32, more than any cache holds
MATRIX = 1024
ROUNDS = 30


@dataclass(frozen=True)
class Rates:
    """What this machine reached at the start of the session, bytes read and written and floating-point operations."""

    bytes_per_second: float
    flops_per_second: dict[torch.dtype, float]  # of a square matrix product

    def __str__(self) -> str:
        flops = ", ".join(f"{str(d)[6:]} {1e-9 * rate:.0f} GFLOP/s" for d, rate in self.flops_per_second.items())
        return f"copy {1e-9 * self.bytes_per_second:.1f} GB/s, matrix product {flops}"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine()


def device() -> str:
    """Name of this machine's results folder, as "amd-epyc-2-threads"."""
    return re.sub(r"[^a-z0-9]+", "-", f"{processor()} {torch.get_num_threads()} threads".lower()).strip("-")


def measure_rates() -> Rates:
    source, target = torch.ones(COPIED_VALUES), torch.zeros(COPIED_VALUES)
    copied = 2 * source.nbytes / _best(lambda: target.copy_(source))
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2, MATRIX, MATRIX, dtype=dtype).unbind()
        flops[dtype] = 2 * MATRIX**3 / _best(lambda a=a, b=b: a @ b)
    return Rates(copied, flops)


def _best(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def surroundings() -> dict[str, Any]:
    """The fields of a result row that are the same for the whole session."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    commit = _git("rev-parse", "--short", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return {
        "device": device(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "commit": commit,
        "dirty": None if changes is None else bool(changes),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command; None outside a repository."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
