"""What the Triton kernels of several operators share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast import _native

INTERPRETED = tl.constexpr(_native.INTERPRETED)


def multiprocessors(tensor: Tensor) -> int:
    """Of the GPU of `tensor`; of an H200 for a shape alone; a few where kernels are interpreted."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 132 if tensor.is_meta else 4


@triton.jit
def dot(a, b):
    """a b of two tiles of one dtype, [M, K] x [K, N], sums in float32. Exact products: no tf32."""
    if INTERPRETED:  # which has no bfloat16 arithmetic
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_two_parts(a, b):
    """a b, [M, K] x [K, N], for a in float32 and b in that or bfloat16: then a is taken as the sum of two of these."""
    if b.dtype == tl.float32:
        return dot(a, b)
    high = a.to(b.dtype)
    low = (a - high.to(tl.float32)).to(b.dtype)
    return dot(high, b) + dot(low, b)


@triton.jit
def tile(base, row, width, column, inside):
    return tl.load(base + row * width + column[None, :], mask=inside, other=0.0)


@triton.jit
def shrink(
    x, row, here, width, factor, column_stride, rank_stride, r: tl.constexpr, chunks,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """x factor, [BM, width] x [width, r]. WAYS > 1: of few rows, each warp sums a part, and its chain is shorter."""
    rank = tl.arange(0, R)
    if WAYS == 1:
        total = tl.zeros([BM, R], tl.float32)
        for i in range(chunks):
            k = i * BK + tl.arange(0, BK)
            a = tile(x, row, width, k, here & (k < width)[None, :])
            at = factor + k[:, None] * column_stride + rank[None, :] * rank_stride
            b = tl.load(at, mask=(k < width)[:, None] & (rank < r)[None, :], other=0.0)
            total += dot(a, b.to(a.dtype))
    else:
        parts = tl.zeros([WAYS, BM, R], tl.float32)
        part = tl.arange(0, WAYS)[:, None] * (BK // WAYS) + tl.arange(0, BK // WAYS)[None, :]
        for i in range(chunks):
            k = i * BK + part
            inside = k < width
            a = tl.load(x + row[None] * width + k[:, None, :], mask=here[None] & inside[:, None, :], other=0.0)
            at = factor + k[:, :, None] * column_stride + rank[None, None, :] * rank_stride
            b = tl.load(at, mask=inside[:, :, None] & (rank < r)[None, None, :], other=0.0)
            parts += dot(a, b.to(a.dtype))
        total = tl.sum(parts, 0)
    return total


@triton.jit
def softmax_sums(z):
    """Of a tile of logits, -inf where there is none: m = max z, s = sum e^(z - m), u = sum e^(z - m) (z - m)."""
    m = tl.max(z, 0)
    d = z - tl.where(m == float("-inf"), 0.0, m)
    e = tl.exp(d)
    return m, tl.sum(e, 0), tl.sum(tl.where(e == 0, 0.0, e * d), 0)


@triton.jit
def combine_softmax_sums(m, s, u):
    """The sums of a whole row from those of its parts (-inf, 0, 0 where there is none)."""
    whole = tl.max(m, 0)
    shift = tl.where(m == float("-inf"), 0.0, m - whole)
    weight = tl.exp(shift)
    return whole, tl.sum(s * weight, 0), tl.sum((u + s * shift) * weight, 0)
