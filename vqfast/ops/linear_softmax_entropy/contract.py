"""Shapes, dtypes and schema of linear_softmax_entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from vqfast.ops._operator import check_activation, check_frozen_base, define


def check(hidden: object, weight: Tensor, bias: Tensor | None) -> None:
    """Raises TypeError or ValueError where arguments do not fit; dtypes are compared after autocast."""
    h = check_activation("hidden", hidden)
    check_frozen_base("hidden", h, weight, bias)
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1] or weight.shape[0] < 1:
        raise ValueError(
            f"hidden must be [N, D] and weight [V, D] with V >= 1; got {list(h.shape)} and {list(weight.shape)}"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias must be [V] with V = {weight.shape[0]}; got {list(bias.shape)}")


def _fwd(hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_grad: bool) -> tuple[Tensor, Tensor]:
    entropy = hidden.new_empty(hidden.shape[:1], dtype=torch.float32)
    return entropy, hidden.new_empty(hidden.shape if hidden_grad else (0,), dtype=torch.float32)


# dH/dh leaves the forward pass with the entropy (one read of the weight serves both), so there is no backward kernel.
define(
    "linear_softmax_entropy",
    fwd=(
        "(Tensor hidden, Tensor weight, Tensor? bias, bool hidden_grad) -> (Tensor entropy, Tensor hidden_grad)",
        _fwd,
    ),
)
