"""Where the vision tower of a transformers model is, which of its layers are tuned, how its pixels are normalised, and
which of its work an answer does not need.

Modules are found by the end of their name, never by a full path: paths move between releases.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TOWER_NAMES = ("vision_tower", "vision_model", "visual", "vision_encoder")
BLOCK_LIST_NAMES = ("layers", "layer", "blocks")
BLOCK_LISTS = (nn.ModuleList, nn.Sequential)
FUSED_NAMES = ("qkv", "query_key_value")  # one layer whose output is query, key and value, one after another
THIRDS = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
Normalisation = tuple[Sequence[float], Sequence[float]]
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
# By `model_type` of the vision configuration, where published models agree.
KNOWN_NORMALISATION: dict[str, Normalisation] = {
    "clip_vision_model": _CLIP,
    "idefics_vision": _CLIP,
    "idefics2_vision": _HALF,
    "idefics3_vision": _HALF,
    "pixtral": _CLIP,
    "qwen2_5_vl_vision": _CLIP,
    "qwen2_vl_vision": _CLIP,
    "siglip_vision_model": _HALF,
    "smolvlm_vision": _HALF,
}


class LoRATarget(NamedTuple):
    """A layer that takes LoRA."""

    layer: nn.Module  # with in_features, out_features and a weight
    thirds: tuple[int, ...] = ()  # of a fused layer's output: those that take an adapter each


@dataclass(frozen=True)
class VisionTower:
    """The vision encoder of a model and the part of it that is tuned."""

    path: str
    module: nn.Module
    targets: dict[str, LoRATarget]  # by path in the model
    blocks: tuple[nn.Module, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    arguments: tuple[str, ...]  # names of what its forward takes, pixels first
    pixel_argument: str  # name of the pixels among the model's own inputs

    def normalisation(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """mean and std, [C]."""
        return torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)


@dataclass(frozen=True)
class _Registered:
    tower: str
    blocks: str | None
    pixel_argument: str
    normalisation: Normalisation | None


_registered: dict[type[nn.Module] | str, _Registered] = {}


def register_vision_tower(
    model_class: type[nn.Module] | str,
    *,
    tower: str,
    blocks: str | None = None,
    pixel_argument: str = "pixel_values",
    normalisation: Normalisation | None = None,
) -> None:
    """Say where the vision tower of a model class is, for models that are not in transformers. A later call replaces.

    The model's forward takes `input_ids` and pixels and returns an output with `logits`. The tower's first argument is
    pixels, images sample by sample: [N, C, H, W]; it gets all of them in one call, and its layers get the batch first.

    Args:
        model_class: the class, or its name where it is remote code. Subclasses are found, too.
        tower: path of the tower in the model, as "model.vision".
        blocks: path in the tower of the ModuleList (or Sequential) of its blocks; None: the longest that is named
            layers, layer or blocks. Layers are targeted in it by name (`TuningConfig.lora_targets`); q_proj, k_proj and
            v_proj are also found in a layer named qkv or query_key_value whose output holds the three one after
            another, each as long as the input.
        pixel_argument: name of the pixels among the model's inputs.
        normalisation: (mean, std) of its pixels, per channel; None: from the processor file beside the model.
    """
    if not isinstance(model_class, (str, type)):
        raise TypeError(f"model_class must be a class or its name; got an instance of {type(model_class).__name__}")
    _registered[model_class] = _Registered(tower, blocks, pixel_argument, normalisation)


@dataclass(frozen=True)
class Shortcuts:
    """Parts of a model whose work an answer does not need, or that has a faster equal."""

    head: nn.Linear | None  # logits are this layer's output and nothing else; None where that is not known
    patch_embedding: nn.Conv2d | nn.Conv3d | None  # patches do not overlap: a matrix product
    unused_blocks: tuple[nn.Module, ...]  # vision blocks behind the features that the language model sees
    decoder_layers: tuple[nn.Module, ...]  # of the language model
    last_rows: tuple[nn.Module, ...]  # in the last of them: only the answer positions' rows are used
    text_tower: nn.Module | None = None  # of a contrastive model: does not see the image


def find_shortcuts(model: nn.Module, tower: VisionTower) -> Shortcuts:
    """What `lean` (vqfast.tuning.patch) can leave out of a forward. What is not recognised is left as it is."""
    head = _plain_head(model)
    convolutions = [m for m in tower.module.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    patches = convolutions[0] if len(convolutions) == 1 and _is_patch_embedding(convolutions[0]) else None
    config = getattr(model, "config", None)
    layers = () if getattr(config, "is_encoder_decoder", False) else _decoder_layers(model, tower)
    last_rows = _last_rows(layers) if head else ()
    text = getattr(model, "text_model", None) if is_contrastive(model) else None
    return Shortcuts(head, patches, _unused_blocks(model, tower), layers, last_rows, text)


def is_contrastive(model: nn.Module) -> bool:
    """It compares images with texts (CLIP, SigLIP) and writes no answer."""
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


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


def _is_patch_embedding(conv: nn.Conv2d | nn.Conv3d) -> bool:
    plain = type(conv).forward in (nn.Conv2d.forward, nn.Conv3d.forward) and "forward" not in vars(conv)
    apart = conv.stride == conv.kernel_size and (conv.padding == "valid" or not any(conv.padding))
    return plain and apart and set(conv.dilation) == {1} and conv.groups == 1


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
    """Those of the model's own `get_decoder()`, not of a connector; none where it does not say."""
    find = getattr(model, "get_decoder", None)
    layers = getattr(find() if callable(find) else None, "layers", None)
    if not isinstance(layers, nn.ModuleList) or any(layer in tower.blocks for layer in layers):
        return ()
    return tuple(layers)


