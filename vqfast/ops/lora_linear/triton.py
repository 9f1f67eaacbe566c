"""lora_linear in Triton around the vendor's products: one launch forward, two backward.

A program takes BM rows of one sample and a part of the columns. t = x A^T and ds = s dy B need all columns: every
program of the same rows computes them anew, so that few rows still fill the chip.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vqfast.ops._triton import dot, multiprocessors, shrink, tile

MANY_ROWS = 4096  # blocks of 64 of them fill a GPU
SUM_TILE = 4096  # partial sums that a program holds at once
COUNTS = ("T", "samples", "M", "blocks", "chunks", "steps", "k_steps", "n_steps")  # no kernel of its own for their 1


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _samples(offsets, T, samples, BM: tl.constexpr, SAMPLES: tl.constexpr):
    """First row, end, blocks, and blocks up to its end, of every sample. No row has two, should the offsets fall."""
    s = tl.arange(0, SAMPLES)
    begin = tl.associative_scan(tl.load(offsets + s, mask=s <= samples, other=0), 0, _larger)
    end = tl.associative_scan(tl.load(offsets + s + 1, mask=s < samples, other=0), 0, _larger)
    begin = tl.minimum(tl.maximum(begin, 0), T)
    end = tl.minimum(tl.maximum(end, begin), T)
    blocks = (end - begin + BM - 1) // BM
    return begin, end, blocks, tl.cumsum(blocks, 0)


@triton.jit
def _rows(offsets, T, samples, M, blocks, BM: tl.constexpr, SAMPLES: tl.constexpr):
    """Sample of this program, its first row and the end of the sample's."""
    block = tl.program_id(0)
    if offsets is None:
        sample = block // blocks
        first, end = sample * M + block % blocks * BM, (sample + 1) * M
    else:
        begins, ends, own_blocks, last = _samples(offsets, T, samples, BM, SAMPLES)
        sample = tl.sum((last <= block).to(tl.int32), 0)
        own = tl.arange(0, SAMPLES) == sample
        first = tl.sum(tl.where(own, begins + (block - (last - own_blocks)) * BM, 0), 0)
        end = tl.sum(tl.where(own, ends, 0), 0)
    return sample, first, end


# Both kernels load their first tiles of columns before the product that all columns wait for, and the next ones ahead.


