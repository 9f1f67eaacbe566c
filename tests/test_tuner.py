"""TestTimeTuner on the embedded model: exact start, isolation of samples, restoration, guard, results, bad input."""

import gc
import json
import weakref

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from vqfast import Preset, TestTimeTuner, TuningConfig, TuningError, backend, backends, zoo
from vqfast.tuning.candidates import IDENTITY, render, select

SEARCH = TuningConfig(candidates="default")


@pytest.fixture(scope="module")
def loaded():
    return zoo.load()


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def batch(loaded):
    """Five noisy validation digits, one question each: {name: [5, ...]}."""
    _, processor = loaded
    drawn = [zoo.questions("validation")[i] for i in (0, 4, 8, 9, 13)]
    return noisy(processor, drawn)


@pytest.fixture(scope="module")
def wide_batch(loaded):
    """Fifteen of them: enough for some to be tuned and some not."""
    return noisy(loaded[1], zoo.questions("validation")[::7][:15])


def noisy(processor, drawn) -> dict:
    inputs = processor(
        images=[image for image, _, _ in drawn], text=[text for _, text, _ in drawn], return_tensors="pt", padding=True
    )
    noise = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    inputs["pixel_values"] = (inputs["pixel_values"] + 1.2 * noise).clamp(-1, 1)
    return dict(inputs)


def rows(batch: dict, *index: int) -> dict:
    return {name: value[list(index)] for name, value in batch.items()}


def plain_logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, logits_to_keep=1).logits[:, 0]


