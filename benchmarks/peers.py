"""What a PyTorch user would write, or import, instead of each operator.

A peer takes the operator's arguments. It works in the activations' dtype, as such code does, except that entropies take
their softmax in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rows import Call
from vqfast.testing.cases import Inputs

COMPILED = "-compiled"  # ends the name of a peer that goes through torch.compile
PLAIN = "plain"  # the frozen layer alone: what lora_linear adds to
BLOCK = "block"  # the frozen block of a vision transformer that film_adapter follows


class Peer(NamedTuple):
    bind: Callable[[Inputs, tuple[str, ...]], Call]  # inputs and the names of those a gradient is taken of
    itself: bool = False  # computes something else than the operator: checked against itself in float64


def eager(function: Callable[..., Tensor], leaves: tuple[str, ...] | None = None, *, itself: bool = False) -> Peer:
    def bind(inputs: Inputs, names: tuple[str, ...]) -> Call:
        return Call(functools.partial(function, **inputs), {n: inputs[n] for n in leaves or names})

    return Peer(bind, itself)


def compiled(function: Callable[..., Tensor]) -> Peer:
    def bind(inputs: Inputs, names: tuple[str, ...]) -> Call:
        torch._dynamo.reset()  # every shape is compiled for itself
        mode = "max-autotune-no-cudagraphs" if torch.cuda.is_available() else None
        return eager(torch.compile(function, dynamic=False, mode=mode)).bind(inputs, names)

    return Peer(bind)


# lowrank_filter2d: the image is padded, filtered in one of three ways and mixed with itself.


def dense(image: Tensor, taps_y: Tensor, taps_x: Tensor, mix: Tensor) -> Tensor:
    """One depthwise k x k convolution."""
    kernel = torch.einsum("...ri,...rj->...ij", taps_y, taps_x)
    padded = _as_channels(_padded(image, taps_y), taps_y)
    filtered = F.conv2d(padded, _per_channel(kernel, image)[:, None], groups=padded.shape[1])
    return _mixed(image, filtered.view_as(image), mix)


def separable(image: Tensor, taps_y: Tensor, taps_x: Tensor, mix: Tensor) -> Tensor:
    """A depthwise 1 x k convolution to R channels each, then k x 1, then the sum over R."""
    rank, taps = taps_y.shape[-2:]
    padded = _as_channels(_padded(image, taps_y), taps_y)
    channels = padded.shape[1]
    rows = F.conv2d(padded, _per_channel(taps_x, image).reshape(channels * rank, 1, 1, taps), groups=channels)
    columns = _per_channel(taps_y, image).reshape(channels * rank, 1, taps, 1)
    filtered = F.conv2d(rows, columns, groups=channels * rank)
    filtered = filtered.unflatten(1, (channels, rank)).sum(2) if rank > 1 else filtered
    return _mixed(image, filtered.view_as(image), mix)


def slices(image: Tensor, taps_y: Tensor, taps_x: Tensor, mix: Tensor) -> Tensor:
    """Sums of taps times shifted slices of the padded image."""
    height, width = image.shape[-2:]
    rank, taps = taps_y.shape[-2:]
    padded = _padded(image, taps_y)
    u, v = (t.to(image.dtype)[..., None, None, None] for t in (taps_y, taps_x))  # [(B,) R, k, 1, 1, 1]
    filtered = torch.zeros((), dtype=image.dtype, device=image.device)
    for r in range(rank):
        row = sum(v[..., r, j, :, :, :] * padded[..., j : j + width] for j in range(taps))
        filtered = filtered + sum(u[..., r, i, :, :, :] * row[..., i : i + height, :] for i in range(taps))
    return _mixed(image, filtered, mix)


def _padded(image: Tensor, taps: Tensor) -> Tensor:
    return F.pad(image, (taps.shape[-1] // 2,) * 4, mode="reflect")


def _as_channels(padded: Tensor, taps: Tensor) -> Tensor:
    """[1, B C, H, W] where every sample has its own taps, so that samples become groups of a convolution."""
    return padded.flatten(0, 1)[None] if taps.dim() == 3 else padded


def _per_channel(taps: Tensor, image: Tensor) -> Tensor:
    """[C, m, n] from shared taps [m, n], [B C, m, n] from those per sample, in the image's dtype."""
    batch, channels = image.shape[:2]
    samples = batch if taps.dim() == 3 else 1
    return taps.to(image.dtype).expand(samples, *taps.shape[-2:]).repeat_interleave(channels, 0)


def _mixed(image: Tensor, filtered: Tensor, mix: Tensor) -> Tensor:
    return image + mix.to(image.dtype).view(-1, 1, 1, 1) * (filtered - image)


# softmax_entropy and linear_softmax_entropy


