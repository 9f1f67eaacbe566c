"""Shapes, dtypes, limits and schemas of spectral_gain2d and dct2."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqfast.ops._operator import check_activation, check_device, check_parameter, define

MAX_RANK = 8


class Arguments(NamedTuple):
    """What a kernel takes: checked, shapes as the caller gave them."""

    image: Tensor  # [B, C, H, W]
    spectrum: Tensor | None  # [B, C, H, W]; None: the one of image
    gain_y: Tensor  # [R, H] or [B, R, H]
    gain_x: Tensor


def check(image: object, gain_y: object, gain_x: object, spectrum: object) -> Arguments:
    x = _check_image(image)
    batch, _, height, width = x.shape
    y_gain, x_gain = check_parameter("gain_y", gain_y, x), check_parameter("gain_x", gain_x, x)
    if y_gain.dim() not in (2, 3) or y_gain.shape[-1] != height or (y_gain.dim() == 3 and y_gain.shape[0] != batch):
        raise ValueError(f"gain_y must be [R, H] or [B, R, H] with B = {batch}, H = {height}; got {list(y_gain.shape)}")
    if x_gain.shape != (*y_gain.shape[:-1], width):
        raise ValueError(
            f"gain_x must be {[*y_gain.shape[:-1], width]}, as gain_y with W = {width}; got {list(x_gain.shape)}"
        )
    rank = y_gain.shape[-2]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the rank R must be 1 to {MAX_RANK}; got {rank}")
    return Arguments(
        x,
        None if spectrum is None else _check_spectrum(spectrum, x),
        y_gain,
        x_gain,
    )


def check_constant(image: object) -> Tensor:
    """`image` if dct2 takes it: no gradient passes through the spectrum, so none may be asked for."""
    x = _check_image(image)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("image requires grad but dct2 is of constant pixels; pass image.detach()")
    return x


def _check_image(image: object) -> Tensor:
    x = check_activation("image", image)
    if x.dim() != 4:
        raise ValueError(f"image must be [B, C, H, W]; got {list(x.shape)}. For one image pass image[None]")
    if min(x.shape[2:]) < 1:
        raise ValueError(f"image must have at least one row and one column; got {list(x.shape)}")
    return x


def _check_spectrum(spectrum: object, image: Tensor) -> Tensor:
    given = check_parameter("spectrum", spectrum, image)
    if given.shape != image.shape:
        raise ValueError(f"spectrum must have the shape of image, {list(image.shape)}; got {list(given.shape)}")
    for name, tensor in (("image", image), ("spectrum", given)):
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad but is constant where a spectrum is given; pass {name}.detach(), or no spectrum "
                "for a gradient in image"
            )
    return given


def _dct2_fwd(image: Tensor) -> Tensor:
    return image.new_empty(image.shape, dtype=torch.float32)


def _fwd(image: Tensor, spectrum: Tensor | None, gain_y: Tensor, gain_x: Tensor) -> tuple[Tensor, Tensor]:
    for name, parameter in (("gain_y", gain_y), ("gain_x", gain_x)):
        check_device(name, parameter, image)
    own = image.new_empty(image.shape if spectrum is None else (0,), dtype=torch.float32)
    return image.new_empty(image.shape), own


def _bwd(grad: Tensor, spectrum: Tensor, gain_y: Tensor, gain_x: Tensor, image_grad: bool) -> tuple[Tensor, ...]:
    image = grad.new_empty(grad.shape if image_grad else (0,))
    return image, gain_y.new_empty(gain_y.shape), gain_x.new_empty(gain_x.shape)


define("dct2", fwd=("(Tensor image) -> Tensor", _dct2_fwd))
define(
    "spectral_gain2d",
    fwd=("(Tensor image, Tensor? spectrum, Tensor gain_y, Tensor gain_x) -> (Tensor y, Tensor spectrum)", _fwd),
    bwd=(
        "(Tensor grad, Tensor spectrum, Tensor gain_y, Tensor gain_x, bool image_grad) -> "
        "(Tensor image, Tensor gain_y, Tensor gain_x)",
        _bwd,
    ),
)