def fingerprint(model: nn.Module) -> dict:
    """Everything close() promises to leave alone, with the parameters' bits."""
    return {
        "tensors": {
            n: (t.clone(), t.requires_grad, t.grad) for n, t in [*model.named_parameters(), *model.named_buffers()]
        },
        "modules": {n: (id(m), m.training, sorted(m.__dict__)) for n, m in model.named_modules()},
        "hooks": {
            n: [len(v) for k, v in sorted(m.__dict__.items()) if k.endswith("hooks")] for n, m in model.named_modules()
        },
        "forwards": {n: m.__dict__.get("forward") for n, m in model.named_modules()},
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = fingerprint(model)
    assert after["modules"] == before["modules"]
    assert after["hooks"] == before["hooks"]
    assert after["forwards"] == before["forwards"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (tensor, requires_grad, grad) in before["tensors"].items():
        now, now_requires, now_grad = after["tensors"][name]
        assert torch.equal(now, tensor), name
        assert (now_requires, now_grad) == (requires_grad, grad), name


# -- the episode ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [TuningConfig(), TuningConfig(filter="lowrank"), SEARCH], ids=["paper", "lowrank", "search"]
)
def test_untuned_answer_is_plain_inference_bit_for_bit(model, batch, config):
    probabilities = plain_logits(model, batch).softmax(-1)
    with TestTimeTuner(model, config) as tuner:
        samples = tuner.tune(**batch).samples
    assert [s.token_before for s in samples] == probabilities.argmax(-1).tolist()
    if config.candidates is None:  # in the search the untuned image is one row of a larger batch: equal within rounding
        assert [s.confidence_before for s in samples] == probabilities.max(-1).values.tolist()
    else:
        torch.testing.assert_close(
            torch.tensor([s.confidence_before for s in samples]), probabilities.max(-1).values, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("config", [TuningConfig(), TuningConfig(steps=3), SEARCH], ids=["one", "three", "search"])
def test_entropy_never_rises_under_the_guard_and_something_is_tuned(model, batch, config):
    with TestTimeTuner(model, config) as tuner:
        result = tuner.tune(**batch)
    assert any(s.tuned for s in result.samples)
    for sample in result.samples:
        assert sample.tuned == (sample.note == "")
        if config.candidates is None:
            assert sample.entropy_after <= sample.entropy_before
            assert sample.tuned or sample.entropy_after == sample.entropy_before


def test_without_the_guard_every_sample_keeps_the_step(model, batch):
    with TestTimeTuner(model, TuningConfig(guard=False)) as tuner:
        assert all(s.tuned for s in tuner.tune(**batch).samples)


@pytest.mark.parametrize("config", [TuningConfig(steps=2), SEARCH], ids=["paper", "search"])
def test_a_sample_does_not_depend_on_its_batch(model, batch, config):
    with TestTimeTuner(model, config) as tuner:
        together = tuner.tune(**batch)
        for i in range(5):
            alone = tuner.tune(**rows(batch, i))
            torch.testing.assert_close(alone.logits[0], together.logits[i], rtol=1e-3, atol=1e-3)
            assert alone.samples[0].preset == together.samples[i].preset
            assert alone.samples[0].tuned == together.samples[i].tuned
            assert abs(alone.samples[0].entropy_after - together.samples[i].entropy_after) < 1e-3


def test_every_episode_starts_from_scratch(model, batch):
    with TestTimeTuner(model) as tuner:
        first = tuner.tune(**batch)
        tuner.tune(**rows(batch, 4, 3, 2, 1, 0))
        again = tuner.tune(**batch)
    assert torch.equal(first.logits, again.logits)
    assert first.samples == again.samples


@pytest.mark.parametrize(
    "config", [TuningConfig(steps=2, guard=False), TuningConfig(steps=2, filter="lowrank", guard=False)]
)
def test_every_trained_tensor_moves_by_the_second_step(model, batch, config):
    with TestTimeTuner(model, config) as tuner:
        parameters = tuner.tune(**batch).parameters
        start = next(iter(tuner._states.values())).identity
        moved = {name for name in parameters if not torch.equal(parameters[name], start[name])}
    assert moved == set(parameters) - {"filter.gain", "filter.bias"}


def test_search_starts_from_presets_and_lowers_entropy_further(model, batch):
    with TestTimeTuner(model, SEARCH) as tuner:
        searched = tuner.tune(**batch)
    assert {s.preset for s in searched.samples} != {"identity"}
    assert "search" in searched.timings_ms


def test_answer_tokens_average_over_the_greedy_answer(model, batch):
    """The answer is a word and the end token: the mean over those two positions, however many are asked for."""
    with torch.no_grad():
        length = batch["input_ids"].shape[1]
        word = model.generate(**batch, max_new_tokens=1)[:, length:]
        longer = {
            **batch,
            "input_ids": torch.cat([batch["input_ids"], word], 1),
            "attention_mask": torch.cat([batch["attention_mask"], torch.ones_like(word)], 1),
        }
        logits = model(**longer).logits[:, -2:]
    expected = torch.distributions.Categorical(logits=logits).entropy().mean(-1)
    for count in (2, 5):
        with TestTimeTuner(model, TuningConfig(answer_tokens=count)) as tuner:
            result = tuner.tune(**batch)
        torch.testing.assert_close(torch.tensor([s.entropy_before for s in result.samples]), expected)


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "autocast"])
def test_works_inside(model, batch, mode):
    contexts = {
        "inference_mode": torch.inference_mode,
        "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    with TestTimeTuner(model) as tuner:
        outside = tuner.tune(**batch)
        with contexts[mode]():
            inside = tuner.tune(**{name: value.clone() for name, value in batch.items()})
            with tuner.applied(inside):
                model(**batch)
        tolerance = 0.2 if mode == "autocast" else 0
        torch.testing.assert_close(inside.logits, outside.logits, rtol=tolerance, atol=tolerance)
        assert torch.equal(tuner.tune(**batch).logits, outside.logits)  # nothing of the mode is left behind


def test_bfloat16_model_takes_float32_adapters(batch):
    model = zoo.load()[0].bfloat16()
    inputs = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    expected = plain_logits(model, inputs).float()
    with TestTimeTuner(model, SEARCH) as searching:
        assert all(value.dtype == torch.float32 for value in searching.tune(**inputs).parameters.values())
    with TestTimeTuner(model) as tuner:
        result = tuner.tune(**inputs)
    assert [s.token_before for s in result.samples] == expected.argmax(-1).tolist()
    assert [s.confidence_before for s in result.samples] == expected.softmax(-1).amax(-1).tolist()


def test_reference_backend_gives_the_same_answer(model, batch):
    with TestTimeTuner(model) as tuner:
        ours = tuner.tune(**batch)
    with TestTimeTuner(model, TuningConfig(backend="reference")) as tuner:
        theirs = tuner.tune(**batch)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-3, atol=1e-3)


# -- applied and generate ---------------------------------------------------------------------------


