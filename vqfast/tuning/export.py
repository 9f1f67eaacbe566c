"""The filter's effect as an image file, for engines that do not run vqfast."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

HALF_STEP = 0.5 / 255  # less than this outside [0, 1] is a rounding error of the normalisation
GREY = ("1", "L", "LA", "I", "I;16", "I;16B")  # modes of Pillow
LEAST_RAMP = 4  # pixels over which a scale can be told
ROUNDS = 8  # of back-projection; the residual that a smaller image shows is right to 1 % after four


def filtered_original(
    original: Image, behind_filter: Callable[[Tensor], Tensor], scale: tuple[float, float]
) -> tuple[Image, float]:
    """The original plus what the filter changes at the model's resolution, and the fraction of values clipped.

        low = resize(original),    y = original + r,    resize(y) = filter(low)

    with r found by back-projection: r <- r + enlarge(filter(low) - resize(original + r)). Whatever the processor crops
    or pads, an engine that scales y down as the model's processor does sees the filtered image: to the scale of the
    tiles, where a processor cuts some and adds the whole image at another.

    Args:
        behind_filter: raw pixels [1, 3, h, w] in [0, 1] -> filtered, not clamped.
        scale: pixels of the original per pixel of the model, down and across.

    Returns:
        An image of the original's size; grey if it is grey, else RGB; with its colour profile where that fits.
    """
    from vqfast.images import to_rgb

    rgb = to_rgb(original)
    raw = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(1, rgb.height, rgb.width, 3)
    raw = raw.permute(0, 3, 1, 2).float() / 255
    full = rgb.height, rgb.width
    small = max(1, round(full[0] / scale[0])), max(1, round(full[1] / scale[1]))
    wanted = behind_filter(_resized(raw, small))
    result = raw
    for _ in range(1 if small == full else ROUNDS):
        result = result + _resized(wanted - _resized(result, small), full)
    exported, clipped = as_image(result[0])
    exported = exported.convert("L") if rgb.info["mode"] in GREY else exported
    if (profile := rgb.info.get("icc_profile")) is not None:
        exported.info["icc_profile"] = profile
    return exported, clipped


def as_image(raw: Tensor) -> tuple[Image, float]:
    """Raw pixels [C, H, W], clamped to [0, 1], as an image in 8 bits, and the fraction of values that was clipped."""
    from PIL import Image

    clipped = ((raw < -HALF_STEP) | (raw > 1 + HALF_STEP)).float().mean().item()
    pixels = (raw.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), clipped


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image, size, mode="bicubic", antialias=True)


def model_scale(processor: Any, size: tuple[int, int], normalisation: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Pixels of an original of `size` (height, width) per pixel of what the processor makes of it, down and across.

    Found by giving the processor an image whose red rises to the right and whose green rises downwards.

    Raises:
        ValueError: there is too little of the image in the result.
    """
    import numpy as np
    from PIL import Image

    height, width = size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width)
    ramp[..., 1] = np.linspace(0, 255, height)[:, None]
    image_processor = getattr(processor, "image_processor", processor)
    made = image_processor(images=[Image.fromarray(ramp)], return_tensors="pt")
    made = {"pixel_values": made} if isinstance(made, Tensor) else made  # Idefics 1
    if "image_grid_thw" in made:
        _, rows, columns = made["image_grid_thw"][0].tolist()
        return height / (rows * image_processor.patch_size), width / (columns * image_processor.patch_size)
    mean, std = (values.cpu()[:, None, None] for values in normalisation)
    pixels = made["pixel_values"]
    tiles = pixels.reshape(-1, *pixels.shape[-3:]).float() * std + mean
    across, down = _slope(tiles[:, 0]), _slope(tiles[:, 1].mT)
    if across is None or down is None:
        raise ValueError(
            f"an original of {height}x{width} pixels is too small or too long for this processor to tell its scale"
        )
    return down * (height - 1), across * (width - 1)


def _slope(tiles: Tensor) -> float | None:
    """Rise per pixel along the rows of [N, h, w], in the finest of the tiles: a line through where it rises steadily.

    Padding is flat, and its border a jump.
    """
    slopes = []
    for tile in tiles:
        rise = tile[:, 2:] - tile[:, :-2]
        usual = rise[rise > 0.5 / 255].median() if bool((rise > 0.5 / 255).any()) else None
        if usual is None:
            continue
        inside = (rise > 0.5 / 255) & (rise < 3 * usual + 2 / 255)
        inside &= (tile[:, 1:-1] > 0.03) & (tile[:, 1:-1] < 0.97)  # not where resizing overshoots
        column = torch.arange(1, tile.shape[1] - 1.0).expand_as(rise)[inside]
        if len(column) and column.amax() - column.amin() >= LEAST_RAMP:
            covariance = torch.cov(torch.stack([column, tile[:, 1:-1][inside]]))
            slopes.append(float(covariance[0, 1] / covariance[0, 0]))
    return min(slopes, default=None)
