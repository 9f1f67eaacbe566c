"""film_adapter in Triton: one launch forward; backward one, and where the adapter learns three for sums over rows.

A program takes BM rows of one sample and a part of the columns. h = x D^T and da = dy U need all columns: every program
of the same rows computes them anew, so that few rows still fill the chip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.ops._triton import dot, multiprocessors, shrink
from vqfast.ops.film_adapter.contract import ACTIVATIONS

OUTER_ROWS = 64  # of a step of the sums over rows
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
def _rows(scale, shift, M, blocks, r: tl.constexpr, BM: tl.constexpr, R: tl.constexpr):
    """This program's rows, which of them are there, and 1 + scale and shift of their sample."""
    sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    m = sample * M + block * BM + tl.arange(0, BM)
    rank = tl.arange(0, R)
    gain = 1 + tl.load(scale + sample * r + rank, mask=rank < r, other=0.0)
    offset = tl.load(shift + sample * r + rank, mask=rank < r, other=0.0)
    return m[:, None].to(tl.int64), (m < (sample + 1) * M)[:, None], gain, offset


@triton.jit(do_not_specialize=COUNTS)
def _film_adapter_fwd_kernel(
    x, down, up, scale, shift, y, h, M, blocks, K, r: tl.constexpr, chunks, steps,
    KIND: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row, here, gain, offset = _rows(scale, shift, M, blocks, r, BM, R)
    rank = tl.arange(0, R)
    ranked = rank < r
    shrunk = shrink(x, row, here, K, down, 1, K, r, chunks, BM, BK, R, 1)
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
    grad, h, down, up, scale, shift, dx, active, dh, modulation, M, blocks, K, r: tl.constexpr, chunks, steps,
    KIND: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    row, here, gain, offset = _rows(scale, shift, M, blocks, r, BM, R)
    rank = tl.arange(0, R)
    ranked = rank < r
    shrunk = tl.load(h + row * r + rank[None, :], mask=here & ranked[None, :], other=0.0)
    a, slope = _activate(gain[None, :] * shrunk + offset[None, :], KIND)
    dz = slope * shrink(grad, row, here, K, up, r, 1, r, chunks, BM, BK, R, 1)
    d_shrunk = (gain[None, :] * dz).to(grad.dtype.element_ty)
    if (tl.program_id(1) == 0) & (modulation is not None):
        at, inside = row * r + rank[None, :], here & ranked[None, :]
        tl.store(active + at, a.to(grad.dtype.element_ty), mask=inside)
        tl.store(dh + at, d_shrunk, mask=inside)
        sums = modulation + tl.program_id(0).to(tl.int64) * 2 * r + rank  # [2, r]: dscale, dshift of these rows
        tl.store(sums, tl.sum(dz * shrunk, 0), mask=ranked)
        tl.store(sums + r, tl.sum(dz, 0), mask=ranked)
    if dx is not None:
        for i in range(steps):
            k = (tl.program_id(1) * steps + i) * BK + tl.arange(0, BK)
            inside = k < K
            at, there = row * K + k[None, :], here & inside[None, :]
            d = tl.load(down + rank[:, None] * K + k[None, :], mask=ranked[:, None] & inside[None, :], other=0.0)
            own_dy = tl.load(grad + at, mask=there, other=0.0)
            new = own_dy.to(tl.float32) + dot(d_shrunk, d.to(d_shrunk.dtype))
            tl.store(dx + at, new.to(dx.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=COUNTS)
def _film_adapter_outer_kernel(
    grad, x, active, dh, partial, rows, K, r: tl.constexpr, steps,
    BM: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """partial [splits, 2, r, K]: dD = dh^T x and dU^T = a^T dy over the rows of a split."""
    k, rank = tl.program_id(0) * BK + tl.arange(0, BK), tl.arange(0, R)
    inside, ranked = k < K, rank < r
    d_down = tl.zeros([R, BK], tl.float32)
    d_up = tl.zeros([R, BK], tl.float32)
    for i in range(steps):
        m = (tl.program_id(1) * steps + i) * BM + tl.arange(0, BM)
        row, here = m[:, None].to(tl.int64), (m < rows)[:, None]
        at, there = row * K + k[None, :], here & inside[None, :]
        short, exists = row * r + rank[None, :], here & ranked[None, :]
        d_shrunk = tl.load(dh + short, mask=exists, other=0.0)
        d_down += dot(tl.trans(d_shrunk), tl.load(x + at, mask=there, other=0.0))
        a = tl.load(active + short, mask=exists, other=0.0)
        d_up += dot(tl.trans(a), tl.load(grad + at, mask=there, other=0.0))
    sums = partial + (tl.program_id(1).to(tl.int64) * 2 * r + rank[:, None]) * K + k[None, :]
    tl.store(sums, d_down, mask=ranked[:, None] & inside[None, :])
    tl.store(sums + r * K, d_up, mask=ranked[:, None] & inside[None, :])


@triton.jit(do_not_specialize=COUNTS)
def _film_adapter_sum_kernel(partial, out, blocks, size, chunks, BP: tl.constexpr, BE: tl.constexpr):
    """out[s] = sum over the blocks of s: partial [samples, blocks, size] -> [samples, size]."""
    sample = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BE + tl.arange(0, BE)
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
    grid = triton.cdiv(size, elements), samples
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
    x_grad: bool, parameter_grads: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    parameters = down, up, scale, shift
    grad, x, h, down, up, scale, shift = (t.contiguous() for t in (grad, x, h, *parameters))
    call = _Call(x, down, scale, activation)
    dx = torch.empty_like(x) if x_grad else x.new_empty(0)
    if not h.numel():
        return dx, *(torch.zeros_like(t) if parameter_grads else t.new_empty(0) for t in parameters)
    active, dh, modulation = x.new_empty(h.shape), x.new_empty(h.shape), h.new_empty((call.blocks, 2, call.rank))
    kept = (active, dh, modulation) if parameter_grads else (None, None, None)
    _film_adapter_bwd_kernel[call.grid](
        grad, h, down, up, scale, shift, dx if x_grad else None, *kept, *call.arguments, **call.tiles
    )
    if not parameter_grads:
        return dx, *(t.new_empty(0) for t in parameters)
    ((d_down, d_up),) = _sum(_outer(call, grad, x, active, dh), 1)
    d_modulation = _sum(modulation, call.samples)
    d_scale, d_shift = (d_modulation[:, i].reshape(scale.shape) for i in range(2))
    return dx, d_down.clone(), d_up.mT.contiguous(), d_scale.clone(), d_shift.clone()


def _outer(call: _Call, grad: Tensor, x: Tensor, active: Tensor, dh: Tensor) -> Tensor:
    """Sums over rows, [splits, 2, r, K]: as many splits as fill the chip."""
    rows, width, tiles = x.shape[:-1].numel(), x.shape[-1], call.tiles | dict(BM=OUTER_ROWS, num_stages=2)
    del tiles["KIND"]
    columns, blocks = triton.cdiv(width, tiles["BK"]), triton.cdiv(rows, OUTER_ROWS)
    steps = triton.cdiv(blocks, max(1, 2 * multiprocessors(x) // columns))
    splits = triton.cdiv(blocks, steps)
    partial = dh.new_empty((splits, 2, call.rank, width), dtype=torch.float32)
    _film_adapter_outer_kernel[(columns, splits)](grad, x, active, dh, partial, rows, width, call.rank, steps, **tiles)
    return partial
