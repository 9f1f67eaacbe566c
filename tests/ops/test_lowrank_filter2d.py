"""lowrank_filter2d against conv2d with the dense kernel, and its own errors."""

import pytest
import torch
import torch.nn.functional as F

from vqfast.ops import lowrank_filter2d
from vqfast.testing.cases.lowrank_filter2d import OPERATOR
from vqfast.testing.here import on_cpu

BACKENDS = ["reference", *on_cpu(OPERATOR.name, OPERATOR.kernels)]


@pytest.fixture(params=BACKENDS)
def backend(request, require_backend):
    require_backend(request.param, "lowrank_filter2d")
    return request.param


@pytest.mark.parametrize("padding", ["reflect", "replicate", "zeros"])
def test_equals_depthwise_conv2d(backend, padding):
    g = torch.Generator().manual_seed(0)
    image, u, v = (torch.randn(s, generator=g) for s in [(2, 3, 20, 13), (2, 5), (2, 5)])
    kernel = torch.einsum("ri,rj->ij", u, v)
    padded = F.pad(image, (2, 2, 2, 2), mode={"zeros": "constant"}.get(padding, padding))
    filtered = F.conv2d(padded, kernel.expand(3, 1, 5, 5), groups=3)
    expected = 1.5 * (image + 0.3 * (filtered - image)) - 0.2
    actual = lowrank_filter2d(image, u, v, 0.3, 1.5, -0.2, padding=padding, backend=backend)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_mix_zero_is_the_image_bit_for_bit(backend, dtype):
    image = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    taps = torch.randn(2, 7)
    assert torch.equal(lowrank_filter2d(image, taps, taps, 0.0, backend=backend), image)


@pytest.mark.parametrize(("pixels", "scale_y", "scale_x"), [(3e4, 1, 1 / 16), (1, 1e5, 1e-5), (1, 1e-6, 1e6)])
def test_float16_image_with_parts_of_the_filter_beyond_its_range(backend, pixels, scale_y, scale_x):
    """How a kernel's scale is shared between its two factors is arbitrary; arithmetic is in float32."""
    g = torch.Generator().manual_seed(0)
    image = (pixels * torch.rand(1, 2, 30, 40, generator=g)).half()
    u, v = ((torch.tensor([[1.0, 2.0, 1.0]]) * scale).requires_grad_() for scale in (scale_y, scale_x))
    results = []
    for name, x in ((backend, image), ("reference", image.float())):
        y = lowrank_filter2d(x, u, v, 0.7, backend=name)
        results.append((y.detach(), *torch.autograd.grad(y, (u, v), torch.full_like(y, 1e-3))))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.float(), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_per_sample_parameters_act_on_their_own_sample(backend):
    image, taps = torch.randn(3, 3, 16, 16), torch.randn(3, 2, 5)
    mix, gain, bias = torch.randn(3), torch.randn(3), torch.randn(3, 3)
    together = lowrank_filter2d(image, taps, taps, mix, gain, bias, backend=backend)
    for i in range(3):
        one = slice(i, i + 1)
        alone = lowrank_filter2d(image[one], taps[i], taps[i], mix[i], gain[i], bias[one], backend=backend)
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image=torch.randn(3, 8, 8)), r"image must be \[B, C, H, W\]; got \[3, 8, 8\]"),
        (dict(taps_y=torch.randn(1, 4), taps_x=torch.randn(1, 4)), "must be odd and at most 31; got 4"),
        (dict(taps_y=torch.randn(1, 33), taps_x=torch.randn(1, 33)), "must be odd and at most 31; got 33"),
        (dict(taps_y=torch.randn(9, 3), taps_x=torch.randn(9, 3)), "rank R must be 1 to 8; got 9"),
        (dict(taps_x=torch.randn(1, 5)), r"taps_x must have the shape of taps_y, \[1, 3\]; got \[1, 5\]"),
        (dict(taps_y=torch.randn(2, 1, 3)), r"taps_y must be \[R, k\] or \[B, R, k\] with B = 1"),
        (dict(taps_y=torch.randn(1, 17), taps_x=torch.randn(1, 17)), "at least 9x9 pixels; got 8x8"),
        (dict(mix=torch.zeros(3)), r"mix must be a scalar or \[B\] with B = 1; got \[3\]"),
        (dict(gain=torch.zeros(1, 2)), r"gain must be .* or \[B, C\] with C = 3; got \[1, 2\]"),
        (dict(padding="wrap"), "padding must be one of reflect, replicate, zeros; got 'wrap'"),
    ],
)
def test_errors_say_what_is_accepted(change, message):
    arguments = dict(image=torch.randn(1, 3, 8, 8), taps_y=torch.randn(1, 3), taps_x=torch.randn(1, 3), mix=0.5)
    with pytest.raises(ValueError, match=message):
        lowrank_filter2d(**arguments | change)


def test_parameters_of_another_dtype_are_refused():
    image, taps = torch.randn(1, 3, 8, 8).bfloat16(), torch.randn(1, 3).bfloat16()
    with pytest.raises(TypeError, match=r"taps_y must be torch.float32 beside torch.bfloat16 activations"):
        lowrank_filter2d(image, taps, taps, 0.5)
