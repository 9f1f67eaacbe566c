"""The tuner: one model, one configuration, any number of inputs."""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqfast import backends
from vqfast.integrations.transformers import Normalisation, find_shortcuts, find_vision_tower
from vqfast.tuning import graph, step
from vqfast.tuning.candidates import IDENTITY, Preset
from vqfast.tuning.config import TuningConfig
from vqfast.tuning.inputs import check_values, checked, cleaned, value_checks
from vqfast.tuning.low_precision import bfloat16_forwards, outdated
from vqfast.tuning.patch import compiled_blocks, frozen, patched
from vqfast.tuning.result import Report, TuningResult, read, report
from vqfast.tuning.search import search
from vqfast.tuning.state import EpisodeState, checked_start
from vqfast.tuning.step import Subject
from vqfast.tuning.stream import Stream
from vqfast.tuning.telemetry import OperatorCalls, Telemetry, traced
from vqfast.tuning.timing import PhaseTimer

# Inputs that generation from a key-value cache has, or does without.
CONTINUED = {"input_ids", "attention_mask", "position_ids", "token_type_ids"}
CONTINUED |= {"image_sizes", "batch_num_images", "pixel_attention_mask"}
STREAMS = 1024  # at most; one is a few kilobytes
STREAM_CANDIDATES = 4  # presets per image; more are no better (docs/stream.md)
logger = logging.getLogger(__name__)
_tuners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[TestTimeTuner]] = weakref.WeakKeyDictionary()


class TuningError(RuntimeError):
    """The entropy of an answer is not finite and the configuration says on_failure="raise"."""


