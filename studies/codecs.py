"""Image codecs at their real file sizes, by Pillow: JPEG, WebP, AVIF, JPEG 2000."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

CODECS: dict[str, tuple[float, ...]] = {
    "jpeg": (1, 3, 5, 6, 10, 20, 40, 65),
    "webp": (0, 1, 5, 10, 20, 40, 60, 80),
    "avif": (5, 10, 20, 30, 40, 50, 60, 70),
    "jpeg2000": (0.02, 0.03, 0.05, 0.1, 0.15, 0.25, 0.5, 1),
}
"""Levels of each codec, from the fewest bits to the most.

| codec | level | settings | bits per pixel |
|---|---|---|---|
| jpeg | quality | 4:2:0, Huffman tables optimised | 0.09 to 1.00 |
| webp | quality | lossy (4:2:0), method 4 of 6 | 0.12 to 1.05 |
| avif | quality | AV1, 4:2:0, speed 6 of 10 | 0.09 to 1.05 |
| jpeg2000 | bits per pixel asked for | 9/7 wavelet, colour transform, one layer, bare codestream | 0.02 to 1.00 |

Bits per pixel: mean of five photographs of 0.14 to 0.37 megapixels that ship with scikit-image (astronaut, coffee,
chelsea, rocket, motorcycle_left). Quality 0 is WebP's lowest; below 5, AVIF's bits no longer fall with every image.
AVIF at
speed 8 takes a third of the time of 6 for 4 to 17 % more bits and 0.3 dB less; speed 4 takes seven times as long.

Small images: a file has no fewer than 289 bytes (jpeg), 58 (webp), 308 (avif), 180 (jpeg2000). So bits rise with every
level from about 0.2 megapixels on; below, the lowest levels may cost the same.
"""
SHEET = 16  # images per side of a sheet
SCANNED = 8  # pixels per side of a digit before it was enlarged (vqfast.zoo.questions)


def compress(image: Image.Image, codec: str, level: float) -> tuple[Image.Image, int]:
    """Encode and decode an image: the RGB image that comes back, and the bits of the file, headers included.

    codec, level: of `CODECS`. Metadata and colour profile of the image are not written. The bits depend on the versions
    of Pillow and its libraries, not on the machine's number of threads.

    Raises:
        ValueError: unknown codec or level.
    """
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}; got {codec!r}")
    if level not in CODECS[codec]:
        known = ", ".join(f"{known:g}" for known in CODECS[codec])
        raise ValueError(f"level of {codec} must be one of {known}; got {level!r}")
    file = io.BytesIO()
    Image.fromarray(np.asarray(image.convert("RGB"))).save(file, **_options(codec, level))
    return Image.open(file).convert("RGB"), 8 * file.getbuffer().nbytes


def compress_sheet(images: Sequence[Image.Image], codec: str, level: float) -> tuple[list[Image.Image], float]:
    """Compress images of one size together, as a header alone would be 5 bits per pixel of a 32x32 image.

    They are laid row by row on sheets of at most 16x16 without gaps, so neighbours share what the codec shares; what is
    left of a sheet is black. Returns the images cut out again, RGB in the given order, and bits per pixel: the files of
    all sheets over the pixels of all images.

    Raises:
        ValueError: no images, images of several sizes, unknown codec or level.
    """
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise ValueError(f"images must be at least one, all of one size; got {len(images)} of sizes {sizes}")
    (width, height), decoded, bits = sizes[0], [], 0
    for start in range(0, len(images), SHEET**2):
        part = images[start : start + SHEET**2]
        columns = min(SHEET, len(part))
        corners = [(i % columns * width, i // columns * height) for i in range(len(part))]
        sheet = Image.new("RGB", (columns * width, corners[-1][1] + height))
        for image, corner in zip(part, corners, strict=True):
            sheet.paste(image.convert("RGB"), corner)
        result, size = compress(sheet, codec, level)
        decoded += [result.crop((x, y, x + width, y + height)) for x, y in corners]
        bits += size
    return decoded, bits / (len(images) * width * height)


def compress_digits(
    images: Sequence[Image.Image], codec: str, level: float, size: int | None = None
) -> tuple[list[Image.Image], float]:
    """Compress the digits as they were scanned, 8x8: enlarged to 32x32, even JPEG's quality 1 costs few answers.

    Every image is reduced by averaging, to `size` pixels per side (None: 8), goes through `compress_sheet` and is
    enlarged to its size as `vqfast.zoo.questions` does. Returns the images and bits per pixel of the reduced ones.
    """
    side = SCANNED if size is None else size
    scanned = [image.resize((side, side), Image.Resampling.BOX) for image in images]
    decoded, rate = compress_sheet(scanned, codec, level)
    enlarged = [new.resize(image.size, Image.Resampling.BICUBIC) for new, image in zip(decoded, images, strict=True)]
    return enlarged, rate


def _options(codec: str, level: float) -> dict[str, Any]:
    """How Pillow is to save a level."""
    if codec == "jpeg":
        return dict(format="JPEG", quality=int(level), subsampling="4:2:0", optimize=True)
    if codec == "webp":
        return dict(format="WEBP", quality=int(level), method=4)
    if codec == "avif":
        return dict(format="AVIF", quality=int(level), subsampling="4:2:0", speed=6, max_threads=1)
    return dict(format="JPEG2000", no_jp2=True, quality_layers=[24 / level], irreversible=True, mct=1)
