"""cosine_alignment against F.cosine_similarity and angles, and at the edges of the number range."""

import math

import pytest
import torch
import torch.nn.functional as F

from vqfast.ops import cosine_alignment
from vqfast.testing import here
from vqfast.testing.cases.cosine_alignment import OPERATOR

KERNELS = here.kernels_here(OPERATOR.name, OPERATOR.kernels)
INF, NAN = torch.inf, torch.nan


@pytest.fixture(params=("reference", *KERNELS))
def backend(request, require_backend):
    require_backend(request.param, OPERATOR.name)
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request, require_backend):
    require_backend(request.param, OPERATOR.name)
    return request.param


def value_and_gradient(prediction, target, backend):
    """On the backend's device and back; the gradient of a sum."""
    prediction, target = (x.detach().to(here.device(backend)) for x in (prediction, target))
    prediction.requires_grad_()
    cosine = cosine_alignment(prediction, target, backend=backend)
    (grad,) = torch.autograd.grad(cosine.sum(), prediction)
    return cosine.detach().cpu(), grad.cpu()


def exact(prediction, target):
    """F.cosine_similarity in float64."""
    prediction = prediction.detach().double().requires_grad_()
    cosine = F.cosine_similarity(prediction, target.double(), dim=-1)
    (grad,) = torch.autograd.grad(cosine.sum(), prediction)
    return cosine.detach(), grad


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equals_cosine_similarity_in_float64(backend):
    prediction, target = rows(5, 7, 300), rows(5, 7, 300, seed=1)
    for actual, expected in zip(
        value_and_gradient(prediction, target, backend), exact(prediction, target), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)


