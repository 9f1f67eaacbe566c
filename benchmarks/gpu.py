"""Every operator on a GPU beside its peers: `python -m benchmarks.gpu FOLDER`; benchmarks/gpu.sh runs the tests, too.

A call is captured in a CUDA graph and checked against float64 before it is timed. `median_us` is cold: a buffer larger
than the last-level cache is written before each replay. `hot_us` is one of ten calls in a graph, one after the other.
Peers are captured, too, so launches cost the same. --rehearse runs the same code on small shapes without a GPU.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import gate, machine
from benchmarks import test_cosine_alignment as cosine
from benchmarks import test_film_adapter as film
from benchmarks import test_linear_softmax_entropy as head
from benchmarks import test_lora_linear as lora
from benchmarks import test_lowrank_filter2d as lowrank
from benchmarks import test_softmax_entropy as softmax
from benchmarks import test_spectral_gain2d as spectral
from benchmarks.peers import COMPILED, PLAIN
from benchmarks.rows import FORWARD, STEP, Benchmark, Row, available
from vqfast.testing.cases import Case
from vqfast.testing.recorder import Recorder

FLUSHED = 1 << 28  # bytes written between two cold calls: several times the last-level cache
COPIED = 1 << 30
REPEATS = 10
SLOW_US = 1000  # of all calls together: hot ones are then timed a few times only
BUDGET_US = 3e5  # of the cold calls of a case and direction
ROUNDS = (9, 40)
BENCHMARKS = {
    lowrank.BENCHMARK: ("dense", "separable", "slices-compiled"),
    spectral.BENCHMARK: ("rfft",),
    lora.BENCHMARK: (PLAIN, "addmm", "bmm", "textbook-compiled", "bmm-compiled"),
    softmax.BENCHMARK: ("log_softmax", "log_softmax-compiled"),
    head.BENCHMARK: ("log_softmax", "log_softmax-compiled"),
    cosine.BENCHMARK: ("cosine_similarity", "cosine_similarity-compiled"),
    film.BENCHMARK: ("linears", "linears-compiled"),
}
REHEARSED = ("k7r1", "radix_3_and_5", "rows_no_bias", "own", "rows", "one_position", "positions_bias")
OURS = ("cuda", "triton")
OWN_ONLY = ("bmm", "bmm-compiled")  # peers of lora_linear that take an adapter per sample
SHARED_ONLY = ("addmm", "textbook-compiled")


@dataclass(frozen=True)
class Target:
    """What a row must reach: at most `us`, at least `percent` of the copy bandwidth, or against a peer's time."""

    us: float | None = None
    percent: float | None = None
    peer: str | None = None
    times_peer: float | None = None

    def __str__(self) -> str:
        if self.us is not None:
            return f"<= {self.us:g} us"
        return f">= {self.percent:g} % of copy" if self.percent is not None else f"<= {self.times_peer:g} x {self.peer}"


TARGETS = {
    ("lowrank_filter2d", "64x3x336x336-k7-r1", FORWARD): Target(percent=75),
    ("lowrank_filter2d", "64x3x336x336-k7-r1", "bwd"): Target(percent=45),
    ("lowrank_filter2d", "1x3x336x336-k7-r1", FORWARD): Target(us=5),
    ("lowrank_filter2d", "1x3x336x336-k7-r1", "bwd"): Target(us=9),
    ("softmax_entropy", "32x152064", FORWARD): Target(us=9),
    ("softmax_entropy", "256x152064", FORWARD): Target(percent=80),
    **{
        ("linear_softmax_entropy", f"{rows}x4096x{classes}", STEP): Target(us=us)
        for classes, one, several in ((32000, 75, 150), (152064, 340, 700))
        for rows, us in ((1, one), (8, several), (32, several))
    },
    ("lora_linear", "577x1024x1024-r8", STEP): Target(peer=PLAIN, times_peer=1.35),
    ("lora_linear", "32x577x1024x1024-r8-own", STEP): Target(peer=PLAIN, times_peer=1.45),
}
"""In the dtype that the row of the figure names: bfloat16, but float32 for softmax_entropy."""


class Graphs(NamedTuple):
    """A call, captured once, and several times in a row."""

    once: Callable[[], None]
    repeated: Callable[[], None]


