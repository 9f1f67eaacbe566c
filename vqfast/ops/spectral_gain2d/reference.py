"""spectral_gain2d and dct2 in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vqfast.ops.spectral_gain2d.contract import Arguments


def dct2(image: Tensor) -> Tensor:
    x = image.to(torch.promote_types(image.dtype, torch.float32))
    return basis(x.shape[-2], x) @ x @ basis(x.shape[-1], x).mT


def spectral_gain2d(arguments: Arguments) -> Tensor:
    image, spectrum, gain_y, gain_x = arguments
    x = dct2(image) if spectrum is None else spectrum
    gain = 1 + gain_y.mT @ gain_x
    y = basis(x.shape[-2], x).mT @ (gain.unsqueeze(-3) * x) @ basis(x.shape[-1], x)
    return y.to(image.dtype)


def basis(n: int, like: Tensor) -> Tensor:
    """C_n [n, n], the orthonormal DCT-II matrix, rounded once from float64."""
    position = torch.arange(n, dtype=torch.float64, device=like.device)
    basis = torch.cos(math.pi / n * position[:, None] * (position + 0.5)) * math.sqrt(2 / n)
    return torch.where(position[:, None] == 0, math.sqrt(1 / n), basis).to(like.dtype)
