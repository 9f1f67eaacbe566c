"""Configuration of a tuning episode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from vqfast import backends
from vqfast.ops.lora_linear.contract import MAX_RANK as MAX_LORA_RANK
from vqfast.ops.lowrank_filter2d.contract import MAX_RANK, MAX_TAPS
from vqfast.tuning.candidates import DEFAULT_PRESETS, IDENTITY, Preset


@dataclass(frozen=True)
class TuningConfig:
    """What is tuned, on what signal, how far. Frozen and validated: a wrong value raises ValueError at once.

    Args:
        filter: "gaussian" (learnable width and mix), "lowrank" (free taps of rank `rank`), "spectral" (a gain of rank
            `rank` on the cosine spectrum, at 8 knots per axis) or None.
        taps: odd filter length in pixels, 3 to 31. rank: 1 to 8, of "lowrank" at most taps.
        lora_rank, lora_alpha: LoRA on the vision tower; its update is scaled by alpha / rank.
        lora_blocks: LoRA on the first n vision blocks; 0 for none. lora_targets: names of their linear layers.
        objective: "answer_entropy", the entropy of the next-token distribution in nats; "marginal_entropy", that of the
            mean distribution over the most confident of several random crops of the image (as in TPT); or a callable
            (model output, valid [B, n]) -> [B] to be lowered, with `output.logits` [B, n, V] at the answer positions.
        views: crops per image for "marginal_entropy", the image itself among them; a step costs as many forwards.
        confident_fraction: of the views, those of lowest entropy, that count.
        answer_tokens: positions it is averaged over, teacher-forced on the untuned greedy answer.
        steps: optimiser steps per input. AdamW, no weight decay, reset for every input.
        lr_filter: learning rate of the filter. Adam's first step moves every parameter by about that much. None: 1 from
            the untouched image, 0.3 from a preset, which is near an optimum already.
        lr_lora: learning rate of LoRA.
        train_tone: also train gain and bias of the filter; otherwise only presets set them.
        candidates: None, the paper's method; "default", start from the best of `DEFAULT_PRESETS`; or your own presets.
            The untouched image is always among them.
        max_candidates: presets evaluated per image: the first ones of the list, or in a stream those it asks for
            (at least 3). None: all, in a stream 4.
        search_resolution: side in pixels of the images that presets are compared on; None: as they are. Fewer pixels
            are fewer image tokens. For models that interpolate their position embedding.
        search_scope: "sample" chooses for every image by itself; "stream" pools the evidence of a named stream of
            images (`tune(..., stream="name")`) and evaluates fewer presets per image.
        guard: keep a sample's start (the untouched image, or its preset) when the step did not lower its entropy, or
            the objective where that is a callable.
        on_failure: entropy not finite: "untuned" keeps the sample's start, or the untuned answer where that is not
            finite either, and says so; "raise" raises TuningError.
        mode: how the step runs. "eager"; "graph", on CUDA, as one CUDA graph per shape of the inputs; "compile", with
            the frozen blocks through torch.compile (on CUDA in a graph, too); "auto" takes "graph" on CUDA and "eager"
            elsewhere. `TestTimeTuner.mode` says which and why.
        frozen_dtype: "bfloat16": frozen linear layers of a float32 model compute in bfloat16 on processors with
            instructions for it, if answers stay the same on the first input (`TestTimeTuner.frozen_dtype` says). Takes
            half of the weights' memory on top. `applied`, and what `generate` writes after the first token, stay in
            float32.
        backend: for every operator (`vqfast.backend`); None leaves the choice to the caller's block or to vqfast. A
            backend by name runs or raises, also for an operator that it has no kernel for.

    Source: VQ-TTT, arXiv 2506.15645 (filter, LoRA on shallow blocks, one step, answer entropy); values and the rest are
    this project's, chosen on the embedded model's validation split (docs/tuning.md).
    """

    filter: Literal["gaussian", "lowrank", "spectral"] | None = "gaussian"
    taps: int = 7
    rank: int = 2
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_blocks: int = 2
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    objective: Literal["answer_entropy", "marginal_entropy"] | Callable[[Any, Tensor], Tensor] = "answer_entropy"
    views: int = 8
    confident_fraction: float = 0.5
    answer_tokens: int = 1
    steps: int = 1
    lr_filter: float | None = None
    lr_lora: float = 5e-3
    train_tone: bool = False
    candidates: Literal["default"] | Sequence[Preset] | None = None
    max_candidates: int | None = None
    search_resolution: int | None = None
    search_scope: Literal["sample", "stream"] = "sample"
    guard: bool = True
    on_failure: Literal["untuned", "raise"] = "untuned"
    mode: Literal["auto", "eager", "graph", "compile"] = "auto"
    frozen_dtype: Literal["bfloat16"] | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        _one_of("filter", self.filter, ("gaussian", "lowrank", "spectral", None))
        if not callable(self.objective):
            _one_of("objective", self.objective, ("answer_entropy", "marginal_entropy"), "or a callable")
        _one_of("search_scope", self.search_scope, ("sample", "stream"))
        _one_of("mode", self.mode, ("auto", "eager", "graph", "compile"))
        _one_of("frozen_dtype", self.frozen_dtype, ("bfloat16", None))
        _one_of("on_failure", self.on_failure, ("untuned", "raise"))
        _one_of("backend", self.backend, (*backends.BACKENDS, None))
        _between("taps", self.taps, 3, MAX_TAPS)
        if self.taps % 2 == 0:
            raise ValueError(f"taps must be odd; got {self.taps}. Use {self.taps - 1} or {self.taps + 1}")
        _between("rank", self.rank, 1, min(MAX_RANK, self.taps) if self.filter == "lowrank" else MAX_RANK)
        _between("lora_rank", self.lora_rank, 1, MAX_LORA_RANK)
        for name, least in (("lora_blocks", 0), ("answer_tokens", 1), ("steps", 1), ("views", 2)):
            _between(name, getattr(self, name), least, None)
        fewest = 3 if self.search_scope == "stream" else 2  # the untouched image and one other; a stream explores, too
        for name, least in (("max_candidates", fewest), ("search_resolution", 1)):
            if getattr(self, name) is not None:
                _between(name, getattr(self, name), least, None)
        if not isinstance(self.confident_fraction, (int, float)) or not 0 < self.confident_fraction <= 1:
            raise ValueError(f"confident_fraction must be above 0 and at most 1; got {self.confident_fraction!r}")
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
        if self.train_tone and self.filter not in ("gaussian", "lowrank"):
            raise ValueError("train_tone needs a filter with gain and bias: filter='gaussian' or 'lowrank'")
        if self.filter is None and self.lora_blocks == 0:
            raise ValueError("nothing to tune: filter is None and lora_blocks is 0")
        if self.mode == "compile" and self.frozen_dtype is not None:
            raise ValueError("frozen_dtype goes with eager steps: leave out mode='compile' or frozen_dtype")
        if self.candidates is None and (self.max_candidates or self.search_resolution or self.search_scope == "stream"):
            raise ValueError("max_candidates, search_resolution and search_scope need a search: candidates='default'")
        if self.candidates is not None:
            if self.filter not in ("gaussian", "lowrank"):
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
        return (IDENTITY, *fitting)[: self.max_candidates if self.search_scope == "sample" else None]


def _one_of(name: str, value: object, accepted: tuple[object, ...], other: str = "") -> None:
    if value not in accepted:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, accepted))} {other}".rstrip() + f"; got {value!r}"
        )


def _between(name: str, value: object, least: int, most: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        upper = "" if most is None else f" and at most {most}"
        raise ValueError(f"{name} must be an integer of at least {least}{upper}; got {value!r}")
