"""One episode: (search) -> reset -> forward -> entropy -> backward -> update -> forward, and what is kept of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast import ops
from vqfast.integrations.transformers import Shortcuts, VisionTower, is_contrastive
from vqfast.tuning.config import TuningConfig
from vqfast.tuning.objective import answer_entropy, marginal_entropy, over_positions, views_of
from vqfast.tuning.patch import is_hooked, lean, patched, replaced
from vqfast.tuning.state import EpisodeState

PIXELS = "pixel_values"


def is_fixed(inputs: dict[str, Any], samples: int) -> bool:
    """Every sample has as many images of the same size, whatever the values are."""
    told = any(inputs.get(name) is not None for name in ("image_sizes", "image_grid_thw", "pixel_attention_mask"))
    pixels = inputs[PIXELS]
    tiles = pixels.dim() == 5 and pixels.shape[1] > 1  # models drop those that are all zero
    return len(pixels) == samples and not told and not tiles


@dataclass(frozen=True)
class Subject:
    """A model under tuning."""

    model: nn.Module
    tower: VisionTower
    shortcuts: Shortcuts
    config: TuningConfig
    arguments: frozenset[str]  # names that the model's forward takes, "**" where it takes any other
    forwards: dict[nn.Module, Callable[..., Any]]  # of frozen parts: compiled, or in bfloat16

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def image_token(self) -> int | None:
        """Id of the token that stands for a patch in the prompt; None where the configuration names none."""
        return getattr(getattr(self.model, "config", None), "image_token_id", None)

    @property
    def answers(self) -> bool:
        """It takes a prompt and writes an answer; else it is a classifier of images, by texts or by itself."""
        return "input_ids" in self.arguments and not is_contrastive(self.model)

    def takes(self, name: str) -> bool:
        return name in self.arguments or "**" in self.arguments

    def call(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs under the model's own names."""
        name = self.tower.pixel_argument
        return inputs if name == PIXELS else {name if n == PIXELS else n: value for n, value in inputs.items()}


class Prompt(NamedTuple):
    """Model inputs that end on the answer positions. The pixels are `pixel_values`, whatever the model calls them."""

    inputs: dict[str, Any]
    valid: Tensor  # [B, n], bool: positions of the answer that count
    images: tuple[int, ...]  # of each sample
    common: frozenset[str] = frozenset()  # names of inputs that all samples share: the texts of a contrastive model

    @property
    def pixels(self) -> Tensor:
        return self.inputs[PIXELS]  # type: ignore[no-any-return]

    @property
    def samples(self) -> int:
        return self.valid.shape[0]

    @property
    def plain(self) -> bool:
        """One image [C, H, W] per sample."""
        return self.pixels.dim() == 4 and self.fixed

    @property
    def fixed(self) -> bool:
        """Whose pixels are where is told by shapes alone."""
        return is_fixed(self.inputs, self.samples)

    def repeated(self, pixels: Tensor, *, rows: Tensor) -> Prompt:
        """The prompts in `rows` with images `pixels`, one each."""
        inputs = {name: value[rows] if self._is_per_sample(name) else value for name, value in self.inputs.items()}
        return Prompt({**inputs, PIXELS: pixels}, self.valid[rows], (1,) * len(rows), self.common)

    def times(self, count: int) -> Prompt:
        """The whole batch, `count` times over."""
        inputs = dict(self.inputs)
        for name, value in self.inputs.items():
            if self._is_per_sample(name) or (isinstance(value, Tensor) and name.startswith(("pixel", "image"))):
                inputs[name] = value.repeat(count, *(1,) * (value.dim() - 1))
        return Prompt(inputs, self.valid.repeat(count, 1), self.images * count, self.common)

    def _is_per_sample(self, name: str) -> bool:
        value = self.inputs[name]
        batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.samples
        return batched and name not in self.common


class Forward(NamedTuple):
    """What one forward gave at the answer positions."""

    logits: Tensor  # [B, n, V]
    entropy: Tensor  # [B], of the answer
    objective: Tensor  # [B], what a step lowers
    cache: Any = None  # key-value cache of everything but the last answer token


class Outcome(NamedTuple):
    """What the step came to; the state holds the parameters that are kept."""

    start: Forward  # of the untouched image, or of the presets that a search chose
    answer: Forward  # after the last step
    accepted: Tensor  # [B], bool: the answer is kept, else the start


