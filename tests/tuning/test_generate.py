"""applied and generate: the tuned model answers, and only inside."""

import pytest
import torch
from transformers import GenerationConfig

from helpers import SEARCH, noisy, plain_logits
from vqfast import TestTimeTuner, TuningConfig, zoo


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
