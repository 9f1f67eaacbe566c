"""The model is bit for bit what it was."""

import gc

import pytest
import torch
from torch import nn

from helpers import SEARCH, assert_unchanged, fingerprint, plain_logits
from vqfast import TestTimeTuner, zoo


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


def test_an_interrupt_while_the_model_is_put_back_does_not_leave_it_half_changed(batch, monkeypatch):
    model, _ = zoo.load()
    plain_logits(model, batch)
    model.train()
    model.lm_head.requires_grad_(True)
    before, arrived = fingerprint(model), []
    original = nn.Module.__setattr__

    def interrupted(module, name, value):
        if (name, value, arrived) == ("training", True, []):
            arrived.append(1)
            raise KeyboardInterrupt
        original(module, name, value)

    with TestTimeTuner(model) as tuner:
        monkeypatch.setattr(nn.Module, "__setattr__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuner.tune(**batch)
        monkeypatch.undo()
        assert arrived
        assert_unchanged(model, before)
        tuner.tune(**batch)


def test_one_tuner_per_model(model, batch):
    tuner = TestTimeTuner(model)
    with pytest.raises(ValueError, match="already has a tuner; close it first"):
        TestTimeTuner(model)
    result = tuner.tune(**batch)
    with tuner.applied(result), pytest.raises(RuntimeError, match="this thread is inside applied"):
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
