"""Models that are not in transformers, through what a user has for a model of their own."""

import pytest
import torch

import vqfast
from cogvlm import SIDE, WORDS, SmallCogVLM
from helpers import assert_unchanged, fingerprint
from vqfast.integrations import transformers as towers

CONFIG = vqfast.TuningConfig(guard=False)
HALF = ((0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(towers, "_registered", {})
    vqfast.register_vision_tower("SmallCogVLM", tower="model.vision", pixel_argument="images", normalisation=HALF)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, SIDE, SIDE, generator=generator) * 2 - 1
    ids = torch.randint(WORDS, (2, 5), generator=generator)
    return dict(input_ids=ids, images=images, attention_mask=torch.ones_like(ids))


def test_an_unknown_model_says_what_was_looked_for_and_how_to_register():
    expected = (
        r"looked for a submodule named vision_tower, .*it has model \(Body\).*register_vision_tower\('SmallCogVLM'"
    )
    with pytest.raises(ValueError, match=expected):
        vqfast.TestTimeTuner(SmallCogVLM())


@pytest.mark.usefixtures("registered")
def test_a_registered_model_is_tuned_and_left_as_it_was(inputs):
    model = SmallCogVLM()
    before, plain = fingerprint(model), model(**inputs).logits
    with vqfast.TestTimeTuner(model, CONFIG) as tuner:
        assert tuner.layers == tuple(f"model.vision.transformer.layers.{i}.attention.query_key_value" for i in range(2))
        result = tuner.tune(**inputs)
        torch.testing.assert_close(result.samples[0].entropy_before, entropy(plain[0, -1]), rtol=1e-4, atol=1e-5)
        with tuner.applied(result), torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits[:, -1], result.logits)
        assert result.samples[0].entropy_after < result.samples[0].entropy_before
    assert_unchanged(model, before)


def entropy(logits):
    return torch.distributions.Categorical(logits=logits.detach()).entropy().item()


@pytest.mark.usefixtures("registered")
def test_query_and_value_of_a_fused_layer_move_and_the_key_does_not(inputs):
    model = SmallCogVLM()
    layer = model.model.vision.transformer.layers[0].attention.query_key_value
    seen = []
    with vqfast.TestTimeTuner(model, CONFIG) as tuner:
        result = tuner.tune(**inputs)
        with (
            tuner.applied(result),
            layer.register_forward_hook(lambda m, x, y: seen.append((x[0], y))),
            torch.no_grad(),
        ):
            model(**inputs)
    ((x, y),) = seen
    query, key, value = (y - torch.nn.functional.linear(x, layer.weight, layer.bias)).abs().chunk(3, -1)
    assert key.max() < 1e-6 < min(query.max(), value.max())
    lora_a, lora_b = result.adapters(1)[tuner.layers[0]]
    moved = (y - torch.nn.functional.linear(x, layer.weight, layer.bias))[1]
    torch.testing.assert_close(moved, 2 * x[1] @ lora_a.T @ lora_b.T, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("registered")
def test_subclasses_are_found_and_a_later_call_replaces(inputs):
    class Finetuned(SmallCogVLM):
        pass

    with vqfast.TestTimeTuner(Finetuned(), CONFIG) as tuner:
        tuner.tune(**inputs)
    vqfast.register_vision_tower(SmallCogVLM, tower="model.eyes")
    with pytest.raises(ValueError, match=r"registered with its vision tower at 'model.eyes', but has no such"):
        vqfast.TestTimeTuner(Finetuned())
    vqfast.register_vision_tower(SmallCogVLM, tower="model.vision", blocks="transformer", normalisation=HALF)
    with pytest.raises(ValueError, match=r"no blocks in the vision tower 'model.vision'"):
        vqfast.TestTimeTuner(Finetuned())


@pytest.mark.usefixtures("registered")
def test_pixels_are_asked_for_by_the_models_own_name(inputs):
    with vqfast.TestTimeTuner(SmallCogVLM(), CONFIG) as tuner, pytest.raises(TypeError, match="tune needs images as a"):
        tuner.tune(input_ids=inputs["input_ids"], pixel_values=inputs["images"])
