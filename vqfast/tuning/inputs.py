"""What `tune` takes: shapes and kinds, checked on the host; values, checked on the device with one read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vqfast.tuning.step import Subject

REFUSED = ("past_key_values", "labels", "inputs_embeds", "vision_feature_layer")
PIXEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def checked(subject: Subject, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs as tensors that gradients can be taken through.

    Raises:
        TypeError, ValueError: what is wrong with their kinds, shapes or devices. Values are left to `check_values`.
    """
    prompt = (("input_ids", 2, "[B, L]"),) if subject.answers else ()
    for name, dims, shape in (*prompt, ("pixel_values", 4, "[B, C, H, W]")):
        value = inputs.get(name)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"tune needs {name} as a tensor {shape}; got {type(value).__name__}. "
                "Pass the processor's output: tuner.tune(**processor(images=..., text=..., return_tensors='pt'))"
            )
        if value.dim() != dims:
            raise ValueError(f"{name} must be {shape}; got {list(value.shape)}")
        if name == "input_ids" and value.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids must be token ids, int64 or int32; got {value.dtype}")
    pixels = inputs["pixel_values"]
    ids = inputs["input_ids"] if subject.answers else pixels
    if ids.shape[0] != pixels.shape[0] or ids.numel() == 0:
        raise ValueError(
            "input_ids and pixel_values must have one row per sample (one image each) and at least one sample; "
            f"got {list(ids.shape)} and {list(pixels.shape)}"
        )
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.device != subject.device:
            raise ValueError(f"{name} is on {value.device}, the model on {subject.device}; move one of them")
    if pixels.dtype not in PIXEL_DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in PIXEL_DTYPES)
        raise TypeError(f"pixel_values must be floating point, {accepted}; got {pixels.dtype}. Convert them: .float()")
    if pixels.shape[1] != (channels := len(subject.tower.mean)):
        raise ValueError(f"pixel_values must have {channels} channels, as the normalisation; got {pixels.shape[1]}")
    if refused := [name for name in REFUSED if inputs.get(name) is not None]:
        raise ValueError(f"tune takes no {refused[0]}: pass the processor's output alone")
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {list(ids.shape)}; got {list(mask.shape)}")
    return {n: _plain(v) if isinstance(v, Tensor) else v for n, v in inputs.items()}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor.detach() if tensor.requires_grad else tensor


def value_checks(inputs: dict[str, Any]) -> Tensor:
    """What `check_values` wants to know of the inputs' values: [2], float32, on their device."""
    total = inputs["pixel_values"].sum(dtype=torch.float32)  # not finite where one pixel is not
    mask = inputs.get("attention_mask")
    ends = mask[:, -1].all().float() if isinstance(mask, Tensor) else torch.ones_like(total)
    return torch.stack([total, ends])


def check_values(values: Sequence[float]) -> None:
    """Raises ValueError for `value_checks`, read, of inputs that cannot be tuned on."""
    total, padded_left = values
    if not math.isfinite(total):
        raise ValueError("pixel_values contain NaN or infinite values; check the image before the processor")
    if not padded_left:
        raise ValueError("prompts must be padded on the left: processor.tokenizer.padding_side = 'left'")
