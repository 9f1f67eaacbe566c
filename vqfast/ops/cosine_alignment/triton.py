"""cosine_alignment in Triton: a program takes a row, several short ones, or walks along a long one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.ops.cosine_alignment import contract

BLOCK_BYTES = 16 << 10  # of a row at once: four 16-byte loads by each of 256 threads
TILE_BYTES = 4 << 10  # of short rows together: one such load
WARPS = 8
EPS = tl.constexpr(contract.EPS)
DOWN = tl.constexpr(2.0**-74)  # brings a row whose squares overflow to where a million of them do not


@triton.jit
def _row_sums(
    prediction, target, row, rows, width, scale_p, scale_t, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """<p, p>, <t, t> and <p, t> of the rows p and t times their scales."""
    pp = tl.zeros((ROWS,), tl.float32)
    tt = tl.zeros((ROWS,), tl.float32)
    pt = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        p = tl.load(prediction + at, mask=inside, other=0.0).to(tl.float32) * scale_p[:, None]
        t = tl.load(target + at, mask=inside, other=0.0).to(tl.float32) * scale_t[:, None]
        pp += tl.sum(p * p, 1)
        tt += tl.sum(t * t, 1)
        pt += tl.sum(p * t, 1)
    return pp, tt, pt


@triton.jit
def _cosine_alignment_fwd_kernel(
    prediction, target, cosine, inverse_p, inverse_t, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    scale_p = tl.full((ROWS,), 1.0, tl.float32)
    scale_t = tl.full((ROWS,), 1.0, tl.float32)
    pp, tt, pt = _row_sums(prediction, target, row, rows, width, scale_p, scale_t, ROWS, BLOCK)
    if tl.max(tl.maximum(pp, tt), 0) == float("inf"):
        scale_p = tl.where(pp == float("inf"), DOWN, scale_p)
        scale_t = tl.where(tt == float("inf"), DOWN, scale_t)
        pp, tt, pt = _row_sums(prediction, target, row, rows, width, scale_p, scale_t, ROWS, BLOCK)
    norm_p, shortest = tl.sqrt_rn(pp), scale_p * EPS
    longer_p, longer_t = tl.maximum(norm_p, shortest), tl.maximum(tl.sqrt_rn(tt), scale_t * EPS)
    there = row < rows
    tl.store(cosine + row, tl.div_rn(tl.div_rn(pt, longer_p), longer_t), mask=there)
    tl.store(inverse_p + row, tl.where(norm_p < shortest, 0.0, tl.div_rn(scale_p, longer_p)), mask=there)
    tl.store(inverse_t + row, tl.div_rn(scale_t, longer_t), mask=there)


@triton.jit
def _cosine_alignment_bwd_kernel(
    grad, prediction, target, cosine, inverse_p, inverse_t, result, rows, width, blocks,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    inside = there[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    p = tl.load(prediction + at, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(target + at, mask=inside, other=0.0).to(tl.float32)
    length = tl.load(inverse_p + row, mask=there, other=0.0)
    along = tl.load(cosine + row, mask=there, other=0.0) * length
    slope = t * tl.load(inverse_t + row, mask=there, other=0.0)[:, None] - p * along[:, None]
    slope *= (tl.load(grad + row, mask=there, other=0.0) * length)[:, None]
    tl.store(result + at, slope.to(result.dtype.element_ty), mask=inside)


def _tile(prediction: Tensor) -> dict[str, int]:
    """Rows of a program, and how much of them it takes at once."""
    size = prediction.element_size()
    block = min(BLOCK_BYTES // size, triton.next_power_of_2(prediction.shape[-1]))
    return dict(ROWS=max(1, TILE_BYTES // size // block), BLOCK=block)


def cosine_alignment_fwd(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    prediction, target = prediction.contiguous(), target.contiguous()
    cosine, inverse_p, inverse_t = (
        prediction.new_empty(prediction.shape[:-1], dtype=torch.float32) for _ in range(3)
    )  # fmt: skip
    rows, tile = cosine.numel(), _tile(prediction)
    if rows:
        _cosine_alignment_fwd_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            prediction, target, cosine, inverse_p, inverse_t, rows, prediction.shape[-1], **tile, num_warps=WARPS
        )
    return cosine, inverse_p, inverse_t


def cosine_alignment_bwd(
    grad: Tensor, prediction: Tensor, target: Tensor, cosine: Tensor, inverse_p: Tensor, inverse_t: Tensor
) -> Tensor:
    prediction = prediction.contiguous()
    result = torch.empty_like(prediction)
    rows, tile = grad.numel(), _tile(prediction)
    if rows:
        blocks = triton.cdiv(prediction.shape[-1], tile["BLOCK"])
        _cosine_alignment_bwd_kernel[(triton.cdiv(rows, tile["ROWS"]) * blocks,)](
            grad.contiguous(), prediction, target.contiguous(), cosine.contiguous(), inverse_p.contiguous(),
            inverse_t.contiguous(), result, rows, prediction.shape[-1], blocks, **tile, num_warps=WARPS,
        )  # fmt: skip
    return result
