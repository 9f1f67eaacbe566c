"""Degradations of an RGB image, seeded, by well-kept libraries where they have them."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.filters import gaussian
from skimage.util import random_noise

Pixels = np.ndarray  # [H, W, 3], float, 0 to 1


def gaussian_noise(x: Pixels, severity: float, rng: np.random.Generator) -> Pixels:
    """severity: standard deviation."""
    return random_noise(x, mode="gaussian", var=severity**2, rng=rng)


def gaussian_blur(x: Pixels, severity: float, rng: np.random.Generator) -> Pixels:
    """severity: sigma in pixels."""
    return gaussian(x, sigma=severity, channel_axis=-1)


def motion_blur(x: Pixels, severity: float, rng: np.random.Generator) -> Pixels:
    """severity: length of the horizontal path in pixels."""
    return ndimage.uniform_filter1d(x, int(severity), axis=1, mode="nearest")


def fog(x: Pixels, severity: float, rng: np.random.Generator) -> Pixels:
    """severity: share of light grey fog, thicker in some places than in others."""
    field = gaussian(rng.random(x.shape[:2]), sigma=x.shape[0] / 4)
    field = (field - field.mean()) / (np.abs(field - field.mean()).max() + 1e-9)
    share = np.clip(severity * (1 + 0.15 * field), 0, 1)[..., None]
    return x * (1 - share) + 0.8 * share


def low_contrast(x: Pixels, severity: float, rng: np.random.Generator) -> Pixels:
    """severity: share of the contrast that is left, around mid-grey."""
    return 0.5 + severity * (x - 0.5)


def pixelation(x: Pixels, severity: float, rng: np.random.Generator) -> Pixels:
    """severity: pixels per side that are left."""
    image = to_image(x)
    small = image.resize((int(severity), int(severity)), Image.Resampling.BOX)
    return to_pixels(small.resize(image.size, Image.Resampling.NEAREST))


def jpeg(x: Pixels, severity: float, rng: np.random.Generator) -> Pixels:
    """severity: JPEG quality, 1 to 95 (lower is worse)."""
    file = io.BytesIO()
    to_image(x).save(file, "JPEG", quality=int(severity))
    return to_pixels(Image.open(file))


def snow(x: Pixels, severity: float, rng: np.random.Generator) -> Pixels:
    """severity: share of pixels that start a falling flake of 3 pixels."""
    flakes = (rng.random(x.shape[:2]) < severity).astype(float)
    flakes = np.clip(ndimage.uniform_filter1d(flakes, 3, axis=0) * 2.5, 0, 1)[..., None]
    return x * (1 - flakes) + flakes


DEGRADATIONS: dict[str, Callable[[Pixels, float, np.random.Generator], Pixels]] = {
    f.__name__: f for f in (gaussian_noise, gaussian_blur, motion_blur, fog, low_contrast, pixelation, jpeg, snow)
}


def degrade(image: Image.Image, name: str, severity: float, seed: int) -> Image.Image:
    """The degraded RGB image, 8 bits per channel as a camera or a file would give it.

    Raises:
        ValueError: unknown degradation.
    """
    if name not in DEGRADATIONS:
        raise ValueError(f"degradation must be one of {', '.join(DEGRADATIONS)}; got {name!r}")
    return to_image(DEGRADATIONS[name](to_pixels(image), severity, np.random.default_rng(seed)))


def to_pixels(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def to_image(pixels: Pixels) -> Image.Image:
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8))
