"""lowrank_filter2d in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqfast.ops.lowrank_filter2d.contract import PADDINGS, Arguments

_MODES = {"reflect": "reflect", "replicate": "replicate", "zeros": "constant"}


def lowrank_filter2d(arguments: Arguments) -> Tensor:
    image, taps_y, taps_x, mix, gain, bias, padding = arguments
    batch, radius, taps = image.shape[0], taps_y.shape[-1] // 2, taps_y.shape[-1]
    taps_y, taps_x = (t.expand(batch, *t.shape[-2:]) for t in (taps_y, taps_x))
    x = image.to(torch.promote_types(image.dtype, torch.float32))
    padded = F.pad(x, (radius,) * 4, mode=_MODES[PADDINGS[padding]])
    columns = padded.unfold(2, taps, 1)  # [B, C, H, W + 2p, k]
    blurred_y = torch.einsum("bchwi,bri->bcrhw", columns, taps_y)
    rows = blurred_y.unfold(4, taps, 1)  # [B, C, R, H, W, k]
    filtered = torch.einsum("bcrhwj,brj->bchw", rows, taps_x)
    y = x + _over_pixels(mix) * (filtered - x)
    if gain is not None:
        y = _over_pixels(gain) * y
    if bias is not None:
        y = y + _over_pixels(bias)
    return y.to(image.dtype)


def _over_pixels(parameter: Tensor) -> Tensor:
    """[], [B] or [B, C] as it broadcasts over [B, C, H, W]."""
    return parameter.reshape(*parameter.shape, *(1,) * (4 - parameter.dim())) if parameter.dim() else parameter
