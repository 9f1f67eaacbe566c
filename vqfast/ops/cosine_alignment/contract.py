"""Shapes, dtypes and schema of cosine_alignment."""

from __future__ import annotations

import torch
from torch import Tensor

from vqfast.ops._operator import check_activation, check_device, define

EPS = 1e-8  # length below which a row has no direction: that of torch.nn.functional.cosine_similarity


def check(prediction: object, target: object) -> tuple[Tensor, Tensor]:
    p, t = check_activation("prediction", prediction), check_activation("target", target)
    check_device("target", t, p)
    if t.dtype != p.dtype:
        raise TypeError(f"target must have the dtype of prediction, {p.dtype}; got {t.dtype}. Convert one of them")
    if p.dim() < 1 or p.shape[-1] < 1:
        raise ValueError(f"prediction must be [..., D] with D >= 1; got {list(p.shape)}")
    if t.shape != p.shape:
        raise ValueError(
            f"target must have the shape of prediction, {list(p.shape)}; got {list(t.shape)}. To compare with one "
            "target for all rows pass target.expand_as(prediction)"
        )
    return p, t


def _fwd(prediction: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return tuple(prediction.new_empty(prediction.shape[:-1], dtype=torch.float32) for _ in range(3))


def _bwd(
    grad: Tensor, prediction: Tensor, target: Tensor, cosine: Tensor, inverse_p: Tensor, inverse_t: Tensor
) -> Tensor:  # fmt: skip
    return prediction.new_empty(prediction.shape)


define(
    "cosine_alignment",
    # inverse_p: 1 / ||p||, 0 where ||p|| < EPS; inverse_t: 1 / max(||t||, EPS)
    fwd=("(Tensor prediction, Tensor target) -> (Tensor cosine, Tensor inverse_p, Tensor inverse_t)", _fwd),
    bwd=(
        "(Tensor grad, Tensor prediction, Tensor target, Tensor cosine, Tensor inverse_p, Tensor inverse_t) -> Tensor",
        _bwd,
    ),
)
