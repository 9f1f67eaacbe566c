"""linear_softmax_entropy in Triton: one read of W for the gradient of one position, two for that of up to 32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.ops._triton import combine_softmax_sums, dot, multiprocessors, softmax_sums
from vqfast.ops.softmax_entropy.triton import _softmax_entropy_combine_kernel as _combine_kernel

MAX_POSITIONS = 32  # of one read of W
MAX_ONE_WIDTH = 8192  # for one position: a program holds three rows of W in registers
GRAD_PROGRAMS = 2  # on a multiprocessor
# Bytes of an element of W -> tiles of W, warps and stages. On a multiprocessor there is room for two programs of each.
LOGITS = {2: dict(BV=128, BK=64, num_warps=8, num_stages=4), 4: dict(BV=32, BK=32, num_warps=4, num_stages=3)}
GRAD = {2: dict(BV=32, BD=256, num_warps=8, num_stages=4), 4: dict(BV=32, BD=64, num_warps=4, num_stages=3)}
COUNTS = ("positions", "parts", "tiles", "chunks", "steps", "splits")  # no kernel of its own for their 1
COEFFICIENT_MAX = tl.constexpr(2.0**15)  # of float16: |p (log p + H)| <= 2 H


@triton.jit(do_not_specialize=COUNTS)
def _linear_softmax_entropy_one_kernel(
    hidden, weight, bias, sums, rows, D, V, tiles, BV: tl.constexpr, D2: tl.constexpr, STAGES: tl.constexpr
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    d = tl.arange(0, D2)
    inside = d < D
    h = tl.load(hidden + d, mask=inside, other=0.0).to(tl.float32)
    m, s, u, mean = float("-inf"), 0.0, 0.0, 0.0  # mean logit less m: u / s
    first = tl.zeros([D2], tl.float32)  # sum e^(z - m) w
    second = tl.zeros([D2], tl.float32)  # sum e^(z - m) (z - m - mean) w: centred, so that nothing cancels in dH/dh
    for i in tl.range(tiles, num_stages=STAGES):
        v = (program * tiles + i) * BV + tl.arange(0, BV)
        there = v < V
        at = weight + v[:, None].to(tl.int64) * D + d[None, :]
        w = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        z = tl.sum(w * h[None, :], 1)
        if bias is not None:
            z += tl.load(bias + v, mask=there, other=0.0).to(tl.float32)
        z = tl.where(there, z, float("-inf"))
        top = tl.maximum(m, tl.max(z, 0))
        finite_top = tl.where(top == float("-inf"), 0.0, top)
        fall = tl.where(m == float("-inf"), 0.0, m - finite_top)
        scale = tl.exp(fall)
        e = tl.exp(z - finite_top)
        z = tl.where(e == 0, 0.0, z - finite_top)
        u = scale * (u + s * fall) + tl.sum(e * z, 0)
        s = scale * s + tl.sum(e, 0)
        new_mean = u / tl.where(s == 0, 1.0, s)
        second = scale * (second + (fall + mean - new_mean) * first) + tl.sum((e * (z - new_mean))[:, None] * w, 0)
        first = scale * first + tl.sum(e[:, None] * w, 0)
        m, mean = top, new_mean
    tl.store(sums + program, m)
    tl.store(sums + programs + program, s)
    tl.store(sums + 2 * programs + program, u)
    tl.store(rows + program * D + d, first, mask=inside)
    tl.store(rows + (programs + program) * D + d, second, mask=inside)


@triton.jit
def _load_sums(sums, part, parts):
    there = part < parts
    m = tl.load(sums + part, mask=there, other=float("-inf"))
    s = tl.load(sums + parts + part, mask=there, other=0.0)
    return m, s, tl.load(sums + 2 * parts + part, mask=there, other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def _linear_softmax_entropy_join_kernel(
    sums, rows, entropy, hidden_grad, D, parts, chunks, PARTS: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr
):
    m, s, u = combine_softmax_sums(*_load_sums(sums, tl.arange(0, PARTS), parts))
    if tl.program_id(0) == 0:
        tl.store(entropy, tl.log(s) - u / s)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    total = tl.zeros([BD], tl.float32)
    for i in tl.range(chunks, num_stages=3):
        part = i * BP + tl.arange(0, BP)
        own_m, own_s, own_u = _load_sums(sums, part, parts)
        fall = tl.where(own_m == float("-inf"), 0.0, own_m - m)
        step = fall + own_u / tl.where(own_s == 0, 1.0, own_s) - u / s
        at, inside = rows + part[:, None] * D + d[None, :], (part < parts)[:, None] & (d < D)[None, :]
        first = tl.load(at, mask=inside, other=0.0)
        second = tl.load(at + parts * D, mask=inside, other=0.0)
        total += tl.sum(tl.exp(fall)[:, None] * (second + step[:, None] * first), 0)
    tl.store(hidden_grad + d, -total / s, mask=d < D)


@triton.jit(do_not_specialize=COUNTS)
def _linear_softmax_entropy_logits_kernel(
    hidden, weight, bias, sums, logits, positions, D, V, chunks,
    BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    n, k = tl.arange(0, BN), tl.arange(0, BK)
    there, asked = v < V, n < positions
    w_row, h_row = weight + v.to(tl.int64)[:, None] * D, hidden + n[:, None] * D
    z = tl.zeros([BV, BN], tl.float32)
    for i in range(chunks):
        d = i * BK + k
        w = tl.load(w_row + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
        h = tl.load(h_row + d[None, :], mask=asked[:, None] & (d < D)[None, :], other=0.0)
        z += dot(w, tl.trans(h))
    if bias is not None:
        z += tl.load(bias + v, mask=there, other=0.0).to(tl.float32)[:, None]
    if logits is not None:
        tl.store(logits + n[None, :].to(tl.int64) * V + v[:, None], z, mask=there[:, None] & asked[None, :])
    m, s, u = softmax_sums(tl.where(there[:, None], z, float("-inf")))
    at = sums + n * tl.num_programs(0) + tl.program_id(0)
    stride = positions * tl.num_programs(0)
    tl.store(at, m, mask=asked)
    tl.store(at + stride, s, mask=asked)
    tl.store(at + 2 * stride, u, mask=asked)


@triton.jit(do_not_specialize=COUNTS)
def _linear_softmax_entropy_grad_kernel(
    logits, entropy, max_logit, log_sum, weight, partial, positions, D, V, tiles, steps,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    split, splits = tl.program_id(1), tl.num_programs(1)
    n, d = tl.arange(0, BN), tl.program_id(0) * BD + tl.arange(0, BD)
    asked, inside = n < positions, d < D
    h = tl.load(entropy + n, mask=asked, other=0.0)[:, None]
    m = tl.load(max_logit + n, mask=asked, other=0.0)[:, None]
    log_s = tl.load(log_sum + n, mask=asked, other=0.0)[:, None]
    scale = COEFFICIENT_MAX / 2 / tl.maximum(h, 1e-30)  # so that float16 holds the coefficients of any row
    total = tl.zeros([BN, BD], tl.float32)
    for i in range(steps):
        # All splits walk from the end of W, which the logits' kernel read last and is still in the L2 cache.
        v = (tiles - 1 - split - i * splits) * BV + tl.arange(0, BV)
        there = (v >= 0) & (v < V)
        at = logits + n[:, None].to(tl.int64) * V + v[None, :]
        log_p = tl.load(at, mask=asked[:, None] & there[None, :], other=float("-inf")) - m - log_s
        p = tl.exp(log_p)
        c = tl.where(p == 0, 0.0, p * (log_p + h) * scale)
        at = weight + v[:, None].to(tl.int64) * D + d[None, :]
        w = tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)
        total += dot(c.to(w.dtype), w)
    at = partial + (split * positions + n[:, None]) * D + d[None, :]
    tl.store(at, -total / scale, mask=asked[:, None] & inside[None, :])


@triton.jit(do_not_specialize=COUNTS)
def _linear_softmax_entropy_sum_kernel(partial, hidden_grad, size, splits, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    split, i = tl.arange(0, SPLITS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = partial + split[:, None] * size + i[None, :]
    part = tl.load(at, mask=(split < splits)[:, None] & (i < size)[None, :], other=0.0)
    tl.store(hidden_grad + i, tl.sum(part, 0), mask=i < size)


def _one_position(hidden: Tensor, weight: Tensor, bias: Tensor | None, entropy: Tensor, hidden_grad: Tensor) -> None:
    (classes, width), width2 = weight.shape, triton.next_power_of_2(weight.shape[1])
    warps = min(16, max(4, width2 // 512))  # 16 on a multiprocessor, each with 2 KB of a tile
    block = max(1, (warps << 11) // (width2 * weight.element_size()))
    blocks = triton.cdiv(classes, block)
    tiles = triton.cdiv(blocks, 16 // warps * multiprocessors(weight))
    programs = triton.cdiv(blocks, tiles)
    sums, rows = entropy.new_empty(3, programs), entropy.new_empty(2, programs, width)
    _linear_softmax_entropy_one_kernel[(programs,)](
        hidden, weight, bias, sums, rows, width, classes, tiles, BV=block, D2=width2, STAGES=4, num_warps=warps
    )
    _linear_softmax_entropy_join_kernel[(triton.cdiv(width, 32),)](
        sums, rows, entropy, hidden_grad, width, programs, triton.cdiv(programs, 64),
        PARTS=triton.next_power_of_2(programs), BP=64, BD=32, num_warps=8,
    )  # fmt: skip


def _several_positions(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, entropy: Tensor, hidden_grad: Tensor | None
) -> None:
    """In groups: logits and their sums, entropies, then dH/dh over splits of W, which are summed in order."""
    (classes, width), group = weight.shape, min(MAX_POSITIONS, hidden.shape[0])
    padded = 16 if group <= 16 else 32
    logits_tile, grad_tile = LOGITS[weight.element_size()], GRAD[weight.element_size()]
    blocks = triton.cdiv(classes, logits_tile["BV"])
    columns, tiles = triton.cdiv(width, grad_tile["BD"]), triton.cdiv(classes, grad_tile["BV"])
    splits = max(1, min(tiles, GRAD_PROGRAMS * multiprocessors(weight) // max(1, columns)))
    sums, statistics = entropy.new_empty(3 * group * blocks), entropy.new_empty(2, group)
    logits = partial = None
    if hidden_grad is not None:
        logits, partial = entropy.new_empty(group, classes), entropy.new_empty(splits, group, width)
    for first in range(0, hidden.shape[0], group):
        own = slice(first, first + group)
        positions, results = hidden[own].shape[0], (entropy[own], *statistics)
        _linear_softmax_entropy_logits_kernel[(blocks,)](
            hidden[own], weight, bias, sums, logits, positions, width, classes,
            triton.cdiv(width, logits_tile["BK"]), BN=padded, **logits_tile,
        )  # fmt: skip
        _combine_kernel[(positions,)](sums, *results, blocks, BLOCKS=triton.next_power_of_2(blocks), num_warps=8)
        if hidden_grad is None:
            continue
        _linear_softmax_entropy_grad_kernel[(columns, splits)](
            logits, *results, weight, partial, positions, width, classes, tiles, triton.cdiv(tiles, splits),
            BN=padded, **grad_tile,
        )  # fmt: skip
        size, splits2 = positions * width, triton.next_power_of_2(splits)
        block = max(16, 4096 // splits2)
        _linear_softmax_entropy_sum_kernel[(triton.cdiv(size, block),)](
            partial, hidden_grad[own], size, splits, SPLITS=splits2, BLOCK=block
        )


def linear_softmax_entropy_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_grad: bool
) -> tuple[Tensor, Tensor]:
    hidden, weight = hidden.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    positions, width = hidden.shape
    entropy = hidden.new_empty(positions, dtype=torch.float32)
    grad = hidden.new_empty(hidden.shape if hidden_grad else (0,), dtype=torch.float32)
    if positions == 1 and hidden_grad and 0 < width <= MAX_ONE_WIDTH:
        _one_position(hidden, weight, bias, entropy, grad)
    elif positions:
        _several_positions(hidden, weight, bias, entropy, grad if hidden_grad else None)
    return entropy, grad
