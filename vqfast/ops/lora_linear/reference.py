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
    base = F.linear(x, weight, bias)
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    if row_offsets is None:
        t = x @ a.mT
        return base + scaling * (t @ b.mT)
    samples, rank, _ = a.shape
    row = torch.arange(x.shape[0], device=x.device, dtype=row_offsets.dtype)
    owner = torch.bucketize(row, row_offsets[1:].contiguous(), right=True)  # sample of each row; no sizes are read back
    own = owner[:, None] == torch.arange(samples, device=x.device)  # [T, B]
    t = (x @ a.flatten(0, 1).mT).unflatten(-1, (samples, rank))
    t = torch.where(own[..., None], t, 0)  # [T, B, r], zero but for the row's own adapter
    return base + scaling * (t.flatten(1) @ b.mT.flatten(0, 1))
