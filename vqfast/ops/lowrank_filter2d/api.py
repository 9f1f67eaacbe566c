"""Public lowrank_filter2d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqfast import backends
from vqfast.ops._operator import distinct, first_order, kernel
from vqfast.ops.lowrank_filter2d import contract, reference


def lowrank_filter2d(
    image: Tensor,
    taps_y: Tensor,
    taps_x: Tensor,
    mix: Tensor | float,
    gain: Tensor | float | None = None,
    bias: Tensor | float | None = None,
    *,
    padding: str = "reflect",
    backend: str | None = None,
) -> Tensor:
    """Filter every channel with one low-rank kernel and mix the result with the image.

        K = sum_r u_r v_r^T,    F = K * image (depthwise cross-correlation, as conv2d)
        y = gain (image + mix (F - image)) + bias

    with u_r = `taps_y[r]` (vertical) and v_r = `taps_x[r]` (horizontal). At mix 0, gain 1 and bias 0 the output equals
    the image if its pixels and F are finite. Where pixels or gradients are not, or come near the largest float32,
    gradients of parameters may be NaN.

    Args:
        image: [B, C, H, W]; float32, float16, bfloat16, or float64 (reference backend). Any value range.
        taps_y, taps_x: [R, k], or [B, R, k] for one kernel per sample; float32 (float64 beside a float64 image);
            k odd and at most 31, R at most 8.
        mix: scalar or [B]. 0 keeps the image, 1 takes the filtered one, negative values sharpen.
        gain, bias: scalar, [B] or [B, C]; default 1 and 0.
        padding: "reflect" (H and W above k // 2), "replicate" or "zeros" (at least 1).
        backend: one of `vqfast.backends.BACKENDS`; None takes the compiled kernel where there is one.

    Returns:
        [B, C, H, W] in the image's dtype; arithmetic in float32. Autocast leaves it alone. Differentiable once in every
        tensor argument (twice on the reference backend). Deterministic.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes that do not fit, an even or too large k, a rank over the limit, an image smaller than the
            padding, tensors on different devices, an unknown padding or backend.
        BackendUnavailableError: a backend asked for by name cannot run this call.

    Source: VQ-TTT, arXiv 2506.15645 (rank 1, Gaussian taps, mix); gain, bias and rank > 1 are this project's.
    """
    arguments = contract.check(image, taps_y, taps_x, mix, gain, bias, padding)
    chosen = backends.choose("lowrank_filter2d", image.device.type, image.dtype, backend)
    if chosen == "reference":
        with torch.autocast(image.device.type, enabled=False):
            return reference.lowrank_filter2d(arguments)
    return _LowRankFilter2d.apply(chosen, *distinct(*arguments[:-1]), arguments.padding)  # type: ignore[no-any-return]


class _LowRankFilter2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *arguments: Any) -> Tensor:
        *tensors, padding = arguments
        ctx.save_for_backward(*tensors)
        ctx.backend, ctx.padding = backend, padding
        return kernel(backend, "lowrank_filter2d_fwd")(*tensors, padding)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:-1]
        run = kernel(ctx.backend, "lowrank_filter2d_bwd")
        grads = first_order(run, "lowrank_filter2d", grad, *ctx.saved_tensors, ctx.padding, needed[0])
        return None, *(g if wanted else None for g, wanted in zip(grads, needed, strict=True)), None
