"""Time of ours against one size at a time; the exponent of each curve is printed, and marked where it is superlinear.

The smallest case of a curve passes the correctness gate; all of them are timed in turn.
"""

import itertools

import pytest
import torch

from benchmarks import (
    gate,
    results,
    test_cosine_alignment,
    test_linear_softmax_entropy,
    test_lora_linear,
    test_lowrank_filter2d,
    test_softmax_entropy,
)
from benchmarks.rows import STEP, Row
from benchmarks.timing import SUPERLINEAR, exponent, in_turn

OPERATORS = (
    test_lowrank_filter2d,
    test_softmax_entropy,
    test_linear_softmax_entropy,
    test_lora_linear,
    test_cosine_alignment,
)
CURVES = [
    pytest.param(module.BENCHMARK, list(cases), id=f"{module.BENCHMARK.op}-{axis}")
    for module in OPERATORS
    for axis, cases in itertools.groupby(module.BENCHMARK.op.scaling, lambda case: case.name.partition("=")[0])
]


@pytest.fixture
def curve(benchmark, rates, record, say):
    """Call with the fields of a row that a curve's points share, then point name, timed call and work of each point."""

    def measure(fields, names, steps, works):
        seconds = in_turn(benchmark, steps)
        if benchmark.disabled:
            return
        axis, values = names[0].partition("=")[0], [float(name.partition("=")[2]) for name in names]
        figures = [results.figures(s, None, work, rates, torch.float32) for s, work in zip(seconds, works, strict=True)]
        found = exponent(values, [point["median_us"] for point in figures])
        times = ", ".join(
            f"{v:g}: {point['median_us'] / 1000:.3g} ms" for v, point in zip(values, figures, strict=True)
        )
        mark = f"  superlinear (above {SUPERLINEAR})" if found > SUPERLINEAR else ""
        say(f"{fields['op']} against {axis}: exponent {found:.2f}{mark}  [{times}]")
        benchmark.extra_info |= {"axis": axis, "exponent": round(found, 3)}
        for name, point in zip(names, figures, strict=True):
            record(op=fields["op"], case=name, dtype="float32", **fields["how"], peer=None, **point)

    return measure


@pytest.mark.benchmark(group="scaling, largest case")
@pytest.mark.parametrize(("subject", "cases"), CURVES)
def test_scaling(subject, cases, curve, ours):
    name = ours(subject.op, torch.float32)
    gate.checked(Row(subject, cases[0], torch.float32, STEP, name), name)
    steps, works = [], []
    for case in cases:
        inputs = subject.op.inputs(case, torch.float32)
        for leaf in subject.leaves:
            inputs[leaf].requires_grad_()
        call = gate.on_backend(subject, inputs, name)
        with torch.no_grad():
            weights = torch.randn_like(call.function(), dtype=torch.float32)
        steps.append(gate.step(call, weights, STEP))
        works.append(subject.work(inputs, STEP))
    how = {"direction": STEP, "backend": name}
    curve({"op": subject.op.name, "how": how}, [case.name for case in cases], steps, works)
