"""The tuned parameters of one episode: a filter and adapters for B samples, and their optimiser, in one storage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vqfast import ops
from vqfast.integrations.layouts import Layout
from vqfast.integrations.transformers import LoRATarget, VisionTower
from vqfast.nn import GaussianFilter, LoRALinear, LowRankFilter, SpectralGain
from vqfast.tuning.config import TuningConfig

# Learning rates relative to filter_rate: 1 spans the range of mix and log_sigma, not that of a tap.
LR_RATIO = {"mix": 1.0, "log_sigma": 1.0, "taps_y": 0.02, "taps_x": 0.02, "gain": 0.1, "bias": 0.1}
LR_RATIO |= {"gain_y": 0.1, "gain_x": 0.1}  # of a spectrum; at 0.3 and above a step breaks more answers than it mends
LORA_SEED = 0  # one fixed draw of every A: a result does not depend on what was tuned before
FIXED = 0.0  # learning rate of what only presets set


class EpisodeState:
    """Filter and adapters with one set of parameters per sample, and AdamW without weight decay.

    Every parameter aliases a part of one storage, ordered by learning rate:

        [ values of rate 1 | of rate 2 | ... | fixed ones | exp_avg of all trained | exp_avg_sq | steps per rate ]

    so that a reset is one copy, and an optimiser step one launch per learning rate.

    Args:
        targets: layers that take LoRA, by path.
        normalisation: mean and std of the pixels, [C] each.
        samples: B.
        begin_from: values to begin with in place of the identity, by parameter, of one sample each.

    Attributes:
        values: [P], every parameter. identity: [P], the values of an untuned model.
        start: [P], what `reset` goes to.
    """

    def __init__(
        self,
        config: TuningConfig,
        targets: dict[str, LoRATarget],
        normalisation: tuple[Tensor, Tensor],
        samples: int,
        begin_from: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.samples = samples
        self.begin_from = begin_from or {}
        self.normalisation = normalisation
        device = normalisation[0].device
        self.filter: GaussianFilter | LowRankFilter | SpectralGain | None = None
        self._keeps_spectra = False
        self._spectra: tuple[Tensor, list[Tensor]] | None = None  # the last pixels, and their groups'
        if config.filter == "gaussian":
            self.filter = GaussianFilter(config.taps, samples=samples).to(device)
        elif config.filter == "lowrank":
            self.filter = LowRankFilter(config.taps, config.rank, samples=samples).to(device)
        elif config.filter == "spectral":
            self.filter = SpectralGain(rank=config.rank, samples=samples).to(device)
        if self.filter is not None and not isinstance(self.filter, SpectralGain):
            self.filter.gain.requires_grad_(config.train_tone)
            self.filter.bias.requires_grad_(config.train_tone)
        generator = torch.Generator().manual_seed(LORA_SEED)
        self.adapters = {
            path: LoRALinear(
                target.layer,
                config.lora_rank,
                config.lora_alpha,
                samples=samples,
                thirds=target.thirds,
                generator=generator,
            )
            for path, target in targets.items()
        }
        self._lay_out(device)

    def filtered(self, layout: Layout, pixels: Tensor) -> Tensor:
        """The pixels that are laid out so, normalised, behind their samples' filters."""
        if self.filter is None:
            return pixels
        spectra: list[Any] = [None] * len(layout.groups)
        if isinstance(self.filter, SpectralGain):
            kept = self._spectra
            same = kept is not None and kept[0] is pixels
            spectra = kept[1] if kept is not None and same else [ops.dct2(group.images) for group in layout.groups]
            if self._keeps_spectra:
                self._spectra = pixels, spectra
        return layout.restore([self._behind(*group, s) for group, s in zip(layout.groups, spectra, strict=True)])

    def _behind(self, samples: slice, images: Tensor, spectrum: Tensor | None) -> Tensor:
        assert self.filter is not None
        mean, std = self.normalisation
        if (repeats := images.shape[1] // len(mean)) > 1:
            mean, std = mean.repeat(repeats), std.repeat(repeats)
        arguments = {"mean": mean, "std": std} | ({} if spectrum is None else {"spectrum": spectrum})
        if len(images) == self.samples:
            result: Tensor = self.filter(images, **arguments)
            return result
        own = {name: parameter[samples] for name, parameter in self.filter.named_parameters()}
        return torch.func.functional_call(self.filter, own, (images,), arguments)  # type: ignore[no-any-return]

    @torch.no_grad()
    def _lay_out(self, device: torch.device) -> None:
        rates: dict[float, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self._modules_parameters():
            rates.setdefault(self._rate(name, parameter), []).append((name, parameter))
        fixed = rates.pop(FIXED, [])
        self._trained = [item for group in rates.values() for item in group]
        self._all = self._trained + fixed
        sizes = [sum(p.numel() for _, p in group) for group in rates.values()]
        trained, total = sum(sizes), sum(p.numel() for _, p in self._all)
        self._storage = torch.zeros(total + 2 * trained + len(sizes), device=device)
        self._gradient = torch.zeros(trained, device=device)
        self.values = self._storage[:total]
        parameters = [p for _, p in self._all]
        for parameter, part in zip(parameters, _parts(self.values, parameters), strict=True):
            parameter.data = part.copy_(parameter)
        for name, parameter in self._all:
            if name in self.begin_from:
                parameter.copy_(self.begin_from[name])
        self._gradients = _parts(self._gradient, parameters[: len(self._trained)])
        self._fresh = self._storage.clone()
        self.start = self._fresh[:total]
        self.identity = self.start if self.config.candidates is None else self.start.clone()
        self._sample: Tensor | None = None  # of each value; of a single sample all values are its own
        if (samples := self.samples) > 1:
            numbers = torch.arange(samples, dtype=torch.int32, device=device)
            self._sample = torch.cat([numbers.repeat_interleave(p.numel() // samples) for p in parameters])
        self._optimizer = self._make_optimizer(dict(zip(rates, sizes, strict=True)))

    def _make_optimizer(self, sizes: dict[float, int]) -> torch.optim.Optimizer:
        """AdamW of one leaf per learning rate, from the number of values at each."""
        total, trained, counts = len(self.values), len(self._gradient), list(sizes.values())
        leaves = [nn.Parameter(part) for part in self.values[:trained].split(counts)]
        optimizer = torch.optim.AdamW(
            [{"params": [leaf], "lr": rate} for rate, leaf in zip(sizes, leaves, strict=True)],
            weight_decay=0,
            fused=True,
            capturable=self.values.is_cuda,
        )
        first, second, steps = self._storage[total:].split([trained, trained, len(counts)])
        parts = (self._gradient.split(counts), first.split(counts), second.split(counts), steps)
        for leaf, gradient, exp_avg, exp_avg_sq, count in zip(leaves, *parts, strict=True):
            leaf.grad = gradient
            optimizer.state[leaf] = {"step": count, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return optimizer

    def _rate(self, name: str, parameter: nn.Parameter) -> float:
        if not parameter.requires_grad:
            return FIXED
        ratio = LR_RATIO.get(name.rpartition(".")[2])
        return self.config.lr_lora if ratio is None else self.config.filter_rate * ratio

    def _modules_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        if self.filter is not None:
            yield from self.filter.named_parameters(prefix="filter")
        for path, adapter in self.adapters.items():
            yield f"{path}.lora_a", adapter.lora_a
            yield f"{path}.lora_b", adapter.lora_b

    def shapes(self) -> dict[str, torch.Size]:
        """Of every parameter by name, [B, ...]: trained ones, and those that only presets set."""
        return {name: p.shape for name, p in self._all}

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return self._trained

    def named(self, values: Tensor) -> dict[str, Tensor]:
        """Views of `values` [P], by parameter."""
        names, parameters = zip(*self._all, strict=True)
        return dict(zip(names, _parts(values, parameters), strict=True))

    def snapshot(self) -> dict[str, Tensor]:
        return self.named(self.values.clone())

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._all:
            parameter.copy_(values[name])

    @torch.no_grad()
    def begin(self) -> None:
        """From now on `reset` goes to the identity."""
        if self.start is not self.identity:
            self.start.copy_(self.identity)

    @torch.no_grad()
    def begin_here(self) -> None:
        """From now on `reset` goes to the values of now."""
        self.start.copy_(self.values)

    @torch.no_grad()
    def reset(self) -> None:
        """Values of the start, optimiser without a past."""
        self._storage.copy_(self._fresh)

    @contextlib.contextmanager
    def keeping_spectra(self) -> Iterator[None]:
        """Inside the block a spectral filter transforms pixels that come again once; their values must not change."""
        self._keeps_spectra = True
        try:
            yield
        finally:
            self._keeps_spectra, self._spectra = False, None

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...]) -> None:
        """One AdamW step along the gradients of `trained`, back into the parameters' ranges."""
        torch._foreach_copy_(self._gradients, gradients)
        self._optimizer.step()
        if self.filter is not None and not isinstance(self.filter, SpectralGain):
            self.filter.clamp_()

    @torch.no_grad()
    def restore(self, which: Tensor, values: Tensor) -> None:
        """Set the samples in `which` ([B], bool) to `values` [P]."""
        mask = which if self._sample is None else which.index_select(0, self._sample)
        torch.where(mask, values, self.values, out=self.values)

    @torch.no_grad()
    def set_presets(self, sigma: Tensor, mix: Tensor, gain: Tensor, bias: Tensor) -> None:
        """Set the samples' filters to Gaussians, with the gain and bias that their stretch came to; [B] each."""
        assert self.filter is not None
        assert not isinstance(self.filter, SpectralGain)
        self.filter.set_gaussian_(sigma)
        self.filter.mix.copy_(mix)
        self.filter.gain.copy_(gain)
        self.filter.bias.copy_(bias)


def checked_start(config: TuningConfig, tower: VisionTower, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of values to begin from, by parameter, of one sample each.

    Raises:
        ValueError: a name or shape that the configuration does not tune on this tower, or values that are not finite.
    """
    shapes = EpisodeState(config, tower.targets, tower.normalisation(torch.device("cpu")), 1).shapes()
    for name, value in values.items():
        if config.candidates is not None and name.startswith("filter."):
            raise ValueError(f"begin_from: {name} is set by the search; leave it out, or leave out candidates")
        if name not in shapes:
            raise ValueError(f"begin_from: {name!r} is not tuned here; there are {', '.join(shapes)}")
        given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if given != (wanted := list(shapes[name][1:])):
            raise ValueError(f"begin_from: {name} must be a tensor {wanted}; got {given}")
        if not value.isfinite().all():
            raise ValueError(f"begin_from: {name} has values that are not finite")
    return {name: value.detach().clone() for name, value in values.items()}


def _parts(flat: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """Consecutive parts of `flat`, as large as each of `like` and viewed as it is."""
    like = list(like)
    return [part.view_as(other) for part, other in zip(flat.split([x.numel() for x in like]), like, strict=True)]
