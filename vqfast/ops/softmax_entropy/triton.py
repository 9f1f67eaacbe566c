"""softmax_entropy in Triton: a row is split over several programs, so that a few rows fill the chip."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.ops._triton import combine_softmax_sums, softmax_sums

BLOCK_BYTES = 16 << 10  # of logits per program: four 16-byte loads by each of 256 threads
WARPS = 8


@triton.jit
def _softmax_entropy_fwd_kernel(
    logits, partial, entropy, max_logit, log_sum, classes, blocks, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits + row * classes + column, mask=column < classes, other=float("-inf")).to(tl.float32)
    m, s, u = softmax_sums(z)
    if ONE_BLOCK:
        tl.store(entropy + row, tl.log(s) - u / s)
        tl.store(max_logit + row, m)
        tl.store(log_sum + row, tl.log(s))
    else:
        tl.store(partial + program, m)
        tl.store(partial + tl.num_programs(0) + program, s)
        tl.store(partial + 2 * tl.num_programs(0) + program, u)


@triton.jit
def _softmax_entropy_combine_kernel(partial, entropy, max_logit, log_sum, blocks, BLOCKS: tl.constexpr):
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    at, there = partial + row * blocks + block, block < blocks
    stride = tl.num_programs(0) * blocks
    m = tl.load(at, mask=there, other=float("-inf"))
    s = tl.load(at + stride, mask=there, other=0.0)
    u = tl.load(at + 2 * stride, mask=there, other=0.0)
    m, s, u = combine_softmax_sums(m, s, u)
    tl.store(entropy + row, tl.log(s) - u / s)
    tl.store(max_logit + row, m)
    tl.store(log_sum + row, tl.log(s))


@triton.jit
def _softmax_entropy_bwd_kernel(
    grad, logits, entropy, max_logit, log_sum, result, classes, blocks, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < classes
    z = tl.load(logits + row * classes + column, mask=inside, other=0.0).to(tl.float32)
    log_p = z - tl.load(max_logit + row) - tl.load(log_sum + row)
    p = tl.exp(log_p)
    slope = -tl.load(grad + row) * p * (log_p + tl.load(entropy + row))
    slope = tl.where(p == 0, 0.0, slope)
    tl.store(result + row * classes + column, slope.to(result.dtype.element_ty), mask=inside)


def _blocks(logits: Tensor) -> tuple[int, int]:
    """Classes of a program, and programs of a row."""
    classes = logits.shape[-1]
    block = min(BLOCK_BYTES // logits.element_size(), triton.next_power_of_2(classes))
    return block, triton.cdiv(classes, block)


def softmax_entropy_fwd(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.contiguous()
    entropy, max_logit, log_sum = (logits.new_empty(logits.shape[:-1], dtype=torch.float32) for _ in range(3))
    rows, (block, blocks) = entropy.numel(), _blocks(logits)
    if rows == 0:
        return entropy, max_logit, log_sum
    results = entropy, max_logit, log_sum
    partial = entropy if blocks == 1 else logits.new_empty((3, rows * blocks), dtype=torch.float32)
    _softmax_entropy_fwd_kernel[(rows * blocks,)](
        logits, partial, *results, logits.shape[-1], blocks, BLOCK=block, ONE_BLOCK=blocks == 1, num_warps=WARPS
    )
    if blocks > 1:
        size = triton.next_power_of_2(blocks)
        _softmax_entropy_combine_kernel[(rows,)](partial, *results, blocks, BLOCKS=size, num_warps=1)
    return results


def softmax_entropy_bwd(grad: Tensor, logits: Tensor, entropy: Tensor, max_logit: Tensor, log_sum: Tensor) -> Tensor:
    logits, grad = logits.contiguous(), grad.contiguous()
    result = torch.empty_like(logits)
    rows, (block, blocks) = grad.numel(), _blocks(logits)
    if rows:
        _softmax_entropy_bwd_kernel[(rows * blocks,)](
            grad, logits, entropy.contiguous(), max_logit.contiguous(), log_sum.contiguous(), result,
            logits.shape[-1], blocks, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return result
