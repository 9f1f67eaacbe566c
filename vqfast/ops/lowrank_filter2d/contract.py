"""Shapes, dtypes, limits and schema of lowrank_filter2d."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqfast.ops._operator import check_activation, check_device, check_parameter, define

PADDINGS = ("reflect", "replicate", "zeros")  # the position is the code that kernels take
MAX_TAPS = 31
MAX_RANK = 8


class Arguments(NamedTuple):
    """What a kernel takes: checked, shapes as the caller gave them (a view of each would cost more than the filter)."""

    image: Tensor  # [B, C, H, W]
    taps_y: Tensor  # [R, k] or [B, R, k]
    taps_x: Tensor
    mix: Tensor  # [] or [B]
    gain: Tensor | None  # [], [B] or [B, C]
    bias: Tensor | None
    padding: int


def check(
    image: object,
    taps_y: object,
    taps_x: object,
    mix: Tensor | float,
    gain: Tensor | float | None,
    bias: Tensor | float | None,
    padding: str,
) -> Arguments:
    x = check_activation("image", image)
    if x.dim() != 4:
        raise ValueError(f"image must be [B, C, H, W]; got {list(x.shape)}. For one image pass image[None]")
    batch, channels, height, width = x.shape
    if channels == 0:
        raise ValueError(f"image must have at least one channel; got {list(x.shape)}")
    y_taps, x_taps = check_parameter("taps_y", taps_y, x), check_parameter("taps_x", taps_x, x)
    if y_taps.dim() not in (2, 3) or (y_taps.dim() == 3 and y_taps.shape[0] != batch):
        raise ValueError(f"taps_y must be [R, k] or [B, R, k] with B = {batch}; got {list(y_taps.shape)}")
    if x_taps.shape != y_taps.shape:
        raise ValueError(f"taps_x must have the shape of taps_y, {list(y_taps.shape)}; got {list(x_taps.shape)}")
    rank, taps = y_taps.shape[-2:]
    if taps % 2 == 0 or taps > MAX_TAPS:
        raise ValueError(f"the number of taps k must be odd and at most {MAX_TAPS}; got {taps}")
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the rank R must be 1 to {MAX_RANK}; got {rank}")
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}; got {padding!r}")
    smallest = taps // 2 + 1 if padding == "reflect" else 1
    if min(height, width) < smallest:
        raise ValueError(
            f"{padding} padding of {taps} taps needs an image of at least {smallest}x{smallest} pixels; "
            f"got {height}x{width}. Use fewer taps or padding='replicate'"
        )
    return Arguments(
        x,
        y_taps,
        x_taps,
        _scalar_or_batch("mix", mix, x, channels=False),
        None if gain is None else _scalar_or_batch("gain", gain, x, channels=True),
        None if bias is None else _scalar_or_batch("bias", bias, x, channels=True),
        PADDINGS.index(padding),
    )


def _scalar_or_batch(name: str, value: Tensor | float, image: Tensor, *, channels: bool) -> Tensor:
    """`value` as a tensor: [] or [B], or also [B, C] where a value per channel is allowed."""
    batch, channel_count = image.shape[:2]
    if isinstance(value, (int, float)):
        dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
        return torch.full((), value, dtype=dtype, device=image.device)
    tensor = check_parameter(name, value, image)
    if tensor.dim() == 0 or tensor.shape == (batch,) or (channels and tensor.shape == (batch, channel_count)):
        return tensor
    accepted = f"a scalar or [B] with B = {batch}" + (f" or [B, C] with C = {channel_count}" if channels else "")
    raise ValueError(f"{name} must be {accepted}; got {list(tensor.shape)}")


def _fwd(
    image: Tensor,
    taps_y: Tensor,
    taps_x: Tensor,
    mix: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    padding: int,
) -> Tensor:
    for name, parameter in (("taps_y", taps_y), ("taps_x", taps_x), ("mix", mix), ("gain", gain), ("bias", bias)):
        if parameter is not None:
            check_device(name, parameter, image)
    return image.new_empty(image.shape)


def _bwd(
    grad: Tensor,
    image: Tensor,
    taps_y: Tensor,
    taps_x: Tensor,
    mix: Tensor,
    gain: Tensor | None,
    bias: Tensor | None,
    padding: int,
    image_grad: bool,
) -> tuple[Tensor, ...]:
    parameters = (taps_y, taps_x, mix, gain, bias)
    return (
        image.new_empty(image.shape if image_grad else (0,)),
        *(mix.new_empty((0,)) if p is None else p.new_empty(p.shape) for p in parameters),
    )


_PARAMETERS = "Tensor image, Tensor taps_y, Tensor taps_x, Tensor mix, Tensor? gain, Tensor? bias, int padding"
define(
    "lowrank_filter2d",
    fwd=(f"({_PARAMETERS}) -> Tensor", _fwd),
    bwd=(
        f"(Tensor grad, {_PARAMETERS}, bool image_grad) -> (Tensor image, Tensor taps_y, Tensor taps_x, Tensor mix, "
        "Tensor gain, Tensor bias)",
        _bwd,
    ),
)
