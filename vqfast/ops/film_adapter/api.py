"""Public film_adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqfast import backends
from vqfast.ops._operator import check_activation, distinct, first_order, kernel
from vqfast.ops.film_adapter import contract, reference


def film_adapter(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    activation: str = "gelu",
    backend: str | None = None,
) -> Tensor:
    """Residual bottleneck whose middle is scaled and shifted, feature by feature (FiLM).

        h = x D^T,    z = (1 + scale) o h + shift,    y = x + act(z) U^T

    With U = 0, as adapters start, y = x.

    Args:
        x: [..., K]; float32, float16, bfloat16, or float64 (reference backend). With a modulation per sample [B, M, K].
        down, up: D [r, K] and U [K, r], r at most 128; float32 (float64 beside float64 x), as all parameters.
        scale, shift: [r], or [B, r] for one modulation per sample. 0 leaves h as it is.
        activation: "gelu" (exact, with the error function), "silu" or "relu".
        backend: one of `vqfast.backends.BACKENDS`; None takes the compiled kernel where there is one.

    Returns:
        [..., K] in the dtype of x, also under autocast: it is the residual stream that is added to. Differentiable once
        in x, down, up, scale and shift (twice on the reference backend); gradients come back in their dtypes. Sums are
        in float32. Deterministic.

    Raises:
        TypeError: a dtype outside those above.
        ValueError: shapes, bottleneck or devices that do not fit; an unknown activation or backend.
        BackendUnavailableError: a backend asked for by name cannot run this call.

    Source: adapters, arXiv 1902.00751; FiLM, arXiv 1709.07871; together as an adaptor to image codecs this project's,
    after arXiv 2512.20901.
    """
    device = check_activation("x", x).device.type
    contract.check(x, down, up, scale, shift, activation)
    chosen = backends.choose("film_adapter", device, x.dtype, backend)
    if chosen == "reference":
        with torch.autocast(device, enabled=False):
            return reference.film_adapter(x, down, up, scale, shift, activation)
    index = contract.ACTIVATIONS.index(activation)
    return _FilmAdapter.apply(chosen, *distinct(x, down, up, scale, shift), index)  # type: ignore[no-any-return]


class _FilmAdapter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, x: Tensor, down: Tensor, up: Tensor, scale: Tensor, shift: Tensor, activation: int
    ) -> Tensor:
        y, h = kernel(backend, "film_adapter_fwd")(x, down, up, scale, shift, activation)
        ctx.save_for_backward(x, h, down, up, scale, shift)
        ctx.backend, ctx.activation = backend, activation
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run, x_grad = kernel(ctx.backend, "film_adapter_bwd"), ctx.needs_input_grad[1]
        own = any(ctx.needs_input_grad[2:6])
        dx, *parameters = first_order(run, "film_adapter", grad, *ctx.saved_tensors, ctx.activation, x_grad, own)
        return None, dx if x_grad else None, *(parameters if own else [None] * 4), None
