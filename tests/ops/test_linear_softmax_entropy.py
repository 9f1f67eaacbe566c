"""linear_softmax_entropy against the covariance form, and what an online sum can get wrong."""

import pytest
import torch

from vqfast import ops
from vqfast.testing import here
from vqfast.testing.cases.linear_softmax_entropy import OPERATOR

KERNELS = here.kernels_here(OPERATOR.name, OPERATOR.kernels)
BACKENDS = ("reference", *KERNELS)


@pytest.fixture(params=KERNELS)
def kernel(request, require_backend):
    require_backend(request.param, OPERATOR.name)
    return request.param


def value(hidden, weight, bias, backend):
    hidden, weight, bias = (None if t is None else t.to(here.device(backend)) for t in (hidden, weight, bias))
    return ops.linear_softmax_entropy(hidden, weight, bias, backend=backend).cpu()


def value_and_gradient(hidden, weight, bias, backend):
    hidden = hidden.clone().requires_grad_()
    entropy = value(hidden, weight, bias, backend)
    (grad,) = torch.autograd.grad(entropy.sum(), hidden)
    return entropy.detach(), grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_the_negative_covariance_of_logit_and_row(backend, require_backend):
    require_backend(backend, "linear_softmax_entropy")
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=generator) for s in ((3, 24), (700, 24), (700,)))
    entropy, grad = value_and_gradient(hidden, weight, bias, backend)
    z = hidden.double() @ weight.double().T + bias.double()
    p = z.softmax(-1)
    w = weight.double()
    covariance = torch.einsum("nv,nv,vd->nd", p, z, w) - (p * z).sum(-1, keepdim=True) * (p @ w)
    torch.testing.assert_close(entropy.double(), torch.distributions.Categorical(logits=z).entropy(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), -covariance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("spread", [0.01, 5.0, 300.0])
def test_order_of_the_classes_does_not_matter(order, spread, positions, kernel):
    """Rising logits raise the running maximum with every block; falling ones never do."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6000, 8, generator=generator)
    hidden = torch.randn(positions, 8, generator=generator)
    bias = torch.linspace(0, spread, 6000)[torch.arange(6000) if order == "rising" else torch.arange(5999, -1, -1)]
    entropy, grad = value_and_gradient(hidden, weight, bias, kernel)
    exact, exact_grad = value_and_gradient(hidden.double(), weight.double(), bias.double(), "reference")
    torch.testing.assert_close(entropy.double(), exact, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("positions", [1, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("top", [0, 1234, 2999])
def test_confident_rows_keep_their_small_gradient(top, dtype, positions, kernel):
    """One logit 30 above the rest: H and dH/dh are of the size of e^-30 V, and terms of size 1 cancel in them."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, 24, generator=generator).to(dtype)
    hidden = (torch.randn(positions, 24, generator=generator) / 16).to(dtype)
    bias = torch.zeros(3000, dtype=dtype)
    bias[top] = 30
    run = getattr(torch.ops, f"vqfast_{kernel}").linear_softmax_entropy_fwd  # before dH/dh is rounded to dtype
    entropy, grad = run(*(t.to(here.device(kernel)) for t in (hidden, weight, bias)), True)
    entropy, grad = entropy.cpu(), grad.cpu().double()
    exact, exact_grad = value_and_gradient(hidden.double(), weight.double(), bias.double(), "reference")
    torch.testing.assert_close(entropy.double(), exact, rtol=0.05, atol=0)  # log(1 + e^-30 V) is 0 in float32
    eps = torch.finfo(torch.float32 if positions == 1 else dtype).eps  # several take their coefficients in dtype
    assert (grad - exact_grad).abs().max() <= 16 * eps * exact_grad.abs().max()


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_masked_by_the_bias_do_not_count(backend, positions, require_backend):
    """Whole blocks and slices of -inf, at the start, in the middle and at the end."""
    require_backend(backend, "linear_softmax_entropy")
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(positions, 16, generator=generator), torch.randn(2000, 16, generator=generator)
    keep = torch.zeros(2000, dtype=torch.bool)
    keep[700:820] = keep[1500:1503] = True
    bias = torch.where(keep, -1e4, -torch.inf)
    entropy, grad = value_and_gradient(hidden, weight, bias, backend)
    kept, kept_grad = value_and_gradient(hidden, weight[keep], bias[keep], "reference")
    torch.testing.assert_close(entropy, kept, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(grad, kept_grad, rtol=1e-3, atol=1e-4)
    assert value(hidden, weight, torch.full((2000,), -torch.inf), backend).isnan().all()


@pytest.mark.parametrize("positions", [1, 2])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("row", [0, 17, 1999])
def test_non_finite_weights_are_not_hidden(bad, row, positions, kernel):
    weight = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    weight[row, 3] = bad
    entropy, grad = value_and_gradient(torch.ones(positions, 16), weight, None, kernel)
    assert entropy.isnan().all()
    assert grad.isnan().all()


def test_non_finite_position_leaves_its_neighbours_alone(kernel):
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    hidden[1, 3] = torch.nan
    entropy, grad = value_and_gradient(hidden, torch.randn(200, 16), None, kernel)
    assert entropy.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == [False, True, False]


def test_one_wide_position(kernel):
    """Its sums are too many for one program of a GPU."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 9000, generator=generator), torch.randn(70, 9000, generator=generator) / 64
    entropy, grad = value_and_gradient(hidden, weight, None, kernel)
    exact, exact_grad = value_and_gradient(hidden.double(), weight.double(), None, "reference")
    torch.testing.assert_close(entropy.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("positions", [1, 2])
def test_no_width_at_all(positions, kernel):
    entropy, grad = value_and_gradient(torch.randn(positions, 0), torch.randn(5, 0), None, kernel)
    torch.testing.assert_close(entropy, torch.full((positions,), 5.0).log())
    assert grad.shape == (positions, 0)


def test_nothing_of_an_earlier_call_is_left(require_backend):
    """Rows that are no whole vectors pass through memory that every call of the thread shares."""
    require_backend("cpu", "linear_softmax_entropy")
    ops.linear_softmax_entropy(torch.ones(1, 30), torch.full((333, 30), torch.nan), backend="cpu")
    _, grad = value_and_gradient(torch.ones(1, 20), torch.randn(39, 20), None, "cpu")
    assert grad.isfinite().all()


@pytest.mark.parametrize("positions", [1, 3])
def test_without_gradient_none_is_computed(positions, kernel):
    run = getattr(torch.ops, f"vqfast_{kernel}").linear_softmax_entropy_fwd
    hidden, weight = (torch.randn(rows, 20, device=here.device(kernel)) for rows in (positions, 40))
    entropy, grad = run(hidden, weight, None, False)
    assert grad.shape == (0,)
    exactly = dict(rtol=0, atol=0) if kernel == "cpu" else {}
    torch.testing.assert_close(entropy, run(hidden, weight, None, True)[0], **exactly)


def test_subnormal_halves_count_even_where_floats_are_flushed(require_backend):
    require_backend("cpu", "linear_softmax_entropy")
    weight = torch.zeros(32, 16, dtype=torch.float16)
    weight[:16] = 2.0**-24
    assert torch.set_flush_denormal(True)
    try:
        actual = ops.linear_softmax_entropy(torch.full((1, 16), 6e4, dtype=torch.float16), weight, backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    logits = torch.zeros(32)
    logits[:16] = 16 * torch.tensor(6e4).half().item() * 2.0**-24
    torch.testing.assert_close(actual[0], torch.distributions.Categorical(logits=logits).entropy(), rtol=0, atol=2e-6)


def test_a_head_that_learns_is_refused():
    hidden, weight = torch.randn(2, 8), torch.randn(10, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"weight is frozen .* weight.detach\(\)"):
        ops.linear_softmax_entropy(hidden, weight)
