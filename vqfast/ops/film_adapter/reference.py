"""film_adapter in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}


def film_adapter(x: Tensor, down: Tensor, up: Tensor, scale: Tensor, shift: Tensor, activation: str) -> Tensor:
    down, up, scale, shift = (t.to(x.dtype) for t in (down, up, scale, shift))
    if scale.dim() == 2:
        scale, shift = scale[:, None], shift[:, None]  # [B, 1, r]
    z = torch.addcmul(shift, 1 + scale, x @ down.mT)
    return x + FUNCTIONS[activation](z) @ up.mT
