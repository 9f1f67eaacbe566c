"""cosine_alignment in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from vqfast.ops.cosine_alignment.contract import EPS


def cosine_alignment(prediction: Tensor, target: Tensor) -> Tensor:
    return (_unit(prediction) * _unit(target.detach())).sum(-1)


def _unit(x: Tensor) -> Tensor:
    """Rows over their length, or over EPS if they are shorter: those pass no gradient."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm < EPS, x.detach(), x) / norm.clamp(min=EPS)
