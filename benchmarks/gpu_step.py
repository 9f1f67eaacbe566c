"""A whole step on a GPU: `python -m benchmarks.gpu_step FOLDER`, which benchmarks/gpu.sh runs.

Every side runs eagerly and as one CUDA graph, on the same parameters, in turn; a time ends when the device is done and
the host knows. Rows are appended to FOLDER/<gpu>/step.jsonl. --rehearse runs tiny models on the CPU, nothing captured.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks import step as steps
from benchmarks.gpu import device_name
from benchmarks.step import (
    IRREDUCIBLE,
    LARGE,
    MEMORY,
    OURS,
    OVER_GRAPHED_PEFT,
    OVER_INFERENCE,
    OVER_PEFT,
    OVERHEAD,
    PEFT,
    TIME,
    Answer,
    Scene,
    percent_over,
    ratio,
    verdict,
)
from vqfast.tuning.graph import capture

GRAPHED = " graphed"
INFERENCE = "inference"
WARM_UP = 3
ROUNDS = (10, 60)
SECONDS = 6.0  # of a model's timed rounds
TIGHT, LOOSE = 2e-2, 1e-1  # relative errors of entropies in bfloat16, before and after the step
TEXT = dict(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=2)
TINY_TEXT = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
Call = Callable[[], Any]


class Device:
    """The GPU: captures, waits, counts its memory."""

    name, modes, dtype = "cuda", ("eager", "graph"), torch.bfloat16

    def captured(self, call: Call) -> Call:
        kept: list[Any] = []
        replay, *_ = capture(lambda: kept.__setitem__(slice(None), [call()]), None)

        def step() -> Any:
            replay()
            return kept[0]

        return step

    def wait(self) -> None:
        torch.cuda.synchronize()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def forget(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Rehearsal(Device):
    """The CPU, on which nothing is captured and no memory counted."""

    name, modes, dtype = "cpu", ("eager", "eager"), torch.float32

    def captured(self, call: Call) -> Call:
        return call

    def wait(self) -> None:
        pass

    def allocated(self) -> int:
        return 0

    def peak(self) -> int:
        return 1 << 20

    def forget(self) -> None:
        pass


def scenes(device: Device) -> Iterator[tuple[str, Callable[[], Scene]]]:
    on = dict(device=device.name, dtype=device.dtype)
    if isinstance(device, Rehearsal):
        yield "vit_l14_336", lambda: steps.vit(TINY, 32, 8, **on)
        yield "llava_7b", lambda: steps.llava(TINY, TINY_TEXT, 32, 8, **on)
    else:
        yield "vit_l14_336", lambda: steps.vit(LARGE, 336, 14, **on)
        yield "llava_7b", lambda: steps.llava(LARGE, TEXT, 336, 14, **on)


def makers(scene: Scene, device: Device) -> dict[str, Callable[[], Call]]:
    """What builds each side. A tuner takes a model for itself, so each gets modules of its own, parameters shared."""
    graphed_peft = device.name == "cuda"

    def ours(mode: str) -> Call:
        config = dataclasses.replace(scene.config, mode=mode)
        return steps.ours(scene._replace(model=steps.shared_copy(scene.model), config=config))

    return {
        INFERENCE + GRAPHED: lambda: device.captured(steps.inference(scene)),
        IRREDUCIBLE: lambda: steps.irreducible(scene),
        IRREDUCIBLE + GRAPHED: lambda: device.captured(steps.irreducible(scene)),
        OURS: lambda: ours(device.modes[0]),
        OURS + GRAPHED: lambda: ours(device.modes[1]),
        PEFT: lambda: steps.peft(scene),
        PEFT + GRAPHED: lambda: device.captured(steps.peft(scene, capturable=graphed_peft)),
    }


def check(side: str, expected: Answer, call: Call) -> None:
    """Raises AssertionError where the side's answers are not ours."""
    actual = call()
    if side.startswith(IRREDUCIBLE):
        steps.check_untuned(expected, actual, TIGHT)
    elif side.startswith((OURS, PEFT)):
        steps.check(side, expected, actual, TIGHT, LOOSE)


