"""LoRA of peft: its layers through vqfast's operator, and its checkpoints out of and into test-time tuning.

peft is imported where it is used: by `accelerate` and `save`. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast import ops
from vqfast.integrations.transformers import TOWER_NAMES, find_vision_tower, is_plain_linear
from vqfast.ops.lora_linear.contract import MAX_RANK

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every path in a checkpoint: the model inside a PeftModel
_KEY = re.compile(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight")
_ANY_NORMALISATION = (0.0,), (1.0,)  # pixels are not looked at here
# What a checkpoint's configuration may say without a tuner's adapters being different for it.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights"}
_WHICH_LAYERS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}  # the weights tell, too
_OF_TRAINING = {"lora_dropout", "inference_mode", "eva_config", "loftq_config", "corda_config", "lora_ga_config"}
_ABOUT = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "megatron_core"}
_UNUSED = {"qalora_group_size", "runtime_config"}  # without use_qalora; of offloading
_ACCEPTED = _READ | _WHICH_LAYERS | _OF_TRAINING | _ABOUT | _UNUSED
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base's weights
_REASONS = {
    "use_dora": "DoRA rescales the rows of the base's weight",
    "bias": "biases of the base were trained, too",
    "lora_bias": "its adapters have a bias",
    "modules_to_save": "whole modules were trained, too",
    "rank_pattern": "its layers differ in rank, and a tuner has one lora_rank",
    "alpha_pattern": "its layers differ in scaling, and a tuner has one lora_alpha",
    "fan_in_fan_out": "its layers store their weights transposed (Conv1D)",
    "init_lora_weights": f"a start other than {', '.join(map(repr, _PLAIN_STARTS))} changes the base's weights; "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...) turns it into plain LoRA",
}
logger = logging.getLogger(__name__)


class Accelerated:
    """LoRA layers of peft that run through `ops.lora_linear`, until `close`. A context manager.

    Attributes:
        layers: paths of the layers that were taken over.
    """

    def __init__(self, layers: dict[str, nn.Module], left: dict[str, str]) -> None:
        self.layers = tuple(layers)
        self._left = left
        self._taken = {path: (layer, functools.partial(_forward, layer)) for path, layer in layers.items()}
        try:
            for layer, forward in self._taken.values():
                layer.__dict__["forward"] = forward
        except BaseException:
            self.close()
            raise

    @property
    def skipped(self) -> dict[str, str]:
        """LoRA layers, by path, that run peft's own forward as the model is now, and why."""
        now = {path: why for path, (layer, _) in self._taken.items() if (why := _left_to_peft(layer)) is not None}
        return self._left | now

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the layers back as they were. Closing again does nothing.

        Raises:
            RuntimeError: another library has replaced a layer's forward since; nothing is given back then.
        """
        covered = [path for path, (layer, own) in self._taken.items() if vars(layer).get("forward", own) is not own]
        if covered:
            raise RuntimeError(
                f"the forward of {covered[0]} was replaced after accelerate() (by a tuner's applied(), or a hook of "
                "accelerate): take that away first, then close"
            )
        for layer, _ in self._taken.values():
            layer.__dict__.pop("forward", None)
        self._taken = {}


def accelerate(model: nn.Module) -> Accelerated:
    """Let the LoRA layers that peft put into a model run through `ops.lora_linear`.

        y = x W^T + bias + sum_i s_i (x A_i^T) B_i^T    over the active adapters i, in one call

    The adapters stay peft's own parameters, and gradients reach them and x; they are differentiable once. State is
    looked up at every call: active adapters, `disable_adapter()`, merging, scaling, dtype. Whatever the operator does
    not compute runs peft's own forward, and `Accelerated.skipped` says which layers do and why: dropout in training,
    DoRA and other variants, `lora_bias`, a base with trainable parameters, hooks on a layer's parts, more than 64 ranks
    together, and base layers that are no plain nn.Linear (quantised, Conv1D). So does a call with further arguments,
    such as `adapter_names=`. Layers of peft other than `lora.Linear` are not touched. Adapters that are added later
    run, too, where the layer had one before.

    The operator works in the dtype of x, peft in that of the adapter and casts back: equal within the rounding of x.

    Args:
        model: a PeftModel, or any module with adapters of peft inside.

    Raises:
        TypeError: not a module.
        ValueError: no LoRA layer of peft in it, or a layer is accelerated already.
        ImportError: peft is not installed.
    """
    lora = _peft().tuners.lora
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    taken: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        own = vars(layer).get("forward")
        if isinstance(own, functools.partial) and own.func is _forward:
            raise ValueError(f"{path} is accelerated already; close what accelerate() gave back first")
        base: object = layer.base_layer
        if type(layer) is not lora.Linear:
            left[path] = f"{type(layer).__name__} of peft is no lora.Linear"
        elif own is not None:
            left[path] = "its forward is replaced already"
        elif not is_plain_linear(base):
            left[path] = f"its base layer, {type(base).__name__}, is no plain nn.Linear"
        else:
            taken[path] = layer
    if not taken and not left:
        raise ValueError(
            f"no LoRA layer of peft in this {type(model).__name__}: give it adapters first, for example "
            "peft.PeftModel.from_pretrained(model, folder)"
        )
    if left:
        path, why = next(iter(left.items()))
        logger.warning("%d LoRA layers are left to peft, such as %s: %s", len(left), path, why)
    return Accelerated(taken, left)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Forward of an accelerated `lora.Linear`."""
    if args or kwargs or _left_to_peft(layer) is not None:
        return type(layer).forward(layer, x, *args, **kwargs)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    names = _active(layer)
    lora_a = [layer.lora_A[name].weight.to(dtype) for name in names]
    lora_b = [layer.lora_B[name].weight.to(dtype) for name in names]
    scaling = [layer.scaling[name] for name in names]
    if len(names) > 1:
        lora_b = [torch.cat([s * b for s, b in zip(scaling, lora_b, strict=True)], 1)]
        lora_a, scaling = [torch.cat(lora_a)], [1.0]
    base = layer.base_layer
    return ops.lora_linear(x, base.weight, base.bias, lora_a[0], lora_b[0], scaling[0])


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _left_to_peft(layer: Any) -> str | None:
    """Why a `lora.Linear` cannot run through `ops.lora_linear` as it is now; None if it can."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    base, names = layer.base_layer, _active(layer)
    if not names:
        return "none of its adapters is active"
    if not is_plain_linear(base) or _is_hooked(base):
        return "its base layer is no plain nn.Linear, or has hooks"
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (base.weight, base.bias)):
        return "its base layer is trained"
    if not layer.cast_input_dtype_enabled:
        return "disable_input_dtype_casting is on"
    for name in names:
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if name in layer.lora_variant:
            return f"adapter {name} is a {type(layer.lora_variant[name]).__name__}"
        if not is_plain_linear(a) or not is_plain_linear(b) or any(map(_is_hooked, (a, b, dropout))):
            return f"parts of adapter {name} are no plain nn.Linear, or have hooks"
        if b.bias is not None:
            return f"adapter {name} has lora_bias"
        if type(dropout) is not nn.Identity and not (type(dropout) is nn.Dropout and not dropout.training):
            return f"adapter {name} has dropout in training"
        if not isinstance(layer.scaling[name], (int, float)):
            return f"the scaling of adapter {name} is no Python number"
    if sum(layer.lora_A[name].weight.shape[0] for name in names) > MAX_RANK:
        return f"its active adapters have more than {MAX_RANK} ranks together"
    return None


def _is_hooked(module: nn.Module) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in hooks)


def save(result: Any, folder: str | Path, sample: int = 0, *, base_model_name_or_path: str | None = None) -> None:
    """Write the adapters of one tuned sample as a checkpoint that plain peft loads: configuration and safetensors.

    `peft.PeftModel.from_pretrained(model, folder)` then computes what `tuner.applied(result)` does, without the
    filter: that is no LoRA and is not saved, nor are logits and figures. `result.image()`, on the command line
    `--save-image`, exports what the filter came to. Files of that name in the folder are overwritten, as by peft. A
    sample that was not tuned has the adapters that it started from. Adapters of peft that were in the model below the
    tuned ones (`peft_model.get_base_model()` was tuned) are not saved either: they have a checkpoint of their own.

    Args:
        result: a `vqfast.TuningResult`.
        folder: is made where there is none.
        sample: which of the batch.
        base_model_name_or_path: noted in the configuration for those who load it; not checked.

    Raises:
        ValueError: the episode tuned no LoRA.
        NotADirectoryError: `folder` is a file.
        IndexError: no such sample.
        ImportError: peft is not installed.
    """
    peft = _peft()
    from safetensors.torch import save_file

    folder, adapters = Path(folder), result.adapters(sample)
    if not adapters:
        raise ValueError("this episode tuned no LoRA (lora_blocks=0): there are no adapters to save")
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; a checkpoint is a folder")
    scaling = result.config.lora_alpha / result.config.lora_rank
    rank = max(len(lora_a) for lora_a, _ in adapters.values())
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=_as_integer(scaling * rank),
        base_model_name_or_path=base_model_name_or_path,
        inference_mode=True,
    )
    config.target_modules = list(adapters)  # after the constructor, which makes a set: the same file every time
    tensors = {}
    for path, matrices in adapters.items():
        missing = rank - len(matrices[0])  # beside fused layers, which have n times the rank
        matrices = F.pad(matrices[0], (0, 0, 0, missing)), F.pad(matrices[1], (0, missing))
        for kind, matrix in zip("AB", matrices, strict=True):
            tensors[f"{PREFIX}{path}.lora_{kind}.weight"] = (
                matrix.detach().cpu().clone(memory_format=torch.contiguous_format)
            )
    config.save_pretrained(str(folder))
    save_file(tensors, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})


def _as_integer(value: float) -> float:
    """Such as lora_alpha is typed, where it is one."""
    return int(value) if value == int(value) else value


def load(folder: str | Path, model: nn.Module, config: Any) -> tuple[Any, dict[str, Tensor]]:
    """Read a LoRA checkpoint of peft as the starting point of tuning.

        config, values = load(folder, model, vqfast.TuningConfig())
        tuner = vqfast.TestTimeTuner(model, config, begin_from=values)

    A layer is found by its path, or, since paths move between releases, by the longest end of it that one layer alone
    has. A checkpoint whose adapters a tuner cannot hold is refused, never read in part.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: the plain model that is tuned.
        config: the `vqfast.TuningConfig` to begin with.

    Returns:
        config with the checkpoint's lora_rank, lora_alpha (of rsLoRA alpha sqrt(r), so that alpha / r scales),
        lora_blocks and lora_targets; and `<path>.lora_a` [r, K] and `<path>.lora_b` [N, r], float32.

    Raises:
        FileNotFoundError: no folder, or a file of it is missing.
        ValueError: no JSON, no safetensors, or values that are not finite; another method than LoRA; DoRA and other
            variants, biases, modules_to_save, patterns of rank or alpha, fan_in_fan_out, anything else that changes
            what is computed (lora_dropout does not: it acts in training alone); layers that are not in the model, not
            in the blocks of its vision tower, of other shapes, or not the same in each of the first n blocks; a rank
            above 64 or an alpha that is not positive.
    """
    folder = Path(folder)
    if hasattr(model, "get_base_model"):
        raise ValueError("the model is a PeftModel already: give load the plain model that is tuned")
    told = _read_config(folder)
    rank, alpha = told.get("r"), told.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
        raise ValueError(f"{folder / CONFIG_FILE}: r and lora_alpha must be numbers, r above 0; got {rank}, {alpha}")
    adapters = _read_weights(folder)
    tower = find_vision_tower(model, 0, (), _ANY_NORMALISATION)
    modules = dict(model.named_modules())
    blocks = {module: i for i, block in enumerate(tower.blocks) for module in block.modules()}
    names = {*TOWER_NAMES, tower.path.rpartition(".")[2]}
    values: dict[str, Tensor] = {}
    found: dict[str, str] = {}
    for theirs, matrices in adapters.items():
        path = _resolved(theirs, modules, names)
        if path in found:
            raise ValueError(f"{folder}: both {found[path]} and {theirs} would be the model's {path}")
        if modules[path] not in blocks:
            raise ValueError(
                f"{folder}: {theirs} has an adapter, but a tuner's are in the blocks of the vision tower "
                f"{tower.path!r} alone. Give a checkpoint of the vision tower; merge the others into the model"
            )
        found[path] = theirs
        expected = _shapes(modules[path], rank)
        for kind, shape in expected.items():
            matrix = matrices.get(kind)
            if matrix is None or list(matrix.shape) != shape:
                given = "nothing" if matrix is None else list(matrix.shape)
                raise ValueError(
                    f"{folder}: lora_{kind} of {theirs} must be {shape} for the model's {path}; got {given}"
                )
            if not matrix.isfinite().all():
                raise ValueError(f"{folder}: lora_{kind} of {theirs} has values that are not finite")
            values[f"{path}.lora_{kind.lower()}"] = matrix.float()
    count = 1 + max(blocks[modules[path]] for path in found)
    targets = tuple(dict.fromkeys(path.rpartition(".")[2] for path in found))
    missing = find_vision_tower(model, count, targets, _ANY_NORMALISATION).targets.keys() - found.keys()
    if missing:
        raise ValueError(
            f"{folder}: no adapter on {', '.join(sorted(missing))}. A tuner's are on all layers of a name "
            f"({', '.join(targets)}) in the first n blocks (here {count}) of the vision tower"
        )
    alpha = float(alpha * rank**0.5 if told.get("use_rslora") else alpha)  # rsLoRA scales by alpha / sqrt(r)
    return dataclasses.replace(
        config, lora_rank=rank, lora_alpha=alpha, lora_blocks=count, lora_targets=targets
    ), values


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a checkpoint of plain LoRA."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: a checkpoint of peft is one, with {CONFIG_FILE}")
    file = folder / CONFIG_FILE
    if not file.is_file():
        inside = sorted(sub.parent.name for sub in folder.glob(f"*/{CONFIG_FILE}"))
        hint = f"; there are checkpoints in its folders {', '.join(inside)}" if inside else ""
        raise FileNotFoundError(f"no {CONFIG_FILE} in {folder}{hint}")
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(told, dict) or told.get("peft_type") != "LORA":
        kind = told.get("peft_type") if isinstance(told, dict) else told
        raise ValueError(f"{file}: peft_type must be 'LORA'; got {kind!r}")
    for name, value in told.items():
        neutral = (
            value in _PLAIN_STARTS if name == "init_lora_weights" else not value or (name, value) == ("bias", "none")
        )
        if not neutral and (name not in _ACCEPTED or name == "init_lora_weights"):
            why = _REASONS.get(name, "this is not known to leave the adapters plain LoRA")
            raise ValueError(f"{file}: {name} = {value!r}, but a tuner begins from plain LoRA alone: {why}")
    return told


def _read_weights(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Path of a layer, without the prefix -> "A" and "B"."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS_FILE
    if not file.is_file():
        if (folder / PICKLE_FILE).is_file():
            raise ValueError(
                f"{folder} has its weights in {PICKLE_FILE}, a pickle, which can run code and is not read. Save them "
                f"as {WEIGHTS_FILE}: save_pretrained of a current peft does"
            )
        raise FileNotFoundError(f"no {WEIGHTS_FILE} in {folder}")
    try:
        tensors = load_file(str(file))
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or damaged: {error}") from error
    adapters: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{file}: {key} is no matrix of plain LoRA on a linear layer ({PREFIX}<path>.lora_A.weight or lora_B), "
                "and a tuner begins from those alone"
            )
        adapters.setdefault(match[1], {})[match[2]] = tensor
    if not adapters:
        raise ValueError(f"{file} holds no adapter")
    return adapters


def _resolved(path: str, modules: dict[str, nn.Module], tower_names: set[str]) -> str:
    """The model's path of the layer that had `path` when the checkpoint was made."""
    if path in modules:
        return path
    parts = path.split(".")
    # A shorter end has lost the list and the number of its block; one that moved must have been in a vision tower.
    ends = [
        parts[i:]
        for i in range(len(parts))
        if (not i or tower_names & {*parts}) and any(part.isdecimal() for part in parts[i + 1 :])
    ]
    for end in map(".".join, ends):
        found = [other for other in modules if other == end or other.endswith(f".{end}")]
        if len(found) > 1:
            raise ValueError(f"the checkpoint's {path} may be any of the model's {', '.join(found)}")
        if found:
            return found[0]
    raise ValueError(
        f"the checkpoint's {path} is not in the model, nor is a layer of its vision tower that ends like it: is it a "
        "checkpoint of this model?"
    )


def _shapes(layer: nn.Module, rank: int) -> dict[str, list[int]]:
    inputs, outputs = (getattr(layer, name, None) for name in ("in_features", "out_features"))
    if inputs is None or outputs is None:
        raise ValueError(f"{type(layer).__name__} is no linear layer, and a tuner has adapters on those alone")
    return {"A": [rank, inputs], "B": [outputs, rank]}


def _peft() -> Any:
    try:
        import peft
        import peft.tuners.lora
    except ImportError as error:
        raise ImportError("peft is not installed: pip install peft") from error
    return peft