class Clock:
    """Times calls in turn, each as a captured graph, in microseconds."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSHED // 4, device="cuda")

    def capture(self, call: Callable[[], object], repeats: int) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and fills caches that a capture must not
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call()
        return graph.replay

    def graphs(self, call: Callable[[], object]) -> Graphs:
        return Graphs(self.capture(call, 1), self.capture(call, REPEATS))

    def _time(self, replay: Callable[[], None], *, cold: bool) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self.flush.zero_()
        start.record()
        replay()
        end.record()
        return start, end

    def in_turn(self, calls: list[Graphs]) -> list[tuple[list[float], float]]:
        """(cold times, median hot time) of each call."""
        first = [self._time(graphs.once, cold=True) for graphs in calls]
        torch.cuda.synchronize()
        first_us = sum(1e3 * start.elapsed_time(end) for start, end in first)
        cold: list[list] = [[] for _ in calls]
        hot: list[list] = [[] for _ in calls]
        for _ in range(int(np.clip(BUDGET_US / first_us, *ROUNDS))):
            for i, graphs in enumerate(calls):
                cold[i].append(self._time(graphs.once, cold=True))
                if len(hot[i]) < ROUNDS[0] or first_us < SLOW_US:
                    hot[i].append(self._time(graphs.repeated, cold=False))
        torch.cuda.synchronize()
        colds, hots = ([[1e3 * start.elapsed_time(end) for start, end in of] for of in both] for both in (cold, hot))
        return [(c, float(np.median(h)) / REPEATS) for c, h in zip(colds, hots, strict=True)]


class Rehearsal:
    """Stands for the clock without a GPU: calls once, times nothing worth keeping."""

    def graphs(self, call: Callable[[], object]) -> Graphs:
        return Graphs(call, call)  # type: ignore[arg-type]

    def in_turn(self, calls: list[Graphs]) -> list[tuple[list[float], float]]:
        found = []
        for call, _ in calls:
            start = time.perf_counter()
            call()
            found.append(([1e6 * (time.perf_counter() - start)], 1e6 * (time.perf_counter() - start)))
        return found


def copy_rate(device: str) -> float:
    """Bytes per second that a large copy reads and writes."""
    if device == "cpu":
        return machine.measure_rates().bytes_per_second
    source = torch.empty(COPIED // 4, device=device).normal_()
    target = torch.empty_like(source)
    clock = Clock()
    ((cold, _),) = clock.in_turn([clock.graphs(lambda: target.copy_(source))])
    return 2 * COPIED / (1e-6 * float(np.median(cold)))


def device_name(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"rehearsal-{machine.processor()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def peers_of(benchmark: Benchmark, case: Case, dtype: torch.dtype) -> Iterator[str]:
    own = case.name.endswith("own")
    for peer in BENCHMARKS[benchmark]:
        skipped = SHARED_ONLY if own else OWN_ONLY
        if benchmark is lora.BENCHMARK and peer in skipped:
            continue
        if peer == "rfft" and dtype != torch.float32:  # cuFFT has no bfloat16, and float16 of powers of two only
            continue
        yield peer


def backward(row: Row, name: str) -> Callable[[], object] | None:
    """The backward operator alone, with the arguments of a step; None where the gradient leaves with the value."""
    inputs, weights, *_ = gate.subject(row.benchmark, row.case, row.dtype, row.device)
    with Recorder() as recorder:
        gate.step(gate.on_backend(row.benchmark, inputs, name), weights, STEP)()
    for operator, arguments in recorder.calls:
        if operator.name().endswith("_bwd"):
            return functools.partial(operator, *arguments)
    return None


def measure_case(
    benchmark: Benchmark, case: Case, dtype: torch.dtype, clock: Clock | Rehearsal, rate: float, *, compiled: bool
) -> Iterator[dict[str, Any]]:
    """Rows of a case: ours, reference and eager peers, or compiled peers; with `error` where one is wrong or fails."""
    device = "cuda" if isinstance(clock, Clock) else "cpu"
    ours = [name for name in available(benchmark.op, dtype, device) if name in OURS]
    peers = [name for name in peers_of(benchmark, case, dtype) if name.endswith(COMPILED) == compiled]
    for direction in (FORWARD, "bwd", STEP):
        if compiled:
            names = peers if direction != "bwd" else []
        else:
            names = ours if direction == "bwd" else [*ours, "reference", *peers]
        labels = dict(op=benchmark.op.name, case=case.name, dtype=str(dtype)[6:], direction=direction)
        graphs: dict[str, Graphs] = {}
        for name in names:
            row = Row(benchmark, case, dtype, STEP, name, device)
            try:
                checked = gate.checked(row, name)
                weights = gate.subject(benchmark, case, dtype, device).weights
                call = backward(row, name) if direction == "bwd" else gate.step(checked, weights, direction)
                if call is not None:
                    graphs[name] = clock.graphs(call)
            except Exception as error:  # of one implementation; the others are still measured
                yield labels | dict(implementation=name, error=f"{type(error).__name__}: {error}"[:400])
        if not graphs:
            continue
        times = clock.in_turn(list(graphs.values()))
        inputs = gate.subject(benchmark, case, dtype, device).inputs
        forward, step = (benchmark.work(inputs, d).bytes for d in (FORWARD, STEP))
        moved = {FORWARD: forward, STEP: step, "bwd": step - forward}[direction]
        for name, (cold, hot) in zip(graphs, times, strict=True):
            p20, median, p80 = (round(float(t), 2) for t in np.percentile(cold, (20, 50, 80)))
            figures = dict(median_us=median, p20_us=p20, p80_us=p80, hot_us=round(hot, 2))
            yield labels | dict(implementation=name, **figures, percent_of_copy=round(100e6 * moved / rate / median, 1))


def best(rows: list[dict[str, Any]], names: Callable[[str], bool], figure: str) -> dict[str, Any] | None:
    return min((r for r in rows if names(r["implementation"])), key=lambda r: r[figure], default=None)


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line per case and direction: the faster of our backends, what is next to it, the target."""
    yield (
        f"{'operator':<23}{'case':<25}{'':<10}{'':<8}{'ours':<8}{'cold us':>9}{'hot us':>9}{'% copy':>7}{'eager/':>8}"
        f"{'compl/':>8}  target"
    )
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault((row["op"], row["case"], row["dtype"], row["direction"]), []).append(row)
    for (op, case, dtype, direction), group in groups.items():
        small = case.startswith(("1x3x", "577x", "1x152064"))  # stays in cache, as it does within a step
        figure = "hot_us" if small else "median_us"
        ours = best(group, lambda n: n in OURS, figure)
        if ours is None:
            continue
        ratios = []
        for wanted in (
            lambda n: n not in (*OURS, PLAIN) and not n.endswith(COMPILED),
            lambda n: n.endswith(COMPILED),
        ):
            peer = best(group, wanted, figure)
            ratios.append(f"{peer[figure] / ours[figure]:.2f}" if peer else "")
        target = (
            TARGETS.get((op, case, direction))
            if dtype == ("float32" if op == "softmax_entropy" else "bfloat16")
            else None
        )
        verdict = ""
        if target is not None:
            plain = best(group, lambda n, t=target: n == t.peer, figure)
            if target.us is not None:
                met = ours[figure] <= target.us
            elif target.percent is not None:
                met = ours["percent_of_copy"] >= target.percent
            else:
                met = plain is not None and ours[figure] <= target.times_peer * plain[figure]
            share = f" ({ours[figure] / plain[figure]:.2f})" if plain else ""
            verdict = f"{target}{share} {'met' if met else 'NOT MET'}"
        yield (
            f"{op:<23}{case:<25}{dtype:<10}{direction:<8}{ours['implementation']:<8}{ours['median_us']:>9.1f}"
            f"{ours['hot_us']:>9.1f}{ours['percent_of_copy']:>7.0f}{ratios[0]:>8}{ratios[1]:>8}  {verdict}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="small shapes, no GPU, no figure worth keeping")
    parser.add_argument("-k", dest="operators", default="", help="only operators whose name contains this")
    parser.add_argument("--seconds", type=float, default=3600, help="compiled peers are left out after so long")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    device = "cpu" if options.rehearse else "cuda"
    clock: Clock | Rehearsal = Rehearsal() if options.rehearse else Clock()
    rate = copy_rate(device)
    surroundings = machine.surroundings() | {"device": device_name(device), "copy_gbps": round(1e-9 * rate)}
    print(surroundings, flush=True)
    file = options.folder / surroundings["device"] / "operators.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def measure(compiled: bool) -> None:
        for benchmark, case, dtype in selected(options.operators, options.rehearse):
            if compiled and time.monotonic() > deadline:
                print("out of time for the other compiled peers", flush=True)
                return
            for row in measure_case(benchmark, case, dtype, clock, rate, compiled=compiled):
                rows.append(row)
                with file.open("a") as lines:
                    lines.write(json.dumps(row | surroundings) + "\n")
            gate.subject.cache_clear()
            gc.collect()
            torch.cuda.empty_cache()
            print(benchmark.op, case, str(dtype)[6:], "compiled peers" if compiled else "", flush=True)

    try:
        measure(compiled=False)
        measure(compiled=True)
    except KeyboardInterrupt:
        print("stopped")
    print(*summary(rows), sep="\n")
    errors = [row for row in rows if "error" in row]
    for row in errors:
        print("ERROR", *(row[name] for name in ("op", "case", "dtype", "direction", "implementation", "error")))
    sys.exit(any(row["implementation"] in OURS for row in errors))


def selected(operators: str, rehearse: bool) -> Iterator[tuple[Benchmark, Case, torch.dtype]]:
    for benchmark in BENCHMARKS:
        op = benchmark.op
        if operators not in op.name:
            continue
        cases = [case for case in op.cases if case.name in REHEARSED] if rehearse else op.gpu_benchmarks
        for case in map(spectral.with_spectrum, cases) if benchmark is spectral.BENCHMARK else cases:
            yield benchmark, case, torch.bfloat16
            if rehearse or benchmark is not head.BENCHMARK:  # a head in float32 is not what a GPU runs
                yield benchmark, case, torch.float32


if __name__ == "__main__":
    main()
