"""Where the vision tower of a transformers model is, which of its layers are tuned, how its pixels are normalised, and
which of its work an answer does not need.

Modules are found by the end of their name, never by a full path: paths move between releases.
"""

from __future__ import annotations

import inspect
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
    blocks: tuple[nn.Module, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """mean and std, [C]."""
        return torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)


@dataclass(frozen=True)
class Shortcuts:
    """Parts of a model whose work an answer does not need, or that has a faster equal."""

    head: nn.Linear | None  # logits are this layer's output and nothing else; None where that is not known
    patch_embedding: nn.Conv2d | None  # patches do not overlap: a matrix product
    unused_blocks: tuple[nn.Module, ...]  # vision blocks behind the features that the language model sees
    decoder_layers: tuple[nn.Module, ...]  # of the language model
    last_rows: tuple[nn.Module, ...]  # in the last of them: only the answer positions' rows are used


def find_shortcuts(model: nn.Module, tower: VisionTower) -> Shortcuts:
    """What `lean` (vqfast.tuning.patch) can leave out of a forward. What is not recognised is left as it is."""
    head = _plain_head(model)
    convolutions = [m for m in tower.module.modules() if isinstance(m, nn.Conv2d)]
    patches = convolutions[0] if len(convolutions) == 1 and _is_patch_embedding(convolutions[0]) else None
    layers = () if getattr(model.config, "is_encoder_decoder", False) else _decoder_layers(model, tower)
    return Shortcuts(head, patches, _unused_blocks(model, tower), layers, _last_rows(layers) if head else ())


def _plain_head(model: nn.Module) -> nn.Linear | None:
    head = getattr(model, "lm_head", None)
    if not (is_plain_linear(head) and "logits_to_keep" in inspect.signature(model.forward).parameters):
        return None
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for name, value in (vars(part) if part is not None else {}).items():
            if ("softcap" in name or ("logit" in name and "scal" in name)) and value not in (None, 1.0):
                return None
    return head


def _is_patch_embedding(conv: nn.Conv2d) -> bool:
    plain = type(conv).forward is nn.Conv2d.forward and "forward" not in vars(conv)
    apart = conv.stride == conv.kernel_size and conv.padding in ((0, 0), "valid")
    return plain and apart and conv.dilation == (1, 1) and conv.groups == 1


def _unused_blocks(model: nn.Module, tower: VisionTower) -> tuple[nn.Module, ...]:
    """Blocks behind the last hidden state that `vision_feature_layer` of the configuration selects."""
    layers = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    layers = [layers] if isinstance(layers, int) else layers
    count = len(tower.blocks)
    if not layers or not all(isinstance(layer, int) for layer in layers):
        return ()
    used = max(layer if layer >= 0 else count + 1 + layer for layer in layers)
    unused = tower.blocks[used:]
    # A block is replaced by the identity, so it must give back a tensor and not a tuple.
    return unused if all(_returns_tensor(block) and "forward" not in vars(block) for block in unused) else ()


def _returns_tensor(module: nn.Module) -> bool:
    annotation = inspect.signature(type(module).forward).return_annotation
    return annotation in (Tensor, torch.FloatTensor, "torch.Tensor", "torch.FloatTensor")


def _decoder_layers(model: nn.Module, tower: VisionTower) -> tuple[nn.Module, ...]:
    inside = set(tower.module.modules())
    lists = [
        tuple(m)
        for path, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and path.rpartition(".")[2] == "layers" and m not in inside
    ]
    return max(lists, key=len, default=())


def _last_rows(decoder_layers: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """The query and output projections and the MLP of the last decoder layer."""
    last = decoder_layers[-1] if decoder_layers else None
    attention = getattr(last, "self_attn", None)
    found = [getattr(attention, "q_proj", None), getattr(attention, "o_proj", None), getattr(last, "mlp", None)]
    return tuple(m for m in found if isinstance(m, nn.Module) and "forward" not in vars(m))


def is_plain_linear(module: object) -> bool:
    """An nn.Linear with a forward and floating-point weight of nn.Linear: not quantised, hooked or wrapped."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    return "forward" not in vars(module) and module.weight.is_floating_point()


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
    lists = [
        (f"{path}.{sub_path}", m)
        for sub_path, m in tower.named_modules()
        if isinstance(m, nn.ModuleList) and sub_path.rpartition(".")[2] in BLOCK_LIST_NAMES and len(m)
    ]
    list_path, block_list = max(lists, key=lambda item: len(item[1]), default=("", nn.ModuleList()))
    if blocks and not block_list:
        raise ValueError(
            f"no blocks in the vision tower {path!r}: looked for a ModuleList named {', '.join(BLOCK_LIST_NAMES)}"
        )
    linears = _target_linears(list_path, block_list, blocks, targets) if blocks else {}
    mean, std = _checked_normalisation(normalisation or _find_normalisation(model))
    return VisionTower(path, tower, linears, tuple(block_list), mean, std)


def _target_linears(
    list_path: str, block_list: nn.ModuleList, blocks: int, targets: Sequence[str]
) -> dict[str, nn.Linear]:
    if blocks > len(block_list):
        raise ValueError(f"lora_blocks = {blocks}, but the vision tower has {len(block_list)} blocks")
    named = {
        f"{list_path}.{i}.{path}": m
        for i, block in enumerate(list(block_list)[:blocks])
        for path, m in block.named_modules()
        if path.rpartition(".")[2] in targets
    }
    missing = [target for target in targets if not any(path.endswith(f".{target}") for path in named)]
    if missing:
        there = sorted({p.rpartition(".")[2] for p, m in block_list[0].named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"lora_targets {missing} match no linear layer in the vision blocks {list_path}; "
            f"their linear layers are named {there}"
        )
    for path, m in named.items():
        if not is_plain_linear(m):
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
