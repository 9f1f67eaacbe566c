"""Putting an episode's filter and adapters into a model, and taking them out again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from vqfast.integrations.transformers import VisionTower
from vqfast.tuning.state import EpisodeState


@contextlib.contextmanager
def patched(tower: VisionTower, state: EpisodeState) -> Iterator[None]:
    """Inside the block the tower filters its pixels and its layers in `state.adapters` apply their LoRA."""

    def filter_pixels(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        pixels: Tensor = args[0] if args else kwargs["pixel_values"]
        if pixels.shape[0] != state.samples:
            raise ValueError(
                f"the vision tower got {pixels.shape[0]} images for {state.samples} tuned samples; "
                "pass one image per sample, in the batch that was tuned"
            )
        if state.filter is None:
            return args, kwargs
        filtered = state.filter(pixels, *tower.normalisation(pixels.device))
        return ((filtered, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": filtered})

    hook = None
    try:
        hook = tower.module.register_forward_pre_hook(filter_pixels, with_kwargs=True)
        # An instance attribute hides the class's forward: no module moves, no name in state_dict() changes.
        for path, adapter in state.adapters.items():
            tower.linears[path].__dict__["forward"] = adapter.forward
        yield
    finally:
        if hook is not None:
            hook.remove()
        for linear in tower.linears.values():
            linear.__dict__.pop("forward", None)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in eval mode and none of its parameters requires a gradient."""
    training = [m for m in model.modules() if m.training]
    requiring = [p for p in model.parameters() if p.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in requiring:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in requiring:
            parameter.requires_grad_(True)
