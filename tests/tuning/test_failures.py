"""Failures and bad input: a clear error or a marked sample, nothing half-applied."""

import gc
import json
import weakref

import pytest
import torch
from torch import nn

from helpers import SEARCH, assert_unchanged, fingerprint
from vqfast import TestTimeTuner, TuningConfig, TuningError, backend, backends, zoo


def test_nan_in_one_sample_is_that_samples_failure_only(model, batch, monkeypatch):
    with TestTimeTuner(model) as tuner:
        healthy = tuner.tune(**batch)
        original = model.lm_head.forward

        def nan_for_sample_2(hidden):
            logits = original(hidden)
            return torch.cat([logits[:2], logits[2:3] * torch.nan, logits[3:]])

        monkeypatch.setattr(model.lm_head, "forward", nan_for_sample_2)
        result = tuner.tune(**batch)
    assert [s.failed for s in result.samples] == [False, False, True, False, False]
    assert result.samples[2].note == "the tuned answer's entropy is nan"
    assert result.samples[2].filter["mix"] == 0
    for i in (0, 1, 3, 4):
        torch.testing.assert_close(result.logits[i], healthy.logits[i])
    assert json.loads(result.to_json())["samples"][2]["entropy_after"] is None


def test_on_failure_raise(model, batch, monkeypatch):
    before = fingerprint(model)
    original = model.lm_head.forward
    with TestTimeTuner(model, TuningConfig(on_failure="raise")) as tuner:
        with monkeypatch.context() as patch:
            patch.setattr(model.lm_head, "forward", lambda hidden: original(hidden) * torch.inf)
            with pytest.raises(TuningError, match="sample 0: the tuned answer's entropy is nan"):
                tuner.tune(**batch)
        tuner.tune(**batch)
    assert_unchanged(model, before)


def change(batch: dict, name: str, f) -> dict:
    return {**batch, name: f(batch.get(name))}


