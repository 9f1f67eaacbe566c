"""One episode: (search) -> forward -> entropy -> backward -> update -> forward, and what is kept of it."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqfast.integrations.transformers import VisionTower
from vqfast.tuning.candidates import IDENTITY, Preset, render, select
from vqfast.tuning.config import TuningConfig
from vqfast.tuning.objective import answer_entropy
from vqfast.tuning.patch import patched
from vqfast.tuning.state import EpisodeState
from vqfast.tuning.timing import PhaseTimer


class Prompt(NamedTuple):
    """Model inputs that end on the answer positions."""

    inputs: dict[str, Any]
    valid: Tensor  # [B, n], bool: positions of the answer that count

    @property
    def pixels(self) -> Tensor:
        return self.inputs["pixel_values"]  # type: ignore[no-any-return]


class Forward(NamedTuple):
    """What one forward gave at the answer positions."""

    logits: Tensor  # [B, n, V]
    entropy: Tensor  # [B]
    cache: Any  # key-value cache of everything but the last answer token


class Episode(NamedTuple):
    """An episode that has run; the state holds the parameters that are kept."""

    untuned: Forward
    start: Forward  # of the chosen presets; the untuned one without a search
    answer: Forward  # after the last step
    accepted: Tensor  # [B], bool: the answer is kept, else the start
    presets: list[Preset]


def prepare(model: Any, inputs: dict[str, Any], answer_tokens: int) -> Prompt:
    """The inputs, followed by all but the last token of the untuned greedy answer where more than one counts."""
    ids: Tensor = inputs["input_ids"]
    valid = torch.ones(ids.shape[0], 1, dtype=torch.bool, device=ids.device)
    if answer_tokens == 1:
        return Prompt(inputs, valid)
    with torch.no_grad():
        greedy = dict(do_sample=False, num_beams=1, num_return_sequences=1, return_dict_in_generate=False)
        generated = model.generate(**inputs, max_new_tokens=answer_tokens, **greedy)
    answer = generated[:, ids.shape[1] :][:, : answer_tokens - 1]
    ends = model.generation_config.eos_token_id
    ends = torch.as_tensor([] if ends is None else ends, device=ids.device).view(-1)
    alive = torch.isin(answer, ends).cumsum(-1) == 0  # a position counts while the answer had not ended before it
    tails = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    if "position_ids" in inputs:
        tails["position_ids"] = inputs["position_ids"][:, -1:] + 1 + torch.arange(answer.shape[1], device=ids.device)
    longer = {
        name: torch.cat([value, tails.get(name, torch.zeros_like(answer)).to(value)], 1)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == ids.shape  # per-token inputs
    }
    return Prompt({**inputs, **longer}, torch.cat([valid, alive], 1))


def forward(model: Any, prompt: Prompt, *, use_cache: bool = True) -> Forward:
    """Run the model on the prompt; rows of the language-model head only for the answer positions where it can."""
    positions = prompt.valid.shape[1]
    keep = {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(**{**prompt.inputs, "use_cache": use_cache, "return_dict": True, **keep})
    logits = output.logits[:, -positions:]
    return Forward(logits, answer_entropy(logits, prompt.valid), output.past_key_values)


def search(
    model: Any, tower: VisionTower, config: TuningConfig, state: EpisodeState, prompt: Prompt
) -> tuple[Forward, list[Preset]]:
    """Set every sample's filter to the preset that `select` picks; all presets of all samples run in one forward.

    Returns:
        The untuned forward (without a cache) and the preset of each sample.
    """
    presets, batch = config.presets, state.samples
    with torch.no_grad():
        images = render(presets, prompt.pixels, config.taps, *tower.normalisation(prompt.pixels.device))
        repeated = {
            name: value.repeat(len(presets), *[1] * (value.dim() - 1)) if _per_sample(value, batch) else value
            for name, value in prompt.inputs.items()
        }
        repeated["pixel_values"] = images.pixels
        tried = forward(model, Prompt(repeated, prompt.valid.repeat(len(presets), 1)), use_cache=False)
        best = select(tried.logits.unflatten(0, (len(presets), batch)), prompt.valid)
        rows = best * batch + torch.arange(batch, device=best.device)
        chosen = [presets[i] for i in best.tolist()]
        state.set_presets(chosen, images.gain[rows], images.bias[rows])
        return Forward(tried.logits[:batch], tried.entropy[:batch], None), chosen


def _per_sample(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch


def run(
    model: Any, tower: VisionTower, config: TuningConfig, state: EpisodeState, prompt: Prompt, timer: PhaseTimer
) -> Episode:
    """Run one episode from the identity. Leaves the kept parameters in `state` and the model as it was."""
    state.reset()
    presets, untuned = [IDENTITY] * state.samples, None
    if config.candidates is not None:
        untuned, presets = search(model, tower, config, state, prompt)
        timer.mark("search")
    begin, optimizer = state.snapshot(), state.optimizer()
    names, trained = zip(*state.trained(), strict=True)
    with patched(tower, state):
        start = last = forward(model, prompt)
        timer.mark("forward")
        for step in range(config.steps):
            if step:
                last = forward(model, prompt)
                timer.mark("forward")
            # A sample's entropy depends on its own parameters only, so the sum gives each its own gradient.
            grads = torch.autograd.grad(last.entropy.sum(), trained, allow_unused=True)
            if unreached := [name for name, grad in zip(names, grads, strict=True) if grad is None]:
                raise ValueError(f"no gradient reaches {unreached[0]}: the model does not call that layer's forward")
            timer.mark("backward")
            for parameter, grad in zip(trained, grads, strict=True):
                parameter.grad = grad.contiguous()  # the fused optimiser walks parameter and gradient in memory order
            optimizer.step()
            optimizer.zero_grad()
            state.clamp_()
            timer.mark("update")
        with torch.no_grad():
            answer = forward(model, prompt)
        timer.mark("answer")
    finite = answer.entropy.isfinite()
    accepted = finite & (answer.entropy < start.entropy) if config.guard else finite
    state.restore(~accepted, begin)
    state.restore(~accepted & ~start.entropy.isfinite(), state.identity)
    return Episode(untuned or start, start, answer, accepted, presets)


def kept_cache(episode: Episode) -> Any:
    """Each sample's key-value cache of the answer that is kept, cut before the last prompt token.

    None without a cache, or where it cannot be put together sample by sample (layers without keys and values).
    """
    kept, accepted = episode.answer.cache, episode.accepted
    if kept is None:
        return None
    if not bool(accepted.all()):
        for layer, other in zip(kept.layers, episode.start.cache.layers, strict=True):
            if not (isinstance(getattr(layer, "keys", None), Tensor) and isinstance(layer.values, Tensor)):
                return None
            mask = accepted[:, None, None, None]
            layer.keys = torch.where(mask, layer.keys, other.keys.detach())
            layer.values = torch.where(mask, layer.values, other.values.detach())
    kept.crop(-episode.answer.logits.shape[1])
    return kept
