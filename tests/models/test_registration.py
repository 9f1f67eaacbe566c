"""Models that are not in transformers, through what a user has for a model of their own."""

from types import SimpleNamespace

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


def register(**options):
    vqfast.register_vision_tower(SmallCogVLM, **{"tower": "model.vision", "pixel_argument": "images"} | options)


def class_like(**methods):
    return type("Other", (SmallCogVLM,), methods)()


@pytest.mark.usefixtures("registered")
def test_a_forward_that_takes_inputs_and_nothing_else_will_do(inputs):
    def forward(self, input_ids, images):
        return SmallCogVLM.forward(self, input_ids, images)

    with vqfast.TestTimeTuner(class_like(forward=forward), CONFIG) as tuner:
        tuner.tune(input_ids=inputs["input_ids"], images=inputs["images"])


@pytest.mark.usefixtures("registered")
def test_a_tower_without_gradients_or_that_is_left_out_is_an_error(inputs):
    blind = class_like(forward=lambda self, input_ids, images: SmallCogVLM.forward(self, input_ids, images * 0))
    blind.model.vision.forward = torch.no_grad()(blind.model.vision.forward)
    with (
        vqfast.TestTimeTuner(blind, CONFIG) as tuner,
        pytest.raises(ValueError, match=r"'model.vision' under\s+torch.no"),
    ):
        tuner.tune(input_ids=inputs["input_ids"], images=inputs["images"])

    def forward(self, input_ids, images):
        vision = self.model.vision
        seen = vision.transformer(vision.patch_embedding(images))  # not through vision.forward
        return SimpleNamespace(logits=self.lm_head(self.mix(torch.cat([seen, self.model.embed_tokens(input_ids)], 1))))

    refused = pytest.raises(ValueError, match=r"'model\.vision' was not called, but its layers were")
    with vqfast.TestTimeTuner(class_like(forward=forward), CONFIG) as tuner, refused:
        tuner.tune(input_ids=inputs["input_ids"], images=inputs["images"])


@pytest.mark.usefixtures("registered")
def test_layers_that_get_the_sequence_first_are_refused_in_a_batch(inputs):
    model = SmallCogVLM()
    for layer in model.model.vision.transformer.layers:
        layer.attention.forward = lambda x, own=layer.attention: sequence_first(own, x)
    with vqfast.TestTimeTuner(model, CONFIG) as tuner:
        tuner.tune(**{name: value[:1] for name, value in inputs.items()})
        with pytest.raises(ValueError, match=r"gets \[16, 2, 32\] for 2 images of 2 samples"):
            tuner.tune(**inputs)


def sequence_first(attention, x):
    qkv = attention.query_key_value(x.transpose(0, 1)).transpose(0, 1).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
    return attention.dense(torch.nn.functional.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2))


@pytest.mark.usefixtures("registered")
def test_a_tower_that_is_called_image_by_image(inputs):
    """One prompt, two images: each keeps its own patch embedding."""

    def forward(self, input_ids, images):
        seen = [self.model.vision(image[None]) for image in images]
        seen = torch.cat([*seen, self.model.embed_tokens(input_ids)], 1)
        return SimpleNamespace(logits=self.lm_head(self.mix(seen)[:, -input_ids.shape[1] :]))

    model, ids = class_like(forward=forward), inputs["input_ids"][:1]
    plain = entropy(model(ids, inputs["images"]).logits[0, -1])
    model.config = SimpleNamespace(image_token_id=int(ids[0, 0]))
    config = vqfast.TuningConfig(filter=None, guard=False)
    with vqfast.TestTimeTuner(model, config, normalisation=HALF) as tuner:
        result = tuner.tune(input_ids=ids, images=inputs["images"])
    assert result.samples[0].entropy_before == pytest.approx(plain, rel=1e-4)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"pixel_argument": "img"}, ValueError, "forward takes no img, only attention_mask, images, input_ids"),
        ({"blocks": "nope"}, ValueError, r"its lists are transformer.layers.*Looked for one at 'nope', as registered"),
        ({"normalisation": ((0.5, torch.nan), (1, 1))}, ValueError, "as many of each, finite"),
    ],
)
def test_registrations_that_do_not_fit(options, error, message):
    register(**options)
    with pytest.raises(error, match=message):
        vqfast.TestTimeTuner(SmallCogVLM(), normalisation=options.get("normalisation", HALF))


def test_a_class_is_registered_not_an_instance():
    with pytest.raises(TypeError, match="an instance of SmallCogVLM"):
        vqfast.register_vision_tower(SmallCogVLM(), tower="model.vision")


@pytest.mark.usefixtures("registered")
def test_a_fused_layer_of_unequal_parts_is_not_cut_into_thirds():
    model = SmallCogVLM()
    for layer in model.model.vision.transformer.layers:
        layer.attention.query_key_value = torch.nn.Linear(32, 48)  # query 32, key and value 8 each
    with pytest.raises(ValueError, match=r"match no linear layer in the vision blocks"):
        vqfast.TestTimeTuner(model)
