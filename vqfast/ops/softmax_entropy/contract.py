"""Shapes, dtypes and schema of softmax_entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from vqfast.ops._operator import check_activation, define


def check(logits: object) -> Tensor:
    tensor = check_activation("logits", logits)
    if tensor.dim() < 1 or tensor.shape[-1] < 1:
        raise ValueError(f"logits must be [..., V] with V >= 1; got {list(tensor.shape)}")
    return tensor


def _fwd(logits: Tensor) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(logits.shape[:-1], dtype=torch.float32) for _ in range(3))


def _bwd(grad: Tensor, logits: Tensor, entropy: Tensor, max_logit: Tensor, log_sum: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


define(
    "softmax_entropy",
    fwd=("(Tensor logits) -> (Tensor entropy, Tensor max_logit, Tensor log_sum)", _fwd),
    bwd=("(Tensor grad, Tensor logits, Tensor entropy, Tensor max_logit, Tensor log_sum) -> Tensor", _bwd),
)
