"""What only a GPU can show: CUDA graphs, tensors of more than 2^31 elements, a second stream."""

import pytest
import torch

from vqfast import ops
from vqfast.testing.cases import all_operators
from vqfast.testing.here import kernels_here

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
KERNELS = [
    pytest.param(op, case, name, id=f"{op}-{case}-{name}")
    for op in all_operators()
    for case in op.cases[:2]
    for name in kernels_here(op.name, op.kernels)
    if name in ("cuda", "triton")
]


def step(op, inputs, name):
    leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    result = op.function(**inputs, backend=name)
    return (result.detach(), *torch.autograd.grad(result, leaves, torch.ones_like(result)))


@pytest.mark.parametrize(("op", "case", "name"), KERNELS)
def test_a_captured_step_follows_its_inputs(op, case, name):
    """Captured once, replayed on other values in the same tensors: the bits of a plain call."""
    inputs = op.inputs(case, torch.bfloat16, "cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(op, inputs, name)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(op, inputs, name)
    with torch.no_grad():
        for value in inputs.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.mul_(0.5)
    graph.replay()
    expected = step(op, inputs, name)
    torch.cuda.synchronize()
    for got, wanted in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("op", "case", "name"), KERNELS)
def test_the_current_stream_is_used(op, case, name):
    """A call on a side stream waits for what that stream does before, not for what another one does."""
    inputs = op.inputs(case, torch.float32, "cuda", requires_grad=True)
    expected = step(op, inputs, name)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        scaled = {k: v.detach() * 1 if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        for key, value in scaled.items():
            if isinstance(value, torch.Tensor):
                value.requires_grad_(inputs[key].requires_grad)
        actual = step(op, scaled, name)
    stream.synchronize()
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_more_than_two_to_the_31_elements():
    classes = 1 << 20
    rows = (1 << 11) + 2
    logits = torch.empty(rows, classes, dtype=torch.bfloat16, device="cuda").normal_()
    entropy = ops.softmax_entropy(logits, backend="triton")
    expected = ops.softmax_entropy(logits[-2:].float(), backend="reference")
    torch.testing.assert_close(entropy[-2:], expected, rtol=1e-4, atol=0)


def test_tensors_on_two_devices_are_refused():
    logits = torch.randn(2, 8, device="cuda")
    with pytest.raises(ValueError, match="weight is on cpu, the activations on cuda"):
        ops.linear_softmax_entropy(logits, torch.randn(5, 8))
