"""Configuration of a tuning episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vqfast import backends
from vqfast.ops.lora_linear.contract import MAX_RANK as MAX_LORA_RANK
from vqfast.ops.lowrank_filter2d.contract import MAX_RANK, MAX_TAPS
from vqfast.tuning.candidates import DEFAULT_PRESETS, IDENTITY, Preset


@dataclass(frozen=True)
class TuningConfig:
    """What is tuned, on what signal, how far. Frozen and validated: a wrong value raises ValueError at once.

    Args:
        filter: "gaussian" (learnable width and mix), "lowrank" (free taps of rank `rank`) or None.
        taps: odd filter length in pixels, 3 to 31. rank: of the "lowrank" filter, 1 to 8 and at most taps.
        lora_rank, lora_alpha: LoRA on the vision tower; its update is scaled by alpha / rank.
        lora_blocks: LoRA on the first n vision blocks; 0 for none. lora_targets: names of their linear layers.
        objective: "answer_entropy", the entropy of the next-token distribution in nats.
        answer_tokens: positions it is averaged over, teacher-forced on the untuned greedy answer.
        steps: optimiser steps per input. AdamW, no weight decay, reset for every input.
        lr_filter: learning rate of the filter. Adam's first step moves every parameter by about that much. None: 1 from
            the untouched image, 0.3 from a preset, which is near an optimum already.
        lr_lora: learning rate of LoRA.
        train_tone: also train gain and bias of the filter; otherwise only presets set them.
        candidates: None, the paper's method; "default", start from the best of `DEFAULT_PRESETS`; or your own presets.
            The untouched image is always among them.
        guard: keep a sample's start (the untouched image, or its preset) when the step did not lower its entropy.
        on_failure: entropy not finite: "untuned" keeps the untuned answer and says so, "raise" raises TuningError.
        backend: for every operator (`vqfast.backend`); None leaves the choice to the caller's block or to vqfast. A
            backend by name runs or raises, also for an operator that it has no kernel for.

    Source: VQ-TTT, arXiv 2506.15645 (filter, LoRA on shallow blocks, one step, answer entropy); values and the rest are
    this project's, chosen on the embedded model's validation split (docs/tuning.md).
    """

    filter: Literal["gaussian", "lowrank"] | None = "gaussian"
    taps: int = 7
    rank: int = 2
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_blocks: int = 2
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    objective: Literal["answer_entropy"] = "answer_entropy"
    answer_tokens: int = 1
    steps: int = 1
    lr_filter: float | None = None
    lr_lora: float = 5e-3
    train_tone: bool = False
    candidates: Literal["default"] | Sequence[Preset] | None = None
    guard: bool = True
    on_failure: Literal["untuned", "raise"] = "untuned"
    backend: str | None = None

    def __post_init__(self) -> None:
        _one_of("filter", self.filter, ("gaussian", "lowrank", None))
        _one_of("objective", self.objective, ("answer_entropy",))
        _one_of("on_failure", self.on_failure, ("untuned", "raise"))
        _one_of("backend", self.backend, (*backends.BACKENDS, None))
        _between("taps", self.taps, 3, MAX_TAPS)
        if self.taps % 2 == 0:
            raise ValueError(f"taps must be odd; got {self.taps}. Use {self.taps - 1} or {self.taps + 1}")
        if self.filter == "lowrank":
            _between("rank", self.rank, 1, min(MAX_RANK, self.taps))
        _between("lora_rank", self.lora_rank, 1, MAX_LORA_RANK)
        for name, least in (("lora_blocks", 0), ("answer_tokens", 1), ("steps", 1)):
            _between(name, getattr(self, name), least, None)
        for name in ("lora_alpha", "lr_filter", "lr_lora"):
            value = getattr(self, name)
            if value is None and name == "lr_filter":
                continue
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number; got {value!r}")
        for name in ("train_tone", "guard"):
            _one_of(name, getattr(self, name), (True, False))
        if not isinstance(self.lora_targets, tuple) or not self.lora_targets:
            raise ValueError(f"lora_targets must be a tuple of layer names, as ('q_proj',); got {self.lora_targets!r}")
        if self.filter is None and self.lora_blocks == 0:
            raise ValueError("nothing to tune: filter is None and lora_blocks is 0")
        if self.candidates is not None:
            if self.filter is None:
                raise ValueError("candidates are filter presets: they need filter='gaussian' or 'lowrank'")
            if self.candidates != "default" and not (
                isinstance(self.candidates, Sequence) and all(isinstance(p, Preset) for p in self.candidates)
            ):
                raise ValueError(f"candidates must be None, 'default' or a list of Preset; got {self.candidates!r}")

    @property
    def filter_rate(self) -> float:
        """lr_filter, resolved."""
        if self.lr_filter is not None:
            return self.lr_filter
        return 1.0 if self.candidates is None else 0.3

    @property
    def presets(self) -> tuple[Preset, ...]:
        """The presets to try, the untouched image first, none wider than the taps hold; empty without a search."""
        if self.candidates is None:
            return ()
        chosen = DEFAULT_PRESETS if self.candidates == "default" else tuple(self.candidates)
        fitting = (replace(p, sigma=min(p.sigma, self.taps / 3)) for p in chosen if p != IDENTITY)
        return (IDENTITY, *fitting)


def _one_of(name: str, value: object, accepted: tuple[object, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}")


def _between(name: str, value: object, least: int, most: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name} must be an integer of at least {least}{upper}; got {value!r}")
