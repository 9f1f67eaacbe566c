"""When a result counts as right: no further from float64 than eager PyTorch in the same dtype, plus a rounding band."""

from __future__ import annotations

import torch
from torch import Tensor

BAND = 8
"""Roundings, in units of eps(dtype) times the largest exact value, allowed beyond the error of eager PyTorch: the order
of a sum differs between implementations, and a result is rounded to its dtype once more."""


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; NaN where both are NaN counts as equal, NaN in only one as infinite."""
    if actual.numel() == 0:
        return 0.0
    difference = (actual.double() - exact).abs()
    both_nan = actual.isnan() & exact.isnan()
    return float(difference.masked_fill(both_nan, 0).nan_to_num(nan=torch.inf).max())


def assert_close_to_exact(
    name: str, actual: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, band: int = BAND
) -> None:
    """Raise AssertionError unless error(actual) <= error(eager) + band eps(dtype) max|exact|.

    Args:
        actual, eager: results in the dtype under test; exact: the same in float64, from the same rounded inputs.
        dtype: activation dtype, which sets eps.
    """
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    finite = exact[exact.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    allowed = error(eager, exact) + band * torch.finfo(dtype).eps * scale
    found = error(actual, exact)
    assert found <= allowed, f"{name}: error {found:.3g} exceeds {allowed:.3g} ({dtype}, largest value {scale:.3g})"