def measure(case: str, scene: Scene, device: Device) -> list[dict[str, Any]]:
    """A row per side, with `error` where it is wrong or fails."""
    expected = steps.unguarded(scene)
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for side, make in makers(scene, device).items():
        rows[side] = row = dict(op="step", case=case, dtype=str(device.dtype)[6:], implementation=side)
        try:
            device.forget()
            before = device.allocated()
            call = make()
            check(side, expected, call)
            for _ in range(WARM_UP):
                call()
            device.wait()
            row["peak_mb"] = round(1e-6 * (device.peak() - before), 1)
            if side in (IRREDUCIBLE, OURS, PEFT):
                row["operator_calls"] = steps.operator_calls(call).total()
            calls[side] = call
        except Exception as error:  # the others are measured
            row["error"] = f"{type(error).__name__}: {error}"[:500]
    for side, seconds in in_turn(calls, device).items():
        p20, median, p80 = (round(1e6 * float(t), 1) for t in np.percentile(seconds, (20, 50, 80)))
        rows[side] |= dict(median_us=median, p20_us=p20, p80_us=p80, seconds=seconds)
    return list(rows.values())


def in_turn(calls: dict[str, Call], device: Device) -> dict[str, list[float]]:
    """Seconds of each call, round by round, until the host knows that the device is done."""

    def timed(call: Call) -> float:
        device.wait()
        start = time.perf_counter()
        call()
        device.wait()
        return time.perf_counter() - start

    first = sum(map(timed, calls.values()))
    rounds = 2 if isinstance(device, Rehearsal) else int(np.clip(SECONDS / max(first, 1e-6), *ROUNDS))
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    gc.disable()
    try:
        for _ in range(rounds):
            for side, call in calls.items():
                seconds[side].append(timed(call))
    finally:
        gc.enable()
    return seconds


def summary(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line per side, then what ours comes to beside the others and its targets."""
    case = rows[0]["case"]
    fine = {row["implementation"]: row for row in rows if "error" not in row}
    for row in rows:
        shown = row.get("error") or (
            f"{row['median_us'] / 1000:.3f} ms, {row['peak_mb']} MB"
            + (f", {row['operator_calls']} operator calls" if "operator_calls" in row else "")
        )
        yield f"step {case}: {row['implementation']:<20} {shown}"

    def beside(side: str, other: str, figure: Callable[[Any, Any], float]) -> float | None:
        return figure(fine[side]["seconds"], fine[other]["seconds"]) if {side, other} <= fine.keys() else None

    graphed = OURS + GRAPHED
    figures = [
        (TIME, fine[graphed]["median_us"] / 1000 if graphed in fine else None, "ms"),
        (OVERHEAD, beside(graphed, IRREDUCIBLE + GRAPHED, percent_over), "%"),
        (OVER_PEFT, beside(PEFT, graphed, ratio), "x"),
        (OVER_GRAPHED_PEFT, beside(PEFT + GRAPHED, graphed, ratio), "x"),
        (OVER_INFERENCE, beside(graphed, INFERENCE + GRAPHED, ratio), "x"),
        ("overhead of eager", beside(OURS, IRREDUCIBLE, percent_over), "%"),
    ]
    if {graphed, IRREDUCIBLE + GRAPHED} <= fine.keys():
        ours, least = (fine[side]["peak_mb"] for side in (graphed, IRREDUCIBLE + GRAPHED))
        figures.append((MEMORY, 100 * (ours / least - 1), "%"))
    for name, value, unit in figures:
        if value is not None:
            yield f"step {case}: {verdict(case, name, value, unit)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="tiny models on the CPU, no figure worth keeping")
    options = parser.parse_args()
    device = Rehearsal() if options.rehearse else Device()
    surroundings = machine.surroundings() | {"device": device_name(device.name)}
    file = options.folder / surroundings["device"] / "step.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    wrong = False
    try:
        for case, make in scenes(device):
            rows = measure(case, make(), device)
            with file.open("a") as lines:
                for row in rows:
                    kept = {name: value for name, value in row.items() if name != "seconds"}
                    lines.write(json.dumps(kept | surroundings) + "\n")
            print(*summary(rows), sep="\n", flush=True)
            wrong |= any("error" in row for row in rows if row["implementation"].startswith(OURS))
    except KeyboardInterrupt:
        print("step: stopped")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
