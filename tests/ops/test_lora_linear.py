"""lora_linear against the merged weight, per sample and packed, and its own errors."""

import pytest
import torch
import torch.nn.functional as F

from vqfast.ops import lora_linear
from vqfast.testing.cases.lora_linear import OPERATOR
from vqfast.testing.here import device, kernels_here
from vqfast.testing.tolerances import assert_close_to_exact

K, N, R = 12, 8, 4


def test_equals_the_merged_weight():
    x, weight, bias = torch.randn(2, 5, K), torch.randn(N, K), torch.randn(N)
    a, b = torch.randn(R, K), torch.randn(N, R)
    expected = F.linear(x, weight + 0.5 * b @ a, bias)
    torch.testing.assert_close(lora_linear(x, weight, bias, a, b, 0.5), expected, rtol=1e-4, atol=1e-4)


def test_packed_rows_equal_each_sample_alone_in_value_and_gradient():
    offsets = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    x, weight = torch.randn(10, K), torch.randn(N, K)
    a, b = torch.randn(3, R, K, requires_grad=True), torch.randn(3, N, R, requires_grad=True)
    packed = lora_linear(x, weight, None, a, b, 2.0, row_offsets=offsets)
    alone = torch.cat(
        [lora_linear(x[s:e], weight, None, a[i], b[i], 2.0) for i, (s, e) in enumerate([(0, 3), (3, 3), (3, 10)])]
    )
    torch.testing.assert_close(packed, alone)
    weights = torch.randn_like(packed)
    for ours, theirs in zip(
        torch.autograd.grad(packed, [a, b], weights), torch.autograd.grad(alone, [a, b], weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        assert not ours[1].any()  # the sample without rows


@pytest.mark.parametrize("where", ["x", "lora_a", "lora_b"])
def test_nan_stays_with_its_sample_in_packed_rows(where):
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32)
    drawn = {"x": torch.randn(7, K), "lora_a": torch.randn(2, R, K), "lora_b": torch.randn(2, N, R)}
    drawn[where][5 if where == "x" else 1] = torch.nan
    leaves = {name: value.requires_grad_() for name, value in drawn.items()}
    y = lora_linear(weight=torch.randn(N, K), bias=None, scaling=1.0, row_offsets=offsets, **leaves)
    grads = dict(zip(leaves, torch.autograd.grad(y[:3].sum(), leaves.values()), strict=True))
    assert y[:3].isfinite().all()
    assert grads["lora_a"][0].isfinite().all()
    assert grads["lora_b"][0].isfinite().all()
    assert grads["x"][:3].isfinite().all()


def test_compiled_with_another_scaling():
    x, weight, a, b = torch.randn(3, K), torch.randn(N, K), torch.randn(R, K), torch.randn(N, R)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="eager", dynamic=True)
    for scaling in (1.0, 2.0, 3.0):
        torch.testing.assert_close(
            compiled(x, weight, None, a, b, scaling), lora_linear(x, weight, None, a, b, scaling)
        )


def test_zero_b_is_the_plain_layer_bit_for_bit():
    x, weight, bias = torch.randn(3, 5, K), torch.randn(N, K), torch.randn(N)
    actual = lora_linear(x, weight, bias, torch.randn(3, R, K), torch.zeros(3, N, R), 2.0)
    assert torch.equal(actual, F.linear(x, weight, bias))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(lora_a=torch.randn(R, 7)),
            ValueError,
            r"lora_a must be \[r, K\] or \[B, r, K\] with K = 12; got \[4, 7\]",
        ),
        (dict(lora_b=torch.randn(N, 3)), ValueError, r"lora_b must be \[8, 4\] beside lora_a \[4, 12\]; got \[8, 3\]"),
        (dict(lora_a=torch.randn(65, K), lora_b=torch.randn(N, 65)), ValueError, "rank r must be 1 to 64; got 65"),
        (dict(lora_a=torch.randn(2, R, K), lora_b=torch.randn(2, N, R)), ValueError, r"need x \[B, M, K\] with B = 2"),
        (dict(row_offsets=torch.tensor([0, 5])), ValueError, "row_offsets goes with packed rows"),
        (dict(scaling=float("nan")), ValueError, "scaling must be a finite Python number"),
        (dict(weight=torch.randn(N, 5)), ValueError, r"x must be \[..., K\] and weight \[N, K\]"),
        (dict(weight=torch.randn(N, K, requires_grad=True)), ValueError, "weight is frozen in this operator"),
        (dict(weight=torch.randn(N, K).half()), TypeError, "weight must have the dtype of x"),
        (dict(lora_a=torch.randn(R, K).half()), TypeError, "lora_a must be torch.float32 beside"),
    ],
)
def test_errors_say_what_is_accepted(change, error, message):
    arguments = dict(
        x=torch.randn(5, K),
        weight=torch.randn(N, K),
        bias=None,
        lora_a=torch.randn(R, K),
        lora_b=torch.randn(N, R),
        scaling=1.0,
    )
    with pytest.raises(error, match=message):
        lora_linear(**arguments | change)


