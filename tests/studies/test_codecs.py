"""Codecs: bits are those of real files and rise with the level; sheets give every image back in its place."""

import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("skimage")
pytest.importorskip("sklearn")
from skimage import data

from studies.codecs import CODECS, compress, compress_digits, compress_sheet
from vqfast import zoo

PHOTOGRAPH = Image.fromarray(data.astronaut())  # 512x512, ships with scikit-image
DIGITS = [image for image, *_ in zoo.questions("validation")[:192:3]]
ENDS = [(codec, level) for codec, levels in CODECS.items() for level in (levels[0], levels[-1])]


def error(image, decoded):
    return float(((np.asarray(image, float) - np.asarray(decoded, float)) ** 2).mean())


@pytest.mark.parametrize("codec", CODECS)
def test_bits_and_quality_rise_with_the_level(codec):
    results = [compress(PHOTOGRAPH, codec, level) for level in CODECS[codec]]
    bits, errors = [b for _, b in results], [error(PHOTOGRAPH, image) for image, _ in results]
    assert all(a < b for a, b in pairwise(bits)), bits
    assert all(a > b for a, b in pairwise(errors)), errors
    assert bits[0] / 512**2 < 0.15
    assert bits[-1] / 512**2 > 0.9


@pytest.mark.parametrize("codec", CODECS)
def test_bits_rise_on_a_sheet_of_digits(codec):
    rates = [compress_sheet(DIGITS * 2, codec, level)[1] for level in CODECS[codec]]
    assert all(a < b for a, b in pairwise(rates)), rates


@pytest.mark.parametrize("level", CODECS["jpeg2000"])
def test_level_of_jpeg2000_is_bits_per_pixel(level):
    bits = compress(PHOTOGRAPH, "jpeg2000", level)[1]
    assert bits / 512**2 == pytest.approx(level, rel=0.05)


@pytest.mark.parametrize("quality", [1, 3, 5, 6])  # those of arXiv 2512.20901
def test_jpeg_is_a_file(quality):
    file = io.BytesIO()
    PHOTOGRAPH.save(file, "JPEG", quality=quality, optimize=True)
    decoded, bits = compress(PHOTOGRAPH, "jpeg", quality)
    assert bits == 8 * len(file.getvalue())
    assert decoded.tobytes() == Image.open(file).tobytes()


@pytest.mark.parametrize(("codec", "level"), ENDS[::2])
def test_metadata_is_not_counted(codec, level):
    tagged = PHOTOGRAPH.copy()
    tagged.info |= {"icc_profile": b"x" * 5000, "comment": b"y" * 5000, "exif": b"Exif\0\0" + b"z" * 5000}
    assert compress(tagged, codec, level)[1] == compress(PHOTOGRAPH, codec, level)[1]


@pytest.mark.parametrize(("codec", "level"), ENDS)
def test_every_size_and_mode(codec, level):
    for mode, size in (("RGB", (1, 1)), ("L", (5, 7)), ("RGBA", (40, 33)), ("P", (33, 40))):
        decoded, bits = compress(Image.new(mode, size, 77), codec, level)
        assert (decoded.mode, decoded.size) == ("RGB", size)
        assert bits % 8 == 0
        assert bits > 0


@pytest.mark.parametrize("codec", CODECS)
def test_sheet_returns_images_in_order(codec):
    """Two sheets, the second of three rows: every plain grey comes back where it was."""
    greys = np.random.default_rng(0).integers(0, 256, 300)
    images = [Image.new("L", (16, 16), grey) for grey in greys.tolist()]
    decoded, _ = compress_sheet(images, codec, CODECS[codec][-1])
    means = np.array([np.asarray(image, float)[4:12, 4:12].mean() for image in decoded])
    np.testing.assert_allclose(means, greys, atol=8)


def test_rate_of_sheets_is_all_files_over_all_images():
    decoded, rate = compress_sheet(DIGITS * 5, "jpeg", 10)  # 320 images: 16x16 and 16x4
    sheets = []
    for images in ((DIGITS * 4), DIGITS):
        rows = [np.concatenate(images[i : i + 16], 1) for i in range(0, len(images), 16)]
        sheets.append(compress(Image.fromarray(np.concatenate(rows)), "jpeg", 10))
    assert rate == pytest.approx(sum(bits for _, bits in sheets) / (320 * 32 * 32))
    assert decoded[17].tobytes() == sheets[0][0].crop((32, 32, 64, 64)).tobytes()
    assert decoded[-1].tobytes() == sheets[1][0].crop((480, 96, 512, 128)).tobytes()
    alone = compress(DIGITS[0], "jpeg", 10)[1] / 32**2
    assert alone > 2.5
    assert rate < 1


@pytest.mark.parametrize("codec", CODECS)
def test_digits_are_compressed_as_they_were_scanned(codec):
    digits = DIGITS * 4
    mildest, rate = compress_digits(digits, codec, CODECS[codec][-1])
    hardest, least = compress_digits(digits, codec, CODECS[codec][0])
    assert rate > least
    assert {image.size for image in mildest} == {(32, 32)}
    losses = [[error(*pair) for pair in zip(digits, found, strict=True)] for found in (mildest, hardest)]
    assert np.mean(losses[0]) < np.mean(losses[1]) / 2
    best = [[error(a, b) for b in DIGITS] for a in mildest[: len(DIGITS)]]
    assert np.mean(np.argmin(best, 1) == np.arange(len(DIGITS))) > 0.9  # each in its place


def test_errors():
    with pytest.raises(ValueError, match=r"one of jpeg, webp, avif, jpeg2000; got 'heic'"):
        compress(PHOTOGRAPH, "heic", 1)
    with pytest.raises(ValueError, match=r"level of jpeg must be one of 1, .*, 65; got 2"):
        compress(PHOTOGRAPH, "jpeg", 2)
    with pytest.raises(ValueError, match="at least one"):
        compress_sheet([], "jpeg", 1)
    with pytest.raises(ValueError, match=r"all of one size; got 2 of sizes \[\(1, 1\), \(2, 1\)\]"):
        compress_sheet([Image.new("RGB", (2, 1)), Image.new("RGB", (1, 1))], "jpeg", 1)
