"""Changing a model for the length of a block: its filter and adapters, shortcuts through it, its parameters frozen.

A patched layer gets a `forward` of its own as an instance attribute, which hides the class's: no module moves, no name
in state_dict() changes, and taking the attribute away leaves the model as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.integrations.transformers import Shortcuts, VisionTower
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
def patched(tower: VisionTower, state: EpisodeState) -> Iterator[None]:
    """Inside the block the tower filters its pixels and its layers in `state.adapters` apply their LoRA.

    A tower that is given V images per sample, sample by sample, takes a sample's parameters for all of them.
    """
    samples = state.samples

    def filter_pixels(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        pixels: Tensor = args[0] if args else kwargs["pixel_values"]
        if pixels.shape[0] % samples:
            raise ValueError(
                f"the vision tower got {pixels.shape[0]} images for {samples} tuned samples; "
                "pass one image per sample, in the batch that was tuned"
            )
        filtered = state.filtered(pixels)
        return ((filtered, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": filtered})

    def by_sample(adapter: LoRALinear) -> Forward:
        def forward(x: Tensor) -> Tensor:
            if x.shape[0] % samples:
                raise ValueError(
                    f"the vision tower packs {samples} samples into {x.shape[0]} rows of patches, and LoRA cannot tell "
                    "whose they are: tune one sample at a time"
                )
            if x.shape[0] == samples:
                return adapter.forward(x)
            rows = adapter.forward(x.reshape(samples, -1, x.shape[-1]))
            return rows.view(*x.shape[:-1], -1)

        return forward

    replacements: dict[nn.Module, Forward] = {
        tower.linears[path]: by_sample(adapter) for path, adapter in state.adapters.items()
    }
    with tower.module.register_forward_pre_hook(filter_pixels, with_kwargs=True), replaced(replacements):
        yield


@contextlib.contextmanager
def lean(shortcuts: Shortcuts, positions: int, *, same_pixels: bool = False) -> Iterator[None]:
    """Inside the block the model does only what the logits at its last `positions` positions need.

    The patch embedding is a matrix product, vision blocks behind the selected features are skipped, and the last
    decoder layer's query, output projection and MLP run for those positions only. The same sums in another order:
    logits differ by rounding, and other positions' hidden states are not those of the model. With `same_pixels` the
    patches are embedded once: every forward in the block must be given the same ones.
    """
    replacements: dict[nn.Module, Forward] = {}
    conv = shortcuts.patch_embedding
    if conv is not None and not is_hooked(conv):
        embed = _patch_product(conv)
        replacements[conv] = _once(embed) if same_pixels else embed
    for block in shortcuts.unused_blocks:
        replacements[block] = _first_argument
    for module in shortcuts.last_rows if not any(map(is_hooked, shortcuts.last_rows)) else ():
        replacements[module] = _for_last_rows(module.forward, positions)
    with replaced(replacements):
        yield


def _patch_product(conv: nn.Conv2d) -> Forward:
    def forward(image: Tensor) -> Tensor:
        (height, width), weight = conv.kernel_size, conv.weight
        rows, columns = image.shape[-2] // height, image.shape[-1] // width
        image = image[..., : rows * height, : columns * width]
        patches = image.unflatten(-1, (columns, width)).unflatten(-3, (rows, height))  # [B, C, rows, h, columns, w]
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(len(image), rows * columns, -1)
        embedded: Tensor = F.linear(patches, weight.flatten(1), conv.bias)  # [B, rows columns, N]
        return embedded.transpose(1, 2).view(len(image), -1, rows, columns)

    return forward


def is_hooked(module: nn.Module) -> bool:
    """It has hooks or a forward of its own, which expect the layer's own input and output."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def _once(function: Forward) -> Forward:
    kept: list[Any] = []

    def forward(image: Tensor) -> Any:
        if not kept:
            kept.append(function(image))
        return kept[0]

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
    touched = {*tower.linears.values(), *shortcuts.unused_blocks, *shortcuts.last_rows}
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
