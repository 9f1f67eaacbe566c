"""Shapes, dtypes, limits and schema of film_adapter."""

from __future__ import annotations

from torch import Tensor

from vqfast.ops._operator import check_activation, check_parameter, define

MAX_RANK = 128
ACTIVATIONS = ("gelu", "silu", "relu")  # kernels are told the index


def check(x: object, down: object, up: object, scale: object, shift: object, activation: str) -> None:
    """Raises TypeError or ValueError where arguments do not fit."""
    rows = check_activation("x", x)
    d, u = check_parameter("down", down, rows), check_parameter("up", up, rows)
    s, b = check_parameter("scale", scale, rows), check_parameter("shift", shift, rows)
    if rows.dim() < 1 or d.dim() != 2 or d.shape[1] != rows.shape[-1] or d.shape[1] < 1:
        raise ValueError(f"x must be [..., K] and down [r, K] with K >= 1; got {list(rows.shape)} and {list(d.shape)}")
    rank, width = d.shape
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the bottleneck r must be 1 to {MAX_RANK}; got {rank}")
    if u.shape != (width, rank):
        raise ValueError(f"up must be [K, r] = [{width}, {rank}] beside down {list(d.shape)}; got {list(u.shape)}")
    if s.dim() not in (1, 2) or s.shape[-1] != rank:
        raise ValueError(f"scale must be [r] or [B, r] with r = {rank}; got {list(s.shape)}")
    if b.shape != s.shape:
        raise ValueError(f"shift must have the shape of scale, {list(s.shape)}; got {list(b.shape)}")
    if s.dim() == 2 and (rows.dim() != 3 or rows.shape[0] != s.shape[0]):
        raise ValueError(
            f"scale {list(s.shape)}, a row per sample, needs x [B, M, K] with B = {s.shape[0]}; got {list(rows.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


def _fwd(x: Tensor, down: Tensor, up: Tensor, scale: Tensor, shift: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), down.new_empty((*x.shape[:-1], down.shape[0]))


def _bwd(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: int,
    x_grad: bool,
    parameter_grads: bool,
) -> tuple[Tensor, ...]:
    parameters = (t.new_empty(t.shape if parameter_grads else (0,)) for t in (down, up, scale, shift))
    return x.new_empty(x.shape if x_grad else (0,)), *parameters


define(
    "film_adapter",
    fwd=(
        "(Tensor x, Tensor down, Tensor up, Tensor scale, Tensor shift, int activation) -> (Tensor y, Tensor h)",
        _fwd,
    ),
    bwd=(
        "(Tensor grad, Tensor x, Tensor h, Tensor down, Tensor up, Tensor scale, Tensor shift, int activation, "
        "bool x_grad, bool parameter_grads) -> (Tensor x, Tensor down, Tensor up, Tensor scale, Tensor shift)",
        _bwd,
    ),
)
