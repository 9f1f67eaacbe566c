"""The step as one CUDA graph per shape of its inputs."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqfast import backends
from vqfast.tuning.inputs import check_values, value_checks
from vqfast.tuning.result import Report, report
from vqfast.tuning.state import EpisodeState
from vqfast.tuning.step import PIXELS, Outcome, Prompt, Subject, run

CAPACITY = 8  # graphs; one keeps the activations of a step
SEEN = 3  # inputs of a shape before it is captured unasked: a capture costs several steps
REMEMBERED = 1024  # shapes that are counted
WARM_UP = 2  # steps before a capture: kernels are compiled, workspaces allocated
_capturing = threading.Lock()  # CUDA takes one capture at a time per process


class CaptureError(RuntimeError):
    """The model does something in its forward or backward that a CUDA graph cannot hold, as waiting for the device."""


@dataclass
class Recorded:
    """A captured step: what to fill, what to replay, what it leaves. The last three are overwritten by every replay."""

    prompt: Prompt  # static
    state: EpisodeState
    model: Placement
    replay: Callable[[], None] | None = None
    outcome: Outcome | None = None
    report: Report | None = None  # as if the start were the untuned answer, which it is without a search
    checks: Tensor | None = None  # [4]

    def fill(self, inputs: dict[str, Any]) -> None:
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self.prompt.inputs[name].copy_(value, non_blocking=True)

    def check(self) -> None:
        """Raises ValueError where the inputs of the last replay cannot be tuned on."""
        assert self.checks is not None
        *values, image_tokens = self.checks.tolist()
        check_values(values)
        if not image_tokens:
            raise ValueError("the prompts have another number of image tokens than the images have features")


class StepGraphs:
    """Captured steps by shape of the inputs, the least recently used of them dropped beyond `capacity`.

    Attributes:
        hits, misses: steps that were replayed, and that were captured first.
        reserved_bytes: device memory that the captures asked for; graphs share it, since one runs at a time.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.hits = self.misses = self.reserved_bytes = 0
        self._recorded: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._recorded)

    def __repr__(self) -> str:
        used = f"{len(self)} of at most {self.capacity}, {self.reserved_bytes >> 20} MB"
        return f"StepGraphs({used}, {self.hits} hits, {self.misses} misses)"

    def clear(self) -> None:
        """Drop every graph and its memory."""
        self._recorded.clear()
        self._seen.clear()
        self._pool, self.reserved_bytes = None, 0

    def find(self, inputs: dict[str, Any], positions: int, keep_cache: bool) -> Recorded | None:
        """The captured step for inputs of this shape and answer positions, on the model where it is now."""
        recorded = self._recorded.get(key := _key(inputs, positions, keep_cache))
        if recorded is None or recorded.replay is None or not recorded.model.unchanged():
            return None
        self._recorded.move_to_end(key)
        return recorded

    def is_due(self, prompt: Prompt, keep_cache: bool) -> bool:
        """Whether a shape has been seen often enough to be captured."""
        key = _key(prompt.inputs, prompt.valid.shape[1], keep_cache)
        self._seen[key] = self._seen.get(key, 0) + 1
        self._seen.move_to_end(key)
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return self._seen[key] >= SEEN

    def prepare(
        self, subject: Subject, prompt: Prompt, keep_cache: bool, make_state: Callable[[], EpisodeState]
    ) -> Recorded:
        """The step for inputs of this shape, filled with them; `step` captures it when it is new."""
        positions = prompt.valid.shape[1]
        recorded = self.find(prompt.inputs, positions, keep_cache)
        if recorded is not None:
            recorded.fill(prompt.inputs)
            recorded.prompt.valid.copy_(prompt.valid)
            return recorded
        static = {name: v.clone() if isinstance(v, Tensor) else v for name, v in prompt.inputs.items()}
        static_prompt = prompt._replace(inputs=static, valid=prompt.valid.clone())
        recorded = Recorded(static_prompt, make_state(), Placement(subject.model))
        self._recorded[key := _key(prompt.inputs, positions, keep_cache)] = recorded
        self._recorded.move_to_end(key)
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
        inputs, state = recorded.prompt.inputs, recorded.state

        def image_tokens() -> Tensor:  # [B], or [1] where there are none to count
            if subject.image_token is None or not subject.answers:
                return torch.zeros(1, device=inputs[PIXELS].device)
            return (inputs["input_ids"] == subject.image_token).sum(1)  # type: ignore[no-any-return]

        counted = image_tokens()

        def body() -> None:
            recorded.outcome = outcome = run(subject, state, recorded.prompt, lambda _: None, keep_cache=keep_cache)
            recorded.report = report(outcome.start, outcome, state)
            same = (image_tokens() == counted).all().float()
            recorded.checks = torch.cat([value_checks(subject, inputs), same[None]])

        recorded.replay, self._pool, reserved = capture(body, self._pool)
        self.reserved_bytes += reserved


def capture(body: Callable[[], None], pool: Any) -> tuple[Callable[[], None], Any, int]:
    """Run `body` a few times, then record it: (replay, memory pool, bytes that it reserved).

    Raises:
        CaptureError: it runs, but cannot be recorded.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with _capturing, torch.cuda.stream(side):  # also where a failed capture would leave this thread on its stream
        for _ in range(WARM_UP):
            body()
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved()
        recording = torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local")
        try:
            with without_checks(), recording:
                body()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise CaptureError(f"this model's step cannot be captured in a CUDA graph: {error}") from error
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay, graph.pool(), torch.cuda.memory_reserved() - before


def unavailable(device: torch.device) -> str | None:
    """Why steps of a model on `device` cannot be captured, or None."""
    if device.type != "cuda":
        return f"the model is on {device}, not on CUDA"
    if device.index not in (None, torch.cuda.current_device()):
        return f"the model is on {device}, which is not the current device: torch.cuda.set_device({device.index})"
    return None


@contextlib.contextmanager
def without_checks() -> Iterator[None]:
    """Inside the block transformers does not compare numbers of image tokens and features, and prints neither.

    Both wait for the device. The steps before a capture do compare, and every replay counts the image tokens. Changes
    what is global to the process: for one thread at a time.
    """
    name, original = "TRANSFORMERS_DISABLE_TORCH_CHECK", Tensor.__format__
    before = os.environ.get(name)
    os.environ[name] = "1"
    Tensor.__format__ = lambda *_: "not read"  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.__format__ = original  # type: ignore[method-assign]
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class Placement:
    """Where a model's parameters and buffers are: a graph reads them there, whatever the model does later."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        tables = [table for m in modules for table in (m._parameters, m._buffers, m._modules)]
        self._entries = [(table, name, value) for table in tables for name, value in table.items()]
        tensors = [value for _, _, value in self._entries if isinstance(value, Tensor)]
        self._addresses = [(tensor, tensor.data_ptr()) for tensor in tensors]

    def unchanged(self) -> bool:
        """No module, parameter or buffer was replaced or moved. Values may have changed; hooks are not looked at."""
        return all(table.get(name) is value for table, name, value in self._entries) and all(
            tensor.data_ptr() == address for tensor, address in self._addresses
        )


def _key(inputs: dict[str, Any], positions: int, keep_cache: bool) -> Hashable:
    """What a captured step depends on, beside the model, and does not read from its static inputs."""
    described = tuple(
        (name, tuple(v.shape), v.dtype, v.device) if isinstance(v, Tensor) else (name, repr(v))
        for name, v in sorted(inputs.items())
    )
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return described, positions, keep_cache, autocast, backends.selected()
