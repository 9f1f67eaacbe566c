"""Classical restoration by scikit-image and OpenCV, and a hook for a user's own restorer.

Parameters are fixed, lengths in pixels. Denoisers estimate the noise themselves (`noise_level`); deconvolution assumes
a Gaussian point spread of sigma `POINT_SPREAD`, whatever the blur was.
"""

from __future__ import annotations

import pkgutil
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from PIL import Image
from skimage import filters, restoration

from studies.degradations import Pixels, to_image, to_pixels

POINT_SPREAD = 1.5  # sigma of the assumed blur, pixels: milder than most, as an assumed blur that is too wide rings
LEAST_NOISE = 1e-3  # where a parameter may not be 0; below a step of 8 bits


def median(x: Pixels) -> Pixels:
    """Median of 3x3 pixels."""
    return cv2.medianBlur(x.astype(np.float32), 3).astype(np.float64)


def bilateral(x: Pixels) -> Pixels:
    """Bilateral filter: sigma 2 pixels, and 4 times the noise in value."""
    sigma = max(4 * noise_level(x), LEAST_NOISE)
    filtered = cv2.bilateralFilter(x.astype(np.float32), -1, sigmaColor=sigma, sigmaSpace=2)
    return np.clip(filtered, 0, 1).astype(np.float64)


def non_local_means(x: Pixels) -> Pixels:
    """Non-local means: patches of 5x5 within 6 pixels, h = 0.8 times the noise."""
    sigma = noise_level(x)
    smoothing = dict(h=max(0.8 * sigma, LEAST_NOISE), sigma=sigma)
    filtered = restoration.denoise_nl_means(x, patch_size=5, patch_distance=6, channel_axis=-1, **smoothing)
    return filtered.reshape(x.shape)  # of a single pixel it returns [3]


def total_variation(x: Pixels) -> Pixels:
    """Chambolle's total variation, its weight the noise."""
    return restoration.denoise_tv_chambolle(x, weight=max(noise_level(x), LEAST_NOISE), channel_axis=-1)


def wiener(x: Pixels) -> Pixels:
    """Wiener deconvolution of the assumed blur, regularised by 0.03 times the Laplacian."""
    return _deconvolve(x, lambda channel, spread: restoration.wiener(channel, spread, balance=0.03))


def richardson_lucy(x: Pixels) -> Pixels:
    """10 iterations of Richardson and Lucy on the assumed blur."""
    return _deconvolve(x, lambda channel, spread: restoration.richardson_lucy(channel, spread, num_iter=10))


def clahe(x: Pixels) -> Pixels:
    """Contrast-limited adaptive histogram equalisation of L in Lab: 8x8 tiles, clip limit 2."""
    lab = cv2.cvtColor(np.asarray(to_image(x)), cv2.COLOR_RGB2Lab)
    lab[..., 0] = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8)).apply(lab[..., 0])
    return cv2.cvtColor(lab, cv2.COLOR_Lab2RGB) / 255


def unsharp_mask(x: Pixels) -> Pixels:
    """The image and once more its difference to a blur of sigma 1.5 pixels."""
    return filters.unsharp_mask(x, radius=1.5, amount=1.0, channel_axis=2)  # -1 sharpens three rows: scikit-image 0.26


RESTORERS: dict[str, Callable[[Pixels], Pixels]] = {
    f.__name__: f
    for f in (median, bilateral, non_local_means, total_variation, wiener, richardson_lucy, clahe, unsharp_mask)
}


def restore(image: Image.Image, name: str) -> Image.Image:
    """The restored RGB image, of the same size.

    name: one of `RESTORERS`, or the hook of `imported` for a restorer of your own, such as a network: a function
    PIL image -> PIL image.

    Raises:
        ValueError: the hook's image has another size, or as `imported`.
        ImportError, TypeError: as `imported`; TypeError also where the hook returns no PIL image.
    """
    if name in RESTORERS:
        return to_image(RESTORERS[name](to_pixels(image)))
    restored = imported(name)(image)
    if not isinstance(restored, Image.Image):
        raise TypeError(f"restorer {name!r} must return a PIL image; got {type(restored).__name__}")
    if restored.size != image.size:
        raise ValueError(f"restorer {name!r} must keep the size of the image, {image.size}; got {restored.size}")
    return restored.convert("RGB")


def imported(name: str) -> Callable[[Image.Image], Any]:
    """The function "module:function" or "module:object.method", from the current folder too under `python -m`.

    Raises:
        ValueError: no such form.
        ImportError: it cannot be imported.
        TypeError: it is no function.
    """
    if not all(name.partition(":")):
        raise ValueError(
            f"restorer must be one of {', '.join(RESTORERS)}, or module:function for one of your own, a function "
            f"PIL image -> PIL image of the same size; got {name!r}"
        )
    try:
        restorer = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(f"restorer {name!r} cannot be imported: {error}") from error
    if not callable(restorer):
        raise TypeError(f"restorer {name!r} must be a function PIL image -> PIL image; got {type(restorer).__name__}")
    return restorer


def noise_level(x: Pixels) -> float:
    """Standard deviation of Gaussian noise, from the finest wavelet coefficients (Donoho and Johnstone, 1994)."""
    if min(x.shape[:2]) < 5:  # too few for the estimate
        return 0.0
    with warnings.catch_warnings():  # coefficients that are 0 are left out: of a constant channel all, which gives NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        levels = restoration.estimate_sigma(x, channel_axis=-1)
    return float(np.nan_to_num(levels).mean())


def _deconvolve(x: Pixels, method: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Pixels:
    """method(channel, point spread) on each channel, borders mirrored so that those of the method stay outside."""
    reach = round(4 * POINT_SPREAD)
    taps, border = cv2.getGaussianKernel(2 * reach + 1, POINT_SPREAD), 4 * reach
    padded = np.pad(x, ((border, border), (border, border), (0, 0)), "symmetric")
    restored = np.stack([method(channel, taps @ taps.T) for channel in np.moveaxis(padded, -1, 0)], -1)
    return np.clip(restored[border:-border, border:-border], 0, 1)
