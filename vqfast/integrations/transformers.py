"""Where the vision tower of a transformers model is, which of its layers are tuned, and how its pixels are normalised.

Modules are found by the end of their name, never by a full path: paths move between releases.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

TOWER_NAMES = ("vision_tower", "vision_model", "visual", "vision_encoder")
BLOCK_LIST_NAMES = ("layers", "layer", "blocks")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# Normalisation of the encoders that were published with one, by vision configuration `model_type`.
KNOWN_NORMALISATION = {
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
Normalisation = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class VisionTower:
    """The vision encoder of a model and the part of it that is tuned."""

    path: str
    module: nn.Module
    linears: dict[str, nn.Linear]  # path in the model -> layer that takes LoRA
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """mean and std, [C]."""
        return torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)


def find_vision_tower(
    model: nn.Module, blocks: int, targets: Sequence[str], normalisation: Normalisation | None
) -> VisionTower:
    """The tower of `model`, with the layers named in `targets` of its first `blocks` blocks.

    Raises:
        ValueError: no tower, no layer matched, or the normalisation of its pixels is not known.
    """
    found = [(path, m) for path, m in model.named_modules() if path.rpartition(".")[2] in TOWER_NAMES]
    if not found:
        children = ", ".join(f"{name} ({type(m).__name__})" for name, m in model.named_children()) or "no submodules"
        raise ValueError(
            f"{type(model).__name__} has no recognisable vision tower: looked for a submodule named "
            f"{', '.join(TOWER_NAMES)}; it has {children}. Pass a vision-language model from transformers"
        )
    path, tower = min(found, key=lambda item: item[0].count("."))
    linears = _target_linears(path, tower, blocks, targets) if blocks else {}
    mean, std = _checked_normalisation(normalisation or _find_normalisation(model))
    return VisionTower(path, tower, linears, mean, std)


def _target_linears(tower_path: str, tower: nn.Module, blocks: int, targets: Sequence[str]) -> dict[str, nn.Linear]:
    lists = [
        (path, m)
        for path, m in tower.named_modules()
        if isinstance(m, nn.ModuleList) and path.rpartition(".")[2] in BLOCK_LIST_NAMES and len(m)
    ]
    if not lists:
        raise ValueError(
            f"no blocks in the vision tower {tower_path!r}: looked for a ModuleList named {', '.join(BLOCK_LIST_NAMES)}"
        )
    list_path, block_list = max(lists, key=lambda item: len(item[1]))
    if blocks > len(block_list):
        raise ValueError(f"lora_blocks = {blocks}, but the vision tower has {len(block_list)} blocks")
    named = {
        f"{tower_path}.{list_path}.{i}.{path}": m
        for i, block in enumerate(list(block_list)[:blocks])
        for path, m in block.named_modules()
        if path.rpartition(".")[2] in targets
    }
    missing = [target for target in targets if not any(path.endswith(f".{target}") for path in named)]
    if missing:
        there = sorted({p.rpartition(".")[2] for p, m in block_list[0].named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"lora_targets {missing} match no linear layer in the vision blocks {tower_path}.{list_path}; "
            f"their linear layers are named {there}"
        )
    for path, m in named.items():
        plain = isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward and "forward" not in vars(m)
        if not (plain and m.weight.is_floating_point()):
            raise ValueError(
                f"{path} is a {type(m).__name__} with a forward or a weight of its own (quantised, hooked or wrapped); "
                "LoRA goes on plain nn.Linear layers with floating-point weights. Leave it out of lora_targets"
            )
    return named


def _checked_normalisation(normalisation: Normalisation) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        mean, std = (tuple(float(value) for value in values) for values in normalisation)
    except TypeError as error:
        raise ValueError(
            f"normalisation must be (mean, std), a number per channel each; got {normalisation}"
        ) from error
    if len(mean) != len(std) or not all(value > 0 for value in std):
        raise ValueError(f"normalisation must be (mean, std), as many of each, std above 0; got {normalisation}")
    return mean, std


def _find_normalisation(model: nn.Module) -> Normalisation:
    """image_mean and image_std from the processor files beside the model, else from its kind of vision encoder."""
    config = getattr(model, "config", None)
    folder = Path(getattr(config, "_name_or_path", "") or "/nonexistent")
    for file in (folder / name for name in PROCESSOR_FILES):
        if file.is_file():
            content = json.loads(file.read_text())
            content = content.get("image_processor", content)
            if "image_mean" in content and "image_std" in content:
                return content["image_mean"], content["image_std"]
    kind = getattr(getattr(config, "vision_config", None), "model_type", None)
    if kind in KNOWN_NORMALISATION:
        return KNOWN_NORMALISATION[kind]
    raise ValueError(
        f"the pixel normalisation of {type(model).__name__} is not known: no {' or '.join(PROCESSOR_FILES)} beside it "
        f"and no published one for vision encoder {kind!r}. "
        "Pass normalisation=(processor.image_processor.image_mean, processor.image_processor.image_std)"
    )