def log_softmax_entropy(logits: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -(log_p.exp() * log_p).sum(-1)


def linear_log_softmax_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return log_softmax_entropy(F.linear(hidden, weight, bias))


# cosine_alignment


def cosine_similarity(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cosine_similarity(prediction, target.detach(), dim=-1)


# lora_linear


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, **_: object) -> Tensor:
    return F.linear(x, weight, bias)


def textbook(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:  # fmt: skip
    return F.linear(x, weight, bias) + scaling * ((x @ lora_a.to(x.dtype).mT) @ lora_b.to(x.dtype).mT)


def bmm(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:  # fmt: skip
    t = torch.bmm(x, lora_a.to(x.dtype).mT)
    return torch.baddbmm(F.linear(x, weight, bias), t, lora_b.to(x.dtype).mT, alpha=scaling)


def vmap(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:  # fmt: skip
    def one_sample(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return textbook(x, weight, bias, a, b, scaling)

    return torch.func.vmap(one_sample)(x, lora_a, lora_b)


class _AddMM(torch.autograd.Function):
    """LoRA of rows [M, K] with every sum taken inside a matrix product; the form of unsloth and axolotl."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:  # fmt: skip
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        t = x @ a.T
        ctx.save_for_backward(x, weight, a, b, t)
        ctx.scaling, ctx.dtypes = scaling, (lora_a.dtype, lora_b.dtype)
        return F.linear(x, weight, bias).addmm_(t, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, t = ctx.saved_tensors
        dt = ctx.scaling * (dy @ b)
        dx = (dy @ weight).addmm_(dt, a)
        da, db = dt.T @ x, ctx.scaling * (dy.T @ t)
        return dx, None, None, da.to(ctx.dtypes[0]), db.to(ctx.dtypes[1]), None


def addmm(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:  # fmt: skip
    return _AddMM.apply(x, weight, bias, lora_a, lora_b, scaling)


def peft_layer(inputs: Inputs, _: tuple[str, ...]) -> Call:
    """The layer that peft puts in place of a linear one, adapters in float32 as it makes them by default."""
    import peft

    outputs, features = inputs["weight"].shape
    base = nn.Linear(features, outputs, device="meta")
    base.weight = nn.Parameter(inputs["weight"], requires_grad=False)
    base.bias = nn.Parameter(inputs["bias"], requires_grad=False)
    rank = inputs["lora_a"].shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=inputs["scaling"] * rank, target_modules=["base"])
    layer = peft.get_peft_model(nn.ModuleDict({"base": base}), config).base_model.model["base"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        a.copy_(inputs["lora_a"])
        b.copy_(inputs["lora_b"])
    return Call(functools.partial(layer, inputs["x"]), {"x": inputs["x"], "lora_a": a, "lora_b": b})


# film_adapter


def linears(x: Tensor, down: Tensor, up: Tensor, scale: Tensor, shift: Tensor, activation: str) -> Tensor:
    """The same layers as torch.nn would run them."""
    down, up, scale, shift = (t.to(x.dtype) for t in (down, up, scale, shift))
    if scale.dim() == 2:
        scale, shift = scale[:, None], shift[:, None]
    return x + F.linear(getattr(F, activation)((1 + scale) * F.linear(x, down) + shift), up)


def block(inputs: Inputs, _: tuple[str, ...]) -> Call:
    """The block of a vision transformer that an adapter follows, frozen, heads of 64."""
    x = inputs["x"] if inputs["x"].dim() == 3 else inputs["x"][None]
    width = x.shape[-1]
    layer = nn.TransformerEncoderLayer(
        width, width // 64, 4 * width, activation="gelu", batch_first=True, norm_first=True, dtype=x.dtype
    )
    layer = layer.to(x.device).eval().requires_grad_(False)
    return Call(lambda: layer(x).view_as(inputs["x"]), {"x": inputs["x"]})


# spectral_gain2d


def rfft(inputs: Inputs, leaves: tuple[str, ...]) -> Call:
    """A gain of the same form on the Fourier transform, which is taken once, as ours takes its cosine transform."""
    size = inputs["image"].shape[-2:]
    spectrum = torch.fft.rfft2(inputs["image"].detach(), norm="ortho")

    def filtered() -> Tensor:
        gain_x = inputs["gain_x"][..., : spectrum.shape[-1]]
        gain = 1 + torch.einsum("...ry,...rx->...yx", inputs["gain_y"], gain_x)
        return torch.fft.irfft2(gain[..., None, :, :] * spectrum, s=size, norm="ortho")

    return Call(filtered, {name: inputs[name] for name in leaves})


PEERS: dict[str, dict[str, Peer]] = {
    "lowrank_filter2d": {
        "dense": eager(dense),
        "separable": eager(separable),
        "slices": eager(slices),
        "dense-compiled": compiled(dense),
        "separable-compiled": compiled(separable),
        "slices-compiled": compiled(slices),
    },
    "softmax_entropy": {
        "log_softmax": eager(log_softmax_entropy),
        "log_softmax-compiled": compiled(log_softmax_entropy),
    },
    "linear_softmax_entropy": {
        "log_softmax": eager(linear_log_softmax_entropy),
        "log_softmax-compiled": compiled(linear_log_softmax_entropy),
    },
    "cosine_alignment": {
        "cosine_similarity": eager(cosine_similarity),
        "cosine_similarity-compiled": compiled(cosine_similarity),
    },
    "lora_linear": {
        "peft": Peer(peft_layer),
        "addmm": eager(addmm),
        "textbook-compiled": compiled(textbook),
        "bmm": eager(bmm),
        "vmap": eager(vmap),
        "bmm-compiled": compiled(bmm),
        PLAIN: eager(plain, leaves=("x",), itself=True),
    },
    "film_adapter": {
        "linears": eager(linears),
        "linears-compiled": compiled(linears),
        BLOCK: Peer(block, itself=True),
    },
    "spectral_gain2d": {"rfft": Peer(rfft, itself=True)},
}
"""Operator -> name -> peer. A row names its peers (test_<op>.py); --peer takes any of these."""

NAMES = sorted({name for peers in PEERS.values() for name in peers})
