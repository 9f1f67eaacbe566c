"""Public lora_linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqfast import backends
from vqfast.ops._operator import autocast_cast, check_activation, distinct, first_order, kernel
from vqfast.ops.lora_linear import contract, reference


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    row_offsets: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear layer with a frozen base and a low-rank update.

        t = x A^T,    y = x W^T + bias + scaling t B^T

    Args:
        x: [..., K]; float32, float16, bfloat16, or float64 (reference backend). With adapters per sample [B, M, K], or
            packed rows [T, K] together with `row_offsets`.
        weight, bias: [N, K] and [N] or None, in the dtype of x; constants: they must not require grad.
        lora_a, lora_b: [r, K] and [N, r], or [B, r, K] and [B, N, r] for one adapter per sample; float32 (float64
            beside float64 x), r at most 64. Gradients come back in their dtype.
        scaling: alpha / r, a Python number.
        row_offsets: int32 [B + 1], rising from 0 to T: rows offsets[i] to offsets[i + 1] belong to sample i. Its values
            are not checked: a device would have to wait for them.
        backend: one of `vqfast.backends.BACKENDS`; None takes the compiled kernel where there is one.

    Returns:
        [..., N] in the dtype of x. Under autocast x, weight and bias are cast as for `torch.nn.functional.linear`.
        Differentiable once in x, lora_a and lora_b (twice on the reference backend). Deterministic. Where lora_b is all
        zero, as every episode starts, the cpu backend computes only what is not zero then: the base's y and dx, t and
        dB (and dA stays 0 beside a dy that is not finite).

    Raises:
        TypeError: a dtype outside those above, or x and weight of different dtypes.
        ValueError: shapes, rank, scaling or devices that do not fit; a base that requires grad; an unknown backend.
        BackendUnavailableError: a backend asked for by name cannot run this call.

    Source: LoRA, arXiv 2106.09685; per-sample and packed forms are this project's.
    """
    device = check_activation("x", x).device.type
    x, weight, bias = autocast_cast(device, x, weight, bias)  # type: ignore[assignment]
    contract.check(x, weight, bias, lora_a, lora_b, scaling, row_offsets)
    chosen = backends.choose("lora_linear", device, x.dtype, backend)
    if chosen == "reference":
        with torch.autocast(device, enabled=False):
            return reference.lora_linear(x, weight, bias, lora_a, lora_b, scaling, row_offsets)
    return _LoRALinear.apply(chosen, x, weight, bias, *distinct(lora_a, lora_b), scaling, row_offsets)  # type: ignore[no-any-return]


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        row_offsets: Tensor | None,
    ) -> Tensor:
        y, t = kernel(backend, "lora_linear_fwd")(x, weight, bias, lora_a, lora_b, scaling, row_offsets)
        ctx.save_for_backward(x, weight, lora_a, lora_b, t, row_offsets)
        ctx.backend, ctx.scaling = backend, scaling
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, t, row_offsets = ctx.saved_tensors
        run, x_grad = kernel(ctx.backend, "lora_linear_bwd"), ctx.needs_input_grad[1]
        with torch.autocast(grad.device.type, enabled=False):  # of the vendor's product inside
            dx, da, db = first_order(
                run, "lora_linear", grad, x, weight, lora_a, lora_b, t, ctx.scaling, row_offsets, x_grad
            )
        return None, dx if x_grad else None, None, None, da, db, None, None
