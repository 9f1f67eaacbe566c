"""The tuned parameters of one episode: a filter and adapters for B samples, and their optimiser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vqfast.nn import GaussianFilter, LoRALinear, LowRankFilter
from vqfast.tuning.candidates import Preset
from vqfast.tuning.config import TuningConfig

# Learning rates relative to filter_rate: 1 spans the range of mix and log_sigma, not that of a tap.
LR_RATIO = {"mix": 1.0, "log_sigma": 1.0, "taps_y": 0.02, "taps_x": 0.02, "gain": 0.1, "bias": 0.1}
LORA_SEED = 0  # one fixed draw of every A: a result does not depend on what was tuned before


class EpisodeState:
    """Filter and adapters with one set of parameters per sample.

    Args:
        linears: layers that take LoRA, by path.
        samples: B.
    """

    def __init__(self, config: TuningConfig, linears: dict[str, nn.Linear], samples: int, device: torch.device) -> None:
        self.config = config
        self.samples = samples
        self.filter: GaussianFilter | LowRankFilter | None = None
        if config.filter == "gaussian":
            self.filter = GaussianFilter(config.taps, samples=samples).to(device)
        elif config.filter == "lowrank":
            self.filter = LowRankFilter(config.taps, config.rank, samples=samples).to(device)
        if self.filter is not None:
            self.filter.gain.requires_grad_(config.train_tone)
            self.filter.bias.requires_grad_(config.train_tone)
        generator = torch.Generator().manual_seed(LORA_SEED)
        self.adapters = {
            path: LoRALinear(linear, config.lora_rank, config.lora_alpha, samples=samples, generator=generator)
            for path, linear in linears.items()
        }
        self.identity = self.snapshot()  # values under which the model is its plain self

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of the episode by name, [B, ...]: trained ones, and those that only presets set."""
        if self.filter is not None:
            yield from self.filter.named_parameters(prefix="filter")
        for path, adapter in self.adapters.items():
            yield f"{path}.lora_a", adapter.lora_a
            yield f"{path}.lora_b", adapter.lora_b

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.parameters() if p.requires_grad]

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh AdamW without weight decay, one group per learning rate."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.trained():
            ratio = LR_RATIO.get(name.rpartition(".")[2])
            rate = self.config.lr_lora if ratio is None else self.config.filter_rate * ratio
            groups.setdefault(rate, []).append(parameter)
        return torch.optim.AdamW([{"params": p, "lr": lr} for lr, p in groups.items()], weight_decay=0, fused=True)

    def snapshot(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters()}

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters():
            parameter.copy_(values[name])

    def reset(self) -> None:
        self.load(self.identity)

    @torch.no_grad()
    def restore(self, which: Tensor, values: dict[str, Tensor]) -> None:
        """Set the samples in `which` ([B], bool) to `values`."""
        for name, parameter in self.parameters():
            mask = which.view(-1, *[1] * (parameter.dim() - 1))
            parameter.copy_(torch.where(mask, values[name], parameter))

    @torch.no_grad()
    def set_presets(self, presets: Sequence[Preset], gain: Tensor, bias: Tensor) -> None:
        """Set each sample's filter to its preset, with the gain and bias [B] that its stretch came to."""
        assert self.filter is not None
        self.filter.set_gaussian_(torch.tensor([p.sigma for p in presets], device=gain.device))
        self.filter.mix.copy_(torch.tensor([p.mix for p in presets], device=gain.device))
        self.filter.gain.copy_(gain)
        self.filter.bias.copy_(bias)

    def clamp_(self) -> None:
        if self.filter is not None:
            self.filter.clamp_()
