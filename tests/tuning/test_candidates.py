"""Presets, the images they make, the choice between them."""

import pytest
import torch

from vqfast import Preset, TuningConfig
from vqfast.tuning.candidates import IDENTITY, _stretch, render, select


def test_render_stretches_the_filtered_image_to_the_full_range():
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.5, 0.4, 0.3])
    raw = 0.4 + 0.1 * torch.rand(2, 3, 16, 16)
    pixels = (raw - mean[:, None, None]) / std[:, None, None]
    images = render((IDENTITY, Preset("stretch", stretch=True)), pixels, 7, mean, std)
    assert torch.equal(images.pixels[:2], pixels)
    stretched = (images.pixels[2:] * std[:, None, None] + mean[:, None, None]).flatten(1)
    torch.testing.assert_close(stretched.quantile(0.02, 1), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(stretched.quantile(0.98, 1), torch.ones(2), rtol=0, atol=1e-4)
    assert images.gain[:2].tolist() == [1, 1]


@pytest.mark.parametrize("size", [1, 2, 7, 51, 52, 3072])
def test_stretch_takes_the_quantiles_of_torch(size):
    images = torch.rand(3, 1, 1, size, generator=torch.Generator().manual_seed(size))
    gain, bias = _stretch(images.flatten(1))
    low, high = torch.quantile(images.flatten(1), torch.tensor([0.02, 0.98]), dim=1)
    if size > 1:
        torch.testing.assert_close(gain, 1 / (high - low), rtol=1e-4, atol=0)
        torch.testing.assert_close(bias, -low / (high - low), rtol=1e-4, atol=1e-5)
    else:
        assert (gain.tolist(), bias.tolist()) == ([1] * 3, [0] * 3)


def test_a_flat_image_is_not_stretched():
    half = torch.full((3,), 0.5)
    flat = torch.full((1, 3, 8, 8), 0.25) + 1e-3 * torch.rand(1, 3, 8, 8)
    images = render((Preset("stretch", stretch=True),), flat, 7, half, half)
    assert (images.gain.item(), images.bias.item()) == (1, 0)
    torch.testing.assert_close(images.pixels, flat)


def test_select_takes_the_majority_of_confidence_not_the_single_most_confident():
    def logits(answer, margin):
        z = torch.zeros(6)
        z[answer] = margin
        return z

    candidates = [(0, 1.0), (1, 4.0), (2, 3.9), (2, 3.8), (5, 0.1)]
    stacked = torch.stack([logits(*c) for c in candidates])[:, None, None]
    valid = torch.ones(1, 1, dtype=torch.bool)
    assert select(stacked, valid).item() == 2
    stacked[2] = torch.nan
    assert select(stacked, valid).item() == 1
    assert select(stacked * torch.nan, valid).item() == 0


def test_presets_are_validated():
    with pytest.raises(ValueError, match=r"mix must be between -1.0 and 1.0; got 2"):
        Preset("too much", mix=2)
    with pytest.raises(ValueError, match=r"sigma must be at least 0.3"):
        Preset("too thin", sigma=0.1)
    assert TuningConfig(candidates=[Preset("blur", 1.0, 1.0), IDENTITY]).presets[0] == IDENTITY
    assert [p.sigma for p in TuningConfig(taps=3, candidates=[Preset("blur", 2.0, 1.0)]).presets[1:]] == [1.0]
