"""Choosing the preset that each sample's step starts from."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.integrations.layouts import Layout
from vqfast.tuning.candidates import Preset, apply_presets, select
from vqfast.tuning.config import TuningConfig
from vqfast.tuning.patch import images_through, lean, patched
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
        untuned = tried.forwards[0]
        if tried.side is not None:  # the answer that an untuned forward gives is one to the whole image
            with lean(subject.shortcuts, prompt.valid.shape[1]), patched(subject.tower, state, prompt.images):
                untuned = forward(subject, prompt, entropy_alone=True)
        rows = torch.arange(prompt.samples, device=best.device)
        gain, bias = (tone[best, rows] for tone in (tried.gain, tried.bias))
        sigma, mix = torch.tensor([(p.sigma, p.mix) for p in presets], device=best.device)[best].unbind(-1)
        state.set_presets(sigma, mix, gain, bias)
        state.begin_here()
    return Found(untuned, [presets[i] for i in best.tolist()], len(tried.forwards))


class _Tried:
    """Presets that were evaluated on the images of a prompt."""

    def __init__(self, subject: Subject, state: EpisodeState, prompt: Prompt, presets: Sequence[Preset]) -> None:
        self.subject, self.prompt, self.presets = subject, prompt, presets
        self.normalisation, self.begin_from = state.normalisation, state.begin_from
        self.forwards: dict[int, Forward] = {}  # preset -> its forward, without a cache
        side = subject.config.search_resolution
        self.side = None if side is None or (prompt.plain and side >= min(prompt.pixels.shape[-2:])) else side
        self.gain, self.bias = (torch.zeros(len(presets), prompt.samples, device=prompt.pixels.device) for _ in "gb")

    def evaluate(self, indices: Sequence[int]) -> None:
        prompt = self.prompt
        flattened = prompt.pixels.dim() < 4
        images = sum(prompt.images) if flattened else prompt.pixels.shape[:-3].numel()
        at_once = max(1, IMAGES_AT_ONCE // images)
        for first in range(0, len(indices), at_once):
            part = list(indices[first : first + at_once])
            tried = self._forward(part)
            each = zip(tried.logits.split(prompt.samples), tried.entropy.split(prompt.samples), strict=True)
            for i, (logits, entropy) in zip(part, each, strict=True):
                self.forwards[i] = Forward(logits, entropy, entropy)

    def logits(self) -> tuple[list[int], Tensor]:
        """Indices of the presets tried, rising, and their logits [P, B, n, V]."""
        indices = sorted(self.forwards)
        return indices, torch.stack([self.forwards[i].logits for i in indices])

    def _forward(self, indices: list[int]) -> Forward:
        """Of every sample behind the first preset, then behind the second, and so on; keeps their tones."""
        subject, wide = self.subject, self.prompt.times(len(indices))
        presets = [self.presets[i] for i in indices for _ in range(self.prompt.samples)]

        def behind(layout: Layout, pixels: Tensor) -> Tensor:
            images = apply_presets(presets, layout, pixels, subject.config.taps, *self.normalisation)
            self.gain[indices], self.bias[indices] = (t.view(len(indices), -1) for t in (images.gain, images.bias))
            if self.side is None:
                return images.pixels
            size = self.side, self.side
            return F.interpolate(images.pixels.float(), size=size, mode="bilinear", antialias=True).to(pixels.dtype)

        with contextlib.ExitStack() as stack:
            stack.enter_context(lean(subject.shortcuts, wide.valid.shape[1]))
            if self.begin_from:  # adapters under every preset
                stack.enter_context(patched(subject.tower, self._adapters_alone(len(presets)), wide.images))
            stack.enter_context(images_through(subject.tower, wide.images, behind))
            if self.side is not None:
                wide = fewer_tokens(subject, wide, self.side)
                tower = subject.tower.module
                stack.enter_context(tower.register_forward_pre_hook(_interpolated_positions, with_kwargs=True))
            return forward(subject, wide, entropy_alone=True)

    def _adapters_alone(self, samples: int) -> EpisodeState:
        config = self.subject.config
        names = ("lora_rank", "lora_alpha", "lora_blocks", "lora_targets")
        lora = TuningConfig(filter=None, **{name: getattr(config, name) for name in names})
        return EpisodeState(lora, self.subject.tower.targets, self.normalisation, samples, self.begin_from)


def _interpolated_positions(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "interpolate_pos_encoding": True}


def fewer_tokens(subject: Subject, prompt: Prompt, side: int) -> Prompt:
    """The prompt with as many fewer image tokens as images of `side` x `side` pixels have fewer patches.

    Raises:
        ValueError: the model's patches are not known or `side` is no multiple of them, or its prompt has not one token
            per patch of one image.
    """
    conv, pixels = subject.shortcuts.patch_embedding, prompt.pixels
    if not isinstance(conv, nn.Conv2d) or side % conv.kernel_size[0] or side % conv.kernel_size[1]:
        size = "which are not known here"
        if isinstance(conv, nn.Conv2d):
            size = f"of {conv.kernel_size[0]}x{conv.kernel_size[1]} pixels"
        raise ValueError(f"search_resolution must be a multiple of the model's patches, {size}; got {side}")
    if not prompt.plain:
        raise ValueError("search_resolution needs one image [C, H, W] per sample; leave it None for this model")
    height, width = pixels.shape[-2:]
    patch_area = conv.kernel_size[0] * conv.kernel_size[1]
    before, after = (height * width // patch_area, side * side // patch_area)
    inputs = dict(prompt.inputs)
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
    return prompt._replace(inputs=inputs)