class TestTimeTuner:
    """Tunes a filter and LoRA on each input of a vision-language model, by the entropy of its own answer.

        (search) -> reset -> forward -> entropy -> backward -> AdamW -> forward (the answer)

    The model is changed only inside `tune`, `applied` and `generate`, and is put back even when they raise. The first
    forward of an episode is plain inference to rounding, and every sample of a batch is tuned by itself.

    Args:
        model: a vision-language model or image classifier of transformers (docs/models.md), or a registered one.
        config: what is tuned and how far.
        normalisation: the model's processor, or (mean, std) per channel of its pixels. By default read from the
            processor file beside the model, or known from the kind of vision encoder.
        begin_from: values to tune from, by parameter as in `TuningResult.parameters` but of one sample, in place of the
            identity: adapters of a checkpoint (vqfast.integrations.peft.load), or what an earlier result came to. The
            untuned answer is then the one with them.

    Attributes:
        layers: paths of the linear layers that take LoRA.
        frozen_dtype: "bfloat16" or None, and why, once something was tuned.
        graphs: captured steps on CUDA, with hits and misses.
        streams: running means by name of a stream.

    Raises:
        ValueError: no vision tower, no layer matched, unknown normalisation, or the model has a tuner already.

    Source: VQ-TTT, arXiv 2506.15645; search and guard are this project's.
    """

    __test__ = False  # not a test class, whatever pytest makes of its name

    def __init__(
        self,
        model: nn.Module,
        config: TuningConfig | None = None,
        *,
        normalisation: Normalisation | Any | None = None,
        begin_from: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config or TuningConfig()
        if not isinstance(self.config, TuningConfig):
            raise TypeError(f"config must be a vqfast.TuningConfig; got {type(config).__name__}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if any(p.is_inference() for p in model.parameters()):
            raise ValueError("the model was made inside torch.inference_mode(): load it outside, so gradients can pass")
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ValueError(f"{type(model).__name__} spreads batches over devices: pass model.module")
        if hasattr(model, "get_base_model"):
            raise ValueError(
                f"{type(model).__name__} of peft does not say what it takes: pass model.get_base_model(), which has "
                "the adapters in it, too"
            )
        devices = {str(p.device) for p in model.parameters()}
        if len(devices) > 1:
            raise ValueError(
                f"the model is spread over {', '.join(sorted(devices))} (device_map); tuning takes a model on one "
                'device: load it with device_map={"": device}, or smaller weights'
            )
        tower = find_vision_tower(model, self.config.lora_blocks, self.config.lora_targets, normalisation)
        if any(p.dtype == torch.float64 for p in tower.module.parameters()):
            raise ValueError("the vision tower is float64; tuning takes float32, bfloat16 or float16: model.float()")
        other = _tuners.get(tower.module)
        if other is not None and other() is not None:
            raise ValueError("this model already has a tuner; close it first: tuner.close()")
        parameters = inspect.signature(model.forward).parameters.values()
        arguments = frozenset("**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters)
        shortcuts = find_shortcuts(model, tower)
        compiled = compiled_blocks(tower, shortcuts) if self.config.mode == "compile" else {}
        self._subject: Subject | None = Subject(model, tower, shortcuts, self.config, arguments, compiled)  # or closed
        if not self._subject.takes(tower.pixel_argument):
            raise ValueError(
                f"{type(model).__name__}.forward takes no {tower.pixel_argument}, only {', '.join(sorted(arguments))}: "
                "vqfast.register_vision_tower(..., pixel_argument=...)"
            )
        if not (self._subject.answers and hasattr(model, "generate")) and self.config.answer_tokens > 1:
            raise ValueError(
                f"answer_tokens must be 1 for {type(model).__name__}, which writes no answer; "
                f"got {self.config.answer_tokens}"
            )
        self._begin_from = begin_from and checked_start(self.config, tower, begin_from)
        self._lock = threading.Lock()
        self._owner: int | None = None  # thread that holds the lock
        self._uncapturable: str | None = None  # why a CUDA graph could not be made
        self.frozen_dtype: tuple[str | None, str] = (None, "not asked for, or nothing was tuned yet")
        self._states: dict[tuple[int, torch.device], EpisodeState] = {}  # of the last batch size and device
        self._listener: Callable[[str], None] | None = None  # to the ends of phases
        self._undecided = self.config.frozen_dtype is not None
        self.layers = tuple(tower.targets)
        self.graphs = graph.StepGraphs()
        self.streams: OrderedDict[str, Stream] = OrderedDict()
        _tuners[tower.module] = weakref.ref(self)
        logger.info("filter %s before %s, LoRA on %s", self.config.filter, tower.path, ", ".join(self.layers))

    def __repr__(self) -> str:
        lines = ["TestTimeTuner(closed)"]
        if self._subject is not None:
            lines = [
                f"TestTimeTuner({type(self._subject.model).__name__})",
                f"  {self.config.filter or 'no'} filter before {self._subject.tower.path}",
            ]
        return "\n".join([*lines, *(f"  LoRA on {path}" for path in self.layers)])

    def __enter__(self) -> TestTimeTuner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model, which is as it was. The tuner cannot be used any more; closing again does nothing.

        Raises:
            RuntimeError: inside `applied`, or while another thread tunes.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "this tuner is in use (inside applied(), or in another thread): leave the block before closing"
            )
        try:
            if self._subject is not None:
                del _tuners[self._subject.tower.module]
            self._subject = None
            self._states.clear()
            self.graphs.clear()
            self.streams.clear()
        finally:
            self._lock.release()

    @property
    def mode(self) -> tuple[str, str]:
        """How a step runs, "eager", "graph" or "compile", and why."""
        if self.config.mode != "auto":
            return self.config.mode, "asked for by config.mode"
        if self._subject is None:
            return "eager", "the tuner is closed"
        if (why := graph.unavailable(self._subject.device) or self._uncapturable) is not None:
            return "eager", why
        return "graph", f"the model is on CUDA; a shape from its input {graph.SEEN} on, unless values lay it out"

    def tune(self, *, stream: str | None = None, **inputs: Any) -> TuningResult:
        """Run one episode on a batch, each sample by itself. Works inside torch.inference_mode() and autocast.

        Calls from several threads run one after the other.

        Args:
            stream: name of the stream that the images belong to; with search_scope="stream", and "" where it is None.
            inputs: what the processor returned: `input_ids` [B, L] (padded on the left), `pixel_values` (normalised,
                finite) as [B, C, H, W] or in its tiles or patches, `attention_mask` and whatever else the model takes.
                A classifier of images takes `pixel_values` alone; a contrastive model the texts of the classes, too.

        Raises:
            TypeError, ValueError: inputs that do not fit.
            TuningError: an entropy is not finite and config.on_failure is "raise".
            RuntimeError: the tuner is closed, or this thread is inside `applied`.
        """
        with self._in_use() as subject:
            return self._episode(subject, inputs, stream)[0]

    @contextlib.contextmanager
    def applied(self, result: TuningResult) -> Iterator[nn.Module]:
        """The model tuned as in `result` inside the block, plain again after it.

        Give it batches of the size and order that were tuned.

        Raises:
            ValueError: the result is of another configuration, or of a model with other layers.
            RuntimeError: the tuner is closed, or this thread is inside `applied` already.
        """
        with self._in_use() as subject, self._applied(subject, result):
            yield subject.model

    def generate(
        self,
        *,
        max_new_tokens: int | None = None,
        generation_config: Any = None,
        stream: str | None = None,
        **inputs: Any,
    ) -> Any:
        """Tune on the inputs, then answer: token ids [B, L + new], or what `model.generate` is told to return.

        Generation continues from the key-value cache of the answer forward: the vision tower does not run again. With
        beams or several sequences per sample, for models with more inputs per token than a mask and positions (Qwen,
        Mllama, Idefics 1) and for those whose cache forgets (sliding windows), it starts anew on the tuned model.

        Args:
            max_new_tokens: longest answer; 32 unless this or a generation_config is given.
            generation_config: as `model.generate` takes it.
            stream: as for `tune`.
            inputs: tensors as for `tune`; anything else is an option of `model.generate`, such as do_sample=True.

        Raises:
            as `tune`, and as `model.generate`.
        """
        inputs = cleaned(inputs)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        options = {name: value for name, value in inputs.items() if name not in tensors}
        options["generation_config"] = generation_config
        if max_new_tokens is not None or generation_config is None:
            options["max_new_tokens"] = 32 if max_new_tokens is None else max_new_tokens
        with self._in_use() as subject:
            model: Any = subject.model
            if not (subject.answers and hasattr(model, "generate")):
                raise TypeError(f"{type(model).__name__} writes no answer; use tune and its result.logits")
            defaults = generation_config or model.generation_config
            wide = any(
                (options.get(name) or getattr(defaults, name, None) or 1) > 1
                for name in ("num_beams", "num_return_sequences")
            )
            own_cache = options.get("cache_implementation") or getattr(defaults, "cache_implementation", None)
            anew = wide or own_cache is not None or self.config.objective == "marginal_entropy"
            anew |= bool(tensors.keys() - {subject.tower.pixel_argument, *CONTINUED})
            result, cache = self._episode(subject, tensors, stream, keep_cache=not anew)
            if cache is None:
                with self._applied(subject, result), frozen(model), torch.no_grad():
                    return model.generate(**tensors, **options)
            prompt: dict[str, Tensor] = {
                name: tensors[name] for name in ("input_ids", "attention_mask") if name in tensors
            }
            if "position_ids" in subject.arguments:
                # Those of the tuned forward. generate would count them from the mask, past the padding.
                positions = torch.arange(prompt["input_ids"].shape[1], device=prompt["input_ids"].device)
                prompt["position_ids"] = tensors.get("position_ids", positions.expand_as(prompt["input_ids"]))
            with frozen(model), torch.no_grad():
                return model.generate(**prompt, past_key_values=cache, **options)

    def profile(self, *, stream: str | None = None, trace: Path | None = None, **inputs: Any) -> TuningResult:
        """`tune`, with `result.telemetry`: operator calls per phase, kernel launches, peak memory.

        Runs the episode four times: to warm up, for the result and its times, for the calls, under torch's profiler.

        Args:
            trace: file to write the profiler's Chrome trace into, for chrome://tracing or Perfetto.
            stream, inputs: as for `tune`. A stream learns from every run.

        Raises:
            as `tune`.
        """

        def episode(listener: Callable[[str], None] | None = None) -> TuningResult:
            with self._in_use() as subject:
                self._listener = listener
                try:
                    return self._episode(subject, inputs, stream)[0]
                finally:
                    self._listener = None

        episode()
        result = episode()
        calls = OperatorCalls()
        with calls:
            episode(calls.mark)
        launches, peak = traced(episode, result.pixels.device, trace)
        return replace(result, telemetry=Telemetry(calls.by_phase, launches, peak))

    def stream(self, name: str = "") -> Stream:
        """The running means of a stream of images: inspect, `reset()`, `state_dict()`, `load_state_dict()`.

        It learns from every search, also where the step after it raises. A new name makes a new stream; beyond
        `STREAMS`, the one that was used longest ago is forgotten.

        Raises:
            ValueError: the tuner has no search_scope="stream".
        """
        if self.config.search_scope != "stream":
            raise ValueError(f"stream={name!r} needs a tuner with search_scope='stream'")
        if name not in self.streams:
            self.streams[name] = Stream(len(self.config.presets), self.config.max_candidates or STREAM_CANDIDATES)
        self.streams.move_to_end(name)
        while len(self.streams) > STREAMS:
            self.streams.popitem(last=False)
        return self.streams[name]

    @contextlib.contextmanager
    def _applied(self, subject: Subject, result: TuningResult) -> Iterator[None]:
        with torch.inference_mode(False):  # a state outlives the caller's mode
            state = self._state(subject, len(result))
        shapes = {name: value.shape for name, value in result.parameters.items()}
        if result.config != self.config or state.shapes() != shapes:
            raise ValueError("this result was tuned with another configuration or model; tune again with this one")
        state.load(result.parameters)
        with patched(subject.tower, state, result.images), self._backend():
            yield

    def _begun(self, subject: Subject, images: tuple[int, ...]) -> contextlib.AbstractContextManager[None]:
        """Where the model answers before it is tuned: with the values that episodes begin from."""
        if self._begin_from is None or self.config.answer_tokens == 1:
            return contextlib.nullcontext()
        state = self._state(subject, len(images))
        state.load(state.named(state.identity))
        return patched(subject.tower, state, images)

    def _episode(
        self, subject: Subject, inputs: dict[str, Any], stream: str | None, *, keep_cache: bool = False
    ) -> tuple[TuningResult, Any]:
        """The result, and the key-value cache of the answers where it is asked for and there is one."""
        pooled = self.config.search_scope == "stream"
        if stream is not None and not pooled:
            raise ValueError(f"stream={stream!r} needs a tuner with search_scope='stream'")
        with torch.inference_mode(False), torch.enable_grad(), self._backend():
            inputs, images = checked(subject, inputs)
            if (replayed := self._replayed(subject, inputs, keep_cache)) is not None:
                return replayed
            with frozen(subject.model):
                return self._run(subject, inputs, images, self.stream(stream or "") if pooled else None, keep_cache)

    def _run(
        self,
        subject: Subject,
        inputs: dict[str, Any],
        images: tuple[int, ...],
        stream: Stream | None,
        keep_cache: bool,
    ) -> tuple[TuningResult, Any]:
        """An episode in which the model's code may run."""
        timer = PhaseTimer(subject.device, self._listener)
        check_values(value_checks(subject, inputs).tolist())
        with self._begun(subject, images):
            prompt = step.prepare(subject, inputs, images)
        if self._undecided or outdated(subject):
            subject = self._decide_frozen_dtype(subject, prompt)
        timer.mark("prepare")
        recorded = self._recorded(subject, prompt, keep_cache)
        state = self._state(subject, prompt.samples) if recorded is None else recorded.state
        state.begin()
        untuned, presets, tried = None, [IDENTITY] * prompt.samples, 0
        if self.config.candidates is not None:
            untuned, presets, tried = search(subject, state, prompt, stream)
            timer.mark("search")
        outcome = self._captured(subject, recorded, keep_cache)
        if outcome is None:
            outcome = step.run(subject, state, prompt, timer.mark, keep_cache=keep_cache)
        else:
            timer.mark("step")
        told = report(untuned or outcome.start, outcome, state)
        result = self._result(told, presets, tried, state, prompt, timer)
        return result, step.kept_cache(outcome) if keep_cache else None

    def _result(
        self,
        told: Report,
        presets: list[Preset],
        evaluations: int,
        state: EpisodeState,
        prompt: step.Prompt,
        timer: PhaseTimer,
    ) -> TuningResult:
        parameters = state.snapshot()
        samples = read(told, presets)
        failed = [i for i, sample in enumerate(samples) if sample.failed]
        if failed and self.config.on_failure == "raise":
            raise TuningError(
                f"sample {failed[0]}: {samples[failed[0]].note}. Check the input and the model's dtype, or use "
                "on_failure='untuned' to get the untuned answer"
            )
        timer.mark("result")
        return TuningResult(
            samples=samples,
            evaluations=evaluations,
            timings_ms=timer.milliseconds(),
            logits=told.logits,
            parameters=parameters,
            config=self.config,
            pixels=prompt.pixels,
            images=prompt.images,
            plain=prompt.plain,
            thirds={path: adapter.thirds for path, adapter in state.adapters.items() if adapter.thirds},
            normalisation=state.normalisation,
        )

    def _replayed(self, subject: Subject, inputs: dict[str, Any], keep_cache: bool) -> tuple[TuningResult, Any] | None:
        """An episode that is a replay and nothing else: no code of the model runs, the host waits at its end alone.

        None where there is no graph for it, or a search, or more than one answer position to find first.
        """
        if self.config.candidates is not None or self.config.answer_tokens > 1:
            return None
        recorded = self.graphs.find(inputs, 1, keep_cache)
        if recorded is None:
            return None
        timer = PhaseTimer(subject.device, self._listener)
        recorded.fill(inputs)
        outcome = self.graphs.step(subject, recorded, keep_cache)
        recorded.check()
        timer.mark("step")
        assert recorded.report is not None
        told = recorded.report._replace(logits=recorded.report.logits.clone())
        presets = [IDENTITY] * len(told.table)
        prompt = recorded.prompt._replace(inputs=inputs)
        result = self._result(told, presets, 0, recorded.state, prompt, timer)
        return result, step.kept_cache(outcome) if keep_cache else None

    def _recorded(self, subject: Subject, prompt: step.Prompt, keep_cache: bool) -> graph.Recorded | None:
        """The graph for inputs of this shape, or None where steps run eagerly."""
        (mode, _), why = self.mode, graph.unavailable(subject.device)
        if mode == "graph" and why is not None:
            raise ValueError(f"mode='graph' cannot run: {why}. Use mode='auto'")
        if self.config.mode == "graph" and not prompt.fixed:
            raise ValueError("mode='graph' cannot hold tiles, sizes or patches that values lay out; use mode='auto'")
        if mode == "eager" or why is not None or not prompt.fixed:
            return None
        if self.config.mode == "auto" and not self.graphs.is_due(prompt, keep_cache):
            return None
        return self.graphs.prepare(subject, prompt, keep_cache, lambda: self._new_state(subject, prompt.samples))

    def _captured(self, subject: Subject, recorded: graph.Recorded | None, keep_cache: bool) -> step.Outcome | None:
        if recorded is None:
            return None
        try:
            outcome = self.graphs.step(subject, recorded, keep_cache)
            recorded.check()
            return outcome
        except graph.CaptureError as error:
            if self.config.mode != "auto":
                raise
            self._uncapturable = str(error)
            logger.warning("%s; steps run eagerly", error)
            return None

    def _decide_frozen_dtype(self, subject: Subject, prompt: step.Prompt) -> Subject:
        forwards, why = bfloat16_forwards(replace(subject, forwards={}), prompt)
        self._undecided = False
        self.frozen_dtype = (self.config.frozen_dtype if forwards else None), why
        if not forwards:
            logger.warning("frozen layers stay in float32: %s", why)
        self._subject = replace(subject, forwards=forwards)
        return self._subject

    def _backend(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.config.backend is None else backends.backend(self.config.backend)

    def _state(self, subject: Subject, samples: int) -> EpisodeState:
        """The state for a batch of that size, where the model is now. Only the last one is kept."""
        key = samples, subject.device
        if key not in self._states:
            self._states = {key: self._new_state(subject, samples)}
        return self._states[key]

    def _new_state(self, subject: Subject, samples: int) -> EpisodeState:
        normalisation = subject.tower.normalisation(subject.device)
        return EpisodeState(self.config, subject.tower.targets, normalisation, samples, self._begin_from)

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[Subject]:
        if self._owner == threading.get_ident():
            raise RuntimeError("this thread is inside applied(); leave the block first")
        with self._lock:
            if self._subject is None:
                raise RuntimeError("this tuner is closed; make a new one: TestTimeTuner(model, config)")
            self._owner = threading.get_ident()
            try:
                yield self._subject
            finally:
                self._owner = None
