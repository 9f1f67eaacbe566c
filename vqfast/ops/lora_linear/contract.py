"""Shapes, dtypes, limits and schema of lora_linear."""

from __future__ import annotations

import torch
from torch import Tensor

from vqfast.ops._operator import check_activation, check_device, check_frozen_base, check_parameter, define

MAX_RANK = 64


def check(
    x: object,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: object,
    lora_b: object,
    scaling: float,
    row_offsets: Tensor | None,
) -> None:
    """Raises TypeError or ValueError where arguments do not fit; dtypes of x and weight are compared after autocast."""
    rows = check_activation("x", x)
    check_frozen_base("x", rows, weight, bias)
    if weight.dim() != 2 or rows.dim() < 1 or rows.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., K] and weight [N, K]; got {list(rows.shape)} and {list(weight.shape)}")
    outputs, inputs = weight.shape
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be [N] with N = {outputs}; got {list(bias.shape)}")
    a, b = check_parameter("lora_a", lora_a, rows), check_parameter("lora_b", lora_b, rows)
    if a.dim() not in (2, 3) or a.shape[-1] != inputs:
        raise ValueError(f"lora_a must be [r, K] or [B, r, K] with K = {inputs}; got {list(a.shape)}")
    rank = a.shape[-2]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the rank r must be 1 to {MAX_RANK}; got {rank}")
    if b.shape != (*a.shape[:-2], outputs, rank):
        raise ValueError(
            f"lora_b must be {[*a.shape[:-2], outputs, rank]} beside lora_a {list(a.shape)}; got {list(b.shape)}"
        )
    if not isinstance(scaling, (int, float)) or not abs(scaling) <= torch.finfo(torch.float32).max:
        raise ValueError(f"scaling must be a finite Python number, within float32; got {scaling!r}")
    if row_offsets is not None:
        if not isinstance(row_offsets, Tensor):
            raise TypeError(f"row_offsets must be a torch.Tensor; got {type(row_offsets).__name__}")
        if a.dim() != 3 or rows.dim() != 2:
            raise ValueError(
                "row_offsets goes with packed rows x [T, K] and per-sample adapters [B, r, K]; "
                f"got x {list(rows.shape)} and lora_a {list(a.shape)}"
            )
        if row_offsets.dtype != torch.int32 or row_offsets.shape != (a.shape[0] + 1,):
            raise ValueError(
                f"row_offsets must be int32 [B + 1] with B = {a.shape[0]}; got {row_offsets.dtype} "
                f"{list(row_offsets.shape)}"
            )
        check_device("row_offsets", row_offsets, rows)
    elif a.dim() == 3 and (rows.dim() != 3 or rows.shape[0] != a.shape[0]):
        raise ValueError(
            f"per-sample adapters {list(a.shape)} need x [B, M, K] with B = {a.shape[0]}, or packed rows [T, K] with "
            f"row_offsets; got x {list(rows.shape)}"
        )


def _fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    row_offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    leading = x.shape[:-1]
    return x.new_empty((*leading, weight.shape[0])), x.new_empty((*leading, lora_a.shape[-2]), dtype=torch.float32)


def _bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    t: Tensor,
    scaling: float,
    row_offsets: Tensor | None,
    x_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape if x_grad else (0,)), lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape)


define(
    "lora_linear",
    fwd=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling, Tensor? row_offsets) -> "
        "(Tensor y, Tensor t)",
        _fwd,
    ),
    bwd=(
        "(Tensor grad, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor t, float scaling, "
        "Tensor? row_offsets, bool x_grad) -> (Tensor x, Tensor lora_a, Tensor lora_b)",
        _bwd,
    ),
)
