"""Faults at every phase: the model is what it was, and the next result is that of an undisturbed tuner."""

import contextlib
from dataclasses import replace

import pytest
import torch

from helpers import SEARCH, assert_unchanged, fingerprint, rows
from vqfast import TestTimeTuner, TuningConfig, TuningError
from vqfast.tuning.objective import answer_entropy
from vqfast.tuning.state import EpisodeState

pytestmark = pytest.mark.usefixtures("one_openmp_thread")
KINDS = (ValueError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt)
SAMPLES, POISONED = 3, 1


class Objective:
    """The answer's entropy; raises `error` at call number `at`."""

    error, at, calls = None, 0, 0

    def __call__(self, output, valid):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return answer_entropy(output.logits, valid)


CONFIGS = {
    "paper": TuningConfig(),
    "search, raise": replace(SEARCH, on_failure="raise"),
    "callable": TuningConfig(objective=Objective(), steps=2),
    "callable, search": replace(SEARCH, objective=Objective()),
}


class Identity(torch.autograd.Function):
    """x, with `change` done to its gradient."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


@contextlib.contextmanager
def hooked(module, change, at=None):
    """Inside the block `change` is done to the first argument of the module's call number `at`, or of every call."""
    calls = 0

    def hook(_, args):
        nonlocal calls
        calls += 1
        return (change(args[0]), *args[1:]) if at in (None, calls) else None

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def fault(model, config, where, error):
    """Inside the block `error` is raised `where`: a phase, and the number of the call."""

    def explode(*_, **__):
        raise error

    phase, _, call = where.partition(" ")
    step = EpisodeState.step

    def step_then_explode(state, gradients):
        step(state, gradients)
        raise error

    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        if phase == "objective":
            for name, value in (("error", error), ("at", int(call)), ("calls", 0)):
                patch.setattr(config.objective, name, value)
        elif phase == "forward":  # in the middle: vision blocks are behind it, everything is patched
            stack.enter_context(hooked(model.model.language_model.layers[1].mlp, explode, int(call)))
        elif phase == "backward":
            stack.enter_context(hooked(model.lm_head, lambda hidden: Identity.apply(hidden, explode)))
        elif phase == "update":
            patch.setattr(EpisodeState, "step", step_then_explode if call == "after" else explode)
        else:
            patch.setattr("vqfast.tuning.tuner.report", explode)
        yield


@pytest.fixture(scope="module")
def three(batch):
    return rows(batch, *range(SAMPLES))


@pytest.fixture(scope="module")
def undisturbed(model, three, one_openmp_thread):
    def tuned(config):
        with TestTimeTuner(model, config) as tuner:
            return tuner.tune(**three)

    return {name: tuned(config) for name, config in CONFIGS.items()}


PHASES = {
    "paper": ("forward 1", "forward 2", "backward", "update before", "update after", "result"),
    "search, raise": ("forward 1", "forward 2", "forward 3", "backward", "update after", "result"),
    "callable": ("objective 1", "objective 2", "objective 3"),
    "callable, search": ("objective 1", "objective 2"),
}


@pytest.mark.parametrize(("name", "where"), [(name, where) for name, phases in PHASES.items() for where in phases])
def test_an_exception_leaves_nothing_behind(model, three, undisturbed, name, where):
    config, clean = CONFIGS[name], fingerprint(model)
    with TestTimeTuner(model, config) as tuner:
        for kind in KINDS:
            error = kind("injected")
            with fault(model, config, where, error):
                before = fingerprint(model)
                with pytest.raises(kind) as caught:
                    tuner.tune(**three)
                assert caught.value is error
                assert_unchanged(model, before)
            assert_unchanged(model, clean)
            assert (tuner._lock.locked(), tuner._owner) == (False, None)
            again = tuner.tune(**three)
            assert torch.equal(again.logits, undisturbed[name].logits)
            assert again.samples == undisturbed[name].samples


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_while_generating_leaves_nothing_behind(model, three, kind):
    clean, calls = fingerprint(model), 2  # of the step; the third is generate's
    with TestTimeTuner(model) as tuner:
        expected = tuner.generate(**three, max_new_tokens=3)
        with fault(model, tuner.config, f"forward {calls + 1}", kind("injected")), pytest.raises(kind):
            tuner.generate(**three, max_new_tokens=3)
        assert_unchanged(model, clean)
        assert not tuner._lock.locked()
        assert torch.equal(tuner.generate(**three, max_new_tokens=3), expected)


