"""python -m benchmarks.memory {ours,eager} V: peak memory of one step of linear_softmax_entropy, in MB.

What it needs beyond its inputs and results: the peak of the resident set over the step, above the one before it. A
process of its own starts with nothing left over from earlier steps.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from benchmarks.peers import linear_log_softmax_entropy
from vqfast.ops import linear_softmax_entropy

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ROWS, WIDTH, WARM_UP = 8, 256, 512


def resident(field: str) -> int:
    """Bytes of VmRSS, or of VmHWM, its largest value since the last reset."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def extra_bytes(who: str, classes: int) -> int:
    def step(classes: int) -> None:
        result = function(hidden, weight[:classes], None)
        torch.autograd.grad(result, hidden, torch.ones_like(result))

    function = {"ours": linear_softmax_entropy, "eager": linear_log_softmax_entropy}[who]
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    weight = torch.randn(classes, WIDTH)
    step(WARM_UP)  # threads and libraries
    gc.collect()
    RESET.write_text("5")  # VmHWM := VmRSS
    before = resident("VmRSS")
    step(classes)
    return max(resident("VmHWM") - before - 4 * (hidden.numel() + ROWS), 0)


if __name__ == "__main__":
    print(1e-6 * extra_bytes(sys.argv[1], int(sys.argv[2])))
