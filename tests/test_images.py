"""Every mode that read_image takes, and every file that it refuses."""

import io
import os
import random
import struct
import warnings
import zlib

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image, PngImagePlugin

from vqfast import images
from vqfast.images import ImageError, read_image

NOISE = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
RGB = Image.fromarray(NOISE[..., :3])
LOSSLESS = [("PNG", {}), ("WEBP", {"lossless": True})]
LOSSY = [("JPEG", {"quality": 95, "subsampling": 0}), ("AVIF", {"quality": 95, "subsampling": "4:4:4"})]


@pytest.fixture
def put(tmp_path):
    def put(image, kind="PNG", **options):
        if isinstance(image, Image.Image):
            image.save(file := io.BytesIO(), kind, **options)
            image = file.getvalue()
        path = tmp_path / "file"
        path.write_bytes(image)
        return path

    return put


def pixels(path):
    image = read_image(path)
    assert image.mode == "RGB"
    assert type(image) is Image.Image  # decoded, no open file
    return np.asarray(image).astype(int)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, colour, raw, *extra):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join([header, *extra, chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")])


def on_white(colour, alpha):
    return colour * (alpha / 255) + 255 * (1 - alpha / 255)


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_rgb_exact(put, kind, options):
    assert (pixels(put(RGB, kind, **options)) == NOISE[..., :3]).all()


@pytest.mark.parametrize(("kind", "options"), LOSSY)
def test_rgb_lossy(put, kind, options):
    smooth = Image.linear_gradient("L").resize((32, 24)).convert("RGB")
    assert np.abs(pixels(put(smooth, kind, **options)) - np.asarray(smooth)).max() <= 4


def test_grey_and_one_bit(put):
    grey = NOISE[..., 0]
    assert (pixels(put(Image.fromarray(grey))) == grey[..., None]).all()
    assert (pixels(put(Image.fromarray(grey > 99))) == 255 * (grey > 99)[..., None]).all()


@pytest.mark.parametrize(("kind", "options"), LOSSLESS)
def test_rgba_on_white(put, kind, options):
    path = put(Image.fromarray(NOISE), kind, exact=True, **options)
    assert np.abs(pixels(path) - on_white(NOISE[..., :3], NOISE[..., 3:])).max() <= 1


def test_grey_alpha_on_white(put):
    grey, alpha = NOISE[..., :1], NOISE[..., 1:2]
    path = put(Image.fromarray(np.concatenate([grey, alpha], -1), "LA"))
    assert np.abs(pixels(path) - on_white(grey, alpha)).max() <= 1


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255])], ids=["opaque", "one", "each"])
def test_palette(put, transparency):
    image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    image.putpalette([200, 0, 0, 0, 100, 0, 0, 0, 50])
    path = put(image, **({} if transparency is None else {"transparency": transparency}))
    alpha = {None: [255, 255, 255], 0: [0, 255, 255]}.get(transparency, [0, 128, 255])
    expected = on_white(np.array([[200, 0, 0], [0, 100, 0], [0, 0, 50]]), np.array(alpha)[:, None])
    assert np.abs(pixels(path)[0] - expected).max() <= 1


def test_sixteen_bits_are_scaled(put):
    levels = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    path = put(Image.fromarray(levels))
    assert Image.open(path).mode == "I;16"
    assert (pixels(path) == np.rint(levels / 257)[..., None]).all()


def test_sixteen_bits_in_32():
    """Mode "I", which some Pillow releases read 16-bit files as; values outside 16 bits are clipped."""
    image = Image.fromarray(np.array([[-5, 0, 300, 32768, 65535, 70000]], dtype=np.int32))
    assert image.mode == "I"
    assert np.asarray(images.to_rgb(image))[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]


def test_sixteen_bits_with_a_transparent_level(put):
    raw = b"\0" + struct.pack(">3H", 300, 301, 65535)
    assert pixels(put(png(3, 1, 16, 0, raw, chunk(b"tRNS", struct.pack(">H", 300)))))[0, :, 0].tolist() == [255, 1, 255]


