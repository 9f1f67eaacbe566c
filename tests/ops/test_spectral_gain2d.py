"""spectral_gain2d and dct2 against scipy's transforms, the spectrum given beforehand, and their own errors."""

import pytest
import scipy.fft
import torch

from vqfast import backends
from vqfast.ops import dct2, spectral_gain2d

BACKENDS = ["reference", "cpu"]
SIZES = [(1, 1), (2, 3), (4, 5), (7, 8), (9, 13), (25, 27), (49, 33), (30, 64), (31, 90), (97, 34)]


@pytest.fixture(params=BACKENDS)
def backend(request, require_backend):
    require_backend(request.param, "spectral_gain2d")
    return request.param


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def scipy_gained(image, gain_y, gain_x):
    spectrum = scipy.fft.dctn(image.double().numpy(), axes=(-2, -1), norm="ortho")
    gain = 1 + torch.einsum("...ry,...rx->...yx", gain_y.double(), gain_x.double())
    gained = spectrum * (gain if gain.dim() == 2 else gain[:, None]).numpy()
    return torch.from_numpy(scipy.fft.idctn(gained, axes=(-2, -1), norm="ortho"))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("own", [False, True])
def test_equals_scipy(backend, height, width, own):
    lead = (2,) if own else ()
    image, gain_y, gain_x = draw((2, 3, height, width), (*lead, 2, height), (*lead, 2, width))
    actual = spectral_gain2d(image, gain_y, gain_x, backend=backend).double()
    expected = scipy_gained(image, gain_y, gain_x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("n", [*range(1, 41), 64, 100, 121, 127, 128, 210, 224, 257, 336, 337])
def test_dct2_equals_scipy_at_every_length(backend, n):
    (lines,) = draw((1, 1, 3, n))
    expected = torch.from_numpy(scipy.fft.dctn(lines.double().numpy(), axes=(-2, -1), norm="ortho"))
    for image, spectrum in ((lines, expected), (lines.mT, expected.mT)):
        torch.testing.assert_close(dct2(image, backend=backend).double(), spectrum, rtol=1e-5, atol=1e-5)


def test_transform_keeps_the_energy_and_knows_constant_and_impulse(backend):
    (image,) = draw((2, 3, 37, 40))
    torch.testing.assert_close(dct2(image, backend=backend).square().sum(), image.square().sum())
    flat = dct2(torch.full((1, 1, 21, 40), 2.0), backend=backend)
    torch.testing.assert_close(flat[0, 0, 0, 0], torch.tensor(2.0 * (21 * 40) ** 0.5))
    assert flat.flatten()[1:].abs().max() < 1e-4
    impulse = torch.zeros(1, 1, 21, 40)
    impulse[0, 0, 0, 0] = 1
    rows, columns = (torch.cos(torch.pi * torch.arange(n) / (2 * n)) * (2 / n) ** 0.5 for n in (21, 40))
    rows[0], columns[0] = 21**-0.5, 40**-0.5
    torch.testing.assert_close(dct2(impulse, backend=backend)[0, 0], rows[:, None] * columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gain_zero_is_the_image_to_within_rounding(backend, dtype):
    image, gain = draw((2, 3, 40, 41), (2, 41))
    image = image.to(dtype)
    actual = spectral_gain2d(image, torch.zeros(2, 40), gain, backend=backend)
    torch.testing.assert_close(actual, image, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_given_spectrum_gives_the_same_values_and_gradients(backend, dtype, own):
    lead = (2,) if own else ()
    image, gain_y, gain_x, weights = draw((2, 3, 35, 50), (*lead, 2, 35), (*lead, 2, 50), (2, 3, 35, 50))
    image, gains = image.to(dtype), [gain_y.requires_grad_(), gain_x.requires_grad_()]
    plain = spectral_gain2d(image, *gains, backend=backend)
    spectrum = dct2(image, backend=backend)
    cached = spectral_gain2d(torch.full_like(image, torch.nan), *gains, spectrum=spectrum, backend=backend)
    assert spectrum.dtype == torch.float32
    assert torch.equal(cached, plain)
    for a, b in zip(*(torch.autograd.grad(y, gains, weights.to(dtype)) for y in (cached, plain)), strict=True):
        assert torch.equal(a, b)


def test_float64_spectrum_passes_gradcheck():
    image, gain_y, gain_x = (t.double() for t in draw((2, 2, 5, 6), (2, 5), (2, 6)))
    spectrum = dct2(image)
    assert spectrum.dtype == torch.float64
    assert torch.autograd.gradcheck(
        lambda a, b: spectral_gain2d(image, a, b, spectrum=spectrum), (gain_y.requires_grad_(), gain_x.requires_grad_())
    )


def test_per_sample_gains_act_on_their_own_sample(backend):
    image, gain_y, gain_x = draw((3, 2, 16, 33), (3, 2, 16), (3, 2, 33))
    together = spectral_gain2d(image, gain_y, gain_x, backend=backend)
    for i in range(3):
        alone = spectral_gain2d(image[i : i + 1], gain_y[i], gain_x[i], backend=backend)
        torch.testing.assert_close(together[i : i + 1], alone)


def test_what_is_not_finite_stays_in_its_plane(backend):
    image, gain_y, gain_x = draw((2, 2, 20, 9), (1, 20), (1, 9))
    clean = spectral_gain2d(image, gain_y, gain_x, backend=backend)
    image[0, 1, 3, 4] = torch.inf
    result = spectral_gain2d(image, gain_y, gain_x, backend=backend)
    assert not result[0, 1].isfinite().any()
    result[0, 1] = clean[0, 1]
    assert torch.equal(result, clean)


def test_gradients_do_not_depend_on_the_number_of_threads(require_backend):
    require_backend("cpu", "spectral_gain2d")
    image, gain_y, gain_x = draw((2, 3, 130, 170), (3, 130), (3, 170))
    leaves = [image.requires_grad_(), gain_y.requires_grad_(), gain_x.requires_grad_()]

    def run():
        y = spectral_gain2d(*leaves, backend="cpu")
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    expected = run()
    torch.set_num_threads(1)
    try:
        actual = run()
    finally:
        torch.set_num_threads(2)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_compiled_with_given_spectrum_in_one_graph(backend, dtype):
    torch._dynamo.reset()
    image, gain_y, gain_x = draw((1, 3, 12, 20), (2, 12), (2, 20))
    image, gains = image.to(dtype), [gain_y.requires_grad_(), gain_x.requires_grad_()]

    def both(image, *gains):
        return spectral_gain2d(image, *gains, spectrum=dct2(image, backend=backend), backend=backend)

    results = [f(image, *gains) for f in (both, torch.compile(both, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), gains) for y in results))


def test_native_operators_with_given_spectrum_obey_their_schemas(require_backend):
    require_backend("cpu", "spectral_gain2d")
    image, gain_y, gain_x = draw((2, 3, 9, 10), (2, 9), (2, 10))
    native = torch.ops.vqfast_cpu
    torch.library.opcheck(native.dct2_fwd, (image,))
    torch.library.opcheck(native.dct2_fwd, (image.bfloat16().mT,))
    torch.library.opcheck(native.spectral_gain2d_fwd, (image, native.dct2_fwd(image), gain_y, gain_x))


def test_strided_arguments_and_autocast_change_nothing(backend):
    image, gain_y, gain_x = draw((2, 20, 12, 3), (2, 12), (2, 20))
    strided = image.permute(0, 3, 2, 1)
    spectrum = dct2(strided, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(dct2(strided.contiguous(), backend=backend), spectrum)
        channels_last = spectrum.contiguous(memory_format=torch.channels_last)
        actual = spectral_gain2d(strided, gain_y, gain_x, spectrum=channels_last, backend=backend)
    torch.testing.assert_close(actual, spectral_gain2d(strided.contiguous(), gain_y, gain_x, backend=backend))


IMAGE, GAIN_Y, GAIN_X = torch.randn(1, 3, 8, 9), torch.randn(1, 8), torch.randn(1, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image=torch.randn(3, 8, 9)), r"image must be \[B, C, H, W\]; got \[3, 8, 9\]"),
        (dict(image=torch.randn(1, 3, 0, 9)), r"at least one row and one column; got \[1, 3, 0, 9\]"),
        (dict(gain_y=torch.randn(8)), r"gain_y must be \[R, H\] or \[B, R, H\] with B = 1, H = 8; got \[8\]"),
        (dict(gain_y=torch.randn(2, 1, 8)), r"gain_y must be .* got \[2, 1, 8\]"),
        (dict(gain_y=torch.randn(1, 9)), r"gain_y must be .* got \[1, 9\]"),
        (dict(gain_x=torch.randn(2, 9)), r"gain_x must be \[1, 9\], as gain_y with W = 9; got \[2, 9\]"),
        (dict(gain_y=torch.randn(9, 8), gain_x=torch.randn(9, 9)), "rank R must be 1 to 8; got 9"),
        (dict(gain_y=torch.randn(0, 8), gain_x=torch.randn(0, 9)), "rank R must be 1 to 8; got 0"),
        (dict(spectrum=torch.randn(1, 3, 9, 8)), r"spectrum must have the shape of image, \[1, 3, 8, 9\]"),
        (
            dict(spectrum=IMAGE.clone().requires_grad_()),
            r"spectrum requires grad but is constant .* spectrum.detach\(\)",
        ),
        (
            dict(image=IMAGE.clone().requires_grad_(), spectrum=IMAGE),
            r"image requires grad but is constant where a spectrum is given; pass image.detach\(\), or no spectrum",
        ),
    ],
)
def test_errors_say_what_is_accepted(change, message):
    with pytest.raises(ValueError, match=message):
        spectral_gain2d(**dict(image=IMAGE, gain_y=GAIN_Y, gain_x=GAIN_X) | change)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"gain_y must be torch.float32 beside torch.bfloat16 activations"):
        spectral_gain2d(IMAGE.bfloat16(), GAIN_Y.bfloat16(), GAIN_X)
    with pytest.raises(TypeError, match=r"spectrum must be torch.float32 beside torch.float16 activations"):
        spectral_gain2d(IMAGE.half(), GAIN_Y, GAIN_X, spectrum=IMAGE.half())
    with pytest.raises(TypeError, match=r"image must be float32, float16, bfloat16, float64; got torch.int64"):
        dct2(IMAGE.long())
    with pytest.raises(backends.BackendUnavailableError, match="dct2"):
        dct2(IMAGE.double(), backend="cpu")


def test_dct2_takes_no_image_that_requires_grad():
    image = IMAGE.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"image requires grad but dct2 is of constant pixels; pass image.detach\(\)"):
        dct2(image)
    with torch.no_grad():
        assert not dct2(image).requires_grad


def test_square_image_takes_one_tensor_as_both_gains():
    image, gain = draw((1, 1, 6, 6), (2, 6))
    compiled = torch.compile(spectral_gain2d, fullgraph=True, backend="aot_eager")
    gain.requires_grad_()
    torch.testing.assert_close(compiled(image, gain, gain), spectral_gain2d(image, gain, gain))
