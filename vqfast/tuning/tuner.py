"""The tuner: one model, one configuration, any number of inputs."""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vqfast import backends
from vqfast.integrations.transformers import Normalisation, VisionTower, find_vision_tower
from vqfast.tuning import step
from vqfast.tuning.config import TuningConfig
from vqfast.tuning.patch import frozen, patched
from vqfast.tuning.result import TuningResult, summarise
from vqfast.tuning.state import EpisodeState
from vqfast.tuning.timing import PhaseTimer

logger = logging.getLogger(__name__)
_tuners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[TestTimeTuner]] = weakref.WeakKeyDictionary()


class TuningError(RuntimeError):
    """The entropy of an answer is not finite and the configuration says on_failure="raise"."""


class TestTimeTuner:
    """Tunes a filter and LoRA on each input of a vision-language model, by the entropy of its own answer.

        reset -> (search) -> forward -> entropy -> backward -> AdamW -> forward (the answer)

    The model is changed only inside `tune`, `applied` and `generate`, and is put back even when they raise. The first
    forward of an episode is exactly plain inference, and every sample of a batch is tuned by itself.

    Args:
        model: a transformers vision-language model whose vision tower takes pixels [B, C, H, W], one image per sample.
        config: what is tuned and how far.
        normalisation: (mean, std) per channel of the processor's pixels. By default read from the processor file beside
            the model, or known from the kind of vision encoder.

    Attributes:
        layers: paths of the linear layers that take LoRA.

    Raises:
        ValueError: no vision tower, no layer matched, unknown normalisation, or the model has a tuner already.

    Source: VQ-TTT, arXiv 2506.15645; search and guard are this project's.
    """

    __test__ = False  # not a test class, whatever pytest makes of its name

    def __init__(
        self, model: nn.Module, config: TuningConfig | None = None, *, normalisation: Normalisation | None = None
    ) -> None:
        self.config = config or TuningConfig()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        if any(p.is_inference() for p in model.parameters()):
            raise ValueError("the model was made inside torch.inference_mode(): load it outside, so gradients can pass")
        tower = find_vision_tower(model, self.config.lora_blocks, self.config.lora_targets, normalisation)
        if any(p.dtype == torch.float64 for p in tower.module.parameters()):
            raise ValueError("the vision tower is float64; tuning takes float32, bfloat16 or float16: model.float()")
        other = _tuners.get(tower.module)
        if other is not None and other() is not None:
            raise ValueError("this model already has a tuner; close it first: tuner.close()")
        self._target: tuple[nn.Module, VisionTower] | None = (model, tower)  # None once closed
        self._busy = False
        self._states: dict[tuple[int, torch.device], EpisodeState] = {}  # of the last batch size and device
        self.layers = tuple(tower.linears)
        _tuners[tower.module] = weakref.ref(self)
        logger.info("filter %s before %s, LoRA on %s", self.config.filter, tower.path, ", ".join(self.layers))

    def __repr__(self) -> str:
        lines = ["TestTimeTuner(closed)"]
        if self._target is not None:
            model, tower = self._target
            lines = [
                f"TestTimeTuner({type(model).__name__})",
                f"  {self.config.filter or 'no'} filter before {tower.path}",
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
        if self._busy:
            raise RuntimeError(
                "this tuner is in use (inside applied(), or in another thread): leave the block before closing"
            )
        if self._target is not None:
            del _tuners[self._target[1].module]
        self._target = None
        self._states.clear()

    def tune(self, **inputs: Any) -> TuningResult:
        """Run one episode on a batch, each sample by itself. Works inside torch.inference_mode() and autocast.

        Args:
            inputs: what the processor returned: `input_ids` [B, L] (padded on the left), `pixel_values` [B, C, H, W]
                (normalised, finite), `attention_mask` and whatever else the model takes.

        Raises:
            TypeError, ValueError: inputs that do not fit.
            TuningError: an entropy is not finite and config.on_failure is "raise".
            RuntimeError: the tuner is closed or in use.
        """
        return self._run(inputs)[0]

    @contextlib.contextmanager
    def applied(self, result: TuningResult) -> Iterator[nn.Module]:
        """The model tuned as in `result` inside the block, plain again after it.

        Give it batches of the size and order that were tuned.

        Raises:
            ValueError: the result is of another configuration, or of a model with other layers.
            RuntimeError: the tuner is closed or in use.
        """
        with self._in_use() as (model, tower):
            with torch.inference_mode(False):  # a state outlives the caller's mode
                state = self._state(len(result), tower, next(model.parameters()).device)
            shapes = {name: value.shape for name, value in result.parameters.items()}
            if result.config != self.config or {n: p.shape for n, p in state.parameters()} != shapes:
                raise ValueError("this result was tuned with another configuration or model; tune again with this one")
            state.load(result.parameters)
            with patched(tower, state), self._backend():
                yield model

    def generate(self, *, max_new_tokens: int | None = None, generation_config: Any = None, **inputs: Any) -> Any:
        """Tune on the inputs, then answer: token ids [B, L + new], or what `model.generate` is told to return.

        Generation continues from the key-value cache of the answer forward: the vision tower does not run again. With
        beams or several sequences per sample it starts anew on the tuned model.

        Args:
            max_new_tokens: longest answer; 32 unless this or a generation_config is given.
            generation_config: as `model.generate` takes it.
            inputs: tensors as for `tune`; anything else is an option of `model.generate`, such as do_sample=True.

        Raises:
            as `tune`, and as `model.generate`.
        """
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        options = {name: value for name, value in inputs.items() if name not in tensors}
        options["generation_config"] = generation_config
        if max_new_tokens is not None or generation_config is None:
            options["max_new_tokens"] = 32 if max_new_tokens is None else max_new_tokens
        result, episode = self._run(tensors)
        assert self._target is not None  # _run has checked it
        model: Any = self._target[0]
        defaults = generation_config or model.generation_config
        wide = any(
            (options.get(name) or getattr(defaults, name, None) or 1) > 1
            for name in ("num_beams", "num_return_sequences")
        )
        cache = None if wide else step.kept_cache(episode)
        if cache is None:
            with self.applied(result), frozen(model), torch.no_grad():
                return model.generate(**tensors, **options)
        prompt: dict[str, Tensor] = {name: tensors[name] for name in ("input_ids", "attention_mask") if name in tensors}
        if "position_ids" in inspect.signature(model.forward).parameters:
            # Those of the tuned forward. generate would count them from the mask, past the padding.
            positions = torch.arange(prompt["input_ids"].shape[1], device=prompt["input_ids"].device)
            prompt["position_ids"] = tensors.get("position_ids", positions.expand_as(prompt["input_ids"]))
        with self._in_use(), frozen(model), torch.no_grad():
            return model.generate(**prompt, past_key_values=cache, **options)

    def _run(self, inputs: dict[str, Any]) -> tuple[TuningResult, step.Episode]:
        with (
            self._in_use() as (model, tower),
            torch.inference_mode(False),
            torch.enable_grad(),
            self._backend(),
            frozen(model),
        ):
            device = next(model.parameters()).device
            timer = PhaseTimer(device)
            prompt = step.prepare(model, _checked(inputs, device), self.config.answer_tokens)
            timer.mark("prepare")
            state = self._state(prompt.valid.shape[0], tower, device)
            episode = step.run(model, tower, self.config, state, prompt, timer)
            samples, logits = summarise(episode, state)
            failed = [i for i, sample in enumerate(samples) if sample.failed]
            if failed and self.config.on_failure == "raise":
                raise TuningError(
                    f"sample {failed[0]}: {samples[failed[0]].note}. Check the input and the model's dtype, or use "
                    "on_failure='untuned' to get the untuned answer"
                )
            timer.mark("result")
            result = TuningResult(
                samples=samples,
                timings_ms=timer.milliseconds(),
                logits=logits,
                parameters=state.snapshot(),
                config=self.config,
                pixels=prompt.pixels,
                normalisation=tower.normalisation(device),
            )
            return result, episode

    def _backend(self) -> contextlib.AbstractContextManager[None]:
        """The configuration's backend; without one the caller's choice stands."""
        return backends.backend(self.config.backend) if self.config.backend else contextlib.nullcontext()

    def _state(self, samples: int, tower: VisionTower, device: torch.device) -> EpisodeState:
        key = (samples, device)
        if key not in self._states:
            self._states = {key: EpisodeState(self.config, tower.linears, samples, device)}
        return self._states[key]

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[tuple[nn.Module, VisionTower]]:
        if self._target is None:
            raise RuntimeError("this tuner is closed; make a new one: TestTimeTuner(model, config)")
        if self._busy:
            raise RuntimeError("this tuner is in use (inside applied(), or in another thread); leave the block first")
        try:
            self._busy = True
            yield self._target
        finally:
            self._busy = False


def _checked(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The inputs as tensors that gradients can be taken through, or an error that says what is wrong with them."""
    for name, dims, shape in (("input_ids", 2, "[B, L]"), ("pixel_values", 4, "[B, C, H, W]")):
        value = inputs.get(name)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"tune needs {name} as a tensor {shape}; got {type(value).__name__}. "
                "Pass the processor's output: tuner.tune(**processor(images=..., text=..., return_tensors='pt'))"
            )
        if value.dim() != dims:
            raise ValueError(f"{name} must be {shape}; got {list(value.shape)}")
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    if ids.shape[0] != pixels.shape[0] or ids.numel() == 0:
        raise ValueError(
            "input_ids and pixel_values must have one row per sample (one image each) and at least one sample; "
            f"got {list(ids.shape)} and {list(pixels.shape)}"
        )
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(f"{name} is on {value.device}, the model on {device}; move one of them")
    if not pixels.is_floating_point():
        raise TypeError(f"pixel_values must be floating point, as the processor gives them; got {pixels.dtype}")
    if not bool(pixels.isfinite().all()):
        raise ValueError("pixel_values contain NaN or infinite values; check the image before the processor")
    if refused := [name for name in ("past_key_values", "labels", "inputs_embeds") if inputs.get(name) is not None]:
        raise ValueError(f"tune takes no {refused[0]}: pass the processor's output alone")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {list(ids.shape)}; got {list(mask.shape)}")
    if isinstance(mask, Tensor) and not bool(mask[:, -1].all()):
        raise ValueError("prompts must be padded on the left: processor.tokenizer.padding_side = 'left'")
    return {n: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for n, v in inputs.items()}
