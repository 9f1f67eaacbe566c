"""What holds for every operator, case and backend. Special cases of one operator: test_<op>.py beside this file."""

import pytest
import torch

from vqfast import _native, backends
from vqfast.testing.cases import Case, OperatorCases, all_operators
from vqfast.testing.here import device, kernels_here, missing
from vqfast.testing.recorder import Recorder
from vqfast.testing.tolerances import assert_close_to_exact

OPERATORS = all_operators()
CASES = [pytest.param(op, case, id=f"{op}-{case}") for op in OPERATORS for case in op.cases]
ON_BACKENDS = [
    pytest.param(op, case, backend, id=f"{op}-{case}-{backend}")
    for op in OPERATORS
    for case in op.cases
    for backend in ("reference", *kernels_here(op.name, op.kernels))
]
ON_KERNELS = [p for p in ON_BACKENDS if p.values[2] != "reference"]


def is_quick(op: OperatorCases, case: Case, backend: str) -> bool:
    """Whether tests that call an operator many times may: where Triton is interpreted only two cases, for the time."""
    return not (backend == "triton" and _native.INTERPRETED) or case in op.cases[:2]


QUICK_ON_BACKENDS = [p for p in ON_BACKENDS if is_quick(*p.values)]
QUICK_ON_KERNELS = [p for p in ON_KERNELS if is_quick(*p.values)]
FIRST_CASE = [
    pytest.param(op, op.cases[0], backend, id=f"{op}-{backend}")
    for op in OPERATORS
    for backend in ("reference", *kernels_here(op.name, op.kernels))
]
KERNELS = [pytest.param(op, name, id=f"{op}-{name}") for op in OPERATORS for name in op.kernels]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run(
    op: OperatorCases, inputs: dict, backend: str, function=None, shift=0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Result and gradients of a fixed weighted sum of it; `shift` is added to the weights."""
    result = (function or op.function)(**inputs, backend=backend)
    weights = shift + torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names = [n for n in op.differentiable if isinstance(inputs.get(n), torch.Tensor)]
    grads = torch.autograd.grad(result, [inputs[n] for n in names], weights.to(result))
    return result.detach(), dict(zip(names, grads, strict=True))


def exact_inputs(op: OperatorCases, inputs: dict) -> dict:
    """The same values, already rounded to the dtype under test, in float64."""

    def convert(name, value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(name in op.differentiable)
        return value

    return {name: convert(name, value) for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case", "backend"), ON_KERNELS)
def test_forward_and_gradients_against_float64(op, case, backend, dtype, require_backend):
    require_backend(backend, op.name)
    inputs = op.inputs(case, dtype, device(backend), requires_grad=True)
    # With random weights alone the sum over pixels that makes a scalar's gradient cancels, and what is left of it is
    # smaller than its rounding; with the result among them it does not.
    shift = op.function(**exact_inputs(op, inputs), backend="reference").detach().cpu()
    actual, grads = run(op, inputs, backend, shift=shift)
    eager, eager_grads = run(op, inputs, "reference", shift=shift)
    exact, exact_grads = run(op, exact_inputs(op, inputs), "reference", shift=shift)
    assert actual.dtype == eager.dtype
    assert_close_to_exact("result", actual, eager, exact, dtype)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_close_to_exact(f"d{name}", grad, eager_grads[name], exact_grads[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_reference_error_is_a_few_roundings(op, case, dtype):
    inputs = op.inputs(case, dtype, requires_grad=True)
    actual, grads = run(op, inputs, "reference")
    exact, exact_grads = run(op, exact_inputs(op, inputs), "reference")
    eps = torch.finfo(dtype).eps
    summed = 32 + inputs[op.differentiable[0]].numel() ** 0.5  # roundings of a long sum
    torch.testing.assert_close(actual.double(), exact, rtol=8 * eps, atol=16 * eps * max(1.0, _largest(exact)))
    for name, grad in grads.items():
        scale = max(1.0, _largest(exact_grads[name]))
        torch.testing.assert_close(grad.double(), exact_grads[name], rtol=8 * eps, atol=summed * eps * scale)


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


@pytest.mark.parametrize(("op", "case"), CASES)
def test_gradcheck(op: OperatorCases, case: Case):
    inputs = op.inputs(case, torch.float64, requires_grad=True)
    if case.name == "masked":  # finite differences of -inf are NaN: check the finite classes
        keep = inputs["logits"].isfinite()
        assert torch.autograd.gradcheck(
            lambda z: op.function(torch.full(keep.shape, -torch.inf, dtype=z.dtype).masked_scatter(keep, z)),
            inputs["logits"][keep].detach().requires_grad_(),
        )
        return
    names = [n for n in op.differentiable if isinstance(inputs.get(n), torch.Tensor) and inputs[n].numel()]
    if not names:
        return
    assert torch.autograd.gradcheck(
        lambda *leaves: op.function(**inputs | dict(zip(names, leaves, strict=True))),
        [inputs[n] for n in names],
        fast_mode=True,
    )


@pytest.mark.parametrize(("op", "case", "backend"), QUICK_ON_KERNELS)
def test_opcheck(op, case, backend, require_backend):
    """Every kernel that the public function calls, forward and backward, obeys its schema and its fake."""
    require_backend(backend, op.name)
    with Recorder() as recorder:
        run(op, op.inputs(case, torch.float32, device(backend), requires_grad=True), backend)
    once = op.name == "linear_softmax_entropy"  # its gradient leaves with the value
    assert len(recorder.calls) == (1 if once else 2)
    for function, args in recorder.calls:
        detached = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(function, tuple(detached))


@pytest.mark.parametrize(("op", "case", "backend"), QUICK_ON_BACKENDS)
def test_compile_fullgraph(op, case, backend, require_backend):
    require_backend(backend, op.name)
    torch._dynamo.reset()
    inputs = op.inputs(case, torch.float32, device(backend), requires_grad=True)
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager", dynamic=False)
    expected, expected_grads = run(op, inputs, backend)
    actual, grads = run(op, inputs, backend, compiled)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name])


@pytest.mark.parametrize(("op", "case", "backend"), FIRST_CASE)
def test_compile_inductor(op, case, backend, require_backend):
    require_backend(backend, op.name)
    torch._dynamo.reset()
    inputs = op.inputs(case, torch.float32, device(backend), requires_grad=True)
    expected, expected_grads = run(op, inputs, backend)
    actual, grads = run(op, inputs, backend, torch.compile(op.function, fullgraph=True))
    torch.testing.assert_close(actual, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "case", "backend"), QUICK_ON_BACKENDS)
def test_strided_inputs_give_the_same_bits(op, case, backend, require_backend):
    require_backend(backend, op.name)
    inputs = op.inputs(case, torch.float32, device(backend), requires_grad=True)
    strided = {
        k: torch.stack([v.detach(), torch.full_like(v, 7)], -1)[..., 0].requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor)
        else v
        for k, v in inputs.items()
    }
    expected, expected_grads = run(op, inputs, backend)
    actual, grads = run(op, strided, backend)
    vendor = backend == "reference" or op.name == "lora_linear"  # a library's product may sum in an order of its own
    exactly = dict(rtol=1e-5, atol=1e-5) if vendor else dict(rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(actual, expected, **exactly)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], **exactly)


@pytest.mark.parametrize(("op", "case", "backend"), QUICK_ON_KERNELS)
def test_expanded_gradient(op, case, backend, require_backend):
    """The gradient of a plain sum arrives with stride 0."""
    require_backend(backend, op.name)
    inputs = op.inputs(case, torch.float32, device(backend), requires_grad=True)
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    result = op.function(**inputs, backend=backend)
    expected = torch.autograd.grad(result, leaves, torch.ones_like(result), retain_graph=True)
    for grad, other in zip(torch.autograd.grad(result.sum(), leaves), expected, strict=True):
        assert torch.equal(grad, other)


@pytest.mark.parametrize(("op", "case", "backend"), QUICK_ON_KERNELS)
def test_every_output_is_written(op, case, backend, require_backend):
    """With uninitialised memory poisoned with NaN, and on one thread or two: the same bits as before."""
    require_backend(backend, op.name)
    inputs = op.inputs(case, torch.float32, device(backend), requires_grad=True)
    expected, expected_grads = run(op, inputs, backend)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(3).isnan().all()
        actual, grads = run(op, inputs, backend)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(2)
    assert torch.equal(actual, expected)
    assert not actual.isnan().any()
    for name, grad in grads.items():
        assert torch.equal(grad, expected_grads[name]), name


@pytest.mark.parametrize(("op", "case", "backend"), FIRST_CASE)
def test_autocast_policy(op, case, backend, require_backend):
    """Matrix-product operators follow autocast; the filter, the entropy of given logits and the cosine ignore it."""
    require_backend(backend, op.name)
    inputs = op.inputs(case, torch.float32, device(backend))
    with torch.autocast(device(backend), torch.bfloat16):
        actual = op.function(**inputs, backend=backend)
    follows = op.name in ("lora_linear", "linear_softmax_entropy")
    expected = op.function(**op.inputs(case, torch.bfloat16, device(backend)) if follows else inputs, backend=backend)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("op", "case", "backend"), [p for p in FIRST_CASE if p.values[2] != "reference"])
def test_backward_under_autocast_changes_nothing(op, case, backend, require_backend):
    require_backend(backend, op.name)
    inputs = op.inputs(case, torch.float32, device(backend), requires_grad=True)
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    expected = torch.autograd.grad(op.function(**inputs, backend=backend).sum(), leaves)
    result = op.function(**inputs, backend=backend).sum()
    with torch.autocast(device(backend), torch.bfloat16):
        actual = torch.autograd.grad(result, leaves)
    for grad, other in zip(actual, expected, strict=True):
        assert torch.equal(grad, other)


@pytest.mark.parametrize(("op", "case", "backend"), FIRST_CASE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_input_is_not_hidden(op, case, backend, bad, require_backend):
    require_backend(backend, op.name)
    inputs = op.inputs(case, torch.float32, device(backend))
    name = op.differentiable[0]
    inputs[name].view(-1)[0] = bad
    assert not op.function(**inputs, backend=backend).isfinite().all()


@pytest.mark.parametrize(("op", "case", "backend"), [p for p in FIRST_CASE if p.values[2] != "reference"])
def test_second_derivative_raises(op, case, backend, require_backend):
    require_backend(backend, op.name)
    inputs = op.inputs(case, torch.float32, device(backend), requires_grad=True)
    leaves = [inputs[n] for n in op.differentiable if isinstance(inputs.get(n), torch.Tensor)]
    for first in leaves:
        for second in leaves:
            (grad,) = torch.autograd.grad(op.function(**inputs, backend=backend).sum(), first, create_graph=True)
            with pytest.raises(NotImplementedError, match=f"{op.name} has no second derivative"):
                torch.autograd.grad(grad.sum(), second)


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_arguments_are_refused_with_a_reason(op):
    inputs = op.inputs(op.cases[0], torch.float32)
    first = op.differentiable[0]
    with pytest.raises(TypeError, match=f"{first} must be float32, float16, bfloat16, float64; got torch.int64"):
        op.function(**inputs | {first: inputs[first].long()})
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"{first} must be float32"):
        op.function(**inputs | {first: inputs[first].to(torch.complex64)})
    with pytest.raises(TypeError, match=f"{first} must be a torch.Tensor; got list"):
        op.function(**inputs | {first: inputs[first].tolist()})
    with pytest.raises(ValueError, match="backend must be one of reference, cpu"):
        op.function(**inputs, backend="gpu")
    for name, value in inputs.items():
        if name != first and isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match=f"{name} is on meta, the activations on cpu"):
                op.function(**inputs | {name: value.to("meta")})


@pytest.mark.parametrize("op", OPERATORS, ids=str)
def test_backend_by_name_never_falls_back(op):
    inputs = op.inputs(op.cases[0], torch.float64)
    for name in backends.NATIVE:
        with pytest.raises(backends.BackendUnavailableError, match=op.name):
            op.function(**inputs, backend=name)
        with backends.backend(name), pytest.raises(backends.BackendUnavailableError, match=op.name):
            op.function(**inputs)


@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_kernel_is_there(op, name, require_backend):
    """The one line that says which backends the tests of this file leave out, and why."""
    require_backend(name, op.name)


def test_the_cases_name_every_kernel():
    for op in OPERATORS:
        assert set(op.kernels) <= set(backends.NATIVE)
        for name in set(backends.NATIVE) - set(op.kernels):
            assert missing(name, op.name), f"{op.name} on {name}"