def test_applied_reproduces_the_tuned_answer_and_only_inside(model, batch):
    plain = plain_logits(model, batch)
    with TestTimeTuner(model, SEARCH) as tuner:
        result = tuner.tune(**batch)
        with tuner.applied(result):
            torch.testing.assert_close(plain_logits(model, batch), result.logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(result.logits, plain, atol=1e-3)
        assert torch.equal(plain_logits(model, batch), plain)


@pytest.mark.parametrize(
    "config", [TuningConfig(), SEARCH, TuningConfig(answer_tokens=2)], ids=["paper", "search", "two"]
)
def test_generate_is_tune_then_generate(model, wide_batch, config):
    batch = wide_batch
    with TestTimeTuner(model, config) as tuner:
        result = tuner.tune(**batch)
        with tuner.applied(result):
            expected = model.generate(**batch, max_new_tokens=3)
        actual = tuner.generate(**batch, max_new_tokens=3)
    assert len({s.tuned for s in result.samples}) == 2, "the batch must mix samples that were tuned and that were not"
    assert torch.equal(actual, expected)
    assert actual[:, batch["input_ids"].shape[1]].tolist() == [s.token_after for s in result.samples]


def padded(batch: dict, count: int) -> dict:
    """The same prompts behind `count` more padding tokens."""
    size = (len(batch["input_ids"]), count)
    longer = {
        name: torch.cat([torch.zeros(size, dtype=torch.long), batch[name]], 1)
        for name in ("input_ids", "attention_mask")
    }
    return {**batch, **longer}


def test_generate_continues_at_the_positions_of_the_tuned_forward(model, batch):
    """Behind long padding the first generated distribution is the tuned one, and the answers stay the same."""
    options = GenerationConfig(max_new_tokens=2, output_logits=True, return_dict_in_generate=True)
    with TestTimeTuner(model) as tuner:
        far = padded(batch, 40)
        result = tuner.tune(**far)
        generated = tuner.generate(**far, generation_config=options)
        near = tuner.generate(**batch, max_new_tokens=2)
    torch.testing.assert_close(generated.logits[0], result.logits, rtol=1e-3, atol=1e-3)
    assert torch.equal(generated.sequences[:, -2:], near[:, -2:])


def test_generate_takes_the_options_of_model_generate(model, batch):
    with TestTimeTuner(model) as tuner:
        assert tuner.generate(**batch, min_new_tokens=4, max_new_tokens=4).shape[1] == batch["input_ids"].shape[1] + 4
        assert tuner.generate(**batch, generation_config=GenerationConfig(max_new_tokens=1)).shape[1] == 71
        beams = tuner.generate(**batch, num_beams=3, num_return_sequences=2, max_new_tokens=2)
        assert beams.shape[0] == 10
        with pytest.raises(ValueError, match="bogus_option"):
            tuner.generate(**batch, bogus_option=1)
        tuner.tune(**batch)


def test_generate_of_a_model_in_training_mode_is_that_of_an_answer():
    """Dropout stays off while an answer is tuned and generated, and the mode comes back."""
    model, processor = zoo.load()
    batch = noisy(processor, zoo.questions("validation")[:4])
    with TestTimeTuner(model) as tuner:
        expected = tuner.generate(**batch, max_new_tokens=2)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        model.train()
        assert torch.equal(tuner.generate(**batch, max_new_tokens=2), expected)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("steps", [1, 2])
def test_generate_runs_the_vision_tower_once_per_step_and_once_for_the_answer(model, batch, steps):
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        with TestTimeTuner(model, TuningConfig(steps=steps)) as tuner:
            tuner.generate(**batch, max_new_tokens=3)
    finally:
        handle.remove()
    assert len(calls) == steps + 1


# -- the model is left as it was --------------------------------------------------------------------


def test_model_is_restored_bit_for_bit(batch):
    model, _ = zoo.load()
    plain_logits(model, batch)  # transformers hooks the model itself on its first forward
    model.train()
    model.model.vision_tower.requires_grad_(True)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before, names = fingerprint(model), list(model.state_dict())
    tuner = TestTimeTuner(model, SEARCH)
    assert_unchanged(model, before)
    result = tuner.tune(**batch)
    assert_unchanged(model, before)
    tuner.generate(**batch, max_new_tokens=2)
    with tuner.applied(result):
        assert "forward" in model.get_submodule(tuner.layers[0]).__dict__
        assert list(model.state_dict()) == names
    tuner.close()
    assert_unchanged(model, before)


@pytest.mark.parametrize("where", ["objective", "model"])
def test_model_is_restored_after_an_exception_in_tune(model, batch, monkeypatch, where):
    def explode(*_, **__):
        raise MemoryError("out of memory")

    before = fingerprint(model)
    with TestTimeTuner(model) as tuner:
        with monkeypatch.context() as patch:
            if where == "objective":
                patch.setattr("vqfast.tuning.step.answer_entropy", explode)
            else:
                patch.setattr(model.lm_head, "forward", explode)
            with pytest.raises(MemoryError):
                tuner.tune(**batch)
        assert_unchanged(model, before)
        assert tuner.tune(**batch).samples  # and the tuner goes on


def test_model_is_restored_after_an_exception_in_the_block(model, batch):
    before = fingerprint(model)
    with TestTimeTuner(model) as tuner:
        result = tuner.tune(**batch)
        with pytest.raises(KeyboardInterrupt), tuner.applied(result):
            raise KeyboardInterrupt
        assert_unchanged(model, before)
        tuner.tune(**batch)


def test_one_tuner_per_model(model, batch):
    tuner = TestTimeTuner(model)
    with pytest.raises(ValueError, match="already has a tuner; close it first"):
        TestTimeTuner(model)
    result = tuner.tune(**batch)
    with tuner.applied(result), pytest.raises(RuntimeError, match="this tuner is in use"):
        tuner.tune(**batch)
    tuner.close()
    tuner.close()
    for use in (
        lambda: tuner.tune(**batch),
        lambda: tuner.generate(**batch),
        lambda: tuner.applied(result).__enter__(),
    ):
        with pytest.raises(RuntimeError, match="this tuner is closed"):
            use()
    TestTimeTuner(model).tune(**batch)  # never closed: forgotten with its last reference
    gc.collect()
    TestTimeTuner(model).close()


# -- failures ---------------------------------------------------------------------------------------


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
        ("pixel_values", lambda x: x * torch.nan, ValueError, "pixel_values contain NaN or infinite"),
        ("pixel_values", lambda x: x[0], ValueError, r"pixel_values must be \[B, C, H, W\]; got \[3, 32, 32\]"),
        ("pixel_values", lambda x: x[:2], ValueError, "one row per sample"),
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
    ],
)
def test_bad_input_is_refused_and_nothing_is_left_applied(model, batch, name, f, error, message):
    before = fingerprint(model)
    with TestTimeTuner(model) as tuner:
        with pytest.raises(error, match=message):
            tuner.tune(**change(batch, name, f))
        assert_unchanged(model, before)
        tuner.tune(**batch)


