"""Restorers: each mends what it is for, survives every image, and a user's own is imported by name."""

import warnings

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")
pytest.importorskip("pywt")
pytest.importorskip("skimage")
from skimage import data

from studies.degradations import degrade, to_image, to_pixels
from studies.restoration import RESTORERS, noise_level, restore

PHOTOGRAPH = Image.fromarray(data.astronaut()[:160, 130:290])  # ships with scikit-image
CHECKS = np.indices((32, 32)).sum(0)[..., None].repeat(3, -1) % 2 * 255
EXTREME = {
    "pixel": np.full((1, 1, 3), 9),
    "two": np.array([[[0, 0, 0], [255, 255, 255]], [[255, 0, 0], [0, 0, 255]]]),
    "strip": np.arange(63).reshape(3, 7, 3),
    "tall": np.arange(120).reshape(40, 1, 3),
    "black": np.zeros((32, 32, 3)),
    "white": np.full((32, 40, 3), 255),
    "red": np.broadcast_to([255, 0, 0], (33, 31, 3)),
    "saturated": CHECKS,
}


def distance(image):
    return float(((to_pixels(image) - to_pixels(PHOTOGRAPH)) ** 2).mean())


@pytest.mark.parametrize("name", RESTORERS)
@pytest.mark.parametrize("kind", EXTREME)
def test_every_image(name, kind):
    pixels = EXTREME[kind].astype(np.uint8) / 255
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored = RESTORERS[name](pixels.copy())
    assert restored.shape == pixels.shape
    assert restored.dtype == np.float64
    assert np.isfinite(restored).all()
    assert restored.min() >= -1e-9
    assert restored.max() <= 1 + 1e-9
    if kind in ("black", "white") and name != "clahe":  # which stretches even that
        np.testing.assert_allclose(restored, pixels, atol=1 / 255)
    assert restore(to_image(pixels), name).size == pixels.shape[1::-1]


@pytest.mark.parametrize(
    ("name", "degradation", "strength", "left"),
    [
        ("median", "impulse_noise", 0.05, 0.2),
        ("bilateral", "gaussian_noise", 0.1, 0.3),
        ("non_local_means", "gaussian_noise", 0.1, 0.3),
        ("total_variation", "gaussian_noise", 0.1, 0.3),
        ("wiener", "gaussian_blur", 1.5, 0.7),
        ("richardson_lucy", "gaussian_blur", 1.5, 0.7),
        ("unsharp_mask", "gaussian_blur", 1, 0.8),
        ("clahe", "fog", 0.6, 0.8),
    ],
)
def test_mends(name, degradation, strength, left):
    """Of the mean squared error, at most the share `left` remains."""
    degraded = degrade(PHOTOGRAPH, degradation, strength, 0)
    assert distance(restore(degraded, name)) < left * distance(degraded)


def test_unsharp_mask_sharpens_every_row():
    """scikit-image 0.26 leaves all but three rows of a colour image unwritten for channel_axis=-1."""
    steps = np.tile(np.where(np.arange(40) < 20, 0.3, 0.6)[None, :, None], (30, 1, 3))
    contrast = np.ptp(RESTORERS["unsharp_mask"](steps), axis=1)
    np.testing.assert_allclose(contrast, contrast[0, 0])
    assert contrast[0, 0] > 0.4


@pytest.mark.parametrize("sigma", [0.02, 0.05, 0.1])
def test_noise_level(sigma):
    smooth = np.full((200, 200, 3), 0.5)
    assert noise_level(smooth) < 1e-9
    noise = np.random.default_rng(0).normal(0, sigma, smooth.shape)
    assert noise_level(smooth + noise) == pytest.approx(sigma, rel=0.05)


def test_hook(tmp_path, monkeypatch):
    (tmp_path / "my_restorer.py").write_text(
        "from PIL import Image, ImageOps\n"
        "def invert(image): return ImageOps.invert(image).convert('L')\n"
        "def half(image): return image.resize((3, 4))\n"
        "def pixels(image): return [1, 2]\n"
        "number = 3\n"
        "class Mine:\n    invert = staticmethod(invert)\n"
    )
    (tmp_path / "broken_restorer.py").write_text("import no_such_package_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    image = Image.new("RGB", (6, 8), (10, 10, 10))
    restored = restore(image, "my_restorer:invert")
    assert (restored.mode, restored.getpixel((0, 0))) == ("RGB", (245, 245, 245))
    assert restore(image, "my_restorer:Mine.invert") == restored
    for name, kind, message in (
        ("my_restorer:half", ValueError, r"keep the size of the image, \(6, 8\); got \(3, 4\)"),
        ("my_restorer:pixels", TypeError, "must return a PIL image; got list"),
        ("my_restorer:number", TypeError, "must be a function PIL image -> PIL image; got int"),
        ("my_restorer:nothing", ImportError, "'my_restorer:nothing' cannot be imported: .*no attribute 'nothing'"),
        ("broken_restorer:f", ImportError, "cannot be imported: No module named 'no_such_package_here'"),
        ("nowhere_at_all:f", ImportError, "cannot be imported: No module named 'nowhere_at_all'"),
        ("nafnet", ValueError, "one of median, .*, unsharp_mask, or module:function .*; got 'nafnet'"),
        (":f", ValueError, "got ':f'"),
    ):
        with pytest.raises(kind, match=message):
            restore(image, name)
