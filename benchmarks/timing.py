"""Timing of calls in turn, and the exponent of a scaling curve."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

WARM_UP = 2  # rounds, before one that says how many rounds fit into the budget
BUDGET = 0.8  # seconds per row
ROUNDS = (15, 200)
SUPERLINEAR = 1.15
"""An exponent above this is marked: over a 16-fold range the largest case then takes 1.5 times its linear share, which
noise of a few percent does not reach."""


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(benchmark: Any, calls: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Seconds of each call, round by round. A round runs every call once, so all meet the same state of the machine.

    pytest-benchmark times the last call and shows it in its table; the others run and are timed in its `setup`.
    Returns nothing but empty lists under --benchmark-disable.
    """
    *others, last = calls
    seconds: list[list[float]] = [[] for _ in others]

    def time_others() -> None:
        for call, into in zip(others, seconds, strict=True):
            into.append(timed(call))

    rounds = 1
    if not benchmark.disabled:
        for _ in range(WARM_UP):
            for call in calls:
                call()
        one_round = sum(timed(call) for call in calls)
        rounds = int(np.clip(BUDGET / one_round, *ROUNDS))
    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(last, setup=time_others, rounds=rounds, iterations=1)
    finally:
        gc.enable()
    return [[] for _ in calls] if benchmark.disabled else [*seconds, list(benchmark.stats.stats.data)]


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """b of seconds = a values^b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])
