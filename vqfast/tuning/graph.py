"""The step as one CUDA graph per shape of its inputs."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vqfast.tuning.state import EpisodeState
from vqfast.tuning.step import Outcome, Prompt, Subject, run

CAPACITY = 8  # graphs; one keeps the activations of a step
WARM_UP = 2  # steps before a capture: kernels are compiled, workspaces allocated


class CaptureError(RuntimeError):
    """The model does something in its forward or backward that a CUDA graph cannot hold, as waiting for the device."""


@dataclass
class Recorded:
    """A captured step: what to fill, what to replay, what it leaves."""

    prompt: Prompt  # static
    state: EpisodeState
    replay: Callable[[], None] | None = None
    outcome: Outcome | None = None  # overwritten by every replay


class StepGraphs:
    """Captured steps by shape of the inputs, the least recently used of them dropped beyond `CAPACITY`.

    Attributes:
        hits, misses: steps that were replayed, and that were captured first.
        reserved_bytes: device memory that the captures asked for; graphs share it, since one runs at a time.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.hits = self.misses = self.reserved_bytes = 0
        self._recorded: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._recorded)

    def __repr__(self) -> str:
        used = f"{len(self)} of at most {self.capacity}, {self.reserved_bytes >> 20} MB"
        return f"StepGraphs({used}, {self.hits} hits, {self.misses} misses)"

    def clear(self) -> None:
        """Drop every graph and its memory."""
        self._recorded.clear()
        self._pool, self.reserved_bytes = None, 0

    def prepared(
        self, subject: Subject, prompt: Prompt, keep_cache: bool, make_state: Callable[[], EpisodeState]
    ) -> Recorded:
        """The graph for inputs of this shape, filled with them; captured by `step` when it is new."""
        key = _key(subject, prompt, keep_cache)
        if key in self._recorded:
            self._recorded.move_to_end(key)
            recorded = self._recorded[key]
            for name, value in prompt.inputs.items():
                if isinstance(value, Tensor):
                    recorded.prompt.inputs[name].copy_(value)
            recorded.prompt.valid.copy_(prompt.valid)
            return recorded
        static = {name: v.clone() if isinstance(v, Tensor) else v for name, v in prompt.inputs.items()}
        recorded = self._recorded[key] = Recorded(Prompt(static, prompt.valid.clone()), make_state())
        while len(self) > self.capacity:
            self._recorded.popitem(last=False)
        return recorded

    def step(self, subject: Subject, recorded: Recorded, keep_cache: bool) -> Outcome:
        """One step from the state's start. Its tensors are good until the next."""
        if recorded.replay is None:
            self.misses += 1
            try:
                self._record(subject, recorded, keep_cache)
            except BaseException:  # half a capture is no graph
                self._recorded = OrderedDict((k, r) for k, r in self._recorded.items() if r is not recorded)
                raise
        else:
            self.hits += 1
        assert recorded.replay is not None
        assert recorded.outcome is not None
        recorded.replay()
        return recorded.outcome

    def _record(self, subject: Subject, recorded: Recorded, keep_cache: bool) -> None:
        def body() -> None:
            recorded.outcome = run(subject, recorded.state, recorded.prompt, lambda _: None, keep_cache=keep_cache)

        recorded.replay, self._pool, reserved = capture(body, self._pool)
        self.reserved_bytes += reserved


def capture(body: Callable[[], None], pool: Any) -> tuple[Callable[[], None], Any, int]:
    """Run `body` a few times, then record it: (replay, memory pool, bytes that it reserved).

    Raises:
        CaptureError: it runs, but cannot be recorded.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved()
    try:
        with without_checks(), torch.cuda.graph(graph, pool=pool):
            body()
    except RuntimeError as error:
        raise CaptureError(f"this model's step cannot be captured in a CUDA graph: {error}") from error
    return graph.replay, graph.pool(), torch.cuda.memory_reserved() - before


def unavailable(device: torch.device) -> str | None:
    """Why steps of a model on `device` cannot be captured, or None."""
    return None if device.type == "cuda" else f"the model is on {device}, not on CUDA"


@contextlib.contextmanager
def without_checks() -> Iterator[None]:
    """Inside the block transformers does not compare numbers of image tokens and features, and prints neither.

    Both wait for the device. The steps before a capture do compare, and the number is part of a graph's key.
    """
    switch = {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"}
    with mock.patch.dict(os.environ, switch), mock.patch.object(Tensor, "__format__", return_value="not read"):
        yield


def _key(subject: Subject, prompt: Prompt, keep_cache: bool) -> Hashable:
    """All that a captured step depends on and does not read from its static inputs."""
    token = getattr(getattr(subject.model, "config", None), "image_token_id", None)
    ids = prompt.inputs.get("input_ids")
    image_tokens = None if token is None or ids is None else (ids == token).sum(1).tolist()
    return (
        tuple(
            (name, tuple(v.shape), v.dtype) if isinstance(v, Tensor) else (name, repr(v))
            for name, v in sorted(prompt.inputs.items())
        ),
        tuple(image_tokens or ()),
        tuple(prompt.valid.shape),
        keep_cache,
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        hash(tuple(p.data_ptr() for p in subject.model.parameters())),  # a model that was moved, or given new weights
    )
