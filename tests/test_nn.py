"""Filters, gains and LoRA layers: exact identity at the start, folding of the normalisation, ranges."""

import pytest
import torch
from torch import nn

from vqfast import ops
from vqfast.nn import GaussianFilter, LoRALinear, LowRankFilter, SpectralGain

FILTERS = [GaussianFilter, LowRankFilter]
MEAN, STD = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])


def normalise(raw: torch.Tensor) -> torch.Tensor:
    return (raw - MEAN[:, None, None]) / STD[:, None, None]


@pytest.mark.parametrize("make", FILTERS)
@pytest.mark.parametrize("samples", [None, 2])
def test_start_is_the_exact_identity(make, samples):
    image = normalise(torch.rand(2, 3, 16, 16))
    assert torch.equal(make(samples=samples)(image, MEAN, STD), image)


@pytest.mark.parametrize("make", FILTERS)
@pytest.mark.parametrize("samples", [None, 2])
def test_normalised_pixels_are_filtered_as_raw_ones(make, samples):
    raw = torch.rand(2, 3, 16, 16)
    module = make(samples=samples)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    torch.testing.assert_close(module(normalise(raw), MEAN, STD), normalise(module(raw)), rtol=1e-4, atol=1e-4)


def test_gaussian_taps_sum_to_one_and_have_the_given_width():
    taps, _ = GaussianFilter(taps=15, sigma=1.5).taps()
    position = torch.arange(15) - 7
    torch.testing.assert_close(taps.sum(), torch.tensor(1.0))
    torch.testing.assert_close((taps[0] * position**2).sum().sqrt(), torch.tensor(1.5), rtol=1e-3, atol=0)


def test_clamp_keeps_the_ranges():
    module = GaussianFilter(taps=7, samples=2)
    with torch.no_grad():
        module.mix.copy_(torch.tensor([-5.0, 5.0]))
        module.log_sigma.copy_(torch.tensor([-5.0, 5.0]))
    module.clamp_()
    assert module.mix.tolist() == [-1, 1]
    torch.testing.assert_close(module.log_sigma.exp(), torch.tensor([0.3, 7 / 3]))


@pytest.mark.parametrize("rank", [1, 3])
def test_every_low_rank_tap_gets_a_gradient_once_mix_moves(rank):
    module = LowRankFilter(rank=rank)
    with torch.no_grad():
        module.mix.fill_(0.5)
    module(torch.rand(1, 3, 16, 16)).square().sum().backward()
    assert module.taps_y.grad.abs().amax(-1).gt(0).all()
    assert module.taps_x.grad[0].abs().max() > 0  # v_r of a further term waits for its u_r, as A waits for B


def test_lora_linear_starts_as_its_base_and_samples_share_the_start():
    base = nn.Linear(8, 4)
    layer = LoRALinear(base, rank=2, alpha=4, samples=3)
    x = torch.randn(3, 5, 8)
    assert torch.equal(layer(x), base(x))
    assert (layer.lora_a == layer.lora_a[0]).all()
    layer(x).sum().backward()
    assert base.weight.grad is None
    assert layer.lora_b.grad.abs().max() > 0


@pytest.mark.parametrize("make", FILTERS)
def test_short_filters_start_within_their_range(make):
    module = make(taps=3)
    before = [p.clone() for p in module.parameters()]
    module.clamp_()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert torch.equal(module.taps()[0][0], GaussianFilter(taps=3, sigma=1.0).taps()[0][0])


@pytest.mark.parametrize("make", FILTERS)
def test_filters_compile_in_one_graph(make):
    module, image = make(samples=2), torch.rand(2, 3, 16, 16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for result in (compiled(image), module(image)):
        assert torch.equal(result, image)
        assert torch.autograd.grad(result.square().sum(), module.mix)[0].abs().sum() > 0


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("size", [(16, 16), (33, 7), (1, 1)])
def test_spectral_gain_starts_as_the_identity_at_any_size(samples, size):
    image = torch.rand(2, 3, *size)
    module = SpectralGain(rank=3, samples=samples)
    torch.testing.assert_close(module(image), image, rtol=0, atol=2e-6)
    assert torch.equal(module(image, ops.dct2(image)), module(image))


@pytest.mark.parametrize("samples", [None, 2])
def test_every_gain_gets_a_gradient_once_gain_y_moves(samples):
    module, image = SpectralGain(rank=3, samples=samples), torch.rand(2, 3, 24, 17)
    spectrum = ops.dct2(image)
    module(image, spectrum).square().sum().backward()
    assert module.gain_y.grad.abs().amax(-1).gt(0).all()
    with torch.no_grad():
        module.gain_y.sub_(0.01 * module.gain_y.grad)
    module(image, spectrum).square().sum().backward()
    assert module.gain_x.grad.abs().amax(-1).gt(0).all()


def test_spectral_gain_per_sample_leaves_the_others_alone():
    module, image = SpectralGain(samples=2), torch.rand(2, 3, 12, 20)
    with torch.no_grad():
        module.gain_y[1] = 1
    result = module(image)
    torch.testing.assert_close(result[0], image[0])
    torch.testing.assert_close(result[1], 2 * image[1])  # M = 1 + 1 at every frequency


def test_spectral_gain_on_normalised_pixels_acts_on_the_raw_ones():
    module, raw = SpectralGain(rank=2, samples=2), torch.rand(2, 3, 12, 20)
    torch.nn.init.normal_(module.gain_y, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    expected = (module(raw) - mean[:, None, None]) / std[:, None, None]
    actual = module((raw - mean[:, None, None]) / std[:, None, None], mean=mean, std=std)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_spectral_gain_interpolates_between_its_knots():
    module = SpectralGain(knots=2)
    with torch.no_grad():
        module.gain_y.copy_(torch.tensor([[0.0, 1.0]]))
    image = torch.zeros(1, 1, 5, 1)
    image[0, 0, 0] = 1
    gained, plain = ops.dct2(module(image).detach()), ops.dct2(image)
    torch.testing.assert_close((gained / plain).flatten(), torch.tensor([1.0, 1.25, 1.5, 1.75, 2.0]))
