"""The filter's effect as an image of the original's size."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from transformers import (
    CLIPImageProcessorPil,
    JanusImageProcessorPil,
    LlavaNextImageProcessorPil,
    SiglipImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from helpers import SEARCH
from vqfast import TestTimeTuner, TuningConfig, zoo
from vqfast.images import read_image
from vqfast.tuning.export import model_scale

HALF = (torch.full((3,), 0.5),) * 2
STANDARD = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def noisy_digit(size):
    image = zoo.questions("validation")[12][0]
    noise = np.random.default_rng(0).normal(0, 60, (32, 32, 3))
    pixels = (np.asarray(image) * 0.5 + 60 + noise).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def tuned(loaded, image, config=SEARCH):
    model, processor = loaded
    inputs = processor(images=image, text=zoo.prompt("which digit?"), return_tensors="pt")
    with TestTimeTuner(model, config) as tuner:
        return tuner.tune(**inputs)


@pytest.mark.parametrize("size", [(32, 32), (128, 128), (97, 160)])
def test_what_the_processor_makes_of_it_is_the_filtered_image(loaded, size):
    _, processor = loaded
    image = noisy_digit(size)
    result = tuned(loaded, image)
    exported, _ = result.image(original=image, processor=processor)
    assert (exported.size, exported.mode) == (size, "RGB")
    seen = processor.image_processor([exported], return_tensors="pt")["pixel_values"][0] * 0.5 + 0.5
    wanted = torch.tensor(np.asarray(result.image()[0])).permute(2, 0, 1) / 255
    change = (wanted - (result.pixels[0] * 0.5 + 0.5)).abs().mean()
    assert change > 0.1
    assert (seen - wanted).abs().mean() < 0.03 * change


def test_the_processor_may_be_left_out_where_proportions_tell_the_scale(loaded):
    image = noisy_digit((128, 128))
    result = tuned(loaded, image)
    with_processor, without = (result.image(original=image, processor=p)[0] for p in (loaded[1], None))
    assert np.abs(np.asarray(with_processor, float) - np.asarray(without, float)).mean() < 2
    with pytest.raises(ValueError, match=r"an original of 160x97 pixels is scaled to pixels \[1, 3, 32, 32\] is not"):
        result.image(original=noisy_digit((97, 160)))


def test_a_filter_at_rest_exports_the_original(loaded):
    image = noisy_digit((61, 47))
    result = tuned(loaded, image, TuningConfig(lr_filter=1e-9))
    exported, clipped = result.image(original=image, processor=loaded[1])
    assert np.array_equal(np.asarray(exported), np.asarray(image))
    assert clipped == 0


def test_grey_stays_grey_and_a_profile_stays(loaded, tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, mode in (("grey.png", "L"), ("colour.png", "RGB"), ("clear.png", "RGBA")):
        noisy_digit((64, 64)).convert(mode).save(tmp_path / name, icc_profile=profile)
        image = read_image(tmp_path / name)
        exported, _ = tuned(loaded, image).image(original=image, processor=loaded[1])
        assert exported.mode == ("L" if mode == "L" else "RGB")
        assert exported.info["icc_profile"] == profile
    noisy_digit((64, 64)).convert("CMYK").save(tmp_path / "print.jpg", icc_profile=profile)
    image = read_image(tmp_path / "print.jpg")
    assert "icc_profile" not in tuned(loaded, image).image(original=image)[0].info


@pytest.mark.parametrize(
    ("processor", "size", "expected"),
    [
        (SiglipImageProcessorPil(size=dict(height=224, width=224), **STANDARD), (480, 640), (480 / 224, 640 / 224)),
        # The shorter side to 336, then the centre.
        (CLIPImageProcessorPil(size=dict(shortest_edge=336), crop_size=336, **STANDARD), (480, 640), (480 / 336,) * 2),
        # Into 672 x 672 with its proportions, padded above and below, cut into tiles beside the image squashed whole.
        (
            LlavaNextImageProcessorPil(
                size=dict(shortest_edge=336), crop_size=336, image_grid_pinpoints=[[672, 672]], **STANDARD
            ),
            (480, 640),
            (640 / 672,) * 2,
        ),
        (Qwen2VLImageProcessorPil(patch_size=14, **STANDARD), (480, 640), (480 / 476, 640 / 644)),
        (Qwen2VLImageProcessorPil(patch_size=14, **STANDARD), (300, 3000), (300 / 308, 3000 / 2996)),
        # With its proportions into a square, padded.
        (JanusImageProcessorPil(**STANDARD), (2000, 500), (2000 / 384,) * 2),
        (JanusImageProcessorPil(**STANDARD), (300, 3000), (3000 / 384,) * 2),
    ],
    ids=["squashed", "cropped", "tiles", "patches", "long patches", "padded", "long padded"],
)
def test_scale_is_read_off_the_processor(processor, size, expected):
    assert model_scale(processor, size, HALF) == pytest.approx(expected, rel=0.015)


def test_an_image_too_small_to_tell_its_scale(loaded):
    with pytest.raises(ValueError, match="an original of 1x40 pixels is too small or too long"):
        model_scale(loaded[1], (1, 40), HALF)
    with pytest.raises(TypeError, match="original must be a PIL image; got ndarray"):
        tuned(loaded, noisy_digit((32, 32))).image(original=np.zeros((32, 32, 3)))
