"""Throughput of studies.paradox with one and two workers on Ray, into docs/scale.md: python -m studies.scale

About five minutes on two cores that nothing else uses.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from studies import data, units
from studies.demo import surroundings
from studies.readme import splice

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
IMAGES, CONDITIONS, METHODS = 400, ("fog:3", "gaussian_noise:3"), ("untuned", "one_step", "search")
WORKERS = (1, 2)
ANSWERS = 1_000_000 * 10 * len(METHODS)  # the plan of the page: images, conditions, methods, one question each


def measure(workers: int) -> dict[str, Any]:
    """Answers per second once every worker answers, and the rows."""
    dataset = data.load("digits", "test", IMAGES, 0)
    conditions = tuple(units.conditions(CONDITIONS, (), dataset.kind))
    plan = units.Plan(dataset, ("digits",), conditions, METHODS, seed=0, answer_tokens=1, threads=1, digest="")
    planned, rows, times = plan.units(), [], []
    for row in tqdm(units.rows(plan, planned, "local", workers), f"{workers} workers", len(planned), unit="unit"):
        rows.append(row)
        times.append(time.perf_counter())
    begin = len(rows) // 5  # by then every actor has started
    answers = sum(len(row["right"]) for row in rows[begin + 1 :])
    return dict(workers=workers, per_second=answers / (times[-1] - times[begin]), rows=rows)


def table(runs: list[dict[str, Any]]) -> str:
    """What the page quotes."""
    rows = runs[0]["rows"]
    size, answers = sum(len(json.dumps(row)) + 1 for row in rows), sum(len(row["right"]) for row in rows)
    lines = ["| method | ms per answer, one worker |", "|---|---|"]
    for method in METHODS:
        each = [1000 * row["seconds"] / len(row["right"]) for row in rows if row["method"] == method]
        lines.append(f"| {method} | {statistics.median(each):.1f} |")
    lines += ["", "| workers | answers per second | a million images, days | core hours |", "|---|---|---|---|"]
    for run in runs:
        hours = ANSWERS / run["per_second"] / 3600
        figures = f"{run['per_second']:.0f} | {hours / 24:.1f} | {hours * run['workers']:.0f}"
        lines.append(f"| {run['workers']} | {figures} |")
    about = surroundings(seed=0)
    machine = about["machine"].rpartition(",")[0]  # its threads are the driver's
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += [
        "",
        f"A row holds {answers / len(rows):.0f} answers in {size / len(rows):,.0f} bytes, {size / answers:.0f} per "
        f"answer: {ANSWERS * size / answers / 1e9:.1f} GB for the plan. {os.cpu_count()} cores, {machine}; "
        f"{versions}; {about['date']}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    PAGE.write_text(splice(PAGE.read_text(), "scale", table([measure(workers) for workers in WORKERS])))


if __name__ == "__main__":
    main()
