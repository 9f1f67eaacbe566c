"""spectral_gain2d and dct2 in Triton: cosine transforms as products with the basis matrices C_H and C_W.

The gain is multiplied in where a product reads the spectrum; its gradients are summed where a product leaves it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vqfast.ops.spectral_gain2d.reference import basis

BLOCK = 64  # rows and columns of a tile of a product
BLOCK_INNER = 32
BLOCK_SUM = 128  # frequencies of a program that adds up partial sums


@triton.jit
def _gain(gain_y, gain_x, y, x, height, width, RANK: tl.constexpr):
    """M = 1 + sum_r a_r b_r^T at frequencies [y, x] of one sample."""
    gain = tl.full((y.shape[0], x.shape[0]), 1.0, tl.float32)
    for r in tl.static_range(RANK):
        a = tl.load(gain_y + r * height + y, mask=y < height, other=0.0)
        b = tl.load(gain_x + r * width + x, mask=x < width, other=0.0)
        gain += a[:, None] * b[None, :]
    return gain


@triton.jit
def _product(
    a, b, y, x, height, width, inner, a_step, a_inner, b_step, b_inner, gain_y, gain_x,
    GAIN: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Tile [y, x] of (M o a) b, or of a b without GAIN; a is [height, inner], b [inner, width]."""
    total = tl.zeros((y.shape[0], x.shape[0]), tl.float32)
    for start in range(0, inner, INNER):
        k = start + tl.arange(0, INNER)
        inside = (y < height)[:, None] & (k < inner)[None, :]
        left = tl.load(a + y[:, None] * a_step + k[None, :] * a_inner, mask=inside, other=0.0).to(tl.float32)
        inside = (k < inner)[:, None] & (x < width)[None, :]
        right = tl.load(b + k[:, None] * b_inner + x[None, :] * b_step, mask=inside, other=0.0).to(tl.float32)
        if GAIN:
            left *= _gain(gain_y, gain_x, y, k, height, inner, RANK)
        total += tl.dot(left, right, input_precision=PRECISION)
    return total