def nan_gradient(gradient):
    gradient = gradient.clone()
    gradient[POISONED] = torch.nan
    return gradient


def filled(value):
    """Sets one sample's rows to `value`, if any; a search stacks its presets."""

    def change(hidden):
        which = (torch.arange(len(hidden)) % SAMPLES == POISONED) & (value is not None)
        return hidden.masked_fill(which[:, None, None], value or 0.0)

    return change


def same_gradient(hidden):
    return Identity.apply(hidden, torch.clone) if hidden.requires_grad else hidden


def poisoned_gradient(hidden):
    return Identity.apply(hidden, nan_gradient) if hidden.requires_grad else hidden


# What is done to the head's input; what does the same to no sample (a copy's strides may be summed in another order);
# whether at the answer's forward alone.
NANS = {
    "gradient": (poisoned_gradient, same_gradient, False),
    "logits": (filled(torch.nan), filled(None), False),
    "logits of the answer": (filled(torch.nan), filled(None), True),
}


@pytest.mark.parametrize("where", NANS)
@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("candidates", [None, "default"])
@pytest.mark.parametrize("on_failure", ["untuned", "raise"])
def test_nan_of_one_sample_is_its_failure_alone(model, three, where, guard, candidates, on_failure):
    config = TuningConfig(guard=guard, candidates=candidates, on_failure=on_failure)
    clean, (change, harmless, answer_alone) = fingerprint(model), NANS[where]
    at = (2 if candidates is None else 3) if answer_alone else None
    with TestTimeTuner(model, config) as tuner:
        undisturbed = tuner.tune(**three)
        with hooked(model.lm_head, harmless, at):
            healthy = tuner.tune(**three)
        with hooked(model.lm_head, change, at):
            before = fingerprint(model)
            if on_failure == "raise":
                with pytest.raises(TuningError, match=f"sample {POISONED}: the tuned answer's entropy is nan"):
                    tuner.tune(**three)
            else:
                result = tuner.tune(**three)
            assert_unchanged(model, before)
        assert_unchanged(model, clean)
        assert not tuner._lock.locked()
        again = tuner.tune(**three)
        assert torch.equal(again.logits, undisturbed.logits)
        assert again.samples == undisturbed.samples
        if on_failure == "raise":
            return
    assert [s.failed for s in result.samples] == [i == POISONED for i in range(SAMPLES)]
    for i in {0, 2}:
        assert torch.equal(result.logits[i], healthy.logits[i])
        assert result.samples[i] == healthy.samples[i]
        assert all(torch.equal(value[i], healthy.parameters[name][i]) for name, value in result.parameters.items())
    sample = result.samples[POISONED]
    assert all(value.isfinite().all() for value in result.parameters.values())
    assert (sample.tuned, sample.note) == (False, "the tuned answer's entropy is nan")
    if where != "logits":  # the answer of the start: untuned, or of the preset
        assert sample.entropy_after == sample.entropy_start
        assert sample.entropy_before == healthy.samples[POISONED].entropy_before
        assert sample.preset == healthy.samples[POISONED].preset
        if candidates is None:
            assert (sample.token_after, sample.confidence_after) == (sample.token_before, sample.confidence_before)
    else:
        assert sample.preset == "identity"
        assert sample.filter["mix"] == 0


@pytest.mark.parametrize("on_failure", ["untuned", "raise"])
def test_a_preset_whose_answer_is_not_finite_gives_way_to_the_untuned_answer(model, three, on_failure):
    config = replace(SEARCH, on_failure=on_failure)
    with TestTimeTuner(model, config) as tuner:
        healthy = tuner.tune(**three)
        with hooked(model.lm_head, filled(torch.nan), 2):  # finite in the search, not at the step's start
            if on_failure == "raise":
                with pytest.raises(TuningError, match=f"sample {POISONED}"):
                    tuner.tune(**three)
                return
            result = tuner.tune(**three)
    sample = result.samples[POISONED]
    assert sample.failed
    assert sample.filter["mix"] == 0
    assert sample.entropy_before == healthy.samples[POISONED].entropy_before
    assert (sample.token_after, sample.confidence_after) == (sample.token_before, sample.confidence_before)
    assert result.logits[POISONED].isfinite().all()
