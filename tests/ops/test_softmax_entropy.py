"""softmax_entropy against torch.distributions, and at the edges of the number range."""

import math

import pytest
import torch

from vqfast.ops import linear_softmax_entropy, softmax_entropy

INF, NAN = torch.inf, torch.nan


@pytest.fixture(params=["reference", "cpu"])
def backend(request, require_backend):
    require_backend(request.param, "softmax_entropy")
    return request.param


def test_equals_categorical_entropy(backend):
    logits = 4 * torch.randn(5, 7, 1000, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(softmax_entropy(logits, backend=backend), expected)


def test_known_values(backend):
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -INF, -INF, -INF], [0.0, 0.0, -INF, -INF], [1e4, 0.0, 0.0, 0.0]])
    expected = torch.tensor([math.log(4), 0.0, math.log(2), 0.0])
    torch.testing.assert_close(softmax_entropy(logits, backend=backend), expected)


@pytest.mark.parametrize("row", [[NAN, 0.0], [INF, 0.0], [-INF, -INF]], ids=str)
def test_bad_row_is_nan_and_leaves_its_neighbours_alone(backend, row):
    entropy = softmax_entropy(torch.tensor([[0.0, 0.0], row, [0.0, 0.0]]), backend=backend)
    assert entropy.isnan().tolist() == [False, True, False]


def test_gradient_sums_to_zero_over_classes(backend):
    """H does not change when every logit moves by the same amount."""
    logits = (5 * torch.randn(6, 3000, generator=torch.Generator().manual_seed(0))).requires_grad_()
    (grad,) = torch.autograd.grad(softmax_entropy(logits, backend=backend).sum(), logits)
    torch.testing.assert_close(grad.sum(-1), torch.zeros(6), rtol=0, atol=1e-5)


def test_no_class_is_an_error():
    with pytest.raises(ValueError, match=r"logits must be \[..., V\] with V >= 1; got \[3, 0\]"):
        softmax_entropy(torch.zeros(3, 0))


def test_linear_softmax_entropy_is_the_entropy_of_the_logits():
    hidden, weight, bias = torch.randn(4, 16), torch.randn(50, 16), torch.randn(50)
    torch.testing.assert_close(linear_softmax_entropy(hidden, weight, bias), softmax_entropy(hidden @ weight.T + bias))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(hidden=torch.randn(2, 3, 8)), ValueError, r"hidden must be \[N, D\] and weight \[V, D\]"),
        (dict(weight=torch.randn(5, 7)), ValueError, r"got \[2, 8\] and \[5, 7\]"),
        (dict(bias=torch.randn(4)), ValueError, r"bias must be \[V\] with V = 5; got \[4\]"),
        (dict(weight=torch.randn(5, 8).bfloat16()), TypeError, "weight must have the dtype of hidden, torch.float32"),
        (dict(weight=torch.randn(5, 8, requires_grad=True)), ValueError, "weight is frozen in this operator"),
    ],
)
def test_linear_softmax_entropy_errors(change, error, message):
    with pytest.raises(error, match=message):
        linear_softmax_entropy(**dict(hidden=torch.randn(2, 8), weight=torch.randn(5, 8)) | change)
