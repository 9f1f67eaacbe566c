"""Inputs, and the fingerprint of a model that tuning must leave alone."""

import collections
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vqfast import TuningConfig
from vqfast.tuning import graph, step
from vqfast.tuning.inputs import checked
from vqfast.tuning.patch import frozen

SEARCH = TuningConfig(candidates="default")


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


WAITING = {"item", "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}


class Waits(TorchDispatchMode):
    """Counts what waits for a device: values read back, shapes that depend on values, tensors made of Python values."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        name = function._schema.name.partition("::")[2]
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        from_python = name == "lift_fresh" and result.numel() > 0
        self.found[name] += name in WAITING or by_mask or from_python
        return result


def waits(tuner, batch, **options) -> dict[str, int]:
    """What a step does that waits for the device, and how often."""
    subject = tuner._subject
    prompt = step.prepare(subject, *checked(subject, batch))
    state = tuner._new_state(subject, prompt.samples)
    capturing = mock.patch("torch.cuda.is_current_stream_capturing", return_value=True)
    with frozen(subject.model), capturing, graph.without_checks(), Waits() as mode:
        step.run(subject, state, prompt, lambda _: None, **options)
    return {name: count for name, count in mode.found.items() if count}