def prepare(subject: Subject, inputs: dict[str, Any], images: tuple[int, ...]) -> Prompt:
    """The inputs, followed by all but the last token of the untuned greedy answer where more than one counts."""
    answer_tokens, samples = subject.config.answer_tokens, len(images)
    valid = torch.ones(samples, 1, dtype=torch.bool, device=inputs[PIXELS].device)
    common = frozenset() if subject.answers else frozenset(inputs) - {PIXELS}
    if answer_tokens == 1:
        return Prompt(inputs, valid, images, common)
    model: Any = subject.model
    ids: Tensor = inputs["input_ids"]
    with torch.no_grad():
        greedy = dict(do_sample=False, num_beams=1, num_return_sequences=1, return_dict_in_generate=False)
        generated = model.generate(**subject.call(inputs), max_new_tokens=answer_tokens, **greedy)
    answer = generated[:, ids.shape[1] :][:, : answer_tokens - 1]
    ends = model.generation_config.eos_token_id
    ends = torch.as_tensor([] if ends is None else ends, device=ids.device).view(-1)
    alive = torch.isin(answer, ends).cumsum(-1) == 0  # a position counts while the answer had not ended before it
    longer = {
        name: torch.cat([value, _tail(subject, name, value, answer)], 1)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape[:2] == ids.shape and name != PIXELS  # per-token inputs
    }
    return Prompt({**inputs, **longer}, torch.cat([valid, alive], 1), images)


def _tail(subject: Subject, name: str, value: Tensor, answer: Tensor) -> Tensor:
    """What a per-token input [B, L, ...] is at the answer's tokens [B, n]."""
    new = answer.shape[1]
    if name == "input_ids":
        return answer.to(value.dtype)
    if name == "position_ids":
        return value[:, -1:] + 1 + torch.arange(new, device=value.device)
    if value.dim() > 2:  # which images a token may look at: as the last one of the prompt
        return value[:, -1:].expand(-1, new, *value.shape[2:])
    # Token types are 0 for text that sees what is before it; PaliGemma calls that 1, and 0 what sees all of the prompt.
    causal = name == "token_type_ids" and getattr(subject.model.config, "model_type", None) == "paligemma"
    return torch.full_like(answer, int(causal or name == "attention_mask")).to(value.dtype)


def run_model(subject: Subject, prompt: Prompt, *, keep_cache: bool = False) -> Any:
    """The model's output, with `logits` [B, n, V] at the answer positions alone."""
    positions = prompt.valid.shape[1]
    options: dict[str, Any] = {}
    if subject.takes("return_dict"):
        options["return_dict"] = True
    if subject.answers and subject.takes("use_cache"):  # some models hand it on without naming it
        options["use_cache"] = keep_cache
    if "logits_to_keep" in subject.arguments:
        options["logits_to_keep"] = positions
    with replaced(subject.forwards):
        output = subject.model(**{**subject.call(prompt.inputs), **options})
    name = "logits_per_image" if is_contrastive(subject.model) else "logits"
    logits = getattr(output, name, None)
    if not isinstance(logits, Tensor):
        model = type(subject.model).__name__
        raise TypeError(f"{model} must return an output with {name}, a tensor; it returned {type(output).__name__}")
    output.logits = logits[:, -positions:] if logits.dim() == 3 else logits[:, None]
    return output


def forward(subject: Subject, prompt: Prompt, *, keep_cache: bool = False, entropy_alone: bool = False) -> Forward:
    """A forward without a gradient; with `entropy_alone` the objective is the entropy, whatever a step lowers."""
    with torch.inference_mode():  # a fourteenth faster than no_grad on a small model
        return _evaluated(subject, prompt, run_model(subject, prompt, keep_cache=keep_cache), entropy_alone)


def _evaluated(subject: Subject, prompt: Prompt, output: Any, entropy_alone: bool = False) -> Forward:
    """Entropy and objective of a model's output, from its logits."""
    objective = entropy = answer_entropy(output.logits, prompt.valid)
    if callable(subject.config.objective) and not entropy_alone:
        objective = _checked_objective(subject.config.objective(output, prompt.valid), prompt)
    return Forward(output.logits, entropy, objective, getattr(output, "past_key_values", None))


def forward_for_gradient(subject: Subject, prompt: Prompt, *, keep_cache: bool = False, report: bool = True) -> Forward:
    """A forward whose objective a gradient can be taken of; without `report` nothing but the objective is computed.

    Where logits are the head's output and nothing else, the answer positions' hidden states go through head and entropy
    in one operator, whose gradient reads the head's weight once; logits are computed beside it only for the report.
    """
    config, valid = subject.config, prompt.valid
    if config.objective == "marginal_entropy":
        count = config.views
        if not prompt.plain:
            raise ValueError("objective='marginal_entropy' crops one image [C, H, W] per sample; use 'answer_entropy'")
        images = views_of(prompt.pixels, count)
        rows = torch.arange(prompt.samples, device=images.device).repeat_interleave(count)
        output = run_model(subject, wide := prompt.repeated(images, rows=rows))
        objective = marginal_entropy(output.logits, wide.valid, count, config.confident_fraction)
        logits = output.logits.detach()[::count]
        return Forward(logits, answer_entropy(logits, valid), objective)
    head = subject.shortcuts.head
    if callable(config.objective) or head is None or is_hooked(head):
        found = _evaluated(subject, prompt, run_model(subject, prompt, keep_cache=keep_cache))
        return found._replace(logits=found.logits.detach(), entropy=found.entropy.detach())
    with replaced({head: lambda hidden: hidden}):
        output = run_model(subject, prompt, keep_cache=keep_cache)
    hidden, weight = output.logits, head.weight
    rows_entropy = ops.linear_softmax_entropy(hidden.reshape(-1, hidden.shape[-1]), weight, head.bias)
    objective = over_positions(rows_entropy.view(valid.shape), valid)
    if not report:
        return Forward(hidden, objective, objective)
    with torch.no_grad():
        logits = F.linear(hidden, weight, head.bias)
        return Forward(logits, answer_entropy(logits, valid), objective, getattr(output, "past_key_values", None))


