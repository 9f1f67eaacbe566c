"""What a step leaves out, where its parameters live, what it minimises, what it costs."""

import functools

import pytest
import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from helpers import assert_unchanged, fingerprint, plain_logits, rows
from vqfast import TestTimeTuner, TuningConfig, ops, zoo
from vqfast.integrations.transformers import find_shortcuts, find_vision_tower
from vqfast.tuning import low_precision, objective, patch
from vqfast.tuning.candidates import DEFAULT_PRESETS
from vqfast.tuning.state import EpisodeState
from vqfast.tuning.telemetry import OperatorCalls


def shortcuts_of(model):
    return find_shortcuts(model, find_vision_tower(model, 2, ("q_proj", "v_proj"), None))


def llava(vision_feature_layer) -> LlavaForConditionalGeneration:
    """The embedded model's shape, random weights, features of another vision block."""
    config = LlavaConfig.from_pretrained(zoo.FOLDER)
    config.vision_feature_layer = vision_feature_layer
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def classifier():
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=vision.to_dict(), num_labels=7)
    return CLIPForImageClassification(config).eval().requires_grad_(False)


def pixels(count: int, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("layer", "unused"), [(-1, 0), (-2, 1), (1, 3), ([-3, -2], 1)])
def test_lean_forward_has_the_logits_of_the_model(batch, layer, unused):
    model = llava(layer)
    shortcuts = shortcuts_of(model)
    assert shortcuts.head is model.lm_head
    assert shortcuts.patch_embedding is not None
    assert len(shortcuts.unused_blocks) == unused
    assert len(shortcuts.last_rows) == 3
    expected = plain_logits(model, batch)
    before = fingerprint(model)
    with patch.lean(shortcuts, 1), OperatorCalls() as calls:
        actual = plain_logits(model, batch)
    assert_unchanged(model, before)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    with OperatorCalls() as plain_calls:
        plain_logits(model, batch)
    assert calls.by_name.total() <= plain_calls.by_name.total() + 4 - 10 * unused


def test_lean_forward_runs_the_last_layer_for_the_answer_positions_alone(model, batch):
    seen = {}

    def note(name):
        return lambda _, args, result: seen.update({name: result.shape[1]})

    last = model.model.language_model.layers[-1]
    named = {"gate": last.mlp.gate_proj, "key": last.self_attn.k_proj}
    handles = [module.register_forward_hook(note(name)) for name, module in named.items()]
    try:
        with patch.lean(shortcuts_of(model), 2):
            plain_logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {"gate": 2, "key": 70}


def test_without_a_filter_patches_are_embedded_once(model, batch, monkeypatch):
    calls = []
    product = patch._patch_product
    monkeypatch.setattr(patch, "_patch_product", lambda conv: lambda x: calls.append(1) or product(conv)(x))
    for filter_kind, count in (("gaussian", 3), (None, 1)):
        with TestTimeTuner(model, TuningConfig(filter=filter_kind, steps=2)) as tuner:
            calls.clear()
            tuner.tune(**batch)
        assert len(calls) == count


def test_a_spectral_filter_transforms_the_pixels_once_and_starts_as_the_identity(model, batch, monkeypatch):
    transforms = []
    dct2 = ops.dct2
    monkeypatch.setattr(ops, "dct2", lambda image: transforms.append(1) or dct2(image))
    expected = plain_logits(model, batch).softmax(-1).amax(-1)
    with TestTimeTuner(model, TuningConfig(filter="spectral", steps=2, guard=False)) as tuner:
        result = tuner.tune(**batch)
        assert len(transforms) == 1
        alone = tuner.tune(**rows(batch, 3))
    confidences = torch.tensor([s.confidence_before for s in result.samples])
    torch.testing.assert_close(confidences, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.logits[0], result.logits[3], rtol=1e-3, atol=1e-3)
    assert all(result.parameters[f"filter.gain_{axis}"].any() for axis in "xy")
    assert result.samples[0].filter == {}
    assert result.image(1)[0].size == (32, 32)


def test_no_spectrum_outlives_a_step_that_raises(model, batch):
    def explode(output, valid):
        raise MemoryError

    with TestTimeTuner(model, TuningConfig(filter="spectral", objective=explode)) as tuner:
        with pytest.raises(MemoryError):
            tuner.tune(**batch)
        state = tuner._state(tuner._subject, 5)
        assert (state._keeps_spectra, state._spectra) == (False, None)


