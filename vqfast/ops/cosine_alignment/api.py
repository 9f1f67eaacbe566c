"""Public cosine_alignment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqfast import backends
from vqfast.ops._operator import first_order, kernel
from vqfast.ops.cosine_alignment import contract, reference


def cosine_alignment(prediction: Tensor, target: Tensor, *, backend: str | None = None) -> Tensor:
    """Cosine of the angle between the rows of prediction p and those of a constant target t, over the last axis.

        c = <p, t> / (max(||p||, eps) max(||t||, eps)),    dc/dp = (t / max(||t||, eps) - c p / ||p||) / ||p||

    eps = 1e-8. The target is a constant: if it requires grad it is detached, and gets no gradient. A row of zeros gives
    0. A prediction shorter than eps has no direction, and its gradient is 0; that of
    `torch.nn.functional.cosine_similarity` is of the order of 1 / eps there. A row with NaN or infinity gives NaN,
    value and gradient, and leaves the others alone. Compiled kernels take every finite row: in float32 one longer than
    1.8e19, whose squares overflow in plain PyTorch (which then returns 0 or NaN), is as exact as any other.

    Args:
        prediction: [..., D], D >= 1; float32, float16, bfloat16, or float64 (reference backend).
        target: the same shape, dtype and device.
        backend: one of `vqfast.backends.BACKENDS`; None takes the compiled kernel where there is one.

    Returns:
        [...], -1 to 1 to within rounding, float32 (float64 for float64 rows), whatever autocast says: the loss is kept
        in full precision. Differentiable once in `prediction` (twice on the reference backend). Deterministic.

    Raises:
        TypeError: not floating-point tensors of the dtypes above, or of two.
        ValueError: no last axis, shapes or devices that differ, or an unknown backend.
        BackendUnavailableError: a backend asked for by name cannot run this call.

    Source: cosine similarity; with a stopped target as predictive regularisation, arXiv 2603.20808.
    """
    prediction, target = contract.check(prediction, target)
    chosen = backends.choose("cosine_alignment", prediction.device.type, prediction.dtype, backend)
    if chosen == "reference":
        with torch.autocast(prediction.device.type, enabled=False):
            return reference.cosine_alignment(prediction, target)
    return _CosineAlignment.apply(prediction, target.detach(), chosen)  # type: ignore[no-any-return]


class _CosineAlignment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor, backend: str) -> Tensor:
        cosine, inverse_p, inverse_t = kernel(backend, "cosine_alignment_fwd")(prediction, target)
        ctx.save_for_backward(prediction, target, cosine, inverse_p, inverse_t)
        ctx.backend = backend
        return cosine  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        run = kernel(ctx.backend, "cosine_alignment_bwd")
        return first_order(run, "cosine_alignment", grad, *ctx.saved_tensors), None, None
