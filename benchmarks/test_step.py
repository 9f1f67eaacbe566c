"""A whole step beside the irreducible one and beside peft, its operator calls and memory, and how its time grows."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from benchmarks import results, timing
from benchmarks import step as steps
from benchmarks.machine import ROOT
from benchmarks.memory import RESET
from benchmarks.step import (
    IRREDUCIBLE,
    MEMORY,
    OURS,
    OVER_PEFT,
    OVERHEAD,
    PEFT,
    SHARE,
    SIDES,
    TIME,
    Scene,
    percent_over,
    ratio,
    verdict,
)
from benchmarks.timing import SUPERLINEAR, exponent
from vqfast import TuningConfig
from vqfast.tuning.candidates import DEFAULT_PRESETS

TIGHT, LOOSE = 1e-4, 1e-2  # relative errors of entropies, before and after a step
PAIRS = {1: 60, 8: 6}  # at least, by batch: eight images take eight times as long
NARROW = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=4)
FOUR_LAYERS = steps.BASE | dict(num_hidden_layers=4)
GROWTH = {
    "batch": {n: lambda n=n: steps.embedded(n) for n in (1, 2, 4, 8)},
    "pixels": {n * n: lambda n=n: steps.vit(FOUR_LAYERS, n, 16) for n in (112, 160, 224, 288)},
    "blocks": {
        n: lambda n=n: steps.vit(NARROW, 224, 16)._replace(config=TuningConfig(lora_blocks=n)) for n in (0, 4, 8, 12)
    },
    "candidates": {n: lambda n=n: steps.embedded(candidates=DEFAULT_PRESETS[:n]) for n in (2, 4, 9)},
    "steps": {n: lambda n=n: steps.embedded(steps=n) for n in (1, 2, 4)},
}
IN_ITSELF = ("candidates", "steps")  # axes on which the irreducible step stays the same


@pytest.fixture
def chosen(request):
    """Call with a scene: the same with the first of --backend."""
    backend = next(iter(request.config.option.backend), None)
    return lambda scene: scene._replace(config=dataclasses.replace(scene.config, backend=backend))


@pytest.fixture
def note(record, rates):
    """Call with a case, the scene and seconds per side: records ours alone, and beside each of the others."""

    def append(case: str, scene: Scene, seconds: dict[str, list[float]]) -> None:
        for peer in (None, *(name for name in seconds if name != OURS)):
            figures = results.figures(seconds[OURS], peer and seconds[peer], None, rates, torch.float32)
            if peer:  # over pairs: a few percent are less than a machine drifts by
                figures["speedup"] = float(f"{ratio(seconds[peer], seconds[OURS]):.4g}")
            how = dict(dtype="float32", direction="tune", backend=scene.config.backend or "automatic", peer=peer)
            record(op="step", case=case, **how, **figures)

    return append


def timed(benchmark, sides):
    """Seconds of each side, round by round; pytest-benchmark shows the last side. Empty under --benchmark-disable."""
    seconds = timing.in_turn(benchmark, [*sides.values()])
    return {} if benchmark.disabled else dict(zip(sides, seconds, strict=True))


def right(call, *arguments):
    try:
        call(*arguments)
    except AssertionError as error:
        pytest.fail(f"wrong, therefore not timed: {error}", pytrace=False)


def milliseconds(seconds):
    return ", ".join(f"{name} {1000 * sorted(times)[len(times) // 2]:.4g} ms" for name, times in seconds.items())


@pytest.mark.benchmark(group="step, vit_b16")
@pytest.mark.parametrize("batch", [1, 8])
def test_vit(batch, benchmark, chosen, note, say, monkeypatch):
    scene, row = chosen(steps.vit_b16(batch)), "vit_b16" if batch == 1 else f"vit_b16, batch {batch}"
    sides = {IRREDUCIBLE: steps.irreducible(scene), PEFT: steps.peft(scene)}
    if batch > 1:
        sides |= {"peft, one adapter for all": steps.peft(scene, alone=False)}
    ours = steps.unguarded(scene)
    right(steps.check_untuned, ours, sides[IRREDUCIBLE](), TIGHT)
    right(steps.check, PEFT, ours, sides[PEFT](), TIGHT, LOOSE)
    sides[OURS] = steps.ours(scene)  # last: pytest-benchmark's table shows it
    monkeypatch.setattr(timing, "ROUNDS", (PAIRS[batch], timing.ROUNDS[1]))
    seconds = timed(benchmark, sides)
    if not seconds:
        return
    base = seconds[IRREDUCIBLE]
    peers = ", ".join(f"{name} {percent_over(seconds[name], base):.3g} %" for name in seconds if name.startswith(PEFT))
    figures = {OVERHEAD: percent_over(seconds[OURS], base), OVER_PEFT: ratio(seconds[PEFT], seconds[OURS])}
    benchmark.extra_info |= figures
    say(f"{row}: {', '.join(verdict(row, name, value) for name, value in figures.items())}")
    say(f"{row}: overhead of {peers}; {milliseconds(seconds)}, {len(base)} pairs")
    note(f"vit_b16-{batch}x3x224x224", scene, seconds)


@pytest.mark.benchmark(group="step, operator calls (the time is the counting's)")
def test_operator_calls(benchmark, chosen, say):
    def count():
        counts.update({name: steps.operator_calls(side(scene)) for name, side in SIDES.items()})

    scene, counts = chosen(steps.vit_b16()), {}
    benchmark.pedantic(count, rounds=1)
    calls = {name: counted.total() for name, counted in counts.items()}
    benchmark.extra_info |= calls
    share = 100 * (calls[OURS] - calls[IRREDUCIBLE]) / (calls[PEFT] - calls[IRREDUCIBLE])
    say(f"vit_b16: {verdict('vit_b16', SHARE, share)} of peft's beyond the irreducible ones; {calls}")
    beyond = counts[OURS] - counts[IRREDUCIBLE]
    say(f"vit_b16: ours beyond irreducible: {', '.join(f'{n} {name}' for name, n in beyond.most_common())}")


@pytest.mark.skipif(not RESET.exists(), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.benchmark(group="step, peak memory (the time is a process's)")
def test_memory(benchmark, say):
    def measure():
        for side in SIDES:
            command = [sys.executable, "-m", "benchmarks.step", side]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            megabytes[side] = round(float(done.stdout), 1)

    megabytes: dict[str, float] = {}
    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info |= {f"{side}_mb": value for side, value in megabytes.items()}
    ours, peft = (100 * (megabytes[side] / megabytes[IRREDUCIBLE] - 1) for side in (OURS, PEFT))
    say(f"vit_b16: {verdict('vit_b16', MEMORY, ours)}, peft {peft:.3g} %; peaks in MB beyond the model: {megabytes}")


@pytest.mark.benchmark(group="step, embedded")
@pytest.mark.parametrize("candidates", [None, "default"], ids=["plain", "search"])
def test_embedded(candidates, benchmark, chosen, note, say):
    scene, row = chosen(steps.embedded(candidates=candidates)), "embedded, search" if candidates else "embedded"
    sides = {"forward": steps.inference(scene), IRREDUCIBLE: steps.irreducible(scene)}
    right(steps.check_untuned, steps.unguarded(scene), sides[IRREDUCIBLE](), TIGHT)
    sides[OURS] = steps.ours(scene)
    seconds = timed(benchmark, sides)
    if not seconds:
        return
    ms = 1000 * sorted(seconds[OURS])[len(seconds[OURS]) // 2]
    over = ", ".join(f"{ratio(seconds[OURS], seconds[name]):.2f} x {name}" for name in ("forward", IRREDUCIBLE))
    say(f"{row}: {verdict(row, TIME, ms)}, {over}; {milliseconds(seconds)}")
    note(row.replace(", ", "-"), scene, seconds)


@pytest.mark.benchmark(group="step, growth, largest case")
@pytest.mark.parametrize("axis", GROWTH)
def test_growth(axis, benchmark, chosen, note, say):
    """Time over the irreducible step at the same point, or over the first point where that one does not change."""
    scenes = {value: chosen(make()) for value, make in GROWTH[axis].items()}
    first = next(iter(scenes.values()))
    right(steps.check_untuned, steps.unguarded(first), steps.irreducible(first)(), TIGHT)
    sides = {} if axis in IN_ITSELF else {(IRREDUCIBLE, v): steps.irreducible(scene) for v, scene in scenes.items()}
    seconds = timed(benchmark, sides | {(OURS, v): steps.ours(scene) for v, scene in scenes.items()})
    if not seconds:
        return
    ours = {value: seconds[OURS, value] for value in scenes}
    base = {value: seconds.get((IRREDUCIBLE, value), ours[next(iter(scenes))]) for value in scenes}
    positive = [value for value in scenes if value]
    found = exponent(positive, [sorted(ours[value])[len(ours[value]) // 2] for value in positive])
    mark = f"  superlinear (above {SUPERLINEAR})" if found > SUPERLINEAR else ""
    unit = "the first" if axis in IN_ITSELF else IRREDUCIBLE
    times = ", ".join(f"{value}: {ratio(ours[value], base[value]):.3f}" for value in scenes)
    say(f"step against {axis}: exponent {found:.2f}{mark}  [time over {unit}: {times}]")
    benchmark.extra_info |= {"axis": axis, "exponent": round(found, 3)}
    for value in positive:  # a curve has logarithmic axes
        note(f"{axis}={value}", scenes[value], {OURS: ours[value]})
