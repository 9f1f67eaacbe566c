"""Extra memory of linear_softmax_entropy, which should not grow with the vocabulary; eager beside it."""

import subprocess
import sys

import pytest

from benchmarks.machine import ROOT
from benchmarks.memory import RESET

TARGET_MB = 8


@pytest.mark.skipif(not RESET.exists(), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.benchmark(group="extra memory of linear_softmax_entropy (the time is a process's)")
@pytest.mark.parametrize("classes", [32000, 152064])
def test_extra_memory(classes, benchmark, say):
    def measure():
        for who in ("ours", "eager"):
            command = [sys.executable, "-m", "benchmarks.memory", who, str(classes)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            megabytes[who] = round(float(done.stdout), 1)

    megabytes: dict[str, float] = {}
    benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info |= {f"{who}_extra_mb": value for who, value in megabytes.items()}
    ours, eager = megabytes["ours"], megabytes["eager"]
    mark = "" if ours <= TARGET_MB else f"  above the target of {TARGET_MB} MB"
    say(f"linear_softmax_entropy, {classes} classes: {ours} MB beyond inputs and results, eager {eager} MB{mark}")
