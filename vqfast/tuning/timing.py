"""Milliseconds per phase, without stopping the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class PhaseTimer:
    """`mark(name)` ends a phase, and tells `listener` so. On CUDA the marks are events, read only by `milliseconds`."""

    def __init__(self, device: torch.device, listener: Callable[[str], None] | None = None) -> None:
        self._cuda = device.type == "cuda"
        self._listener = listener
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.mark("")

    def mark(self, name: str) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))
        if self._listener is not None:
            self._listener(name)

    def milliseconds(self) -> dict[str, float]:
        """Time per phase; a name that was marked several times is added up."""
        if not isinstance(last := self._marks[-1][1], float):
            last.synchronize()
        total: dict[str, float] = {}
        for (_, start), (name, end) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(start, float) and isinstance(end, float):
                elapsed = 1e3 * (end - start)
            else:
                elapsed = start.elapsed_time(end)  # type: ignore[union-attr, arg-type]
            total[name] = total.get(name, 0.0) + elapsed
        return total
