"""Degradations: what a strength means, severities in order, seeds."""

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
from scipy import ndimage
from skimage import data

from studies.degradations import DEGRADATIONS, LEVELS, STYLES, degrade, to_image, to_pixels
from vqfast import zoo

PHOTOGRAPH = Image.fromarray(data.astronaut()[:300, 100:360])  # ships with scikit-image
DIGITS = [image for image, *_ in zoo.questions("validation")[:24:3]]
SEEDED = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "snow", "fog", "rain", "colour_transfer"}
GREY = Image.new("RGB", (200, 200), (128, 128, 128))


def distance(image, name, strength, seed=0):
    return float(((to_pixels(degrade(image, name, strength, seed)) - to_pixels(image)) ** 2).mean())


def apply(name, pixels, strength):
    return DEGRADATIONS[name](pixels, strength, np.random.default_rng(0))


def test_levels_are_complete():
    assert LEVELS.keys() == {"photographs", "digits"}
    for levels in LEVELS.values():
        assert levels.keys() == DEGRADATIONS.keys()
        assert all(len(strengths) == 5 for strengths in levels.values())
    assert set(STYLES) < DEGRADATIONS.keys()


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_severity_rises_on_a_photograph(name):
    distances = [distance(PHOTOGRAPH, name, strength) for strength in LEVELS["photographs"][name]]
    assert distances[0] > 0
    assert all(a < b for a, b in pairwise(distances)), distances


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_severity_rises_on_digits(name):
    levels = LEVELS["digits"][name]
    distances = [np.mean([distance(x, name, strength, i) for i, x in enumerate(DIGITS)]) for strength in levels]
    if name == "saturation":  # grey images have none
        assert distances == [0] * 5
    else:
        assert distances[0] > 0
        assert all(a < b for a, b in pairwise(distances)), distances


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_seed(name):
    strength = LEVELS["photographs"][name][2]
    first, again, other = (degrade(PHOTOGRAPH, name, strength, seed).tobytes() for seed in (7, 7, 8))
    assert first == again
    assert (first != other) == (name in SEEDED)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_every_size_and_mode(name):
    for mode, size in (("RGB", (1, 1)), ("L", (5, 7)), ("RGBA", (40, 33)), ("P", (33, 40))):
        for strength in (LEVELS["photographs"][name][4], LEVELS["digits"][name][0]):
            result = degrade(Image.new(mode, size, 77), name, strength, 0)
            assert (result.mode, result.size) == ("RGB", size)


def test_unknown():
    with pytest.raises(ValueError, match=r"one of gaussian_noise, .*, cartoon; got 'frost'"):
        degrade(PHOTOGRAPH, "frost", 1, 0)


@pytest.mark.parametrize(
    ("name", "strength", "deviation"),
    [
        ("gaussian_noise", 0.1, 0.1),
        ("speckle_noise", 0.2, 0.2 * 128 / 255),
        ("shot_noise", 50, (128 / 255 / 50) ** 0.5),
        ("impulse_noise", 0.1, (0.1 * 0.25) ** 0.5),
    ],
)
def test_noise_has_its_strength(name, strength, deviation):
    noise = apply(name, to_pixels(GREY), strength) - to_pixels(GREY)
    assert noise.std() == pytest.approx(deviation, rel=0.03)
    assert abs(noise.mean()) < 0.02 * deviation


@pytest.mark.parametrize(
    ("name", "strength", "shape"),
    [
        ("motion_blur", 9, np.ones((1, 9), bool)),
        ("defocus_blur", 2, np.abs(np.add.outer(np.arange(-2, 3) ** 2, np.arange(-2, 3) ** 2)) <= 4),
    ],
)
def test_a_point_becomes(name, strength, shape):
    point = np.zeros((21, 21, 3))
    point[10, 10] = 1
    spread = apply(name, point, strength)
    rows, columns = np.nonzero(spread[..., 0] > 1e-9)
    assert spread.sum((0, 1)) == pytest.approx([1, 1, 1])
    assert (spread[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1, 0] > 1e-9).tolist() == shape.tolist()
    assert spread.max() == pytest.approx(1 / shape.sum())


def test_zoom_blur():
    pixels = to_pixels(PHOTOGRAPH)
    np.testing.assert_allclose(apply("zoom_blur", pixels, 1), pixels, atol=1e-6)
    rings = np.hypot(*np.meshgrid(np.arange(-60, 61), np.arange(-60, 61)))[..., None].repeat(3, -1) / 100
    expected = rings * np.log(1.5) / 0.5  # mean of r / s over enlargements s from 1 to 1.5
    np.testing.assert_allclose(apply("zoom_blur", rings, 1.5)[2:-2, 2:-2], expected[2:-2, 2:-2], atol=0.01)


def test_tone_and_colour():
    pixels = to_pixels(PHOTOGRAPH)
    np.testing.assert_allclose(apply("brightness", pixels, 0.2), np.minimum(pixels + 0.2, 1))
    np.testing.assert_allclose(apply("gamma", pixels, 2), pixels**2)
    luma = pixels @ (0.299, 0.587, 0.114)
    np.testing.assert_allclose(apply("saturation", pixels, 0), luma[..., None].repeat(3, -1), atol=1e-6)
    np.testing.assert_allclose(apply("saturation", pixels, 1), pixels)
    for bits in (1, 3):
        assert len(np.unique(apply("posterise", pixels, bits))) == 2**bits


def test_rain_falls_along_one_slant():
    """On black, streaks are grey, hardly wider than they lean and a twelfth of the image long."""
    drops = apply("rain", np.zeros((240, 240, 3)), 5e-4)[..., 0] > 0
    labels, count = ndimage.label(drops, np.ones((3, 3)))
    heights = [rows.stop - rows.start for rows, _ in ndimage.find_objects(labels)]
    assert 5 < count < 40
    assert np.median(heights) == 20


def test_styles_at_full_share():
    pixels = to_pixels(PHOTOGRAPH)
    drawing = apply("sketch", pixels, 1)
    assert np.ptp(drawing, axis=-1).max() == 0  # no colour
    assert np.median(drawing) > 0.9  # paper
    edges = np.abs(np.diff(pixels.mean(-1), axis=0)).ravel() > 0.1
    assert drawing[1:, :, 0].ravel()[edges].mean() < np.median(drawing) - 0.1  # lines
    cartoon = to_pixels(to_image(apply("cartoon", pixels, 1)))
    assert 0.02 < (cartoon.max(-1) == 0).mean() - (pixels.max(-1) == 0).mean() < 0.4  # outlines
    tinted = apply("colour_transfer", pixels, 1).mean((0, 1))
    assert np.ptp(tinted) > 2 * np.ptp(pixels.mean((0, 1)))
