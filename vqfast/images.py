"""Image files of users: untrusted, of any mode, to RGB."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO, Any

from PIL import AvifImagePlugin, Image, ImageFile, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

MAX_PIXELS = 100_000_000
"""Largest image, by the size in its header. Decoding one takes 4 to 14 bytes of memory per pixel."""

# The readers themselves: Image.open warns of large images, and a warning cannot be silenced in one thread only.
READERS: dict[str, type[ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
ACCEPTED = "PNG, JPEG, WebP or AVIF"
_SIGNATURE = re.compile(
    rb"(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<JPEG>\xff\xd8\xff)|(?P<WebP>RIFF.{4}WEBP)|(?P<AVIF>.{4}ftyp(.{4})*?avi[fs])"
    rb"|(?P<HEIC>.{4}ftyp(hei|hev|mif1|msf1))|(?P<GIF>GIF8)|(?P<BMP>BM)|(?P<TIFF>II\*\0|MM\0\*)|(?P<PDF>%PDF)"
    rb"|(?P<SVG>\s*<(\?xml|svg))",
    re.DOTALL,
)
_TO_8_BIT = [(value + 128) // 257 for value in range(1 << 16)]  # value / 257, rounded


class ImageError(ValueError):
    """The file is not an image that is accepted; the message says what it is and what to do."""


def read_image(source: str | os.PathLike[str] | IO[bytes], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to RGB: the first frame, upright by its EXIF orientation, transparency on white.

    16-bit grey levels are scaled to 8 bits; colour profiles are not applied, but kept in `info` with the file's mode.
    The format is told from the content, not from the name. Works in any thread and leaves Pillow's settings as they
    are.

    Args:
        source: path of a PNG, JPEG, WebP or AVIF file, or such a file opened for reading bytes, as an upload is. Other
            formats, TIFF and BMP among them, are not decoded.
        max_pixels: more, by the size in its header, and it is not decoded.

    Raises:
        ImageError: no such file, a folder, another format, damaged, truncated, without pixels, or more than
            `max_pixels` pixels.
    """
    if not isinstance(source, (str, os.PathLike)):
        return _decode(source, "the image", max_pixels)
    path = Path(source)
    try:
        if path.is_dir():
            raise ImageError(f"{path} is a folder; give one image file ({ACCEPTED})")
        if not path.is_file():
            problem = "is not a regular file" if path.exists() else "does not exist"
            raise ImageError(f"{path} {problem}; give an image file ({ACCEPTED})")
        file = path.open("rb")
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error
    with file:
        return _decode(file, str(path), max_pixels)


def _decode(file: IO[bytes], path: str, max_pixels: int) -> Image.Image:
    head = file.read(64)
    if not head:
        raise ImageError(f"{path} is empty (0 bytes); give an image file ({ACCEPTED})")
    signature = _SIGNATURE.match(head)
    kind = signature.lastgroup if signature else None
    if kind not in READERS:
        what = f"in {kind} format" if kind else "not an image of a known format"
        raise ImageError(f"{path} is {what}; convert it to {ACCEPTED}")
    try:
        image = _open(file, kind)
        width, height = image.size
        if width * height > max_pixels:
            limit = f"at most {max_pixels:,} are accepted"
            raise ImageError(f"{path} has {width} x {height} = {width * height:,} pixels, {limit}; scale it down")
        image.verify()  # checksums of a PNG, which decoding skips; uses the reader up
        image = _open(file, kind)
        image.load()
        _turn_upright(image)
        return to_rgb(image)
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is too large: {error}") from error
    except Exception as error:  # readers raise almost anything on damaged bytes
        problem = f"is in {kind} format, but damaged, truncated or without pixels ({error})"
        raise ImageError(f"{path} {problem}; export or download it again") from error


def _open(file: IO[bytes], kind: str) -> ImageFile.ImageFile:
    file.seek(0)
    return READERS[kind](file)


def _turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # EXIF that cannot be read: the image stays as stored
        return


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; `info` keeps its mode, and the colour profile where that one is of RGB or of grey levels."""
    result = _converted(image)
    kept: dict[str | tuple[int, int], Any] = {"mode": image.info.get("mode", image.mode)}
    if "icc_profile" in image.info and image.mode not in ("CMYK", "YCbCr", "LAB"):
        kept["icc_profile"] = image.info["icc_profile"]
    result.info = kept
    return result


def _converted(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit levels, also where Pillow keeps them in 32 bits; others are clipped
        levels = list(_TO_8_BIT)
        if isinstance(transparent := image.info.get("transparency"), int):
            levels[transparent] = 255
        return image.convert("I").point(levels, "L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
