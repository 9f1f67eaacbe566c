"""Frozen linear layers of a float32 model on the CPU, computed in bfloat16."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqfast.integrations.transformers import is_plain_linear
from vqfast.tuning.patch import Forward, lean
from vqfast.tuning.step import Prompt, Subject, forward

INSTRUCTIONS = ("amx_bf16", "avx512_bf16")  # without them bfloat16 products are slower than float32 ones
ENTROPY_BAND = 0.05  # nats by which an untuned answer's entropy may move


def bfloat16_forwards(subject: Subject, prompt: Prompt) -> tuple[dict[nn.Module, Forward], str]:
    """Forwards of the frozen layers in bfloat16, and why; none where they cannot be had or change the answer.

    Layers that take LoRA, the head and everything that is not a linear layer stay in float32.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if prompt.pixels.device.type != "cpu":
        return {}, f"the model is on {prompt.pixels.device}, not on the CPU"
    if not any(capabilities.get(name) for name in INSTRUCTIONS):
        return {}, f"this processor has none of {', '.join(INSTRUCTIONS)}"
    shortcuts = subject.shortcuts
    kept = {*(target.layer for target in subject.tower.targets.values()), *shortcuts.last_rows, shortcuts.head}
    layers = [
        m
        for m in subject.model.modules()
        if isinstance(m, nn.Linear) and is_plain_linear(m) and m.weight.dtype == torch.float32 and m not in kept
    ]
    forwards: dict[nn.Module, Forward] = {layer: _InBfloat16(layer) for layer in layers}
    if not forwards:
        return {}, "no linear layer of the model is frozen and float32"
    with lean(shortcuts, prompt.valid.shape[1]):
        exact, low = (forward(s, prompt) for s in (subject, replace(subject, forwards=forwards)))
    same = (exact.logits.argmax(-1) == low.logits.argmax(-1)) | ~prompt.valid
    moved = (exact.entropy - low.entropy).abs().max().item()
    if not bool(same.all()) or not moved <= ENTROPY_BAND:
        return {}, f"answers to the first input differ: entropy by {moved:.3f} nats, or the most likely token"
    return forwards, f"answers to the first input are the same, entropy to {moved:.3f} nats"


def outdated(subject: Subject) -> bool:
    """Whether a copy is no longer that of its layer."""
    copies = [(layer, forward) for layer, forward in subject.forwards.items() if isinstance(forward, _InBfloat16)]
    return any(forward.source != _source(layer) for layer, forward in copies)


def _source(layer: nn.Module) -> tuple[object, ...]:
    parameters = (layer.get_parameter("weight"), layer._parameters.get("bias"))
    return tuple(p if p is None else (p.data_ptr(), p._version, p.device, p.dtype) for p in parameters)


class _InBfloat16:
    def __init__(self, layer: nn.Linear) -> None:
        self.source = _source(layer)
        self.weight = layer.weight.detach().bfloat16()
        self.bias = None if layer.bias is None else layer.bias.detach().bfloat16()

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight, self.bias).to(x.dtype)