def test_heads_that_do_more_than_a_product_are_not_bypassed(batch):
    for name, value in (("final_logit_softcapping", 30.0), ("logits_scaling", 8.0)):
        model = llava(-1)
        setattr(model.config.text_config, name, value)
        assert shortcuts_of(model).head is None
    model = llava(-1)
    model.lm_head.forward = functools.partial(nn.functional.linear, weight=2 * model.lm_head.weight)
    assert shortcuts_of(model).head is None
    with TestTimeTuner(model) as tuner:  # and goes through its logits
        confidences = [s.confidence_before for s in tuner.tune(**batch).samples]
    expected = plain_logits(model, batch).softmax(-1).amax(-1)
    torch.testing.assert_close(torch.tensor(confidences), expected, rtol=1e-4, atol=1e-5)


def test_hooks_on_the_head_see_logits(model, batch):
    handle = model.lm_head.register_forward_hook(lambda _, args, logits: logits / 2)
    try:
        expected = plain_logits(model, batch).softmax(-1).amax(-1)
        with TestTimeTuner(model) as tuner:
            confidences = [s.confidence_before for s in tuner.tune(**batch).samples]
    finally:
        handle.remove()
    torch.testing.assert_close(torch.tensor(confidences), expected, rtol=1e-4, atol=1e-5)


def test_an_objective_is_computed_on_the_batch_alone(model, batch):
    sizes = []

    def objective(output, valid):
        sizes.append(len(valid))
        return -output.logits[:, 0].logsumexp(-1)

    with TestTimeTuner(model, TuningConfig(objective=objective, candidates="default")) as tuner:
        tuner.tune(**batch)
    assert sizes == [5, 5]


