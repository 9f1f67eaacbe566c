"""What `tune` takes: shapes and kinds, checked on the host; values, checked on the device with one read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vqfast.tuning.step import PIXELS, Subject, is_fixed

GRID = "image_grid_thw"
IGNORED = -100  # a label that does not count
REFUSED = ("past_key_values", "labels", "inputs_embeds", "vision_feature_layer", "pixel_values_videos", "return_loss")
PIXEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def checked(subject: Subject, inputs: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The inputs as tensors that gradients can be taken through, pixels named `pixel_values`, and images per sample.

    Raises:
        TypeError, ValueError: what is wrong with their kinds, shapes or devices. Values are left to `check_values`.
    """
    name = subject.tower.pixel_argument
    shapes = ((name, "[B, C, H, W], or as the model's processor lays tiles and patches out"),)
    for argument, shape in (("input_ids", "[B, L]"), *shapes) if subject.answers else shapes:
        value = inputs.get(argument)
        if not isinstance(value, Tensor):
            raise TypeError(
                f"tune needs {argument} as a tensor {shape}; got {type(value).__name__}. "
                "Pass the processor's output: tuner.tune(**processor(images=..., text=..., return_tensors='pt'))"
            )
        if argument == "input_ids" and value.dim() != 2:
            raise ValueError(f"{argument} must be {shape}; got {list(value.shape)}")
        if argument == "input_ids" and value.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids must be token ids, int64 or int32; got {value.dtype}")
    inputs = {PIXELS if n == name else n: value for n, value in cleaned(inputs).items()}
    if refused := [n for n in REFUSED if inputs.get(n) is not None]:
        raise ValueError(f"tune takes no {refused[0]}: pass the processor's output for images and text alone")
    for argument, value in inputs.items():
        if value is not None and not isinstance(value, Tensor) and not _is_input(subject, argument):
            raise TypeError(
                f"{argument}={value!r} is no input of {type(subject.model).__name__}: tune takes what the processor "
                "returned; options of generate go to TestTimeTuner.generate"
            )
        if isinstance(value, Tensor) and value.device != subject.device:
            raise ValueError(f"{argument} is on {value.device}, the model on {subject.device}; move one of them")
    _check_pixels(subject, name, inputs)
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if isinstance(mask, Tensor) and isinstance(ids, Tensor) and mask.shape != ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids, {list(ids.shape)}; got {list(mask.shape)}")
    positions = inputs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() > 2:
        raise ValueError(
            f"position_ids must be [B, L]; got {list(positions.shape)}. Leave them out: the model makes them"
        )
    plain = {n: _plain(v) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    return plain, _images_per_sample(subject, plain)


def _is_input(subject: Subject, name: str) -> bool:
    """The model's forward takes it, by name or, unless it is an option of generate, among others that it hands on."""
    from transformers import GenerationConfig

    return name in subject.arguments or (subject.takes(name) and not hasattr(GenerationConfig(), name))


def cleaned(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with sizes as a tensor, and without labels none of which count: PaliGemma's processor gives such."""
    result = dict(inputs)
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and not bool((labels != IGNORED).any()):
        del result["labels"]
    if isinstance(sizes := inputs.get("image_sizes"), (list, tuple)):
        device = next((v.device for v in inputs.values() if isinstance(v, Tensor)), None)
        result["image_sizes"] = torch.tensor(sizes, device=device)
    return result


def _check_pixels(subject: Subject, name: str, inputs: dict[str, Any]) -> None:
    pixels, channels = inputs[PIXELS], len(subject.tower.mean)
    if pixels.dtype not in PIXEL_DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in PIXEL_DTYPES)
        raise TypeError(f"{name} must be floating point, {accepted}; got {pixels.dtype}. Convert them: .float()")
    grid = inputs.get(GRID)
    flattened = grid is not None
    if flattened:
        _check_grid(subject, grid)
    if GRID in subject.arguments and not flattened:
        raise ValueError(f"{GRID} is missing: the model's processor gives it beside {name}")
    if pixels.dim() < 4 and not flattened:
        raise ValueError(
            f"{name} must be [B, C, H, W], tiles [B, T, C, H, W], or flattened patches with {GRID}; "
            f"got {list(pixels.shape)}"
        )
    if flattened and (pixels.dim() != 2 or len(pixels) != int(inputs[GRID].prod(-1).sum())):
        raise ValueError(
            f"{name} must be [patches, values] with as many patches as {GRID} comes to; "
            f"got {list(pixels.shape)} for {inputs[GRID].tolist()}"
        )
    if not flattened and pixels.shape[-3] != channels:
        raise ValueError(f"{name} must have {channels} channels, as the normalisation; got {pixels.shape[-3]}")


def _check_grid(subject: Subject, grid: Any) -> None:
    if not isinstance(grid, Tensor) or grid.is_floating_point() or grid.dim() != 2 or grid.shape[1] != 3:
        given = f"{grid.dtype} {list(grid.shape)}" if isinstance(grid, Tensor) else type(grid).__name__
        raise TypeError(f"{GRID} must be an integer tensor [images, 3]: frames, height, width in patches; got {given}")
    merge: Any = getattr(subject.tower.module, "spatial_merge_size", 1)
    rows = grid.tolist()
    if any(t != 1 or h < 1 or w < 1 or h % merge or w % merge for t, h, w in rows):
        raise ValueError(f"{GRID} must be 1 frame, height and width in multiples of {merge}; got {rows}")


def _images_per_sample(subject: Subject, inputs: dict[str, Any]) -> tuple[int, ...]:
    """How many images (tiles, views) of each sample the vision tower gets, to a common multiple."""
    pixels: Tensor = inputs[PIXELS]
    grid, sizes = inputs.get(GRID), inputs.get("image_sizes")
    samples = len(inputs["input_ids"]) if subject.answers else len(pixels)
    given = len(pixels if grid is None else grid)
    if samples == 0 or given == 0:
        raise ValueError(
            f"input_ids and pixels must have at least one sample and one image; got {samples} samples, {given} images"
        )
    if pixels.dim() >= 5:
        if given != samples:
            raise ValueError(f"pixels [B, ...] must have a row per sample, {samples}; got {list(pixels.shape)}")
        if is_fixed(inputs, samples):
            return (1,) * samples
        if sizes is not None:
            return _tiles(subject, sizes, samples)
        if getattr(subject.model.config, "model_type", None) == "idefics":  # keeps all of them
            return (pixels.shape[1],) * samples
        counts = tuple((pixels != 0).flatten(2).any(-1).sum(-1).tolist())  # models drop tiles that are all zero
        return _none_missing(counts)
    extent = grid if sizes is None else sizes
    if given == samples and extent is None:
        return (1,) * samples
    size = [1.0] * given if extent is None else extent.prod(-1).tolist()
    return _by_tokens(subject, inputs["input_ids"], size)


def _tiles(subject: Subject, sizes: Tensor, samples: int) -> tuple[int, ...]:
    """Tiles of LLaVA-NeXT's and OneVision's images, from their sizes in pixels."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config: Any = subject.model.config
    if len(sizes) != samples:
        raise ValueError(f"image_sizes must have a row per sample, {samples}; got {list(sizes.shape)}")
    tile = config.vision_config.image_size
    return tuple(image_size_to_num_patches(size, config.image_grid_pinpoints, tile) for size in sizes.tolist())


def _by_tokens(subject: Subject, ids: Tensor, size: list[float]) -> tuple[int, ...]:
    """Images go to samples in order; one of n times the size has n times the image tokens."""
    tokens = [] if subject.image_token is None else (ids == subject.image_token).sum(-1).tolist()
    if sum(tokens) == 0:
        raise ValueError(
            f"{len(ids)} samples, {len(size)} images, and no image tokens in the prompts that say whose they are; "
            "pass one image per sample"
        )
    counts, image, per_token = [], 0, sum(size) / sum(tokens)
    for wanted in tokens:
        first, taken = image, 0.0
        while image < len(size) and taken < wanted - 0.5:
            taken += size[image] / per_token
            image += 1
        counts.append(image - first)
        if abs(taken - wanted) > 0.5:
            raise ValueError(
                f"the prompts' image tokens {tokens} cannot be shared out among {len(size)} images: "
                "pass the processor's output as it is"
            )
    return _none_missing(tuple(counts))


def _none_missing(counts: tuple[int, ...]) -> tuple[int, ...]:
    if 0 in counts:
        raise ValueError(f"sample {counts.index(0)} has no image; every sample is tuned on one at least")
    return counts


def _plain(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor.detach() if tensor.requires_grad else tensor


def value_checks(subject: Subject, inputs: dict[str, Any]) -> Tensor:
    """What `check_values` wants to know of the inputs' values: [3], float32, on their device."""
    total = inputs[PIXELS].sum(dtype=torch.float32)  # not finite where one pixel is not
    mask = inputs.get("attention_mask") if subject.answers else None
    ends = mask[:, -1].all().float() if isinstance(mask, Tensor) else torch.ones_like(total)
    alike = torch.ones_like(total)  # an image each: as many image tokens in every prompt
    if subject.answers and subject.image_token is not None and is_fixed(inputs, len(inputs["input_ids"])):
        tokens = (inputs["input_ids"] == subject.image_token).sum(-1)
        alike = (tokens == tokens[0]).all().float()
    return torch.stack([total, ends, alike])


def check_values(values: Sequence[float]) -> None:
    """Raises ValueError for `value_checks`, read, of inputs that cannot be tuned on."""
    total, padded_left, alike = values
    if not math.isfinite(total):
        raise ValueError("the pixels contain NaN or infinite values; check the image before the processor")
    if not padded_left:
        raise ValueError("prompts must be padded on the left: processor.tokenizer.padding_side = 'left'")
    if not alike:
        raise ValueError(
            "prompts with one image each must have as many image tokens each; some have more or fewer: pass the "
            "processor's output as it is, every sample with an image"
        )
