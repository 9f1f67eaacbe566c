"""linear_softmax_entropy in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vqfast.ops.softmax_entropy.reference import softmax_entropy


def linear_softmax_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return softmax_entropy(F.linear(hidden, weight, bias))
