"""Public spectral_gain2d and dct2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqfast import backends
from vqfast.ops._operator import distinct, first_order, kernel
from vqfast.ops.spectral_gain2d import contract, reference


def spectral_gain2d(
    image: Tensor,
    gain_y: Tensor,
    gain_x: Tensor,
    *,
    spectrum: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multiply the cosine spectrum of every channel by one low-rank gain.

        X = C_H x C_W^T,    M = 1 + sum_r a_r b_r^T,    y = C_H^T (M o X) C_W

    with C_n the orthonormal DCT-II, a_r = `gain_y[r]` (over vertical frequency) and b_r = `gain_x[r]` (horizontal). A
    filter as large as the image, without wrap-around: its borders are those of the mirrored image. At gain 0 (all a_r
    or all b_r zero) the output is the image to within rounding.

    Args:
        image: [B, C, H, W], H and W at least 1; float32, float16, bfloat16, or float64 (reference backend).
        gain_y: [R, H], or [B, R, H] for one gain per sample; float32 (float64 beside a float64 image); R at most 8.
        gain_x: [R, W] or [B, R, W], as gain_y.
        spectrum: X as `dct2(image)` returns it, for an image that stays constant over many calls: forward is then one
            inverse transform, backward one transform. The pixels themselves are not read, and take no gradient.
        backend: one of `vqfast.backends.BACKENDS`; None takes the compiled kernel where there is one.

    Returns:
        [B, C, H, W] in the image's dtype; arithmetic in float32. Autocast leaves it alone. Differentiable once in
        image (without `spectrum`), gain_y and gain_x (twice on the reference backend). Deterministic.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes that do not fit, a rank over the limit, an image or spectrum that requires grad where a
            spectrum is given, tensors on different devices, an unknown backend.
        BackendUnavailableError: a backend asked for by name cannot run this call.

    Source: this project; the transform as a Fourier transform of permuted pixels after Makhoul, IEEE TASSP 28(1), 1980.
    """
    arguments = contract.check(image, gain_y, gain_x, spectrum)
    chosen = backends.choose("spectral_gain2d", image.device.type, image.dtype, backend)
    if chosen == "reference":
        with torch.autocast(image.device.type, enabled=False):
            return reference.spectral_gain2d(arguments)
    return _SpectralGain2d.apply(chosen, *distinct(*arguments))  # type: ignore[no-any-return]


class _SpectralGain2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, image: Tensor, spectrum: Tensor | None, *gains: Tensor) -> Tensor:
        y, own_spectrum = kernel(backend, "spectral_gain2d_fwd")(image, spectrum, *gains)
        ctx.save_for_backward(image, own_spectrum if spectrum is None else spectrum, *gains)
        ctx.backend = backend
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run, image_grad = kernel(ctx.backend, "spectral_gain2d_bwd"), ctx.needs_input_grad[1]
        image, *saved = ctx.saved_tensors  # the image itself only so that a second derivative in it raises, too
        d_image, *d_gains = first_order(lambda _, *args: run(*args), "spectral_gain2d", image, grad, *saved, image_grad)
        return None, d_image if image_grad else None, None, *d_gains


def dct2(image: Tensor, *, backend: str | None = None) -> Tensor:
    """Orthonormal two-dimensional DCT-II of every channel of a constant image, X = C_H x C_W^T.

    Args:
        image: [B, C, H, W], H and W at least 1; float32, float16, bfloat16, or float64 (reference backend).
        backend: one of `vqfast.backends.BACKENDS`; None takes the compiled kernel where there is one.

    Returns:
        [B, C, H, W], float32 (float64 for a float64 image), whatever autocast says. No gradient passes through it.

    Raises:
        TypeError: not a floating-point tensor of the dtypes above.
        ValueError: not [B, C, H, W], an image that requires grad, or an unknown backend.
        BackendUnavailableError: a backend asked for by name cannot run this call.
    """
    image = contract.check_constant(image)
    chosen = backends.choose("dct2", image.device.type, image.dtype, backend)
    if chosen == "reference":
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            return reference.dct2(image)
    return kernel(chosen, "dct2_fwd")(image.detach())  # type: ignore[no-any-return]
