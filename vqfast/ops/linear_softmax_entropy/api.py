"""Public linear_softmax_entropy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqfast import backends
from vqfast.ops._operator import autocast_cast, check_activation, first_order, kernel
from vqfast.ops.linear_softmax_entropy import contract, reference


def linear_softmax_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Entropy of softmax(hidden W^T + bias), in nats: the language-model head and its entropy in one.

        z = W h + bias,    H = lse(z) - sum_i p_i z_i
        dH/dh = -(sum_i p_i z_i w_i - (sum_i p_i z_i)(sum_i p_i w_i))

    Args:
        hidden: [N, D], one row per position; float32, float16, bfloat16, or float64 (reference backend).
        weight, bias: [V, D] and [V] or None, in the dtype of hidden; constants: they must not require grad.
        backend: one of `vqfast.backends.BACKENDS`; None takes the compiled kernel where there is one.

    Returns:
        [N], float32 (float64 for float64 input). Under autocast hidden, weight and bias are cast as for
        `torch.nn.functional.linear`; the entropy stays float32. Differentiable in hidden, once (twice on the reference
        backend). Deterministic. [N, D] float32 is kept for backward. Memory beside the results:

        - cpu: the logits are never stored; up to 8 positions at a time share one read of the weight for value and
          gradient, with about 4 MB (more for D above 16384) whatever V is.
        - triton: one position with its gradient takes one read and no logits, others up to 32 at a time: one read for
          the values, a second for gradients, between which their logits are kept: at most 32 V float32.

    Raises:
        TypeError: a dtype outside those above, or hidden and weight of different dtypes.
        ValueError: shapes or devices that do not fit; a head that requires grad; an unknown backend.
        BackendUnavailableError: a backend asked for by name cannot run this call.

    Source: this project (online form of the entropy of VQ-TTT, arXiv 2506.15645).
    """
    device = check_activation("hidden", hidden).device.type
    hidden, weight, bias = autocast_cast(device, hidden, weight, bias)  # type: ignore[assignment]
    contract.check(hidden, weight, bias)
    chosen = backends.choose("linear_softmax_entropy", device, hidden.dtype, backend)
    if chosen == "reference":
        with torch.autocast(device, enabled=False):
            return reference.linear_softmax_entropy(hidden, weight, bias)
    needs_grad = hidden.requires_grad and torch.is_grad_enabled()
    return _LinearSoftmaxEntropy.apply(chosen, hidden, weight, bias, needs_grad)  # type: ignore[no-any-return]


class _LinearSoftmaxEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: bool
    ) -> Tensor:
        run = kernel(backend, "linear_softmax_entropy_fwd")
        entropy, hidden_grad = run(hidden, weight, bias, needs_grad)
        ctx.save_for_backward(hidden, hidden_grad)
        return entropy  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, None]:
        return None, first_order(_chain, "linear_softmax_entropy", grad, *ctx.saved_tensors), None, None, None


def _chain(grad: Tensor, hidden: Tensor, hidden_grad: Tensor) -> Tensor:
    return (grad[:, None] * hidden_grad).to(hidden.dtype)
