"""softmax_entropy in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    p = log_p.exp()
    return -(p * log_p.masked_fill(p == 0, 0)).sum(-1)  # 0 log 0 = 0
