"""Codec adapters in vision towers: nothing at the start, the right row per image, saved and loaded, taken out again."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

import vqfast
from families import FAMILIES
from vqfast import TestTimeTuner, TuningConfig, zoo
from vqfast.ops.film_adapter.reference import film_adapter

CONDITIONS = ("jpeg:1", "webp:0")


@pytest.fixture
def model():
    return zoo.load()[0]


@pytest.fixture(scope="module")
def inputs():
    images, texts, _ = zip(*zoo.questions("validation")[:4], strict=True)
    return zoo.load()[1](images=list(images), text=list(texts), return_tensors="pt", padding=True)


def trained(model):
    """Adapters that change something."""
    adapters = vqfast.insert_codec_adapters(model, CONDITIONS, bottleneck=4)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapters


def features(model, inputs):
    return model.model.vision_tower(inputs["pixel_values"]).last_hidden_state


def test_new_adapters_change_nothing_and_every_one_learns(model, inputs):
    before, state = model(**inputs).logits, {n: t.clone() for n, t in model.state_dict().items()}
    adapters = vqfast.insert_codec_adapters(model, CONDITIONS)
    assert [adapter.down.shape for adapter in adapters.layers] == [(16, 96)] * 4
    assert torch.equal(model(**inputs).logits, before)
    model(**inputs).logits.square().sum().backward()
    assert all(adapter.up.grad.abs().sum() > 0 for adapter in adapters.layers)
    adapters.remove()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_taken_out_the_model_is_what_it_was(model, inputs):
    before = model(**inputs).logits
    adapters = trained(model)
    assert not torch.allclose(model(**inputs).logits, before)
    adapters.remove()
    adapters.remove()
    assert torch.equal(model(**inputs).logits, before)
    assert vqfast.insert_codec_adapters(model, CONDITIONS)


def test_equals_blocks_with_the_equation(model, inputs):
    """Every block by itself, on the activations that it gets."""
    seen = []
    layers = model.model.vision_tower.encoder.layers
    for layer in layers:
        layer.register_forward_hook(
            lambda m, args, kwargs, y: seen.append((m.forward(*args, **kwargs), y)), with_kwargs=True
        )
    adapters = trained(model)
    with adapters.condition(["jpeg:1", None, "webp:0", "jpeg:1"]):
        features(model, inputs)
    rows = torch.tensor([1, 0, 2, 1])
    for (plain, adapted), a in zip(seen, adapters.layers, strict=True):
        expected = film_adapter(plain, a.down, a.up, a.scale[rows], a.shift[rows], "gelu")
        torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-4)


def test_conditions_per_image_equal_images_alone(model, inputs):
    adapters = trained(model)
    names = ["jpeg:1", None, "webp:0", "unknown"]
    with adapters.condition(names):
        together = features(model, inputs)
    for i, name in enumerate(names):
        with adapters.condition(name):
            alone = features(model, {"pixel_values": inputs["pixel_values"][i : i + 1]})
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], features(model, inputs)[0])  # outside: unknown
    torch.testing.assert_close(together[1], features(model, inputs)[1], rtol=1e-4, atol=1e-4)


def test_saved_and_loaded(model, inputs, tmp_path):
    adapters = trained(model)
    with adapters.condition("webp:0"):
        expected = model(**inputs).logits
    adapters.save(tmp_path / "a.safetensors")
    other = zoo.load()[0]
    loaded = vqfast.insert_codec_adapters(other, tmp_path / "a.safetensors")
    assert loaded.conditions == ("unknown", *CONDITIONS)
    with loaded.condition("webp:0"):
        assert torch.equal(other(**inputs).logits, expected)


def test_a_tuner_runs_behind_them(model, inputs):
    adapters = trained(model)
    expected = model(**inputs).logits[:, -1]
    with TestTimeTuner(model) as tuner:
        result = tuner.tune(**inputs)
    before = torch.tensor([sample.token_before for sample in result.samples])
    assert torch.equal(before, expected.argmax(-1))
    adapters.remove()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_takes_them_and_gives_them_back(family):
    model, inputs = family.build().requires_grad_(False), family.inputs(2)
    name = "logits_per_image" if hasattr(model, "get_image_features") and "logit_scale" in dir(model) else "logits"
    with torch.no_grad():
        before = getattr(model(**inputs), name)
        adapters = trained(model)
        with adapters.condition("jpeg:1"):
            known = getattr(model(**inputs), name)
        unknown = getattr(model(**inputs), name)
        adapters.remove()
        after = getattr(model(**inputs), name)
    assert torch.equal(after, before)
    assert not torch.allclose(known, before)
    assert not torch.allclose(known, unknown)


def test_a_backward_that_computes_the_tower_again_needs_the_condition(model, inputs):
    adapters, pixels = trained(model), inputs["pixel_values"].clone().requires_grad_()

    def loss():
        return checkpoint(lambda x: features(model, {"pixel_values": x}), pixels, use_reentrant=False).square().sum()

    with adapters.condition("jpeg:1"):
        (inside,) = torch.autograd.grad(loss(), pixels)
        (expected,) = torch.autograd.grad(features(model, {"pixel_values": pixels}).square().sum(), pixels)
        late = loss()
    torch.testing.assert_close(inside, expected)
    with pytest.raises(ValueError, match="inside condition"):
        late.backward()


def test_gradients_reach_pixels_alone_behind_frozen_adapters(model, inputs):
    adapters, pixels = trained(model), inputs["pixel_values"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(features(model, {"pixel_values": pixels}).square().sum(), pixels)
    adapters.requires_grad_(False)
    model.requires_grad_(False)
    (grad,) = torch.autograd.grad(features(model, {"pixel_values": pixels}).square().sum(), pixels)
    torch.testing.assert_close(grad, expected)


def test_a_search_takes_one_condition_for_all(model, inputs):
    adapters = trained(model)
    with TestTimeTuner(model, TuningConfig(candidates="default")) as tuner:
        with adapters.condition("jpeg:1"):
            tuner.tune(**inputs)
        with adapters.condition(["jpeg:1"] * 4), pytest.raises(ValueError, match="candidate search"):
            tuner.tune(**inputs)


def test_float64(model, inputs):
    adapters = vqfast.insert_codec_adapters(model.double(), CONDITIONS)
    with adapters.condition("jpeg:1"):
        assert features(model, {"pixel_values": inputs["pixel_values"].double()}).dtype == torch.float64


def test_bfloat16(model, inputs):
    adapters = trained(model.bfloat16())
    assert {parameter.dtype for parameter in adapters.parameters()} == {torch.float32}
    assert features(model, {"pixel_values": inputs["pixel_values"].bfloat16()}).dtype == torch.bfloat16


def test_a_model_is_not_copied_with_them(model):
    adapters = vqfast.insert_codec_adapters(model, CONDITIONS)
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="call remove"):
            duplicate(model)
    adapters.remove()
    copy.deepcopy(model)


def test_errors(model, inputs, tmp_path):
    with pytest.raises(ValueError, match=r"none twice, none 'unknown'; got \['a', 'a'\]"):
        vqfast.insert_codec_adapters(model, ("a", "a"))
    with pytest.raises(FileNotFoundError, match="pass a sequence of conditions for new adapters"):
        vqfast.insert_codec_adapters(model, tmp_path / "absent.safetensors")
    (tmp_path / "a.bin").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        vqfast.insert_codec_adapters(model, tmp_path / "a.bin")
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="holds no codec adapters"):
        vqfast.insert_codec_adapters(model, tmp_path / "b.safetensors")
    adapters = vqfast.insert_codec_adapters(model, CONDITIONS, bottleneck=4)
    with pytest.raises(ValueError, match="has codec adapters already"):
        vqfast.insert_codec_adapters(model, CONDITIONS)
    with pytest.raises(ValueError, match="condition must be one of unknown, jpeg:1, webp:0 or None; got 'jpeg:2'"):
        adapters.condition("jpeg:2").__enter__()
    with (
        adapters.condition(["jpeg:1"]),
        pytest.raises(ValueError, match=r"1 conditions, but the vision blocks get \[4,"),
    ):
        model(**inputs)
    adapters.save(tmp_path / "c.safetensors")
    adapters.remove()
    with pytest.raises(ValueError, match="have a bottleneck of 4; got bottleneck=8"):
        vqfast.insert_codec_adapters(model, tmp_path / "c.safetensors", 8)
    for change, message in (
        ({"layers.1.scale": torch.zeros(9, 4)}, "does not fit this model"),
        ({"layers.0.down": torch.zeros(())}, "holds no codec adapters"),
    ):
        save_file(adapters.state_dict() | change, tmp_path / "d.safetensors", metadata={"conditions": '["a", "b"]'})
        with pytest.raises(ValueError, match=message):
            vqfast.insert_codec_adapters(model, tmp_path / "d.safetensors")
    save_file(adapters.state_dict(), tmp_path / "e.safetensors", metadata={"conditions": '"ab"'})
    with pytest.raises(ValueError, match="holds no codec adapters"):
        vqfast.insert_codec_adapters(model, tmp_path / "e.safetensors")
    for bottleneck in (0, 129, -1):
        with pytest.raises(ValueError, match=f"bottleneck must be 1 to 128; got {bottleneck}"):
            vqfast.insert_codec_adapters(model, CONDITIONS, bottleneck)
    vqfast.insert_codec_adapters(model, tmp_path / "c.safetensors").remove()  # nothing was left behind
    del model.model.vision_tower.encoder.layers[-1]
    with pytest.raises(ValueError, match="are for other blocks"):
        vqfast.insert_codec_adapters(model, tmp_path / "c.safetensors")
