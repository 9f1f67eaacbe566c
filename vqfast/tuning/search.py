"""Choosing the preset that each sample's step starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.tuning.candidates import Preset, render, select
from vqfast.tuning.patch import lean
from vqfast.tuning.state import EpisodeState
from vqfast.tuning.step import Forward, Prompt, Subject, forward
from vqfast.tuning.stream import Stream

IMAGES_AT_ONCE = 64  # of a search forward: bounds its memory


class Found(NamedTuple):
    """What a search came to; the state starts from it."""

    untuned: Forward
    presets: list[Preset]  # of each sample
    evaluations: int  # presets tried per sample


def search(subject: Subject, state: EpisodeState, prompt: Prompt, stream: Stream | None) -> Found:
    """Start every sample from the preset that `select`, or the stream, picks.

    Raises:
        ValueError: config.search_resolution does not fit the images or the model.
    """
    presets = subject.config.presets
    with torch.no_grad():
        tried = _Tried(subject, state, prompt, presets)
        if stream is None:
            tried.evaluate(range(len(presets)))
            best = select(tried.logits()[1], prompt.valid)
        else:
            tried.evaluate(stream.ask())
            best = stream.choose(*tried.logits(), prompt.valid)
        state.begin()
        state.reset()
        rows = torch.arange(prompt.samples, device=best.device)
        gain, bias = (tone[best, rows] for tone in (tried.gain, tried.bias))
        sigma, mix = torch.tensor([(p.sigma, p.mix) for p in presets], device=best.device)[best].unbind(-1)
        state.set_presets(sigma, mix, gain, bias)
        state.begin_here()
        untuned = tried.forwards[0]
        if tried.side is not None:  # the answer that a plain forward gives is one to the whole image
            with lean(subject.shortcuts, prompt.valid.shape[1]):
                untuned = forward(subject, prompt, entropy_alone=True)
    return Found(untuned, [presets[i] for i in best.tolist()], len(tried.forwards))


class _Tried:
    """Presets that were evaluated on the images of a prompt."""

    def __init__(self, subject: Subject, state: EpisodeState, prompt: Prompt, presets: Sequence[Preset]) -> None:
        self.subject, self.prompt, self.presets = subject, prompt, presets
        self.normalisation = state.normalisation
        self.forwards: dict[int, Forward] = {}  # preset -> its forward, without a cache
        side = subject.config.search_resolution
        self.side = None if side is None or side >= min(prompt.pixels.shape[-2:]) else side
        self.gain, self.bias = (torch.zeros(len(presets), prompt.samples, device=prompt.pixels.device) for _ in "gb")

    def evaluate(self, indices: Sequence[int]) -> None:
        prompt = self.prompt
        at_once = max(1, IMAGES_AT_ONCE // prompt.samples)
        for first in range(0, len(indices), at_once):
            part = list(indices[first : first + at_once])
            presets, taps = [self.presets[i] for i in part], self.subject.config.taps
            images = render(presets, prompt.pixels, taps, *self.normalisation)
            self.gain[part], self.bias[part] = (t.view(len(part), -1) for t in (images.gain, images.bias))
            rows = torch.arange(prompt.samples, device=prompt.pixels.device).repeat(len(part))
            wide = prompt.repeated(images.pixels, rows=rows)
            with lean(self.subject.shortcuts, prompt.valid.shape[1]):
                tried = self._forward(wide)
            each = zip(tried.logits.split(prompt.samples), tried.entropy.split(prompt.samples), strict=True)
            for i, (logits, entropy) in zip(part, each, strict=True):
                self.forwards[i] = Forward(logits, entropy, entropy)

    def logits(self) -> tuple[list[int], Tensor]:
        """Indices of the presets tried, rising, and their logits [P, B, n, V]."""
        indices = sorted(self.forwards)
        return indices, torch.stack([self.forwards[i].logits for i in indices])

    def _forward(self, prompt: Prompt) -> Forward:
        if self.side is None:
            return forward(self.subject, prompt, entropy_alone=True)
        with self.subject.tower.module.register_forward_pre_hook(_interpolated_positions, with_kwargs=True):
            return forward(self.subject, smaller(self.subject, prompt, self.side), entropy_alone=True)


def _interpolated_positions(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "interpolate_pos_encoding": True}


def smaller(subject: Subject, prompt: Prompt, side: int) -> Prompt:
    """The prompt with images of `side` x `side` pixels, and as many fewer image tokens.

    Raises:
        ValueError: the model's patches are not known or `side` is no multiple of them, or its prompt has not one token
            per patch.
    """
    conv = subject.shortcuts.patch_embedding
    if conv is None or side % conv.kernel_size[0] or side % conv.kernel_size[1]:
        patch = "which are not known here" if conv is None else f"of {conv.kernel_size[0]}x{conv.kernel_size[1]} pixels"
        raise ValueError(f"search_resolution must be a multiple of the model's patches, {patch}; got {side}")
    height, width = prompt.pixels.shape[-2:]
    patch_area = conv.kernel_size[0] * conv.kernel_size[1]
    before, after = (height * width // patch_area, side * side // patch_area)
    pixels = F.interpolate(prompt.pixels.float(), size=(side, side), mode="bilinear", antialias=True)
    inputs = {**prompt.inputs, "pixel_values": pixels.to(prompt.pixels.dtype)}
    if subject.answers:
        ids = inputs["input_ids"]
        image = ids == subject.image_token
        if subject.image_token is None or not bool((image.sum(1) == before).all()):
            raise ValueError(
                f"search_resolution needs a prompt with one image token per patch, {before} for {height}x{width} "
                "pixels; leave it None for this model"
            )
        kept = ~image | (image.cumsum(1) <= after)
        for name, value in prompt.inputs.items():
            if isinstance(value, Tensor) and value.shape == ids.shape:
                inputs[name] = value[kept].view(len(ids), -1)
    return Prompt(inputs, prompt.valid)
