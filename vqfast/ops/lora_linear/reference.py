"""lora_linear in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    row_offsets: Tensor | None,
) -> Tensor:
    return F.linear(x, weight, bias) + scaling * update(x, lora_a, lora_b, row_offsets)


def update(x: Tensor, lora_a: Tensor, lora_b: Tensor, row_offsets: Tensor | None) -> Tensor:
    """(x A^T) B^T in the dtype of x."""
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    if row_offsets is None:
        return (x @ a.mT) @ b.mT
    row = torch.arange(x.shape[0], device=x.device, dtype=row_offsets.dtype)
    owner = torch.bucketize(row, row_offsets[1:].contiguous(), right=True)  # sample of each row; no sizes are read back
    result = x.new_zeros(x.shape[0], b.shape[-2])
    for sample in range(a.shape[0]):  # masked before and after, so that a NaN stays with its sample
        own = (owner == sample)[:, None]
        t = torch.where(own, x, 0) @ a[sample].mT
        result = torch.where(own, t @ b[sample].mT, result)
    return result
