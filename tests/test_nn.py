"""Filters, gains, LoRA layers: exact identity at the start, folding of the normalisation, ranges. Predictive loss."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqfast import ops, zoo
from vqfast.nn import GaussianFilter, LoRALinear, LowRankFilter, PredictiveHead, SpectralGain, predictive_loss

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


class Output(NamedTuple):
    hidden_states: tuple[torch.Tensor, ...] | None


@pytest.fixture
def hidden_states():
    """Three layers of two sequences of five positions, and which of them are visual."""
    generator = torch.Generator().manual_seed(0)
    states = tuple(torch.randn(2, 5, 8, generator=generator).requires_grad_() for _ in range(3))
    return states, torch.tensor([[0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]).bool()


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("with_head", [False, True])
def test_predictive_loss_is_the_mean_over_visual_positions(layer, with_head, hidden_states):
    states, visual = hidden_states
    head = PredictiveHead(8) if with_head else None
    loss = predictive_loss(Output(states), layer, visual, head)
    predicted = head(states[layer][visual]) if with_head else states[layer][visual]
    expected = -F.cosine_similarity(predicted, states[0][visual].detach(), dim=-1).mean()
    torch.testing.assert_close(loss, expected)
    leaves = [states[layer], *(head.parameters() if with_head else ())]
    for actual, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_predictive_loss_leaves_target_and_text_without_gradient(hidden_states):
    states, visual = hidden_states
    predictive_loss(Output(states), 2, visual).backward()
    assert states[0].grad is None
    assert states[1].grad is None
    assert states[2].grad.abs().amax(-1).gt(0).equal(visual)


def test_predictive_head_is_two_layers_of_the_width():
    head, x = PredictiveHead(8), torch.randn(2, 5, 8)
    first, _, second = head
    torch.testing.assert_close(head(x), F.gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias)
    assert [tuple(p.shape) for p in head.parameters()] == [(8, 8), (8,), (8, 8), (8,)]


def test_predictive_loss_of_a_head_under_autocast(hidden_states):
    """The head then gives bfloat16 beside hidden states in float32."""
    states, visual = hidden_states
    head = PredictiveHead(8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = predictive_loss(Output(states), 1, visual, head)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, predictive_loss(Output(states), 1, visual, head), rtol=0, atol=0.02)


def test_predictive_loss_pulls_a_model_towards_its_input():
    model, processor = zoo.load()
    image, question, _ = zoo.questions("test")[0]
    inputs = processor(images=image, text=question, return_tensors="pt")
    visual = inputs["input_ids"] == model.config.image_token_id
    parameters = [p.requires_grad_() for p in model.get_decoder().layers[0].parameters()]
    losses = []
    for _ in range(3):
        loss = predictive_loss(model(**inputs, output_hidden_states=True), 1, visual)
        losses.append(loss.item())
        with torch.no_grad():
            for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.sub_(0.1 * grad)
    assert losses[0] > losses[1] > losses[2] > -1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(model_output=Output(None)),
            ValueError,
            "no hidden_states; call the model with output_hidden_states=True",
        ),
        (dict(model_output=object()), ValueError, "output_hidden_states=True"),
        (dict(layer=0), ValueError, "layer must be 1 to 2, counted as in hidden_states, whose 0 is the target; got 0"),
        (dict(layer=3), ValueError, "got 3"),
        (dict(layer=-1), ValueError, "got -1"),
        (dict(visual_positions=torch.ones(2, 5)), TypeError, "visual_positions must be bool; got torch.float32"),
        (dict(visual_positions=torch.ones(2, 4).bool()), ValueError, r"\[B, T\], .* \[2, 5\]; got \[2, 4\]"),
        (dict(visual_positions=torch.zeros(2, 5).bool()), ValueError, "visual_positions has no True; leave the loss"),
    ],
)
def test_predictive_loss_errors(change, error, message, hidden_states):
    states, visual = hidden_states
    with pytest.raises(error, match=message):
        predictive_loss(**dict(model_output=Output(states), layer=1, visual_positions=visual) | change)