@pytest.mark.parametrize("kind", ["own forward", "hooked", "integer weight"])
def test_layers_that_are_not_plain_linear_are_refused(kind):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    model, _ = zoo.load()
    attention = model.model.vision_tower.encoder.layers[0].self_attn
    if kind == "own forward":
        attention.q_proj = Scaled(96, 96)
    elif kind == "hooked":
        attention.q_proj.forward = lambda x: x
    else:
        attention.q_proj.weight = nn.Parameter(attention.q_proj.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is a \w+ with a forward or a weight of its own"):
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


def test_models_that_cannot_be_tuned(model):
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
        assert tuner._target[1].mean == (0.5, 0.5, 0.5)
    path, config._name_or_path = config._name_or_path, ""
    try:
        with TestTimeTuner(model) as tuner:
            assert tuner._target[1].mean[0] == pytest.approx(0.4815, abs=1e-4)  # published with CLIP
        with TestTimeTuner(model, normalisation=([0.1] * 3, [0.2] * 3)) as tuner:
            assert tuner._target[1].std == (0.2, 0.2, 0.2)
        config.vision_config.model_type = "some_encoder"
        with pytest.raises(ValueError, match="normalisation of LlavaForConditionalGeneration is not known"):
            TestTimeTuner(model)
    finally:
        config._name_or_path, config.vision_config.model_type = path, "clip_vision_model"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(filter="box"), "filter must be one of 'gaussian', 'lowrank', None; got 'box'"),
        (dict(taps=6), "taps must be odd; got 6. Use 5 or 7"),
        (dict(taps=33), "taps must be an integer of at least 3 and at most 31; got 33"),
        (dict(rank=9), "rank must be an integer of at least 1 and at most 7; got 9"),
        (dict(lora_rank=0), "lora_rank must be"),
        (dict(steps=0), "steps must be an integer of at least 1; got 0"),
        (dict(lr_lora=-1.0), "lr_lora must be a positive number; got -1"),
        (dict(lr_filter=float("nan")), "lr_filter must be a positive number; got nan"),
        (dict(lora_targets="q_proj"), "lora_targets must be a tuple"),
        (dict(filter=None, lora_blocks=0), "nothing to tune"),
        (dict(filter=None, candidates="default"), "candidates are filter presets"),
        (dict(candidates=["blur"]), "candidates must be None, 'default' or a list of Preset"),
        (dict(backend="tpu"), "backend must be one of 'reference', 'cpu', None"),
        (dict(objective="loss"), "objective must be one of 'answer_entropy'"),
    ],
)
def test_configuration_is_validated(options, message):
    with pytest.raises(ValueError, match=message):
        TuningConfig(**options)


# -- results ----------------------------------------------------------------------------------------


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


# -- candidates -------------------------------------------------------------------------------------


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
