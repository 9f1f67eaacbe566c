"""Public softmax_entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqfast import backends
from vqfast.ops._operator import first_order, kernel
from vqfast.ops.softmax_entropy import contract, reference


def softmax_entropy(logits: Tensor, *, backend: str | None = None) -> Tensor:
    """Entropy of softmax(logits) over the last axis, in nats.

        H(z) = lse(z) - sum_i p_i z_i,    dH/dz_i = -p_i (log p_i + H)

    A class with logit -inf has probability 0 and contributes 0 to value and gradient; a row with NaN or +inf, or with
    nothing but -inf, gives NaN.

    Args:
        logits: [..., V], V >= 1; float32, float16, bfloat16, or float64 (reference backend).
        backend: one of `vqfast.backends.BACKENDS`; None takes the compiled kernel where there is one.

    Returns:
        [...], float32 (float64 for float64 logits), whatever autocast says: the loss is kept in full precision.
        Differentiable once in `logits` (twice on the reference backend). Deterministic.

    Raises:
        TypeError: not a floating-point tensor of the dtypes above.
        ValueError: no class axis, or an unknown backend.
        BackendUnavailableError: a backend asked for by name cannot run this call.

    Source: Shannon entropy; as test-time objective VQ-TTT, arXiv 2506.15645.
    """
    logits = contract.check(logits)
    chosen = backends.choose("softmax_entropy", logits.device.type, logits.dtype, backend)
    if chosen == "reference":
        with torch.autocast(logits.device.type, enabled=False):
            return reference.softmax_entropy(logits)
    return _SoftmaxEntropy.apply(logits, chosen)  # type: ignore[no-any-return]


class _SoftmaxEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, backend: str) -> Tensor:
        entropy, max_logit, log_sum = kernel(backend, "softmax_entropy_fwd")(logits)
        ctx.save_for_backward(logits, entropy, max_logit, log_sum)
        ctx.backend = backend
        return entropy  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        run = kernel(ctx.backend, "softmax_entropy_bwd")
        return first_order(run, "softmax_entropy", grad, *ctx.saved_tensors), None