@triton.jit(do_not_specialize=COUNTS)
def _lora_linear_fwd_kernel(
    x, lora_a, lora_b, y, t, offsets, scaling, T, samples, M, blocks, K, N, r: tl.constexpr, chunks, steps,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, WAYS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    sample, first, end = _rows(offsets, T, samples, M, blocks, BM, SAMPLES)
    if first >= end:
        return
    m = first + tl.arange(0, BM)
    row, here = m[:, None].to(tl.int64), (m < end)[:, None]
    rank = tl.arange(0, R)
    ranked = (rank < r)[None, :]
    own_a, own_b = lora_a + sample.to(tl.int64) * r * K, lora_b + sample.to(tl.int64) * r * N
    n = tl.program_id(1) * steps * BC + tl.arange(0, BC)
    n_end = tl.minimum(N, (tl.program_id(1) + 1) * steps * BC)
    old = tile(y, row, N, n, here & (n < n_end)[None, :])
    b = tile(own_b, n[:, None], r, rank, (n < n_end)[:, None] & ranked)
    total = shrink(x, row, here, K, own_a, 1, K, r, chunks, BM, BK, R, WAYS)
    if tl.program_id(1) == 0:
        tl.store(t + row * r + rank[None, :], total, mask=here & ranked)
    total = total.to(x.dtype.element_ty)
    for _ in range(steps):
        new = old.to(tl.float32) + scaling * dot(total, tl.trans(b.to(total.dtype)))
        at, inside = y + row * N + n[None, :], here & (n < n_end)[None, :]
        n += BC
        old = tile(y, row, N, n, here & (n < n_end)[None, :])
        b = tile(own_b, n[:, None], r, rank, (n < n_end)[:, None] & ranked)
        tl.store(at, new.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _lora_linear_bwd_kernel(
    grad, x, lora_a, lora_b, t, dx, partial, offsets, scaling, T, samples, M, blocks, K, N, r: tl.constexpr,
    chunks, k_steps, n_steps,
    BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, R: tl.constexpr, WAYS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    sample, first, end = _rows(offsets, T, samples, M, blocks, BM, SAMPLES)
    if first >= end:
        return
    m = first + tl.arange(0, BM)
    row, here = m[:, None].to(tl.int64), (m < end)[:, None]
    rank = tl.arange(0, R)
    ranked = (rank < r)[:, None]
    own_a, own_b = lora_a + sample.to(tl.int64) * r * K, lora_b + sample.to(tl.int64) * r * N
    sums = partial + (tl.program_id(0).to(tl.int64) * r + rank[:, None]) * (K + N)  # [r, K + N]: dA, then (dB / s)^T
    k = tl.program_id(1) * k_steps * BC + tl.arange(0, BC)
    n = tl.program_id(1) * n_steps * BC + tl.arange(0, BC)
    k_end = tl.minimum(K, (tl.program_id(1) + 1) * k_steps * BC)
    n_end = tl.minimum(N, (tl.program_id(1) + 1) * n_steps * BC)
    own_dy = tile(grad, row, N, n, here & (n < n_end)[None, :])
    own_x = tile(x, row, K, k, here & (k < k_end)[None, :])
    if dx is not None:
        old = tile(dx, row, K, k, here & (k < k_end)[None, :])
        a = tile(own_a, rank[:, None], K, k, ranked & (k < k_end)[None, :])
    shrunk = tl.trans(tile(t, row, r, rank, here & (rank < r)[None, :]).to(x.dtype.element_ty))
    ds = scaling * shrink(grad, row, here, N, own_b, r, 1, r, chunks, BM, BK, R, WAYS)
    ds = ds.to(x.dtype.element_ty)
    for _ in range(n_steps):
        db = dot(shrunk, own_dy)
        at, inside = sums + K + n[None, :], ranked & (n < n_end)[None, :]
        n += BC
        own_dy = tile(grad, row, N, n, here & (n < n_end)[None, :])
        tl.store(at, db, mask=inside)
    for _ in range(k_steps):
        da = dot(tl.trans(ds), own_x)
        now, inside = k[None, :], (k < k_end)[None, :]
        k += BC
        own_x = tile(x, row, K, k, here & (k < k_end)[None, :])
        tl.store(sums + now, da, mask=ranked & inside)
        if dx is not None:
            new = old.to(tl.float32) + dot(ds, a.to(ds.dtype))
            old = tile(dx, row, K, k, here & (k < k_end)[None, :])
            a = tile(own_a, rank[:, None], K, k, ranked & (k < k_end)[None, :])
            tl.store(dx + row * K + now, new.to(dx.dtype.element_ty), mask=here & inside)


@triton.jit(do_not_specialize=COUNTS)
def _lora_linear_sum_kernel(
    partial, da, db, offsets, scaling, T, samples, M, blocks, K, N, r: tl.constexpr, chunks,
    BM: tl.constexpr, SAMPLES: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    sample, size = tl.program_id(0), r * (K + N)
    if offsets is None:
        first, count = sample * blocks, blocks
    else:
        _, _, own_blocks, last = _samples(offsets, T, samples, BM, SAMPLES)
        own = tl.arange(0, SAMPLES) == sample
        count = tl.sum(tl.where(own, own_blocks, 0), 0)
        first = tl.sum(tl.where(own, last, 0), 0) - count
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    total = tl.zeros([BE], tl.float32)
    for i in range(chunks):
        block = i * BP + tl.arange(0, BP)
        row, here = (first + block)[:, None].to(tl.int64), (block < count)[:, None]
        total += tl.sum(tile(partial, row, size, e, here & (e < size)[None, :]), 0)
    rank, column = e // (K + N), e % (K + N)
    to_a, to_b = (e < size) & (column < K), (e < size) & (column >= K)
    tl.store(da + (sample.to(tl.int64) * r + rank) * K + column, total, mask=to_a)
    tl.store(db + (sample.to(tl.int64) * N + column - K) * r + rank, total * scaling, mask=to_b)


def _tiles(rows: int, rank: int, half: bool) -> dict[str, int]:
    """Rows and columns of a program. Partial sums of dA and dB are about rank / BM of the activations' traffic."""
    if not half:
        return dict(BM=16, BK=64, BC=64, WAYS=4, num_warps=8, num_stages=2)
    if rank <= 16 and rows < MANY_ROWS:
        return dict(BM=16, BK=256, BC=256, WAYS=8, num_warps=8, num_stages=5)
    if rank > 16 and rows >= MANY_ROWS:
        return dict(BM=128, BK=64, BC=64, WAYS=1, num_warps=8, num_stages=3)
    return dict(BM=64, BK=64, BC=64, WAYS=1, num_warps=8, num_stages=4)


class _Call:
    """Of a call: the grid of its kernels, the arguments that all of them take, and their tiles."""

    def __init__(self, x: Tensor, weight: Tensor, lora_a: Tensor, scaling: float, row_offsets: Tensor | None) -> None:
        self.outputs, self.inputs = weight.shape
        rows, self.rank = x.shape[:-1].numel(), lora_a.shape[-2]
        self.samples = lora_a.shape[0] if lora_a.dim() == 3 else 1
        own = rows // max(1, self.samples)  # rows of a sample, unless packed
        tiles = _tiles(rows if own >= 64 else 0, self.rank, x.element_size() == 2)
        own_blocks = triton.cdiv(own, tiles["BM"])
        if row_offsets is None:
            offsets, padded = None, 1
            self.blocks, self.summed = own_blocks * self.samples, own_blocks  # of all samples, of one at most
        else:
            offsets, padded = row_offsets.contiguous(), triton.next_power_of_2(max(1, self.samples))
            self.blocks = self.summed = triton.cdiv(rows, tiles["BM"]) + self.samples
        self.splits = triton.cdiv(multiprocessors(x), max(1, self.blocks))
        self.arguments = offsets, scaling, rows, self.samples, own, own_blocks, self.inputs, self.outputs, self.rank
        self.tiles = tiles | dict(R=max(16, triton.next_power_of_2(self.rank)), SAMPLES=padded)

    def chunks(self, width: int) -> int:
        return triton.cdiv(width, self.tiles["BK"])

    def steps(self, width: int) -> int:
        """Tiles of columns of a program."""
        return triton.cdiv(triton.cdiv(width, self.tiles["BC"]), self.splits)


def lora_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float,
    row_offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, lora_a, lora_b = x.contiguous(), lora_a.contiguous(), lora_b.contiguous()
    call = _Call(x, weight, lora_a, scaling, row_offsets)
    y = F.linear(x, weight, bias).contiguous()
    t = x.new_empty((*x.shape[:-1], call.rank), dtype=torch.float32)
    if t.numel():
        _lora_linear_fwd_kernel[(call.blocks, call.splits)](
            x, lora_a, lora_b, y, t, *call.arguments,
            call.chunks(call.inputs), call.steps(call.outputs), **call.tiles,
        )  # fmt: skip
    return y, t


def lora_linear_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, t: Tensor, scaling: float,
    row_offsets: Tensor | None, x_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad, x, lora_a, lora_b, t = (tensor.contiguous() for tensor in (grad, x, lora_a, lora_b, t))
    call = _Call(x, weight, lora_a, scaling, row_offsets)
    dx = torch.matmul(grad, weight).contiguous() if x_grad else x.new_empty(0)
    da, db = torch.empty_like(lora_a), torch.empty_like(lora_b)
    size = call.rank * (call.inputs + call.outputs)
    partial = t.new_empty(call.blocks, size)
    if t.numel():
        _lora_linear_bwd_kernel[(call.blocks, call.splits)](
            grad, x, lora_a, lora_b, t, dx if x_grad else None, partial, *call.arguments,
            call.chunks(call.outputs), call.steps(call.inputs), call.steps(call.outputs), **call.tiles,
        )  # fmt: skip
    parts = min(64, triton.next_power_of_2(max(1, call.summed)))
    elements = SUM_TILE // parts
    _lora_linear_sum_kernel[(call.samples, triton.cdiv(size, elements))](
        partial, da, db, *call.arguments, triton.cdiv(call.summed, parts),
        BM=call.tiles["BM"], SAMPLES=call.tiles["SAMPLES"], BP=parts, BE=elements,
    )  # fmt: skip
    return dx, da, db
