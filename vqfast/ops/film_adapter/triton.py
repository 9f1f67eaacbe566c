"""film_adapter in Triton: one launch forward, two backward.

A program takes BM rows of one sample and a part of the columns. h = x D^T and da = dy U need all columns: every program
of the same rows computes them anew, so that few rows still fill the chip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.ops._triton import dot, multiprocessors
from vqfast.ops.film_adapter.contract import ACTIVATIONS

SUM_TILE = 4096  # partial sums that a program holds at once
SILU, RELU = tl.constexpr(ACTIVATIONS.index("silu")), tl.constexpr(ACTIVATIONS.index("relu"))
COUNTS = ("M", "blocks", "chunks", "steps")  # no kernel of its own for their 1


@triton.jit
def _activate(z, KIND: tl.constexpr):
    """act(z) and act'(z)."""
    if KIND == RELU:
        return tl.where(z < 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)
    if KIND == SILU:
        e = tl.exp(-tl.abs(z))
        sigmoid = tl.where(z < 0, e, 1.0) / (1 + e)
        return z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
    phi = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
    return z * phi, phi + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def _shrink(
    x, row, here, width, factor, column_stride, rank_stride, r: tl.constexpr, chunks,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """x factor, [BM, width] x [width, r]."""
    rank = tl.arange(0, R)
    total = tl.zeros([BM, R], tl.float32)
    for i in range(chunks):
        k = i * BK + tl.arange(0, BK)
        inside = k < width
        a = tl.load(x + row * width + k[None, :], mask=here & inside[None, :], other=0.0)
        at = factor + k[:, None] * column_stride + rank[None, :] * rank_stride
        b = tl.load(at, mask=inside[:, None] & (rank < r)[None, :], other=0.0)
        total += dot(a, b.to(a.dtype))
    return total


@triton.jit(do_not_specialize=COUNTS)
def _film_adapter_fwd_kernel(
    x, down, up, scale, shift, y, h, M, blocks, K, r: tl.constexpr, chunks, steps,
    KIND: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    m = sample * M + block * BM + tl.arange(0, BM)
    row, here = m[:, None].to(tl.int64), (m < (sample + 1) * M)[:, None]
    rank = tl.arange(0, R)
    ranked = rank < r
    gain = 1 + tl.load(scale + sample * r + rank, mask=ranked, other=0.0)
    offset = tl.load(shift + sample * r + rank, mask=ranked, other=0.0)
    shrunk = _shrink(x, row, here, K, down, 1, K, r, chunks, BM, BK, R)
    if tl.program_id(1) == 0:
        tl.store(h + row * r + rank[None, :], shrunk, mask=here & ranked[None, :])
    a, _ = _activate(gain[None, :] * shrunk + offset[None, :], KIND)
    a = a.to(x.dtype.element_ty)
    for i in range(steps):
        k = (tl.program_id(1) * steps + i) * BK + tl.arange(0, BK)
        inside = k < K
        u = tl.load(up + k[None, :] * r + rank[:, None], mask=inside[None, :] & ranked[:, None], other=0.0)
        at, there = row * K + k[None, :], here & inside[None, :]
        old = tl.load(x + at, mask=there, other=0.0)
        new = old.to(tl.float32) + dot(a, u.to(a.dtype))
        tl.store(y + at, new.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=COUNTS)
def _film_adapter_bwd_kernel(
    grad, x, h, down, up, scale, shift, dx, partial, modulation, M, blocks, K, r: tl.constexpr, chunks, steps,
    KIND: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    m = sample * M + block * BM + tl.arange(0, BM)
    row, here = m[:, None].to(tl.int64), (m < (sample + 1) * M)[:, None]
    rank = tl.arange(0, R)
    ranked = rank < r
    gain = 1 + tl.load(scale + sample * r + rank, mask=ranked, other=0.0)
    offset = tl.load(shift + sample * r + rank, mask=ranked, other=0.0)
    shrunk = tl.load(h + row * r + rank[None, :], mask=here & ranked[None, :], other=0.0)
    a, slope = _activate(gain[None, :] * shrunk + offset[None, :], KIND)
    a = a.to(x.dtype.element_ty)  # rows that are not there have dy = 0
    dz = slope * _shrink(grad, row, here, K, up, r, 1, r, chunks, BM, BK, R)
    if tl.program_id(1) == 0:
        at = modulation + tl.program_id(0).to(tl.int64) * 2 * r + rank  # [2, r]: dscale, dshift of these rows
        tl.store(at, tl.sum(dz * shrunk, 0), mask=ranked)
        tl.store(at + r, tl.sum(dz, 0), mask=ranked)
    dh = (gain[None, :] * dz).to(x.dtype.element_ty)
    sums = partial + (tl.program_id(0).to(tl.int64) * 2 * r + rank[:, None]) * K  # [2, r, K]: dD, dU^T of these rows
    for i in range(steps):
        k = (tl.program_id(1) * steps + i) * BK + tl.arange(0, BK)
        inside = k < K
        at, there, ranks_there = row * K + k[None, :], here & inside[None, :], ranked[:, None] & inside[None, :]
        own_dy = tl.load(grad + at, mask=there, other=0.0)
        own_x = tl.load(x + at, mask=there, other=0.0)
        tl.store(sums + k[None, :], dot(tl.trans(dh), own_x), mask=ranks_there)
        tl.store(sums + r * K + k[None, :], dot(tl.trans(a), own_dy), mask=ranks_there)
        if dx is not None:
            d = tl.load(down + rank[:, None] * K + k[None, :], mask=ranks_there, other=0.0)
            new = own_dy.to(tl.float32) + dot(dh, d.to(dh.dtype))
            tl.store(dx + at, new.to(dx.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=COUNTS)
def _film_adapter_sum_kernel(partial, out, blocks, size, chunks, BP: tl.constexpr, BE: tl.constexpr):
    """out[s] = sum over the blocks of s: partial [samples, blocks, size] -> [samples, size]."""
    sample = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    total = tl.zeros([BE], tl.float32)
    for i in range(chunks):
        block = i * BP + tl.arange(0, BP)
        at = partial + (sample * blocks + block[:, None]) * size + e[None, :]
        total += tl.sum(tl.load(at, mask=(block < blocks)[:, None] & (e < size)[None, :], other=0.0), 0)
    tl.store(out + sample * size + e, total, mask=e < size)


def _sum(partial: Tensor, samples: int) -> Tensor:
    """Sums over the blocks of every sample: [samples blocks, ...] -> [samples, ...]."""
    blocks, size = partial.shape[0] // samples, partial[0].numel()
    out = partial.new_empty((samples, *partial.shape[1:]))
    parts = min(64, triton.next_power_of_2(blocks))
    elements = min(SUM_TILE // parts, triton.next_power_of_2(size))
    grid = samples, triton.cdiv(size, elements)
    _film_adapter_sum_kernel[grid](partial, out, blocks, size, triton.cdiv(blocks, parts), BP=parts, BE=elements)
    return out


class _Call:
    """Of a call: the grid of its kernels, the counts that both of them take, and their tiles."""

    def __init__(self, x: Tensor, down: Tensor, scale: Tensor, activation: int) -> None:
        self.rank, width = down.shape
        rows = x.shape[:-1].numel()
        self.samples = scale.shape[0] if scale.dim() == 2 else 1
        own = rows // max(1, self.samples)
        tile = 64 if x.element_size() == 2 and own >= 64 else 16  # rows of a program
        column_tile = 64 if self.rank <= 32 else 32  # registers hold sums of [2, r, BK]
        blocks = triton.cdiv(own, tile)
        self.blocks, tiles = blocks * self.samples, triton.cdiv(width, column_tile)
        splits = triton.cdiv(multiprocessors(x), max(1, self.blocks))
        steps = triton.cdiv(tiles, splits)
        self.grid = self.blocks, triton.cdiv(tiles, steps)
        self.arguments = own, blocks, width, self.rank, tiles, steps
        self.tiles = dict(
            KIND=activation,
            BM=tile,
            BK=column_tile,
            R=max(16, triton.next_power_of_2(self.rank)),
            num_warps=4 if self.rank <= 64 else 8,
            num_stages=3 if self.rank <= 32 else 2,
        )


def film_adapter_fwd(
    x: Tensor, down: Tensor, up: Tensor, scale: Tensor, shift: Tensor, activation: int
) -> tuple[Tensor, Tensor]:
    x, down, up, scale, shift = (t.contiguous() for t in (x, down, up, scale, shift))
    call = _Call(x, down, scale, activation)
    y, h = torch.empty_like(x), x.new_empty((*x.shape[:-1], call.rank), dtype=torch.float32)
    if h.numel():
        _film_adapter_fwd_kernel[call.grid](x, down, up, scale, shift, y, h, *call.arguments, **call.tiles)
    return y, h


def film_adapter_bwd(
    grad: Tensor, x: Tensor, h: Tensor, down: Tensor, up: Tensor, scale: Tensor, shift: Tensor, activation: int,
    x_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    grad, x, h, down, up, scale, shift = (t.contiguous() for t in (grad, x, h, down, up, scale, shift))
    call = _Call(x, down, scale, activation)
    dx = torch.empty_like(x) if x_grad else x.new_empty(0)
    if not h.numel():
        return dx, *(torch.zeros_like(t) for t in (down, up, scale, shift))
    partial = h.new_empty((call.blocks, 2, *down.shape))
    modulation = h.new_empty((call.blocks, 2, call.rank))
    _film_adapter_bwd_kernel[call.grid](
        grad, x, h, down, up, scale, shift, dx if x_grad else None, partial, modulation, *call.arguments, **call.tiles
    )
    ((d_down, d_up),) = _sum(partial, 1)
    d_modulation = _sum(modulation, call.samples)
    d_scale, d_shift = (d_modulation[:, i].reshape(scale.shape) for i in range(2))
    return dx, d_down.clone(), d_up.mT.contiguous(), d_scale.clone(), d_shift.clone()
