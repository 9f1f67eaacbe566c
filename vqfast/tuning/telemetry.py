"""What an episode costs beside time: operator calls, kernel launches, memory."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

NO_WORK = ("_unsafe_view", "promote_types")  # operators that neither compute nor move anything, beside views


@dataclass(frozen=True)
class Telemetry:
    """Of one episode.

    Attributes:
        operator_calls: by phase; calls that reach the dispatcher, without views. An operator of vqfast counts as one. A
            replayed CUDA graph makes none.
        launches: kernels and graphs started on the device; None on the CPU.
        peak_memory_bytes: most memory that the episode held at a time, beyond what was held before it.
    """

    operator_calls: dict[str, int]
    launches: int | None
    peak_memory_bytes: int

    @property
    def total_calls(self) -> int:
        return sum(self.operator_calls.values())


class OperatorCalls(TorchDispatchMode):
    """Counts operator calls by name, and by phase; `mark` ends one. Views and the profiler's own do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.by_phase: dict[str, int] = {}
        self._counted = 0

    def mark(self, phase: str) -> None:
        if phase:
            self.by_phase[phase] = self.by_phase.get(phase, 0) + self.by_name.total() - self._counted
        self._counted = self.by_name.total()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled() and function._can_decompose():  # else the parts arrive by themselves
            with self:
                return function.decompose(*args, **kwargs or {})
        name = function.name().partition("::")[2].partition(".")[0]
        if function.namespace != "profiler" and not function.is_view and name not in NO_WORK:
            self.by_name[name] += 1
        return function(*args, **kwargs or {})


def traced(run: Callable[[], object], device: torch.device, trace: Path | None) -> tuple[int | None, int]:
    """Run under torch's profiler: (kernel launches, peak memory in bytes). Writes a Chrome trace where asked to."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    if on_cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with profile(activities=activities, profile_memory=not on_cuda, acc_events=True) as profiler:
        run()
    if on_cuda:
        launches = sum(event.name.startswith(("cudaLaunchKernel", "cudaGraphLaunch")) for event in profiler.events())
        peak = torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder:
        file = trace or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        if not on_cuda:
            launches, peak = None, _peak_of_trace(json.loads(file.read_text()))
    return launches, peak


def _peak_of_trace(trace: Any) -> int:
    """Largest sum of the allocations so far."""
    held = peak = 0
    changes = [event for event in trace["traceEvents"] if event["name"] == "[memory]"]
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