def _checked_objective(value: Any, prompt: Prompt) -> Tensor:
    if not isinstance(value, Tensor) or value.shape != (prompt.samples,):
        given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the objective must return one value per sample, [{prompt.samples}]; got {given}")
    if not value.is_floating_point() or (torch.is_grad_enabled() and not value.requires_grad):
        raise ValueError(
            f"the objective must be real and have a gradient; got {value.dtype}, requires_grad={value.requires_grad}. "
            "Compute it from output.logits, without detach() or item()"
        )
    return value


def run(
    subject: Subject, state: EpisodeState, prompt: Prompt, mark: Callable[[str], None], *, keep_cache: bool = False
) -> Outcome:
    """The step from the state's start; `mark` is called with each phase's name at its end.

    Leaves the kept parameters in `state` and the model as it was.

    Nothing in it waits for the device or depends on values there: on CUDA it can be captured in a graph.
    """
    config = subject.config
    names, trained = zip(*state.trained(), strict=True)
    state.reset()
    start: Forward | None = None
    same_pixels = state.filter is None and config.objective != "marginal_entropy"
    lean_model = lean(subject.shortcuts, prompt.valid.shape[1], same_pixels=same_pixels)
    with patched(subject.tower, state, prompt.images), lean_model, state.keeping_spectra():
        for _ in range(config.steps):
            last = forward_for_gradient(subject, prompt, keep_cache=keep_cache and start is None, report=start is None)
            start = start or last
            mark("forward")
            if not last.objective.requires_grad:
                raise ValueError(
                    f"the answer does not depend on what is tuned: is the vision tower {subject.tower.path!r} under "
                    "torch.no_grad(), are its features detached, or does the model leave it out?"
                )
            # A sample's objective depends on its own parameters only, so the sum gives each its own gradient.
            grads = torch.autograd.grad(last.objective.sum(), trained, allow_unused=True)
            if unreached := [name for name, grad in zip(names, grads, strict=True) if grad is None]:
                raise ValueError(f"no gradient reaches {unreached[0]}: the model does not call that layer's forward")
            mark("backward")
            state.step(grads)
            mark("update")
        answer = forward(subject, prompt, keep_cache=keep_cache)
        mark("answer")
    assert start is not None
    accepted = _accepted(config, start, answer)
    state.restore(~accepted, state.start)
    if config.candidates is not None:  # a preset's answer may not be finite either
        state.restore(~accepted & ~start.entropy.isfinite(), state.identity)
    return Outcome(start, answer, accepted)


def _accepted(config: TuningConfig, start: Forward, answer: Forward) -> Tensor:
    if not config.guard:
        return answer.entropy.isfinite()
    if callable(config.objective):
        return (answer.objective < start.objective) & answer.entropy.isfinite()
    return answer.entropy < start.entropy  # not where one of them is NaN


def kept_cache(outcome: Outcome) -> Any:
    """Each sample's key-value cache of the answer that is kept, cut before the last prompt token.

    None without a cache, or where it cannot be put together sample by sample (layers without keys and values).
    """
    if outcome.answer.cache is None or outcome.start.cache is None:
        return None
    if not bool((outcome.accepted | outcome.start.entropy.isfinite()).all()):
        return None  # the untouched image's, which a search does not keep
    kept = copy.copy(outcome.answer.cache)
    kept.layers = [copy.copy(layer) for layer in kept.layers]
    if not bool(outcome.accepted.all()):
        for layer, other in zip(kept.layers, outcome.start.cache.layers, strict=True):
            if not (isinstance(getattr(layer, "keys", None), Tensor) and isinstance(layer.values, Tensor)):
                return None
            mask = outcome.accepted[:, None, None, None]
            layer.keys = torch.where(mask, layer.keys, other.keys.detach())
            layer.values = torch.where(mask, layer.values, other.values.detach())
    if any(getattr(layer, "is_sliding", False) or not getattr(layer, "is_croppable", True) for layer in kept.layers):
        return None  # such a layer has forgotten what came before the last tokens
    kept.crop(-outcome.answer.logits.shape[1])
    return kept
