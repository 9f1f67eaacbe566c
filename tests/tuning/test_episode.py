"""One episode: exact start, isolation of samples, what moves, inside which modes it works."""

import pytest
import torch

from helpers import SEARCH, plain_logits, rows
from vqfast import TestTimeTuner, TuningConfig, zoo
from vqfast.tuning.patch import lean


@pytest.mark.parametrize(
    "config", [TuningConfig(), TuningConfig(filter="lowrank"), SEARCH], ids=["paper", "lowrank", "search"]
)
def test_untuned_answer_is_plain_inference(model, batch, config):
    probabilities = plain_logits(model, batch).softmax(-1)
    with TestTimeTuner(model, config) as tuner:
        samples = tuner.tune(**batch).samples
    assert [s.token_before for s in samples] == probabilities.argmax(-1).tolist()
    confidences = torch.tensor([s.confidence_before for s in samples])  # other products, sums in another order
    torch.testing.assert_close(confidences, probabilities.amax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [TuningConfig(), TuningConfig(filter="lowrank")], ids=["paper", "lowrank"])
def test_an_untouched_filter_and_adapters_change_not_a_bit(model, batch, config):
    with TestTimeTuner(model, config) as tuner:
        shortcuts = tuner._subject.shortcuts
        samples = tuner.tune(**batch).samples
    with lean(shortcuts, 1):
        probabilities = plain_logits(model, batch).softmax(-1)
    assert [s.confidence_before for s in samples] == probabilities.amax(-1).tolist()


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
        state = next(iter(tuner._states.values()))
        start = state.named(state.identity)
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