@triton.jit
def _spectral_gain2d_product_kernel(
    a, b, result, gain_y, gain_x, channels, height, width, inner,
    a_plane, a_step, a_inner, b_plane, b_step, b_inner, y_stride, x_stride,
    GAIN: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """result = a b of every plane; a plane stride of 0 stands for a matrix that all planes share."""
    plane, sample = tl.program_id(0).to(tl.int64), tl.program_id(0) // channels
    y, x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    product = _product(
        a + plane * a_plane, b + plane * b_plane, y, x, height, width, inner, a_step, a_inner, b_step, b_inner,
        gain_y + sample * y_stride, gain_x + sample * x_stride, GAIN, RANK, PRECISION, INNER,
    )  # fmt: skip
    inside = (y < height)[:, None] & (x < width)[None, :]
    to = result + plane * height * width + y[:, None] * width + x[None, :]
    tl.store(to, product.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _spectral_gain2d_gradient_kernel(
    rows, basis, spectrum, result, partial_y, partial_x, gain_y, gain_x, channels, height, width, y_stride, x_stride,
    IMAGE_GRAD: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """S = rows C_W^T, the spectrum of the gradient; sums of a tile of S o X along x with b_r and along y with a_r."""
    plane, sample = tl.program_id(0).to(tl.int64), tl.program_id(0) // channels
    gain_y += sample * y_stride
    gain_x += sample * x_stride
    y, x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    offset = plane * height * width
    s = _product(
        rows + offset, basis, y, x, height, width, width, width, 1, width, 1, gain_y, gain_x,
        False, RANK, PRECISION, INNER,
    )  # fmt: skip
    at = offset + y[:, None] * width + x[None, :]
    inside = (y < height)[:, None] & (x < width)[None, :]
    slope = s * tl.load(spectrum + at, mask=inside, other=0.0)
    to_y = partial_y + (plane * tl.num_programs(2) + tl.program_id(2)) * RANK * height + y
    to_x = partial_x + (plane * tl.num_programs(1) + tl.program_id(1)) * RANK * width + x
    for r in tl.static_range(RANK):
        b = tl.load(gain_x + r * width + x, mask=x < width, other=0.0)
        a = tl.load(gain_y + r * height + y, mask=y < height, other=0.0)
        tl.store(to_y + r * height, tl.sum(slope * b[None, :], 1), mask=y < height)
        tl.store(to_x + r * width, tl.sum(slope * a[:, None], 0), mask=x < width)
    if IMAGE_GRAD:
        tl.store(result + at, s * _gain(gain_y, gain_x, y, x, height, width, RANK), mask=inside)


@triton.jit
def _spectral_gain2d_sum_kernel(
    partial_y, partial_x, d_gain_y, d_gain_x, rows_y, rows_x, size_y, size_x, RANK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds up `rows` partial sums [RANK, size] of every sample, in order; along y or along x."""
    sample, axis = tl.program_id(0), tl.program_id(2)
    rows, size = tl.where(axis == 0, rows_y, rows_x), tl.where(axis == 0, size_y, size_x) * RANK
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    partial = tl.where(axis == 0, partial_y, partial_x) + sample.to(tl.int64) * rows * size + at
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(rows):
        total += tl.load(partial, mask=at < size, other=0.0)
        partial += size
    tl.store(tl.where(axis == 0, d_gain_y, d_gain_x) + sample * size + at, total, mask=at < size)


@functools.cache  # a CUDA graph keeps addresses of them
def _basis(size: int, device: torch.device) -> Tensor:
    """C [size, size], kept: first made before a CUDA graph is captured, as kernels are first compiled then."""
    return basis(size, torch.empty(0, device=device))


class _Planes:
    """Products of planes with the bases; `like` has their sizes, and the dtype that sets the precision."""

    def __init__(self, like: Tensor, gain_y: Tensor | None = None, gain_x: Tensor | None = None) -> None:
        self.batch, self.channels, self.height, self.width = like.shape
        self.c_h, self.c_w = (_basis(n, like.device) for n in like.shape[-2:])
        self.gains = (
            (self.c_h, self.c_w) if gain_y is None or gain_x is None else (gain_y.contiguous(), gain_x.contiguous())
        )
        self.own = tuple(g[0].numel() if g.dim() == 3 else 0 for g in self.gains)
        self.rank = 1 if gain_y is None else gain_y.shape[-2]
        # tf32 as the tensor cores take it, cut off after 10 bits, is finer than bfloat16 alone
        precision = "tf32" if like.dtype == torch.bfloat16 else "tf32x3"
        self.constants: dict[str, Any] = dict(RANK=self.rank, PRECISION=precision, BLOCK=BLOCK, INNER=BLOCK_INNER)
        self.tiles_y, self.tiles_x = triton.cdiv(self.height, BLOCK), triton.cdiv(self.width, BLOCK)
        self.grid = (self.batch * self.channels, self.tiles_y, self.tiles_x)

    def left(self, planes: Tensor, dtype: torch.dtype = torch.float32, *, inverse: bool = False) -> Tensor:
        """C_H planes, or C_H^T planes."""
        strides = (0, 1, self.height) if inverse else (0, self.height, 1)
        return self._multiply(self.c_h, planes, self.height, (*strides, self.height * self.width, 1, self.width), dtype)

    def right(self, planes: Tensor, *, inverse: bool = False, gain: bool = False) -> Tensor:
        """planes C_W^T, or (M o planes) C_W; M only where `gain`."""
        strides = (0, 1, self.width) if inverse else (0, self.width, 1)
        strides = (self.height * self.width, self.width, 1, *strides)
        return self._multiply(planes, self.c_w, self.width, strides, torch.float32, gain=gain)

    def _multiply(
        self, a: Tensor, b: Tensor, inner: int, strides: tuple[int, ...], dtype: torch.dtype, *, gain: bool = False
    ) -> Tensor:
        result = a.new_empty((self.batch, self.channels, self.height, self.width), dtype=dtype)
        if result.numel():
            _spectral_gain2d_product_kernel[self.grid](
                a, b, result, *self.gains, self.channels, self.height, self.width, inner, *strides, *self.own,
                GAIN=gain, **self.constants,
            )  # fmt: skip
        return result

    def gradients(self, rows: Tensor, spectrum: Tensor, *, image_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """M o S where `image_grad`, and the gradients of both gains, for rows = C_H g."""
        result = rows.new_empty(rows.shape if image_grad else 0)
        grads = tuple(g.new_empty(g.shape) for g in self.gains)
        if not rows.numel():
            return result, *(g.zero_() for g in grads)  # type: ignore[return-value]
        planes = self.batch * self.channels
        partial_y = rows.new_empty((planes, self.tiles_x, self.rank, self.height))
        partial_x = rows.new_empty((planes, self.tiles_y, self.rank, self.width))
        _spectral_gain2d_gradient_kernel[self.grid](
            rows, self.c_w, spectrum, result, partial_y, partial_x, *self.gains, self.channels, self.height, self.width,
            *self.own, IMAGE_GRAD=image_grad, **self.constants,
        )  # fmt: skip
        samples = self.gains[0].shape[0] if self.gains[0].dim() == 3 else 1
        covered = planes // samples
        blocks = triton.cdiv(self.rank * max(self.height, self.width), BLOCK_SUM)
        _spectral_gain2d_sum_kernel[(samples, blocks, 2)](
            partial_y, partial_x, *grads, covered * self.tiles_x, covered * self.tiles_y, self.height, self.width,
            RANK=self.rank, BLOCK=BLOCK_SUM,
        )  # fmt: skip
        return result, grads[0], grads[1]


def dct2_fwd(image: Tensor) -> Tensor:
    planes = _Planes(image)
    return planes.right(planes.left(image.contiguous()))


def spectral_gain2d_fwd(
    image: Tensor, spectrum: Tensor | None, gain_y: Tensor, gain_x: Tensor
) -> tuple[Tensor, Tensor]:
    planes = _Planes(image, gain_y, gain_x)
    own = planes.right(planes.left(image.contiguous())) if spectrum is None else image.new_empty(0, dtype=torch.float32)
    rows = planes.right(own if spectrum is None else spectrum.contiguous(), inverse=True, gain=True)
    return planes.left(rows, image.dtype, inverse=True), own


def spectral_gain2d_bwd(
    grad: Tensor, spectrum: Tensor, gain_y: Tensor, gain_x: Tensor, image_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    planes = _Planes(grad, gain_y, gain_x)
    modulated, d_gain_y, d_gain_x = planes.gradients(
        planes.left(grad.contiguous()), spectrum.contiguous(), image_grad=image_grad
    )
    if not image_grad:
        return grad.new_empty(0), d_gain_y, d_gain_x
    return planes.left(planes.right(modulated, inverse=True), grad.dtype, inverse=True), d_gain_y, d_gain_x
