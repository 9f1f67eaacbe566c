"""film_adapter against layers of torch.nn, at its start, per sample, and its own errors."""

import pytest
import torch
import torch.nn.functional as F

from vqfast.ops import film_adapter
from vqfast.ops.film_adapter.contract import ACTIVATIONS
from vqfast.testing.cases.film_adapter import OPERATOR
from vqfast.testing.here import device, kernels_here

K, R = 24, 6
KERNELS = kernels_here(OPERATOR.name, OPERATOR.kernels)


@pytest.fixture(params=["reference", "cpu"])
def backend(request, require_backend):
    require_backend(request.param, "film_adapter")
    return request.param


def drawn(*own: int, dtype=torch.float32, lead=(3, 5)) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (*lead, K), "down": (R, K), "up": (K, R), "scale": (*own, R), "shift": (*own, R)}
    return {name: torch.randn(shape, generator=g, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_layers_of_torch(backend, activation):
    a = drawn()
    down, up = torch.nn.Linear(K, R), torch.nn.Linear(R, K, bias=False)
    down.weight.data, down.bias.data, up.weight.data = a["down"] * (1 + a["scale"])[:, None], a["shift"], a["up"]
    layer = {"gelu": torch.nn.GELU(), "silu": torch.nn.SiLU(), "relu": torch.nn.ReLU()}[activation]
    expected = a["x"] + up(layer(down(a["x"])))
    torch.testing.assert_close(film_adapter(**a, activation=activation, backend=backend), expected.detach())


def test_no_up_is_the_identity_bit_for_bit(backend):
    a = drawn(3)
    x = film_adapter(**a | {"up": torch.zeros(K, R)}, backend=backend)
    assert torch.equal(x, a["x"])


def test_own_modulation_equals_each_sample_alone(backend):
    a = {name: value.requires_grad_() for name, value in drawn(3).items()}
    one = film_adapter(**a, backend=backend)
    shared = {name: a[name] for name in ("down", "up")}
    alone = [film_adapter(a["x"][i], **shared, scale=a["scale"][i], shift=a["shift"][i]) for i in range(3)]
    torch.testing.assert_close(one, torch.stack(alone))
    weights = torch.randn_like(one)
    leaves = list(a.values())
    expected = torch.autograd.grad(torch.stack(alone), leaves, weights)
    for ours, theirs in zip(torch.autograd.grad(one, leaves, weights), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_far_out(backend, activation):
    """A middle of -40 to 40, where tails of the activation vanish, on exact inputs."""
    middle = torch.linspace(-40, 40, 161)
    a = dict(x=torch.zeros(161, 1), down=torch.ones(1, 1), up=torch.ones(1, 1), scale=torch.zeros(1))
    a["x"] = middle[:, None].clone().requires_grad_()
    y = film_adapter(**a, shift=torch.zeros(1), activation=activation, backend=backend)
    exact = middle.double().requires_grad_()
    expected = exact + getattr(F, activation)(exact)
    torch.testing.assert_close(y[:, 0], expected.float())
    (grad,) = torch.autograd.grad(y.sum(), a["x"])
    torch.testing.assert_close(grad[:, 0], torch.autograd.grad(expected.sum(), exact)[0].float())


def test_nan_stays_with_its_row(backend):
    a = drawn(3)
    a["x"][1, 2] = torch.nan
    for activation in ACTIVATIONS:
        bad = film_adapter(**a, activation=activation, backend=backend).isnan().any(-1)
        assert bad.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("learns", [("down", "up", "scale", "shift"), ("x",), ("scale",)])
@pytest.mark.parametrize("backend", KERNELS)
def test_some_gradients_alone(backend, learns, require_backend):
    """x of a frozen part, or frozen adapters that a gradient passes through: the others are not computed."""
    require_backend(backend, "film_adapter")
    a = {name: value.to(device(backend)).requires_grad_() for name, value in drawn(3).items()}
    leaves = [a[name] for name in learns]
    expected = torch.autograd.grad(film_adapter(**a, backend=backend).square().sum(), leaves)
    others = {name: value.detach() for name, value in a.items() if name not in learns}
    y = film_adapter(**a | others, backend=backend)
    for ours, theirs in zip(torch.autograd.grad(y.square().sum(), leaves), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_many_rows(require_backend):
    """Gradients of the adapter are sums over rows, which are summed in parts."""
    require_backend("cpu", "film_adapter")
    exact = {name: value.requires_grad_() for name, value in drawn(dtype=torch.float64, lead=(700,)).items()}
    single = {name: value.detach().float().requires_grad_() for name, value in exact.items()}
    found = [
        torch.autograd.grad(film_adapter(**a, backend=b).square().sum(), list(a.values()))
        for a, b in ((exact, "reference"), (single, "cpu"))
    ]
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(down=torch.randn(R, 7)),
            ValueError,
            r"down \[r, K\] with K >= 1; got \[3, 5, 24\] and \[6",
        ),
        (
            dict(x=torch.randn(3, 0), down=torch.randn(R, 0)),
            ValueError,
            r"K >= 1; got \[3, 0\] and \[6",
        ),
        (dict(up=torch.randn(R, K)), ValueError, r"up must be \[K, r\] = \[24, 6\] beside down \[6, 24\]; got \[6, 24"),
        (dict(scale=torch.randn(5)), ValueError, r"scale must be \[r\] or \[B, r\] with r = 6; got \[5\]"),
        (dict(shift=torch.randn(3, R)), ValueError, r"shift must have the shape of scale, \[6\]; got \[3, 6\]"),
        (
            dict(scale=torch.randn(2, R), shift=torch.randn(2, R)),
            ValueError,
            r"scale \[2, 6\], a row per sample, needs x \[B, M, K\] with B = 2; got \[3, 5, 24\]",
        ),
        (
            dict(down=torch.randn(129, K), up=torch.randn(K, 129)),
            ValueError,
            "the bottleneck r must be 1 to 128; got 129",
        ),
        (dict(activation="tanh"), ValueError, "activation must be one of gelu, silu, relu; got 'tanh'"),
        (dict(up=torch.randn(K, R).half()), TypeError, "up must be torch.float32 beside torch.float32 activations"),
    ],
)
def test_errors_say_what_is_accepted(change, error, message):
    with pytest.raises(error, match=message):
        film_adapter(**drawn() | change)


@pytest.mark.parametrize(("x_grad", "own"), [(True, True), (False, True), (True, False)])
def test_contract_fakes(x_grad, own):
    """Shapes that the contract promises for a kernel."""
    a = OPERATOR.inputs(OPERATOR.cases[1], torch.bfloat16, "meta")
    tensors = [a[name] for name in ("x", "down", "up", "scale", "shift")]
    y, h = torch.ops.vqfast_cpu.film_adapter_fwd(*tensors, 0)
    assert (y.shape, y.dtype, h.shape, h.dtype) == (a["x"].shape, torch.bfloat16, (3, 10, 5), torch.float32)
    dx, *grads = torch.ops.vqfast_cpu.film_adapter_bwd(y, tensors[0], h, *tensors[1:], 0, x_grad, own)
    assert dx.shape == (a["x"].shape if x_grad else (0,))
    assert [g.shape for g in grads] == [t.shape if own else (0,) for t in tensors[1:]]