def _last_rows(decoder_layers: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """The query and output projections and the MLP of the last decoder layer."""
    last = decoder_layers[-1] if decoder_layers else None
    attention = getattr(last, "self_attn", None)
    found = [getattr(attention, "q_proj", None), getattr(attention, "o_proj", None), getattr(last, "mlp", None)]
    return tuple(m for m in found if isinstance(m, nn.Module) and "forward" not in vars(m))


def is_plain_linear(module: object) -> bool:
    """An nn.Linear with a forward and a floating-point weight of nn.Linear: not quantised, hooked or wrapped."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return False
    weight = module._parameters.get("weight")
    return "forward" not in vars(module) and type(weight) is nn.Parameter and weight.is_floating_point()


def find_vision_tower(
    model: nn.Module, blocks: int, targets: Sequence[str], normalisation: Normalisation | Any | None
) -> VisionTower:
    """The tower of `model`, with the layers named in `targets` of its first `blocks` blocks.

    Raises:
        ValueError: no tower, no layer matched, or the normalisation of its pixels is not known.
    """
    keys = (key for c in type(model).__mro__ for key in (c, c.__name__))
    known = next((_registered[key] for key in keys if key in _registered), None)
    path, tower = _registered_tower(model, known) if known else _recognised_tower(model)
    list_path, block_list = _blocks(path, tower, known.blocks if known else None)
    if blocks and not block_list:
        there = ", ".join(sub for sub, m in tower.named_modules() if isinstance(m, BLOCK_LISTS) and len(m)) or "none"
        wanted = (
            f"named {', '.join(BLOCK_LIST_NAMES)}; say where they are: vqfast.register_vision_tower(..., blocks=...)"
        )
        if known and known.blocks:
            wanted = f"at {known.blocks!r}, as registered"
        raise ValueError(f"no blocks in the vision tower {path!r}; its lists are {there}. Looked for one {wanted}")
    chosen = _targets(list_path, block_list, blocks, targets) if blocks else {}
    if normalisation is None:
        normalisation = (known.normalisation if known else None) or _find_normalisation(model)
    mean, std = _checked_normalisation(normalisation)
    arguments = tuple(inspect.signature(type(tower).forward).parameters)[1:]
    pixel_argument = known.pixel_argument if known else "pixel_values"
    return VisionTower(path, tower, chosen, tuple(block_list), mean, std, arguments, pixel_argument)


def _recognised_tower(model: nn.Module) -> tuple[str, nn.Module]:
    found = [(path, m) for path, m in model.named_modules() if path.rpartition(".")[2] in TOWER_NAMES]
    if not found:
        children = ", ".join(f"{name} ({type(m).__name__})" for name, m in model.named_children()) or "no submodules"
        raise ValueError(
            f"{type(model).__name__} has no recognisable vision tower: looked for a submodule named "
            f"{', '.join(TOWER_NAMES)}; it has {children}. Pass a vision-language model from transformers, or say "
            f"where the tower is: vqfast.register_vision_tower({type(model).__name__!r}, tower=...)"
        )
    return min(found, key=lambda item: item[0].count("."))


def _registered_tower(model: nn.Module, known: _Registered) -> tuple[str, nn.Module]:
    modules = dict(model.named_modules())
    if known.tower not in modules:
        raise ValueError(
            f"{type(model).__name__} is registered with its vision tower at {known.tower!r}, but has no such submodule"
        )
    return known.tower, modules[known.tower]


def _blocks(path: str, tower: nn.Module, registered: str | None) -> tuple[str, nn.ModuleList | nn.Sequential]:
    lists = [
        (f"{path}.{sub_path}", m)
        for sub_path, m in tower.named_modules()
        if isinstance(m, BLOCK_LISTS)
        and len(m)
        and (sub_path.rpartition(".")[2] in BLOCK_LIST_NAMES if registered is None else sub_path == registered)
    ]
    return max(lists, key=lambda item: len(item[1]), default=("", nn.ModuleList()))


def _targets(
    list_path: str, block_list: nn.ModuleList | nn.Sequential, blocks: int, targets: Sequence[str]
) -> dict[str, LoRATarget]:
    if blocks > len(block_list):
        raise ValueError(f"lora_blocks = {blocks}, but the vision tower has {len(block_list)} blocks")
    found: dict[str, LoRATarget] = {}
    missing = set(targets)
    for i, block in enumerate(list(block_list)[:blocks]):
        for path, m in block.named_modules():
            name = path.rpartition(".")[2]
            if not _takes_lora(m):
                continue
            if name in targets:
                found[f"{list_path}.{i}.{path}"] = LoRATarget(m)
                missing.discard(name)
            elif name in FUSED_NAMES and m.out_features == 3 * m.in_features:
                thirds = tuple(THIRDS[target] for target in THIRDS if target in targets)
                if thirds:
                    found[f"{list_path}.{i}.{path}"] = LoRATarget(m, thirds)
                    missing -= THIRDS.keys()
    if missing:
        there = sorted({p.rpartition(".")[2] for p, m in block_list[0].named_modules() if _takes_lora(m)})
        raise ValueError(
            f"lora_targets {[t for t in targets if t in missing]} match no linear layer in the vision blocks "
            f"{list_path}; their linear layers are named {there}"
        )
    return found


def _takes_lora(module: nn.Module) -> bool:
    """A linear layer, quantised or wrapped by another library as it may be."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return all(isinstance(size, int) for size in sizes) and isinstance(getattr(module, "weight", None), Tensor)


def _checked_normalisation(normalisation: Normalisation | Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    processor: Any = getattr(normalisation, "image_processor", normalisation)
    if hasattr(processor, "image_mean") and hasattr(processor, "image_std"):
        normalisation = _if_normalised(processor.image_mean, processor.image_std, processor.do_normalize)
    try:
        mean, std = (tuple(float(value) for value in values) for values in normalisation)
    except TypeError as error:
        raise ValueError(
            f"normalisation must be the model's processor or (mean, std), a number per channel each; "
            f"got {normalisation}"
        ) from error
    finite = all(math.isfinite(value) for value in (*mean, *std))
    if len(mean) != len(std) or not finite or not all(value > 0 for value in std):
        raise ValueError(
            f"normalisation must be (mean, std), as many of each, finite, std above 0; got {normalisation}"
        )
    return mean, std


def _if_normalised(mean: Sequence[float], std: Sequence[float], normalised: bool | None) -> Normalisation:
    return ([0.0] * len(mean), [1.0] * len(std)) if normalised is False else (mean, std)


def _find_normalisation(model: nn.Module) -> Normalisation:
    """image_mean and image_std from the processor files beside the model, else from its kind of vision encoder."""
    config = getattr(model, "config", None)
    folder = Path(getattr(config, "_name_or_path", "") or "/nonexistent")
    for file in (folder / name for name in PROCESSOR_FILES):
        if file.is_file():
            content = json.loads(file.read_text())
            content = content.get("image_processor", content)
            if "image_mean" in content and "image_std" in content:
                return _if_normalised(content["image_mean"], content["image_std"], content.get("do_normalize", True))
    kind = getattr(getattr(config, "vision_config", None), "model_type", None)
    if kind in KNOWN_NORMALISATION:
        return KNOWN_NORMALISATION[kind]
    raise ValueError(
        f"the pixel normalisation of {type(model).__name__} is not known: no {' or '.join(PROCESSOR_FILES)} beside it "
        f"and no published one for vision encoder {kind!r}. Pass normalisation=processor, or (mean, std) per channel"
    )
