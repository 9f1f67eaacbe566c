"""Changing a model for the length of a block: its filter and adapters, shortcuts through it, its parameters frozen.

A patched layer gets a `forward` of its own as an instance attribute, which hides the class's: no module moves, no name
in state_dict() changes, and taking the attribute away leaves the model as it was.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.integrations.layouts import Layout, layout_of
from vqfast.integrations.transformers import Shortcuts, VisionTower, is_plain_linear
from vqfast.nn import LoRALinear
from vqfast.tuning.state import EpisodeState

Forward = Callable[..., Any]


@contextlib.contextmanager
def replaced(forwards: dict[nn.Module, Forward]) -> Iterator[None]:
    """Inside the block each module's forward is the one given."""
    before = {module: module.__dict__.get("forward") for module in forwards}

    def restore() -> None:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own

    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        _to_the_end(restore)


def _to_the_end(restore: Callable[[], None]) -> None:
    """`restore()`, again from the start where a KeyboardInterrupt arrives in it."""
    try:
        restore()
    except BaseException:
        restore()
        raise


@contextlib.contextmanager
def images_through(
    tower: VisionTower, images: tuple[int, ...], function: Callable[[Layout, Tensor], Tensor]
) -> Iterator[None]:
    """Inside the block the tower's pixels go through `function`, which gets their layout and themselves.

    Args:
        images: of each sample.
    """
    first = tower.arguments[0]

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = dict(zip(tower.arguments, args, strict=False)) | kwargs
        pixels: Tensor = arguments[first]
        changed = function(layout_of(tower.module, pixels, arguments, images), pixels)
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, first: changed})

    with tower.module.register_forward_pre_hook(hook, with_kwargs=True):
        yield


@contextlib.contextmanager
def patched(tower: VisionTower, state: EpisodeState, images: tuple[int, ...]) -> Iterator[None]:
    """Inside the block the tower filters its pixels and its layers in `state.adapters` apply their LoRA.

    Args:
        images: of each sample; the tower may be given a common multiple of them, sample by sample.
    """
    layout: Layout | None = None

    def filter_pixels(found: Layout, pixels: Tensor) -> Tensor:
        nonlocal layout
        layout = found
        return state.filtered(found, pixels)

    def by_sample(layer: nn.Module, adapter: LoRALinear) -> Forward:
        original = None if is_plain_linear(layer) else layer.forward

        def forward(x: Tensor) -> Tensor:
            if layout is None:
                raise ValueError(
                    f"the vision tower {tower.path!r} was not called, but its layers were: register the module whose "
                    "forward gets the pixels"
                )
            offsets: Tensor | None = None
            rows = x
            if not layout.alike:
                rows = x.reshape(-1, x.shape[-1])
                offsets = layout.row_offsets(len(rows), x.device)
            elif x.shape[0] != state.samples:
                images = sum(layout.counts)
                sequence_first = x.dim() == 3 and x.shape[0] != images == x.shape[1] and state.samples > 1
                if layout.rows is None and (x.shape[0] % state.samples or sequence_first):
                    raise ValueError(
                        f"a layer in the vision tower gets {list(x.shape)} for {images} images of {state.samples} "
                        "samples, and LoRA cannot tell whose rows are whose: tune one sample at a time"
                    )
                rows = x.reshape(state.samples, -1, x.shape[-1])
            return adapter.forward(rows, offsets, original).view(*x.shape[:-1], -1)

        return forward

    replacements: dict[nn.Module, Forward] = {}
    for path, adapter in state.adapters.items():
        layer = tower.targets[path].layer
        replacements[layer] = by_sample(layer, adapter)
    with images_through(tower, images, filter_pixels), replaced(replacements):
        yield


