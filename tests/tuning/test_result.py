"""What a result prints, serialises and renders."""

import json

import pytest
import torch

from helpers import SEARCH
from vqfast import TestTimeTuner, TuningConfig


def test_result_prints_serialises_and_renders(model, batch):
    with TestTimeTuner(model, SEARCH) as tuner:
        result = tuner.tune(**batch)
    text = str(result)
    assert len(text.splitlines()) == 7
    assert "search" in text.splitlines()[-1]
    content = json.loads(result.to_json())
    assert len(content["samples"]) == 5
    assert content["samples"][0].keys() >= {"entropy_before", "entropy_after", "preset", "filter", "tuned", "note"}
    image, clipped = result.image(1)
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert 0 <= clipped <= 1
    with pytest.raises(IndexError, match="sample must be 0 to 4; got 5"):
        result.image(5)


def test_image_of_an_untouched_sample_is_the_input(model, batch):
    with TestTimeTuner(model, TuningConfig(candidates=[], lr_filter=1e-9)) as tuner:
        image, clipped = tuner.tune(**batch).image(0)
    expected = ((batch["pixel_values"][0] * 0.5 + 0.5) * 255).round().byte().permute(1, 2, 0)
    assert torch.equal(torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3), expected)
    assert clipped == 0


def test_image_without_a_filter(model, batch):
    with TestTimeTuner(model, TuningConfig(filter=None)) as tuner:
        result = tuner.tune(**batch)
    with pytest.raises(ValueError, match="no filter"):
        result.image()


def test_repr_lists_every_layer(model):
    with TestTimeTuner(model) as tuner:
        assert len(tuner.layers) == 4
        for path in tuner.layers:
            assert path in repr(tuner)