def test_parameters_alias_one_storage_and_a_step_is_that_of_separate_tensors(model):
    tower = find_vision_tower(model, 2, ("q_proj", "v_proj"), None)
    state = EpisodeState(TuningConfig(), tower.targets, tower.normalisation(torch.device("cpu")), 3)
    storage = state.values.untyped_storage().data_ptr()
    assert {p.untyped_storage().data_ptr() for _, p in state.trained()} == {storage}
    assert all(p.is_leaf and p.is_contiguous() for _, p in state.trained())
    separate = {name: p.detach().clone().requires_grad_() for name, p in state.trained()}
    rates = {name: 5e-3 if "lora" in name else 1.0 for name in separate}
    optimizer = torch.optim.AdamW([{"params": [p], "lr": rates[n]} for n, p in separate.items()], weight_decay=0)
    generator = torch.Generator().manual_seed(0)
    state.begin()
    state.reset()
    for _ in range(3):
        gradients = tuple(1e-3 * torch.randn(p.shape, generator=generator) for p in separate.values())
        for parameter, gradient in zip(separate.values(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        with torch.no_grad():
            separate["filter.mix"].clamp_(-1, 1)
            separate["filter.log_sigma"].clamp_(torch.tensor(0.3).log(), torch.tensor(7 / 3).log())
        state.step(gradients)
    for name, parameter in state.trained():
        torch.testing.assert_close(parameter, separate[name], msg=name)
    kept = state.named(state.values.clone())
    state.restore(torch.tensor([False, True, False]), state.identity)
    for name, value in state.named(state.values).items():
        assert torch.equal(value[[0, 2]], kept[name][[0, 2]]), name
        assert torch.equal(value[1], state.named(state.identity)[name][1]), name
    state.reset()
    assert torch.equal(state.values, state.identity)
    assert not any(moment.any() for entry in state._optimizer.state.values() for moment in entry.values())


def test_marginal_entropy_is_that_of_the_mean_of_the_confident_views():
    logits = torch.randn(2 * 5, 1, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    valid = torch.ones(10, 1, dtype=torch.bool)
    p = logits[:, 0].softmax(-1).view(2, 5, 11)
    own = torch.distributions.Categorical(p).entropy()
    for fraction, count in ((1.0, 5), (0.5, 3), (0.1, 1)):
        mean = torch.stack([p[b, own[b].argsort()[:count]].mean(0) for b in range(2)])
        expected = torch.distributions.Categorical(mean).entropy()
        actual = objective.marginal_entropy(logits, valid, 5, fraction)
        torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


def test_views_are_crops_of_their_image_and_the_first_is_the_image():
    images = pixels(2)
    views = objective.views_of(images, 4)
    assert views.shape == (8, 3, 32, 32)
    assert torch.equal(views[::4], images)
    assert not torch.equal(views[1], views[2])
    assert views.amax() <= images.amax()
    assert torch.equal(objective.views_of(images[:1], 4), views[:4])


def test_marginal_entropy_tunes_every_sample_by_itself(model, batch):
    config = TuningConfig(objective="marginal_entropy", views=3)
    with TestTimeTuner(model, config) as tuner:
        together = tuner.tune(**batch)
        assert any(s.tuned for s in together.samples)
        for i in range(5):
            alone = tuner.tune(**rows(batch, i))
            torch.testing.assert_close(alone.logits[0], together.logits[i], rtol=1e-3, atol=1e-3)
        assert tuner.generate(**batch, max_new_tokens=2).shape[1] == 72


def test_a_callable_objective_is_lowered(model, batch):
    def energy(output, valid):
        assert output.logits.shape == (5, 1, 26)
        return -output.logits[:, 0].logsumexp(-1)

    before = energy_of(plain_logits(model, batch))
    with TestTimeTuner(model, TuningConfig(objective=energy)) as tuner:
        result = tuner.tune(**batch)
    after = energy_of(result.logits)
    assert any(s.tuned for s in result.samples)
    assert all(now < then for now, then, s in zip(after, before, result.samples, strict=True) if s.tuned)
    with (
        TestTimeTuner(model, TuningConfig(objective=lambda output, valid: output.logits.mean())) as tuner,
        pytest.raises(ValueError, match=r"one value per sample, \[5\]; got \[\]"),
    ):
        tuner.tune(**batch)


def energy_of(logits):
    return (-logits.logsumexp(-1)).tolist()


def test_a_classifier_of_images_is_tuned_without_a_prompt(classifier):
    images = pixels(4)
    with torch.no_grad():
        expected = classifier(pixel_values=images).logits.softmax(-1)
    before = fingerprint(classifier)
    with TestTimeTuner(classifier, TuningConfig(lora_blocks=3, candidates="default")) as tuner:
        result = tuner.tune(pixel_values=images)
        with pytest.raises(TypeError, match="writes no answer; use tune"):
            tuner.generate(pixel_values=images)
    torch.testing.assert_close(
        torch.tensor([s.confidence_before for s in result.samples]), expected.amax(-1), rtol=1e-4, atol=1e-5
    )
    assert any(s.tuned for s in result.samples)
    assert result.evaluations == 9
    assert_unchanged(classifier, before)
    with pytest.raises(ValueError, match="answer_tokens must be 1 for CLIPForImageClassification"):
        TestTimeTuner(classifier, TuningConfig(answer_tokens=2))


def test_search_can_be_limited(model, batch):
    with TestTimeTuner(model, TuningConfig(candidates="default", max_candidates=3)) as tuner:
        result = tuner.tune(**batch)
    assert result.evaluations == 3
    assert {s.preset for s in result.samples} <= {p.name for p in DEFAULT_PRESETS[:3]}


def test_search_at_a_lower_resolution_keeps_the_answers_at_the_full_one(model, batch):
    config = TuningConfig(candidates="default", search_resolution=16)
    sizes = []
    handle = model.model.vision_tower.embeddings.register_forward_hook(lambda _, args, out: sizes.append(out.shape))
    try:
        with TestTimeTuner(model, config) as tuner:
            result = tuner.tune(**batch)
    finally:
        handle.remove()
    assert [tuple(size[:2]) for size in sizes] == [(45, 17), (5, 65), (5, 65), (5, 65)]
    expected = plain_logits(model, batch).softmax(-1).amax(-1)
    torch.testing.assert_close(torch.tensor([s.confidence_before for s in result.samples]), expected)
    with (
        TestTimeTuner(model, TuningConfig(candidates="default", search_resolution=10)) as tuner,
        pytest.raises(ValueError, match="multiple of the model's patches, of 4x4 pixels; got 10"),
    ):
        tuner.tune(**batch)


def test_streams_are_kept_apart_and_named_ones_only_where_they_are_asked_for(model, batch):
    config = TuningConfig(candidates="default", search_scope="stream")
    with TestTimeTuner(model, config) as tuner:
        counts = [tuner.tune(stream="door", **batch).evaluations for _ in range(3)]
        assert counts == [9, 4, 4]
        assert tuner.tune(stream="yard", **batch).evaluations == 9
        assert tuner.stream("door").images == 15
        tuner.stream("door").reset()
        assert tuner.tune(stream="door", **batch).evaluations == 9
        assert set(tuner.streams) == {"door", "yard"}
        tuner.generate(stream="yard", **batch, max_new_tokens=1)
        assert tuner.stream("yard").images == 10
    with TestTimeTuner(model) as tuner, pytest.raises(ValueError, match="needs a tuner with search_scope='stream'"):
        tuner.tune(stream="door", **batch)


@pytest.mark.skipif(
    not any(getattr(torch.cpu, "get_capabilities", dict)().get(name) for name in low_precision.INSTRUCTIONS),
    reason="no bfloat16 instructions",
)
def test_frozen_layers_in_bfloat16_keep_the_answer_or_stay_in_float32(model, batch, monkeypatch):
    with TestTimeTuner(model) as tuner:
        exact = tuner.tune(**batch)
    with TestTimeTuner(model, TuningConfig(frozen_dtype="bfloat16")) as tuner:
        low = tuner.tune(**batch)
        assert tuner.frozen_dtype[0] == "bfloat16"
        assert not torch.equal(low.logits, exact.logits)
        torch.testing.assert_close(low.logits, exact.logits, rtol=0.05, atol=0.3)
        assert low.logits.dtype == torch.float32
        before = model.model.multi_modal_projector.linear_2.weight.clone()
        with torch.no_grad():
            model.model.multi_modal_projector.linear_2.weight.mul_(0.5)
        try:
            expected = plain_logits(model, batch).softmax(-1).amax(-1)
            confidences = [s.confidence_before for s in tuner.tune(**batch).samples]
        finally:
            with torch.no_grad():
                model.model.multi_modal_projector.linear_2.weight.copy_(before)
        torch.testing.assert_close(torch.tensor(confidences), expected, rtol=0.02, atol=0.02)
    monkeypatch.setattr(low_precision, "ENTROPY_BAND", -1.0)
    with TestTimeTuner(model, TuningConfig(frozen_dtype="bfloat16")) as tuner:
        assert torch.equal(tuner.tune(**batch).logits, exact.logits)
        assert tuner.frozen_dtype[0] is None
        assert "differ" in tuner.frozen_dtype[1]


def test_compiled_blocks_give_the_same_step(model, batch, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    with TestTimeTuner(model) as tuner:
        expected = tuner.tune(**batch)
    before = fingerprint(model)
    with TestTimeTuner(model, TuningConfig(mode="compile")) as tuner:
        assert len(tuner._subject.forwards) == 3  # two vision blocks without LoRA, one decoder layer
        torch.testing.assert_close(tuner.tune(**batch).logits, expected.logits, rtol=1e-3, atol=1e-3)
    assert_unchanged(model, before)


def test_telemetry_counts_calls_by_phase_and_measures_memory(model, batch, tmp_path):
    with TestTimeTuner(model, TuningConfig(candidates="default")) as tuner:
        telemetry = tuner.profile(trace=tmp_path / "trace.json", **batch).telemetry
        plain = tuner.tune(**batch)
    assert plain.telemetry is None
    assert list(telemetry.operator_calls) == ["prepare", "search", "forward", "backward", "update", "answer", "result"]
    assert telemetry.operator_calls["backward"] > telemetry.operator_calls["update"] > 0
    assert telemetry.launches is None
    assert batch["pixel_values"].nbytes < telemetry.peak_memory_bytes < 100e6
    assert "traceEvents" in (tmp_path / "trace.json").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mode="fast"), "mode must be one of 'auto', 'eager', 'graph', 'compile'; got 'fast'"),
        (dict(objective="loss"), "objective must be one of 'answer_entropy', 'marginal_entropy' or a callable"),
        (dict(views=1), "views must be an integer of at least 2; got 1"),
        (dict(confident_fraction=0), "confident_fraction must be above 0 and at most 1; got 0"),
        (dict(filter="spectral", candidates="default"), "candidates are filter presets"),
        (dict(filter="spectral", train_tone=True), "train_tone needs a filter with gain and bias"),
        (dict(max_candidates=3), "need a search: candidates='default'"),
        (dict(search_scope="stream"), "need a search: candidates='default'"),
        (dict(candidates="default", max_candidates=1), "max_candidates must be an integer of at least 2; got 1"),
        (dict(candidates="default", search_scope="stream", max_candidates=2), "at least 3"),
        (dict(frozen_dtype="float16"), "frozen_dtype must be one of 'bfloat16', None; got 'float16'"),
        (dict(frozen_dtype="bfloat16", mode="compile"), "frozen_dtype goes with eager steps"),
    ],
)
def test_wrong_settings_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        TuningConfig(**options)