def test_known_angles(backend):
    angle = torch.tensor([0.0, 30.0, 90.0, 120.0, 180.0]).deg2rad()
    prediction = 3 * torch.stack([angle.cos(), angle.sin()], -1)
    cosine, grad = value_and_gradient(prediction, torch.tensor([[0.5, 0.0]]).expand(5, 2), backend)
    torch.testing.assert_close(cosine, torch.tensor([1.0, math.sqrt(0.75), 0.0, -0.5, -1.0]))
    # Towards the target, at a right angle to the prediction, sin(angle) / ||p|| long.
    perpendicular = torch.stack([angle.sin(), -angle.cos()], -1)
    torch.testing.assert_close(grad, angle.sin()[:, None] / 3 * perpendicular, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("width", [1, 17, 5000])
def test_a_row_beside_itself_is_one_with_gradient_zero(width, kernel):
    prediction = rows(4, width)
    cosine, grad = value_and_gradient(prediction, -2 * prediction, kernel)
    torch.testing.assert_close(cosine, torch.full((4,), -1.0), rtol=2e-7, atol=0)
    assert (grad.norm(dim=-1) * prediction.norm(dim=-1)).max() < 3e-7


def test_target_gets_no_gradient(backend):
    device = here.device(backend)
    prediction, target = (rows(3, 8, seed=i).to(device).requires_grad_() for i in range(2))
    cosine_alignment(prediction, target, backend=backend).sum().backward()
    assert target.grad is None
    _, expected = exact(prediction.cpu(), target.detach().cpu())
    torch.testing.assert_close(prediction.grad.cpu().double(), expected, rtol=1e-5, atol=1e-7)
    assert not cosine_alignment(prediction.detach(), target, backend=backend).requires_grad


def test_one_tensor_as_both(backend):
    """Its gradient is that of the prediction alone, here 0, in eager and compiled."""
    both = rows(3, 8).to(here.device(backend)).requires_grad_()
    for function in (cosine_alignment, torch.compile(cosine_alignment, fullgraph=True, backend="aot_eager")):
        cosine = function(both, both, backend=backend)
        torch.testing.assert_close(cosine.detach().cpu(), torch.ones(3))
        (grad,) = torch.autograd.grad(cosine.sum(), both)
        assert grad.abs().max() < 1e-6


def test_rows_shorter_than_eps(backend):
    """Zeros, and rows of length 2e-9 and 2e-8: below eps = 1e-8 the cosine shrinks and no gradient passes."""
    ones, long = torch.ones(4), torch.ones(4, 4)
    prediction = torch.stack([0 * ones, 1e-9 * ones, 1e-8 * ones, ones])
    cosine, grad = value_and_gradient(prediction, long, backend)
    torch.testing.assert_close(cosine, torch.tensor([0.0, 0.2, 1.0, 1.0]))
    assert torch.equal(grad[:2], torch.zeros(2, 4))
    cosine, grad = value_and_gradient(long + torch.arange(4.0), prediction, backend)
    expected, expected_grad = exact(long + torch.arange(4.0), prediction)
    torch.testing.assert_close(cosine.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(grad[0], torch.zeros(4))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("width", [5, 9000])
def test_bad_row_is_nan_and_leaves_its_neighbours_alone(bad, which, width, backend):
    pair = [rows(3, width), rows(3, width, seed=1)]
    good = value_and_gradient(*pair, backend)
    pair[which][1, -1] = bad
    pair[1 - which][1, -1] = 0
    for actual, expected in zip(value_and_gradient(*pair, backend), good, strict=True):
        assert actual[1].isnan().all()
        assert torch.equal(actual[::2], expected[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [33, 9000])
@pytest.mark.parametrize("exponent", [-20, 50, 63, 75, 90])
def test_scale_changes_nothing_but_the_size_of_the_gradient(exponent, width, dtype, kernel):
    """Squares overflow from 2^64 on, sums of them before that; plain PyTorch then returns 0."""
    prediction, target = rows(4, width).to(dtype), rows(4, width, seed=1).to(dtype)
    wanted, wanted_grad = exact(prediction, target)
    scale = torch.full((4, 1), 2.0**exponent, dtype=dtype)
    scale[2] = 1  # beside rows that overflow
    for p, t in ((prediction * scale, target), (prediction, target * scale), (prediction * scale, target * scale)):
        cosine, grad = value_and_gradient(p, t, kernel)
        torch.testing.assert_close(cosine.double(), wanted, rtol=2e-6, atol=1e-7)
        size = (p[:, :1] / prediction[:, :1]).double()  # 1 or the scale
        close = dict(rtol=torch.finfo(dtype).eps, atol=1e-6 * float(wanted_grad.abs().max()))
        torch.testing.assert_close(grad.double() * size, wanted_grad, **close)


def test_both_rows_overflow_and_one_alone(kernel):
    prediction = torch.tensor([[3e38, -3e38], [3e38, 0.0], [1.0, 1.0]])
    target = torch.tensor([[3e38, -3e38], [1e-3, 1e-3], [3e38, -1e38]])
    cosine, grad = value_and_gradient(prediction, target, kernel)
    torch.testing.assert_close(cosine, torch.tensor([1.0, 0.5**0.5, 1 / 5**0.5]))
    assert grad.isfinite().all()


def test_sums_of_a_long_row_do_not_drift(kernel):
    """A million equal squares, in one float after the other, would be lost to rounding."""
    prediction = torch.full((1, 1 << 20), 0.1)
    target = torch.cat([prediction[:, : 1 << 19], -0.5 * prediction[:, 1 << 19 :]], -1)
    cosine, _ = value_and_gradient(prediction, target, kernel)
    torch.testing.assert_close(cosine.double(), exact(prediction, target)[0], rtol=1e-5, atol=0)


def test_value_does_not_depend_on_the_number_of_threads(require_backend):
    """Enough rows that they are shared out."""
    require_backend("cpu", OPERATOR.name)
    prediction, target = rows(300, 1000), rows(300, 1000, seed=1)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(value_and_gradient(prediction, target, "cpu"))
    torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("prediction", "target", "error", "message"),
    [
        (torch.ones(3, 0), torch.ones(3, 0), ValueError, r"prediction must be \[..., D\] with D >= 1; got \[3, 0\]"),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError, r"got \[\]"),
        (torch.ones(2, 3), torch.ones(3), ValueError, r"target must have the shape of prediction, \[2, 3\]; got \[3\]"),
        (
            torch.ones(2, 3),
            torch.ones(2, 3).half(),
            TypeError,
            "target must have the dtype of prediction, torch.float32",
        ),
        (torch.ones(2, 3), [1.0], TypeError, "target must be a torch.Tensor; got list"),
    ],
)
def test_errors(prediction, target, error, message):
    with pytest.raises(error, match=message):
        cosine_alignment(prediction, target)