def test_cmyk(put):
    path = put(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert Image.open(path).mode == "CMYK"
    assert np.abs(pixels(path) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(put, kind, orientation):
    upright = np.array([[0, 80], [160, 240], [40, 200]], dtype=np.uint8)
    stored = {  # EXIF 2.32, table of the tag: which side of the stored image the first row and column are
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    big = Image.fromarray(np.ascontiguousarray(stored.repeat(16, 0).repeat(16, 1)))
    result = pixels(put(big.convert("RGB"), kind, exif=exif.tobytes(), quality=90))
    assert result.shape == (48, 32, 3)
    assert np.abs(result[8::16, 8::16, 0] - upright).max() <= 12


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"x"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_is_passed_over(put, kind, exif):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own about the EXIF
        assert pixels(put(RGB, kind, exif=exif)).shape == (12, 20, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "MPO"])
def test_first_frame(put, kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    path = put(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(path).n_frames == 2
    assert np.abs(pixels(path) - [255, 0, 0]).max() <= 3


def test_malformed_list_of_frames(put):
    data = put(RGB, "MPO", save_all=True, append_images=[RGB]).read_bytes()
    at = data.index(b"MPF\0") + 4
    path = put(data[:at] + bytes(12) + data[at + 12 :])
    with pytest.warns(UserWarning, match="malformed MPO"):
        Image.open(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(path).shape == (12, 20, 3)


def test_format_is_told_from_the_content(tmp_path):
    RGB.save(tmp_path / "photo.jpg", "PNG")
    assert (pixels(str(tmp_path / "photo.jpg")) == NOISE[..., :3]).all()


@pytest.mark.parametrize(
    ("kind", "options"), [*LOSSLESS, *LOSSY, ("JPEG", {"progressive": True})], ids=lambda x: x if type(x) is str else ""
)
def test_truncated_at_any_byte(put, kind, options):
    whole = put(RGB, kind, **options).read_bytes()
    last = len(whole) - (5 if kind == "PNG" else 1)  # the checksum of PNG's empty last chunk says nothing
    for length in [*range(1, last, 17), last]:
        with pytest.raises(ImageError):
            read_image(put(whole[:length]))
    with pytest.raises(ImageError, match=r"file is in \w+ format, but damaged, truncated or .*download it again$"):
        read_image(put(whole[: len(whole) * 3 // 4]))


def test_wrong_checksum(put):
    data = bytearray(put(RGB).read_bytes())
    data[-14] ^= 1  # checksum of IDAT
    with pytest.raises(ImageError, match="damaged"):
        read_image(put(bytes(data)))


def test_random_damage_gives_an_image_or_an_image_error(put):
    rng = random.Random(0)
    files = [put(RGB, kind, **options).read_bytes() for kind, options in [*LOSSLESS, *LOSSY]]
    files.append(put(RGB.quantize(16), exif=Image.Exif()).read_bytes())
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(600):
            data = bytearray(rng.choice(files))
            for _ in range(rng.randint(1, 6)):
                data[rng.randrange(min(len(data), rng.choice([64, 400])))] = rng.choice([0, 1, 128, 255])
            try:
                assert read_image(put(bytes(data))).mode == "RGB"
            except ImageError:
                refused += 1
    assert 100 < refused < 600


def test_palette_without_colours(put):
    """Pillow raises AssertionError."""
    with pytest.raises(ImageError, match="damaged"):
        read_image(put(png(1, 1, 8, 3, b"\0\0")))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello, world", "not an image of a known format; convert it to PNG, JPEG, WebP or AVIF"),
        (b"GIF89a", "is in GIF format; convert it to PNG, JPEG, WebP or AVIF"),
        (b"%PDF-1.7", "is in PDF format"),
        (b'<?xml version="1.0"?><svg/>', "is in SVG format"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is in HEIC format"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "is in AVIF format, but damaged"),
        (png(0, 5, 8, 0, b""), "without pixels"),
        (png(5, 0, 8, 0, b""), "without pixels"),
    ],
)
def test_not_an_image(put, data, message):
    with pytest.raises(ImageError, match=message):
        read_image(put(data))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats(put, kind):
    with pytest.raises(ImageError, match=f"is in {kind} format; convert it"):
        read_image(put(RGB, kind))


def test_no_file(tmp_path):
    with pytest.raises(ImageError, match="nothing does not exist; give an image file"):
        read_image(tmp_path / "nothing")
    with pytest.raises(ImageError, match="is a folder; give one image file"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match="cannot read"):
        read_image(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="pipe is not a regular file"):
        read_image(tmp_path / "pipe")


def test_too_large_by_its_header(put):
    assert images.MAX_PIXELS == 100_000_000
    message = r"10000 x 10001 = 100,010,000 pixels, at most 100,000,000 are accepted; scale it down"
    with pytest.raises(ImageError, match=message):
        read_image(put(png(10_000, 10_001, 8, 0, b"")))
    with pytest.raises(ImageError, match="damaged"):  # not too large: the decoder is asked
        read_image(put(png(10_000, 10_000, 8, 0, b"")))


@pytest.mark.parametrize(("kind", "options"), [*LOSSLESS, *LOSSY])
def test_limit_holds_for_every_format(put, kind, options):
    path = put(RGB, kind, **options)
    assert read_image(path, max_pixels=240).size == (20, 12)
    with pytest.raises(ImageError, match="20 x 12 = 240 pixels, at most 239"):
        read_image(path, max_pixels=239)


@pytest.mark.parametrize(("kind", "options"), [*LOSSLESS, *LOSSY])
def test_an_upload_is_read_as_its_file_is(put, kind, options):
    path = put(RGB, kind, **options)
    upload = io.BytesIO(path.read_bytes())
    assert read_image(upload).tobytes() == read_image(path).tobytes()
    with pytest.raises(ImageError, match=r"^the image is .*damaged"):
        read_image(io.BytesIO(path.read_bytes()[:60]))
    with pytest.raises(ImageError, match=r"^the image is empty"):
        read_image(io.BytesIO())


@pytest.mark.parametrize(("kind", "options"), [*LOSSLESS, *LOSSY])
def test_pillow_warns_of_nothing_and_keeps_its_settings(put, monkeypatch, kind, options):
    path = put(RGB, kind, **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Image.DecompressionBombWarning):
            Image.open(path)
        assert read_image(path).size == (20, 12)
    assert Image.MAX_IMAGE_PIXELS == 200


def test_pillows_own_limit(put, monkeypatch):
    path = put(RGB, "WEBP")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow's WebP reader refuses twice as much by itself
    with pytest.raises(ImageError, match="file is too large"):
        read_image(path)


def test_large_text_in_a_png(put):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * 10**7, zip=True)
    with pytest.raises(ImageError, match="damaged"):
        read_image(put(RGB, pnginfo=info))
