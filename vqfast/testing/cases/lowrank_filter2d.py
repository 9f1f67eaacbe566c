"""Cases of lowrank_filter2d: shared and per-sample parameters, every padding, sizes around the 32-row band."""

from __future__ import annotations

import torch

from vqfast.ops import lowrank_filter2d
from vqfast.testing.cases import Case, Inputs, OperatorCases, normal


def _case(
    name: str,
    shape: tuple[int, int, int, int],
    taps: int,
    rank: int,
    *,
    own: bool = False,
    tone: str = "",
    **options: str,
) -> Case:
    def make(g: torch.Generator | None) -> Inputs:
        batch, channels = shape[:2]
        lead = (batch,) if own else ()
        inputs = {
            "image": normal(g, *shape),
            "taps_y": normal(g, *lead, rank, taps, scale=taps**-0.5),
            "taps_x": normal(g, *lead, rank, taps, scale=taps**-0.5),
            "mix": normal(g, *lead),
        }
        tone_shape = {"scalar": (), "sample": (batch,), "channel": (batch, channels)}.get(tone)
        if tone_shape is not None:
            inputs |= {"gain": 1 + normal(g, *tone_shape, scale=0.1), "bias": normal(g, *tone_shape)}
        return inputs | options

    return Case(name, make)


OPERATOR = OperatorCases(
    name="lowrank_filter2d",
    function=lowrank_filter2d,
    activations=frozenset({"image"}),
    differentiable=("image", "taps_y", "taps_x", "mix", "gain", "bias"),
    kernels=("cpu", "cuda", "triton"),
    cases=(
        _case("k7r1", (1, 3, 32, 32), 7, 1),
        _case("k3r2_own", (3, 3, 9, 11), 3, 2, own=True, tone="channel"),
        _case("k1r2", (2, 1, 5, 4), 1, 2, tone="scalar"),
        _case("k5r4_two_bands", (1, 2, 33, 70), 5, 4, tone="sample"),
        _case("k15_largest_halo", (1, 1, 8, 8), 15, 1),
        _case("k15r2_lags_halved", (1, 2, 36, 20), 15, 2),
        _case("k31r3_lags_halved_twice", (2, 1, 32, 33), 31, 3, own=True),
        _case("replicate_smaller_than_halo", (1, 2, 3, 2), 9, 2, padding="replicate"),
        _case("b2c3_own_sample_tone", (2, 3, 6, 7), 3, 1, own=True, tone="sample"),
        _case("b2c3_own_channel_tone", (2, 3, 6, 7), 3, 1, own=True, tone="channel"),
        _case("several_tasks", (2, 3, 130, 140), 3, 1),
        _case("zeros", (2, 3, 12, 7), 7, 1, own=True, padding="zeros"),
        _case("one_row_replicate", (1, 1, 1, 17), 5, 1, padding="replicate"),
        _case("empty_batch", (0, 3, 8, 8), 3, 1),
    ),
    benchmarks=(
        _case("1x3x336x336-k7-r1", (1, 3, 336, 336), 7, 1),
        _case("1x3x336x336-k15-r4", (1, 3, 336, 336), 15, 4),
        _case("16x3x224x224-k7-r1-own", (16, 3, 224, 224), 7, 1, own=True),
    ),
    gpu_benchmarks=(
        _case("1x3x336x336-k7-r1", (1, 3, 336, 336), 7, 1),
        _case("64x3x336x336-k7-r1", (64, 3, 336, 336), 7, 1),
        _case("64x3x336x336-k7-r1-own", (64, 3, 336, 336), 7, 1, own=True),
        _case("8x3x336x336-k15-r4", (8, 3, 336, 336), 15, 4),
    ),
    scaling=(
        *(_case(f"pixels={side**2}", (1, 3, side, side), 7, 1) for side in (112, 224, 448, 896)),
        *(_case(f"batch={batch}", (batch, 3, 224, 224), 7, 1, own=True) for batch in (1, 4, 16, 64)),
        *(_case(f"rank={rank}", (1, 3, 336, 336), 7, rank) for rank in (1, 2, 4, 8)),
        *(_case(f"taps={taps}", (1, 3, 336, 336), taps, 1) for taps in (3, 7, 15, 31)),
    ),
)