def test_row_offsets_of_another_dtype_are_refused():
    a, b = torch.randn(2, R, K), torch.randn(2, N, R)
    with pytest.raises(ValueError, match=r"row_offsets must be int32 \[B \+ 1\] with B = 2; got torch.int64 \[3\]"):
        lora_linear(torch.randn(5, K), torch.randn(N, K), None, a, b, 1.0, row_offsets=torch.tensor([0, 2, 5]))


@pytest.mark.parametrize(("lead", "samples"), [((2, 5), None), ((3, 5), 3)], ids=["shared", "own"])
def test_contract_fakes(lead, samples):
    """Shapes that the contract promises for a kernel: y and t forward; x, A and B gradients backward."""
    own = () if samples is None else (samples,)
    with torch.device("meta"):
        x, weight, a, b = torch.empty(*lead, K), torch.empty(N, K), torch.empty(*own, R, K), torch.empty(*own, N, R)
        y, t = torch.ops.vqfast_cpu.lora_linear_fwd(x, weight, None, a, b, 1.0, None)
        grads = torch.ops.vqfast_cpu.lora_linear_bwd(y, x, weight, a, b, t, 1.0, None, True)
    assert (y.shape, t.shape) == ((*lead, N), (*lead, R))
    assert [g.shape for g in grads] == [x.shape, a.shape, b.shape]


def test_row_offsets_that_fall_keep_samples_apart(require_backend):
    """They are not checked, but no row may belong to two samples: two threads would write it."""
    require_backend("cpu", "lora_linear")
    x, a, b = torch.randn(64, 256), torch.randn(3, R, 256), torch.randn(3, N, R)
    offsets = torch.tensor([0, 64, 0, 64], dtype=torch.int32)
    actual = lora_linear(x, torch.zeros(N, 256), None, a, b, 1.0, row_offsets=offsets, backend="cpu")
    torch.testing.assert_close(actual, x @ a[0].mT @ b[0].mT, rtol=1e-4, atol=1e-3)


MANY_ROWS = [
    pytest.param(backend, rank, rows, dtype, id=f"{backend}-{rank}-{rows}-{dtype}")
    for backend in kernels_here(OPERATOR.name, OPERATOR.kernels)
    for rank, rows in ((3, 20), (12, 40), (3, 70), (40, 70))
    for dtype in (torch.float32, torch.bfloat16)
    if backend != "triton" or (rows == 70 and dtype == torch.bfloat16)
]


@pytest.mark.parametrize(("backend", "rank", "rows", "dtype"), MANY_ROWS)
def test_blocks_of_many_rows(backend, rank, rows, dtype, require_backend):
    """So many samples that a GPU's blocks take 32, 64 and 128 rows (csrc/cuda), 64 and 128 (Triton)."""
    require_backend(backend, "lora_linear")
    g = torch.Generator().manual_seed(0)
    samples = 70 if backend == "triton" else 256
    shapes = {"x": (samples, rows, 8), "weight": (16, 8), "lora_a": (samples, rank, 8), "lora_b": (samples, 16, rank)}
    exact = {name: torch.randn(shape, generator=g).to(device(backend)) for name, shape in shapes.items()}
    exact = {name: t.to(dtype).double() if name in OPERATOR.activations else t.double() for name, t in exact.items()}
    found = []
    for name, kind in ((backend, dtype), ("reference", dtype), ("reference", torch.float64)):
        parameter = torch.promote_types(kind, torch.float32)
        inputs = {n: t.to(kind if n in OPERATOR.activations else parameter) for n, t in exact.items()}
        leaves = [inputs[n].requires_grad_() for n in OPERATOR.differentiable]
        y = lora_linear(**inputs, bias=None, scaling=0.5, backend=name)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    for what, *values in zip(("y", "dx", "dA", "dB"), *found, strict=True):
        assert_close_to_exact(what, *values, dtype)
