"""Result rows: one JSON object per line in <folder>/<device>/<op>.jsonl, appended and never rewritten."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import ROOT, Rates
from benchmarks.rows import Work

FOLDER = ROOT / "benchmarks" / "results"
FIELDS = (
    "op", "case", "dtype", "direction", "backend", "peer",
    "median_us", "p20_us", "p80_us", "peer_median_us", "speedup", "gbps", "gflops", "floor_us",
    "device", "torch", "triton", "cuda", "commit", "dirty", "date",
)  # fmt: skip
KEY = ("op", "case", "dtype", "direction", "peer")
Result = dict[str, Any]


def figures(ours: Sequence[float], peer: Sequence[float] | None, work: Work | None, rates: Rates, dtype: Any) -> Result:
    """The measured fields of a row from seconds per round; None where there is no peer or no work to count."""
    p20, median, p80 = (float(x) for x in np.percentile(ours, (20, 50, 80)))
    peer_median = None if peer is None else float(np.median(peer))
    floor = None
    if work is not None:
        floor = max(work.flops / rates.flops_per_second[dtype], work.bytes / rates.bytes_per_second)
    found = {
        "median_us": 1e6 * median,
        "p20_us": 1e6 * p20,
        "p80_us": 1e6 * p80,
        "peer_median_us": peer_median and 1e6 * peer_median,
        "speedup": peer_median and peer_median / median,
        "gbps": work and 1e-9 * work.bytes / median,
        "gflops": work and 1e-9 * work.flops / median,
        "floor_us": floor and 1e6 * floor,
    }
    return {name: value and float(f"{value:.4g}") for name, value in found.items()}


def append(folder: Path, rows: Iterable[Result]) -> None:
    for row in rows:
        assert tuple(row) == FIELDS, f"a row has {FIELDS}; got {tuple(row)}"
        file = folder / row["device"] / f"{row['op']}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(json.dumps(row, allow_nan=False) + "\n")


def load(folder: Path) -> list[Result]:
    """Every row of a device's folder, in the order they were appended to each file."""
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def latest(rows: Iterable[Result]) -> list[Result]:
    """The last row of every op, case, dtype, direction and peer."""
    return list({tuple(row[name] for name in KEY): row for row in rows}.values())