@pytest.mark.parametrize(
    ("name", "f", "error", "message"),
    [
        ("pixel_values", lambda x: x * torch.nan, ValueError, "the pixels contain NaN or infinite"),
        ("pixel_values", lambda x: x[0], ValueError, r"pixel_values must be \[B, C, H, W\], .*; got \[3, 32, 32\]"),
        (
            "pixel_values",
            lambda x: x[:2],
            ValueError,
            r"image tokens \[64, 64, 64, 64, 64\] cannot be shared out among 2 images",
        ),
        ("pixel_values", lambda x: (x * 9).int(), TypeError, "must be floating point"),
        ("pixel_values", lambda x: x.to("meta"), ValueError, "pixel_values is on meta, the model on cpu"),
        ("pixel_values", lambda x: None, TypeError, "tune needs pixel_values as a tensor"),
        ("pixel_values", lambda x: x[..., :3, :3], ValueError, "at least 4x4 pixels; got 3x3"),
        ("input_ids", lambda x: x[0], ValueError, r"input_ids must be \[B, L\]"),
        ("input_ids", lambda x: x.tolist(), TypeError, "tune needs input_ids as a tensor"),
        ("attention_mask", lambda x: x * 0, ValueError, "padded on the left"),
        (
            "attention_mask",
            lambda x: x[:, :3],
            ValueError,
            r"attention_mask must have the shape of input_ids, \[5, 70\]",
        ),
        ("labels", lambda x: torch.zeros(5), ValueError, "tune takes no labels"),
        ("max_new_tokens", lambda x: 3, TypeError, "max_new_tokens=3 is no input of LlavaForConditionalGeneration"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_left_applied(model, batch, name, f, error, message):
    before = fingerprint(model)
    with TestTimeTuner(model) as tuner:
        with pytest.raises(error, match=message):
            tuner.tune(**change(batch, name, f))
        assert_unchanged(model, before)
        tuner.tune(**batch)


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


@pytest.mark.parametrize("kind", ["own forward", "hooked"])
def test_lora_goes_on_top_of_a_layer_with_a_forward_of_its_own(batch, kind):
    plain, _ = zoo.load()
    wrapped, _ = zoo.load()
    attention = wrapped.model.vision_tower.encoder.layers[0].self_attn
    before = attention.q_proj
    if kind == "own forward":
        attention.q_proj = Tripled(96, 96)
        attention.q_proj.load_state_dict(before.state_dict())
        layer = plain.model.vision_tower.encoder.layers[0].self_attn.q_proj
        layer.weight.data *= 3
        layer.bias.data *= 3
    else:
        own = before.forward
        attention.q_proj.forward = lambda x: own(x)
    config = TuningConfig(steps=2, guard=False)
    with TestTimeTuner(plain, config) as one, TestTimeTuner(wrapped, config) as other:
        expected, result = one.tune(**batch), other.tune(**batch)
    torch.testing.assert_close(result.logits, expected.logits, rtol=1e-3, atol=1e-3)
    name = next(name for name in expected.parameters if name.endswith("layers.0.self_attn.q_proj.lora_b"))
    moved = expected.parameters[name].abs() > 2e-3  # smaller ones had a gradient near zero, of either sign
    torch.testing.assert_close(result.parameters[name][moved], expected.parameters[name][moved], rtol=0.1, atol=1e-3)


def test_a_model_on_several_devices_is_refused():
    model, _ = zoo.load()
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"spread over cpu, meta \(device_map\)"):
        TestTimeTuner(model)


def test_a_layer_that_the_model_does_not_call_is_an_error(model, batch, monkeypatch):
    attention = model.model.vision_tower.encoder.layers[0].self_attn
    with TestTimeTuner(model) as tuner:
        q_proj = attention.q_proj
        attention.q_proj = nn.Linear(96, 96)
        try:
            with pytest.raises(ValueError, match=r"no gradient reaches .*layers.0.self_attn.q_proj.lora_a"):
                tuner.tune(**batch)
        finally:
            attention.q_proj = q_proj


def test_the_callers_backend_block_stands_unless_the_configuration_names_one(model, batch, require_backend):
    require_backend("cpu", "softmax_entropy")
    chosen = []
    original = backends.choose

    def spy(*args):
        chosen.append(original(*args))
        return chosen[-1]

    for config, expected in ((TuningConfig(), {"reference"}), (TuningConfig(backend="cpu", lora_blocks=0), {"cpu"})):
        chosen.clear()
        with pytest.MonkeyPatch.context() as patch, TestTimeTuner(model, config) as tuner, backend("reference"):
            patch.setattr(backends, "choose", spy)
            tuner.tune(**batch)
        assert set(chosen) == expected


def test_inputs_of_odd_shapes_pass_through_the_search(model, batch):
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    with TestTimeTuner(model, SEARCH) as tuner:
        expected = tuner.tune(**batch)
        assert torch.equal(tuner.tune(**batch, position_ids=positions).logits, expected.logits)
    with TestTimeTuner(model, TuningConfig(answer_tokens=2)) as tuner:
        expected = tuner.tune(**batch)
        given = tuner.tune(**batch, position_ids=positions.expand(5, -1))
    assert torch.equal(given.logits, expected.logits)
    assert given.samples == expected.samples


def test_a_kept_result_holds_neither_tuner_nor_model(batch):
    model, _ = zoo.load()
    tuner = TestTimeTuner(model)
    result = tuner.tune(**batch)
    watched = weakref.ref(model.model.vision_tower)
    del tuner
    gc.collect()
    TestTimeTuner(model).close()
    del model
    gc.collect()
    assert watched() is None
    assert result.image()[0].size == (32, 32)


def test_results_of_another_configuration_are_refused(model, batch):
    with TestTimeTuner(model, TuningConfig(lora_alpha=16)) as tuner:
        result = tuner.tune(**batch)
    with TestTimeTuner(model, TuningConfig(lora_alpha=64)) as tuner:
        with pytest.raises(ValueError, match="tuned with another configuration"), tuner.applied(result):
            pass
        tuner.tune(**batch)


def test_close_inside_the_block_is_refused(model, batch):
    with TestTimeTuner(model) as tuner:
        result = tuner.tune(**batch)
        with tuner.applied(result), pytest.raises(RuntimeError, match="leave the block before closing"):
            tuner.close()


def test_models_that_cannot_be_tuned(model):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got str"):
        TestTimeTuner("model")
    with TestTimeTuner(model), pytest.raises(ValueError, match="already has a tuner"):
        TestTimeTuner(nn.Sequential(model), normalisation=([0.5] * 3, [0.5] * 3))  # the same tower in a wrapper
    with pytest.raises(ValueError, match="the vision tower is float64"):
        TestTimeTuner(zoo.load()[0].double())
    with pytest.raises(ValueError, match="normalisation must be"):
        TestTimeTuner(model, normalisation=(0.5, 0.5))
    with pytest.raises(ValueError, match="std above 0"):
        TestTimeTuner(model, normalisation=([0.5] * 3, [0.0] * 3))
    with pytest.raises(ValueError, match=r"lora_targets \['v_projj'\] match no linear layer"):
        TestTimeTuner(model, TuningConfig(lora_targets=("q_proj", "v_projj")))
    with pytest.raises(ValueError, match=r"no recognisable vision tower: looked for .*vision_tower.*it has 0 .Linear."):
        TestTimeTuner(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"lora_targets \['query'\] match no linear layer.*'k_proj'"):
        TestTimeTuner(model, TuningConfig(lora_targets=("query",)))
    with pytest.raises(ValueError, match="lora_blocks = 9, but the vision tower has 4 blocks"):
        TestTimeTuner(model, TuningConfig(lora_blocks=9))
    TestTimeTuner(model).close()  # a refused tuner leaves no claim


def test_normalisation_comes_from_the_processor_file_the_encoder_or_the_user(model):
    config = model.config
    with TestTimeTuner(model) as tuner:
        assert tuner._subject.tower.mean == (0.5, 0.5, 0.5)
    path, config._name_or_path = config._name_or_path, ""
    try:
        with TestTimeTuner(model) as tuner:
            assert tuner._subject.tower.mean[0] == pytest.approx(0.4815, abs=1e-4)  # published with CLIP
        with TestTimeTuner(model, normalisation=([0.1] * 3, [0.2] * 3)) as tuner:
            assert tuner._subject.tower.std == (0.2, 0.2, 0.2)
        config.vision_config.model_type = "some_encoder"
        with pytest.raises(ValueError, match="normalisation of LlavaForConditionalGeneration is not known"):
            TestTimeTuner(model)
    finally:
        config._name_or_path, config.vision_config.model_type = path, "clip_vision_model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(filter="box"), "filter must be one of 'gaussian', 'lowrank', 'spectral', None; got 'box'"),
        (dict(taps=6), "taps must be odd; got 6. Use 5 or 7"),
        (dict(taps=33), "taps must be an integer of at least 3 and at most 31; got 33"),
        (dict(filter="lowrank", rank=9), "rank must be an integer of at least 1 and at most 7; got 9"),
        (dict(lora_rank=0), "lora_rank must be"),
        (dict(steps=0), "steps must be an integer of at least 1; got 0"),
        (dict(lr_lora=-1.0), "lr_lora must be a positive number; got -1"),
        (dict(lr_filter=float("nan")), "lr_filter must be a positive number; got nan"),
        (dict(lora_alpha="a"), "lora_alpha must be a positive number; got 'a'"),
        (dict(steps=True), "steps must be an integer"),
        (dict(guard="no"), "guard must be one of True, False; got 'no'"),
        (dict(lora_targets="q_proj"), "lora_targets must be a tuple"),
        (dict(filter=None, lora_blocks=0), "nothing to tune"),
        (dict(filter=None, candidates="default"), "candidates are filter presets"),
        (dict(candidates=["blur"]), "candidates must be None, 'default' or a list of Preset"),
        (dict(backend="tpu"), "backend must be one of 'reference', 'cpu', 'cuda', 'triton', None"),
        (dict(objective="loss"), "objective must be one of 'answer_entropy'"),
    ],
)
def test_configuration_is_validated(options, message):
    with pytest.raises(ValueError, match=message):
        TuningConfig(**options)