@contextlib.contextmanager
def lean(shortcuts: Shortcuts, positions: int, *, same_pixels: bool = False) -> Iterator[None]:
    """Inside the block the model does only what the logits at its last `positions` positions need.

    The patch embedding is a matrix product, vision blocks behind the selected features are skipped, and the last
    decoder layer's query, output projection and MLP run for those positions only. The same sums in another order:
    logits differ by rounding, and other positions' hidden states are not those of the model. With `same_pixels` the
    patches are embedded once. Every forward in the block must be given the same texts, and then the same pixels.
    """
    replacements: dict[nn.Module, Forward] = {}
    conv = shortcuts.patch_embedding
    if conv is not None and not is_hooked(conv):
        embed = _patch_product(conv)
        replacements[conv] = _once_per_tensor(embed) if same_pixels else embed
    for block in shortcuts.unused_blocks:
        replacements[block] = _first_argument
    for module in shortcuts.last_rows if not any(map(is_hooked, shortcuts.last_rows)) else ():
        replacements[module] = _for_last_rows(module.forward, positions)
    if shortcuts.text_tower is not None:
        replacements[shortcuts.text_tower] = _once(shortcuts.text_tower.forward)
    with replaced(replacements):
        yield


def _patch_product(conv: nn.Conv2d | nn.Conv3d) -> Forward:
    size, weight = conv.kernel_size, conv.weight
    axes = len(size)

    def forward(image: Tensor) -> Tensor:
        counts = [length // step for length, step in zip(image.shape[-axes:], size, strict=True)]
        for axis, (count, step) in enumerate(zip(counts, size, strict=True)):
            image = image.narrow(2 + axis, 0, count * step)
        parts = [n for pair in zip(counts, size, strict=True) for n in pair]  # [B, C, rows, h, columns, w]
        order = (0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))
        patches = image.reshape(*image.shape[:2], *parts).permute(order).reshape(len(image), math.prod(counts), -1)
        embedded: Tensor = F.linear(patches, weight.flatten(1), conv.bias)  # [B, rows columns, N]
        embedded = embedded.transpose(1, 2)
        return embedded.view(*embedded.shape[:2], *counts)

    return forward


def is_hooked(module: nn.Module) -> bool:
    """It has hooks or a forward of its own, which expect the layer's own input and output."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def _once(function: Forward) -> Forward:
    kept: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            kept.append(function(*args, **kwargs))
        return copy.copy(kept[0])  # CLIP writes into what its text tower gives back

    return forward


def _once_per_tensor(function: Forward) -> Forward:
    """`function` of a tensor in the same place is that of before: its values must not have changed."""
    kept: dict[Any, tuple[Tensor, Any]] = {}  # with the tensors, so that no other takes their place

    def forward(image: Tensor) -> Any:
        key = image.data_ptr(), image.shape, image.dtype
        if key not in kept:
            kept[key] = image, function(image)
        return kept[key][1]

    return forward


def _first_argument(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _for_last_rows(original: Forward, positions: int) -> Forward:
    """`original`, [B, T, K] -> [B, T, N] row by row, for the last rows; zero for the others."""

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or x.dim() != 3 or x.shape[1] <= positions:
            return original(x, *args, **kwargs)
        unused = x.shape[1] - positions
        result = original(x[..., unused:, :])
        if not isinstance(result, Tensor):  # a mixture of experts may give back more than its output
            return original(x)
        return F.pad(result, (0, 0, unused, 0))

    return forward


def compiled_blocks(tower: VisionTower, shortcuts: Shortcuts) -> dict[nn.Module, Forward]:
    """Forwards through torch.compile of the vision blocks and decoder layers that no other patch touches."""
    touched = {*(target.layer for target in tower.targets.values()), *shortcuts.unused_blocks, *shortcuts.last_rows}
    blocks = [b for b in (*tower.blocks, *shortcuts.decoder_layers) if touched.isdisjoint(b.modules())]
    return {block: torch.compile(block.forward, dynamic=False) for block in blocks}


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode and none of its parameters requires a gradient."""
    modules = list(model.modules())
    training = [m for m in modules if m.training]
    requiring = {p for m in modules for p in m._parameters.values() if p is not None and p.requires_grad}

    def restore() -> None:
        for module in training:
            module.training = True
        for parameter in requiring:
            parameter.requires_grad_(True)

    try:
        for module in training:
            module.training = False
        for parameter in requiring:
            parameter.requires_grad_(False)
        yield
    finally:
        _to_the_end(restore)
