"""lowrank_filter2d in Triton: a tile of pixels between two band matrices, so that every pass is a matrix product.

With M_y[y, s] the sum of the taps that meet pixel s from position y, borders included, F = M_y X M_x^T; the gradient in
the image is M_y^T g M_x. The correlation of g with the image, filtered along one axis, has the gradient of the other
axis' taps on its diagonals. A pixel that is not finite reaches all of its tile: zeros of a band times NaN are NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.ops._triton import dot, dot_two_parts

PROGRAMS = 512  # of the correlation: a few for each multiprocessor; more only make more partial sums
ROWS = 64  # partial sums that the last kernel takes at once


@triton.jit
def _tap(taps, i, wanted, TAPS: tl.constexpr):
    return tl.load(taps + i, mask=wanted & (i >= 0) & (i < TAPS), other=0.0)


@triton.jit
def _band(taps, at, source, size, TAPS: tl.constexpr, PADDING: tl.constexpr):
    """M[at, source]: sum of the taps i for which padded position at + i - k // 2 is pixel `source`."""
    i = source - at + TAPS // 2
    band = _tap(taps, i, True, TAPS)
    if PADDING == 0:  # reflect: pixel s lies at -s and 2 (n - 1) - s, too
        band += _tap(taps, i - 2 * source, source >= 1, TAPS)
        band += _tap(taps, i + 2 * (size - 1 - source), source <= size - 2, TAPS)
    if PADDING == 1:  # replicate: the first and the last pixel lie at all positions beyond them
        for j in tl.static_range(TAPS):
            position = at + (j - TAPS // 2)
            beyond = ((source == 0) & (position < 0)) | ((source == size - 1) & (position >= size))
            band += tl.where(beyond, tl.load(taps + j), 0.0)
    return band


@triton.jit
def _source(position, size, PADDING: tl.constexpr):
    """Pixel at a padded position; the position itself where that is a zero or beyond the padding."""
    if PADDING == 0:
        position = tl.where(position < 0, -position, position)
        position = tl.where(position >= size, 2 * (size - 1) - position, position)
    if PADDING == 1:
        position = tl.minimum(tl.maximum(position, 0), size - 1)
    return position


@triton.jit
def _pixels(plane, y, x, height, width, wanted):
    """Tile [y, x] of a plane, zeros outside. float16 becomes float32: taps and filtered rows may leave its range."""
    inside = wanted & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    tile = tl.load(plane + y * width + x, mask=inside, other=0.0)
    if tile.dtype == tl.float16:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _lowrank_filter2d_kernel(
    image, taps_y, taps_x, mix, gain, bias, result,
    channels, height, width, tiles_y, tiles_x, taps_stride, mix_stride, gain_stride, gain_step, bias_stride, bias_step,
    RANK: tl.constexpr, TAPS: tl.constexpr, PADDING: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    ADJOINT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    plane = program // (tiles_y * tiles_x)
    sample, channel = plane // channels, plane % channels
    step: tl.constexpr = TILE - TAPS + 1
    local = tl.arange(0, TILE)
    y = program // tiles_x % tiles_y * step + local  # of results; of these `step` are whole
    x = program % tiles_x * step + local
    y_in, x_in = y - TAPS // 2, x - TAPS // 2
    offset = plane.to(tl.int64) * height * width
    tile = _pixels(image + offset, y_in[:, None], x_in[None, :], height, width, True)
    filtered = tl.zeros((TILE, TILE), tl.float32)
    for r in range(RANK):
        u = taps_y + sample * taps_stride + r * TAPS
        v = taps_x + sample * taps_stride + r * TAPS
        if ADJOINT:
            left = _band(u, y_in[None, :], y[:, None], height, TAPS, PADDING)
            right = _band(v, x_in[:, None], x[None, :], width, TAPS, PADDING)
        else:
            left = _band(u, y[:, None], y_in[None, :], height, TAPS, PADDING)
            right = _band(v, x[None, :], x_in[:, None], width, TAPS, PADDING)
        rows = dot(left.to(tile.dtype), tile)
        filtered += dot(rows.to(tile.dtype), right.to(tile.dtype))
    whole = (local < step)[:, None] & (local < step)[None, :]
    own = _pixels(image + offset, y[:, None], x[None, :], height, width, whole).to(tl.float32)
    out = own + tl.load(mix + sample * mix_stride) * (filtered - own)
    if HAS_GAIN:
        out *= tl.load(gain + sample * gain_stride + channel * gain_step)
    if HAS_BIAS:
        out += tl.load(bias + sample * bias_stride + channel * bias_step)
    inside = whole & (y < height)[:, None] & (x < width)[None, :]
    tl.store(result + offset + y[:, None] * width + x[None, :], out.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _correlate(
    grad, image, own_taps, other_taps, lags, values, r, first, tiles, tiles_x, height, width,
    ALONG_Y: tl.constexpr, TAPS: tl.constexpr, PADDING: tl.constexpr, LAGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sums of tiles [first, first + tiles) of a plane for the taps of one axis, called a; the other axis is b.

    Writes G v (or G^T u) to LAGS lags; along y the values sum g (F_r - x), without x for r > 0, sum g x and sum g, too.
    The difference is taken per pixel: <G, K> - G[p, p], two sums over all pixels, would cancel.
    """
    step: tl.constexpr = TILE - TAPS + 1
    local, lag = tl.arange(0, TILE), tl.arange(0, LAGS)
    whole = (local < step)[:, None] & (local < step)[None, :]
    diagonals = tl.zeros((LAGS, TILE), tl.float32)
    zeros = tl.zeros((TILE,), tl.float32)
    difference, centre, total = zeros, zeros, zeros
    for i in range(first, first + tiles):
        top, left = i // tiles_x * step, i % tiles_x * step
        y, x = top + local, left + local
        g = _pixels(grad, y[:, None], x[None, :], height, width, whole)
        halo = _pixels(image, y[:, None] - TAPS // 2, x[None, :] - TAPS // 2, height, width, True)
        if ALONG_Y:
            g = tl.trans(g)
            halo = tl.trans(halo)  # both are [b, a] now
            a, a_first, a_size, b, b_size = y, top, height, x, width
        else:
            a, a_first, a_size, b, b_size = x, left, width, y, height
        band = _band(other_taps, b[:, None], b[None, :] - TAPS // 2, b_size, TAPS, PADDING)
        along_b = dot_two_parts(band, halo)  # [b, a with its halo]
        products = dot_two_parts(tl.trans(along_b), g)  # [a with its halo, a]
        at = _source(a[None, :] + lag[:, None] - TAPS // 2, a_size, PADDING) - a_first + TAPS // 2
        diagonals += tl.gather(products, tl.minimum(tl.maximum(at, 0), TILE - 1), 0)
        if ALONG_Y:
            band = _band(own_taps, a[None, :], a[:, None] - TAPS // 2, a_size, TAPS, PADDING)
            own = _pixels(image, y[None, :], x[:, None], height, width, tl.trans(whole)).to(tl.float32)
            weight = g.to(tl.float32)
            difference += tl.sum(weight * (dot(along_b, band) - tl.where(r == 0, own, 0.0)), 1)
            centre += tl.sum(tl.where(r == 0, weight * own, 0.0), 1)
            total += tl.sum(tl.where(r == 0, weight, 0.0), 1)
    tl.store(lags + lag, tl.sum(diagonals, 1))
    tl.store(values, tl.sum(difference, 0))
    tl.store(values + 1, tl.sum(centre, 0))
    tl.store(values + 2, tl.sum(total, 0))


@triton.jit
def _lowrank_filter2d_correlate_kernel(
    grad, image, taps_y, taps_x, lags, values, channels, height, width, tiles_x, tiles, parts, taps_stride,
    RANK: tl.constexpr, TAPS: tl.constexpr, PADDING: tl.constexpr, LAGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """LAGS lags and three values per (plane, rank, axis, part of the tiles), as _correlate writes them."""
    program = tl.program_id(0)
    first = program % parts * tiles
    axis = program // parts % 2
    r = program // (2 * parts) % RANK
    plane = program // (2 * parts * RANK)
    u = taps_y + plane // channels * taps_stride + r * TAPS
    v = taps_x + plane // channels * taps_stride + r * TAPS
    grad += plane.to(tl.int64) * height * width
    image += plane.to(tl.int64) * height * width
    lags += program * LAGS
    values += program * 3
    if axis == 0:
        _correlate(
            grad, image, u, v, lags, values, r, first, tiles, tiles_x, height, width, True, TAPS, PADDING, LAGS, TILE
        )
    else:
        _correlate(
            grad, image, v, u, lags, values, r, first, tiles, tiles_x, height, width, False, TAPS, PADDING, LAGS, TILE
        )


@triton.jit
def _lowrank_filter2d_finish_kernel(
    lags, values, mix, gain, d_taps_y, d_taps_x, d_mix, d_gain, d_bias,
    batch, channels, parts, taps_samples, mix_samples, gain_samples, gain_channels, bias_samples, bias_channels,
    mix_stride, gain_stride, gain_step,
    RANK: tl.constexpr, TAPS: tl.constexpr, HAS_GAIN: tl.constexpr, LAGS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums what a gradient covers of the partial sums, in order: a program per value, or per axis and line of taps."""
    program = tl.program_id(0)
    mixes = 2 * taps_samples * RANK  # first program of each gradient
    gains = mixes + mix_samples
    biases = gains + gain_samples * gain_channels
    of_taps = program < mixes
    of_mix = (program >= mixes) & (program < gains)
    of_gain = (program >= gains) & (program < biases)
    index = program - tl.where(of_taps, 0, tl.where(of_mix, mixes, tl.where(of_gain, gains, biases)))
    axis = tl.where(of_taps, index % 2, 0)
    index = tl.where(of_taps, index // 2, index)  # of the value, or of the line of taps
    samples = tl.where(
        of_taps, taps_samples, tl.where(of_mix, mix_samples, tl.where(of_gain, gain_samples, bias_samples))
    )
    own_channels = tl.where(of_gain, gain_channels, tl.where(of_taps | of_mix, 1, bias_channels))
    ranks = tl.where(of_taps, 1, RANK)  # what it covers of each, from which on
    first_rank = tl.where(of_taps, index % RANK, 0)
    covered = tl.where(own_channels == 1, channels, 1)
    first_channel = tl.where(own_channels == 1, 0, index % own_channels)
    first_sample = tl.where(samples == 1, 0, index // tl.where(of_taps, RANK, own_channels))
    count = tl.where(samples == 1, batch, 1) * covered * ranks * parts
    lag = tl.arange(0, LAGS)
    lines, value = tl.zeros((ROWS, LAGS), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, count, ROWS):
        i = start + tl.arange(0, ROWS)
        there = i < count
        sample = i // (parts * ranks * covered) + first_sample
        channel = i // (parts * ranks) % covered + first_channel
        r = i // parts % ranks + first_rank
        plane = sample * channels + channel
        row = ((plane * RANK + r) * 2 + axis) * parts + i % parts
        weight = tl.load(mix + sample * mix_stride, mask=there, other=0.0)
        scale = tl.full((ROWS,), 1.0, tl.float32)
        if HAS_GAIN:
            scale = tl.load(gain + sample * gain_stride + channel * gain_step, mask=there, other=0.0)
        if of_taps:
            wanted = there[:, None] & (lag < TAPS)[None, :]
            line = tl.load(lags + row[:, None] * LAGS + lag[None, :], mask=wanted, other=0.0)
            lines += (scale * weight)[:, None] * line
        else:
            difference = tl.load(values + 3 * row, mask=there, other=0.0)
            centre = tl.load(values + 3 * row + 1, mask=there, other=0.0)
            total = tl.load(values + 3 * row + 2, mask=there, other=0.0)
            value += tl.where(of_mix, scale * difference, tl.where(of_gain, centre + weight * difference, total))
    if of_taps:
        to = tl.where(axis == 0, d_taps_y, d_taps_x) + index * TAPS + lag
        tl.store(to, tl.sum(lines, 0), mask=lag < TAPS)
    else:
        gradient = tl.where(of_mix, d_mix, tl.where(of_gain, d_gain, d_bias))
        tl.store(gradient + index, tl.sum(value, 0))


class _Parameters(NamedTuple):
    """Parameters as the kernels read them: contiguous, with the steps from a sample and a channel to the next."""

    tensors: tuple[Tensor, ...]  # taps_y, taps_x, mix, gain, bias; the last two stand for nothing where absent
    strides: tuple[int, ...]  # of the taps and mix per sample, of gain and bias per sample and per channel

    @classmethod
    def of(cls, taps_y: Tensor, taps_x: Tensor, mix: Tensor, gain: Tensor | None, bias: Tensor | None) -> _Parameters:
        tensors = [taps_y, taps_x, mix, mix if gain is None else gain, mix if bias is None else bias]
        tensors = [t.contiguous() for t in tensors]
        taps = tensors[0]
        per_sample = (taps.shape[-2] * taps.shape[-1] if taps.dim() == 3 else 0, mix.dim())
        return cls(tuple(tensors), (*per_sample, *_steps(tensors[3]), *_steps(tensors[4])))


def _steps(tone: Tensor) -> tuple[int, ...]:
    """From a sample and from a channel to the next of a gain or bias [], [B] or [B, C], contiguous."""
    return (*tone.stride(), 0, 0)[:2]


def _counts(tone: Tensor | None) -> tuple[int, ...]:
    """Samples and channels with a gain or bias of their own."""
    return (0, 0) if tone is None else (*tone.shape, 1, 1)[:2]


def _tiles(image: Tensor, taps: int) -> tuple[int, int, int]:
    """Pixels of a tile along each axis, of which k - 1 are halo; tiles of a column and of a row.

    A tile of 64 spills registers; above 15 taps most of a smaller one would be halo.
    """
    tile = 32 if taps <= 15 else 64
    return tile, triton.cdiv(image.shape[2], tile - taps + 1), triton.cdiv(image.shape[3], tile - taps + 1)


def _schedule(tile: int, *, heavy: bool) -> dict[str, int]:
    """Warps, so many that no register spills; nothing is loaded ahead, which would take shared memory."""
    return dict(num_warps=8 if tile == 64 or heavy else 4, num_stages=1)


def _filter(
    image: Tensor, parameters: _Parameters, padding: int, *, has_gain: bool, has_bias: bool, adjoint: bool
) -> Tensor:
    result = torch.empty_like(image)
    batch, channels, height, width = image.shape
    rank, taps = parameters.tensors[0].shape[-2:]
    tile, *tiles = _tiles(image, taps)
    if image.numel():
        _lowrank_filter2d_kernel[(batch * channels * tiles[0] * tiles[1],)](
            image, *parameters.tensors, result, channels, height, width, *tiles, *parameters.strides,
            RANK=rank, TAPS=taps, PADDING=padding, HAS_GAIN=has_gain, HAS_BIAS=has_bias, ADJOINT=adjoint, TILE=tile,
            **_schedule(tile, heavy=rank > 1),
        )  # fmt: skip
    return result


def lowrank_filter2d_fwd(
    image: Tensor, taps_y: Tensor, taps_x: Tensor, mix: Tensor, gain: Tensor | None, bias: Tensor | None, padding: int
) -> Tensor:
    parameters = _Parameters.of(taps_y, taps_x, mix, gain, bias)
    has = dict(has_gain=gain is not None, has_bias=bias is not None)
    return _filter(image.contiguous(), parameters, padding, **has, adjoint=False)


def lowrank_filter2d_bwd(
    grad: Tensor, image: Tensor, taps_y: Tensor, taps_x: Tensor, mix: Tensor, gain: Tensor | None, bias: Tensor | None,
    padding: int, image_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    grad, image = grad.contiguous(), image.contiguous()
    parameters = _Parameters.of(taps_y, taps_x, mix, gain, bias)
    d_image = image.new_empty(0)
    if image_grad:
        d_image = _filter(grad, parameters, padding, has_gain=gain is not None, has_bias=False, adjoint=True)
    grads = tuple(mix.new_empty(0 if p is None else p.shape) for p in (taps_y, taps_x, mix, gain, bias))
    batch, channels, height, width = image.shape
    if image.numel() == 0:
        return d_image, *(g.zero_() for g in grads)
    rank, taps = taps_y.shape[-2:]
    tile, tiles_y, tiles_x = _tiles(image, taps)
    parts = min(tiles_y * tiles_x, triton.cdiv(PROGRAMS, 2 * batch * channels * rank))
    tiles = triton.cdiv(tiles_y * tiles_x, parts)  # of a part
    parts = triton.cdiv(tiles_y * tiles_x, tiles)
    shape = dict(RANK=rank, TAPS=taps, LAGS=max(8, triton.next_power_of_2(taps)))
    rows = batch * channels * rank * 2 * parts
    lags = mix.new_empty((rows, shape["LAGS"]))
    values = mix.new_empty((rows, 3))
    y_taps, x_taps, mix, gain_or_mix, _ = parameters.tensors
    taps_stride, mix_stride, gain_stride, gain_step, *_ = parameters.strides
    _lowrank_filter2d_correlate_kernel[(rows,)](
        grad, image, y_taps, x_taps, lags, values, channels, height, width, tiles_x, tiles, parts, taps_stride, **shape,
        PADDING=padding, TILE=tile, **_schedule(tile, heavy=image.dtype != torch.bfloat16),
    )  # fmt: skip
    taps_samples = taps_y.shape[0] if taps_y.dim() == 3 else 1
    counts = (*_counts(gain), *_counts(bias))
    programs = 2 * taps_samples * rank + mix.numel() + counts[0] * counts[1] + counts[2] * counts[3]
    _lowrank_filter2d_finish_kernel[(programs,)](
        lags, values, mix, gain_or_mix, *grads, batch, channels, parts, taps_samples, mix.numel(), *counts,
        mix_stride, gain_stride, gain_step, **shape, HAS_GAIN=gain is not None, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return d_image, *grads
