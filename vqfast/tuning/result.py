"""What a tuning episode gives back."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vqfast.integrations.layouts import stacked
from vqfast.nn import GaussianFilter, SpectralGain, whole_lora_b
from vqfast.tuning.candidates import Preset
from vqfast.tuning.config import TuningConfig
from vqfast.tuning.export import as_image, filtered_original, model_scale
from vqfast.tuning.state import EpisodeState
from vqfast.tuning.step import Forward, Outcome
from vqfast.tuning.telemetry import Telemetry

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class SampleResult:
    """One sample of the batch. Entropies in nats; confidences are the probability of the most likely first token."""

    entropy_before: float  # of the untuned answer
    entropy_start: float  # at the preset that the step started from; the guard compares with this one
    entropy_after: float
    token_before: int
    token_after: int
    confidence_before: float
    confidence_after: float
    preset: str  # where the step started; "identity" without a search
    filter: dict[str, float]  # scalar parameters of the filter: sigma, mix, gain, bias
    tuned: bool  # False: the step was not taken over and the sample keeps its start
    failed: bool  # an entropy is not finite, at the start or after the step; implies not tuned
    note: str  # why not tuned, else empty


@dataclass(frozen=True)
class TuningResult:
    """Result of `TestTimeTuner.tune`. Prints as a table; `to_json` leaves the tensors out."""

    samples: list[SampleResult]
    evaluations: int  # presets tried per sample; 0 without a search
    timings_ms: dict[str, float]  # phase -> milliseconds
    logits: Tensor = field(repr=False)  # [B, V], float32: first-token logits of the answer that is kept
    parameters: dict[str, Tensor] = field(repr=False)  # [B, ...] each; what `applied` puts into the model
    config: TuningConfig = field(repr=False)
    pixels: Tensor = field(repr=False)  # the tensor that was given
    images: tuple[int, ...] = field(repr=False)  # of each sample
    normalisation: tuple[Tensor, Tensor] = field(repr=False)  # mean and std of the pixels, [C]
    plain: bool = field(repr=False)  # one image [C, H, W] per sample
    thirds: dict[str, tuple[int, ...]] = field(repr=False)  # of fused layers, by path: those with an adapter
    telemetry: Telemetry | None = None  # of `TestTimeTuner.profile`

    def __len__(self) -> int:
        return len(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Samples and timings as plain Python values."""
        return {"samples": [asdict(s) for s in self.samples], "timings_ms": self.timings_ms}

    def to_json(self, **options: Any) -> str:
        """`to_dict` as JSON (options of json.dumps). A value that is not finite, which JSON has not, becomes null."""
        return json.dumps(_finite(self.to_dict()), allow_nan=False, **options)

    def image(
        self, sample: int = 0, *, original: Image | None = None, processor: Any | None = None
    ) -> tuple[Image, float]:
        """The filtered image of one sample, and the fraction of its values that was clipped to [0, 1].

        An engine that does not run vqfast can be fed the tuned image: the filter's part of the tuning, without LoRA.

        Args:
            original: the image that the processor was given, of any size. The result has its size and is grey where it
                is; None: what the model saw, at its own resolution, for one image [C, H, W] per sample.
            processor: the model's, which tells how it scales such an image. May be left out where the original has the
                proportions of the model's input.

        Raises:
            ValueError: the episode had no filter, or the scale of the original is not known.
            IndexError: no such sample.
        """
        from PIL import Image as images

        if self.config.filter is None:
            raise ValueError("this episode had no filter (filter=None), so there is no filtered image")
        self._check_sample(sample)
        if original is not None:
            if not isinstance(original, images.Image):
                raise TypeError(f"original must be a PIL image; got {type(original).__name__}")
            if processor is not None:
                scale = model_scale(processor, (original.height, original.width), self.normalisation)
            else:
                scale = self._own_scale(original)
            return filtered_original(original, lambda raw: self._behind_filter(sample, raw), scale)
        if not self.plain:
            raise ValueError("this model takes an image as tiles or patches: pass original=image, processor=processor")
        mean, std = (values[:, None, None] for values in self.normalisation)
        return as_image(self._behind_filter(sample, self.pixels[sample : sample + 1].float() * std + mean)[0])

    def _own_scale(self, original: Image) -> tuple[float, float]:
        scale = original.height / self.pixels.shape[-2], original.width / self.pixels.shape[-1]
        if not self.plain or abs(scale[0] / scale[1] - 1) > 0.01:
            raise ValueError(
                f"how an original of {original.height}x{original.width} pixels is scaled to pixels "
                f"{list(self.pixels.shape)} is not known: pass processor=processor"
            )
        return scale

    @torch.no_grad()
    def _behind_filter(self, sample: int, raw: Tensor) -> Tensor:
        """Raw pixels [1, C, H, W] behind one sample's filter, not clamped; on their device."""
        state = EpisodeState(self.config, {}, self.normalisation, 1)
        state.load({name: value[sample : sample + 1] for name, value in self.parameters.items()})
        mean, std = (values[:, None, None] for values in self.normalisation)
        pixels = (raw.to(mean.device) - mean) / std
        return (state.filtered(stacked(pixels, (1,)), pixels) * std + mean).to(raw.device)

    def adapters(self, sample: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """LoRA of one sample: path of a layer -> A [R, K] and B [N, R] of x W^T + (alpha / rank) (x A^T) B^T.

        alpha and rank are those of the configuration. R is the rank, or n times the rank where a fused layer takes n
        adapters.

        Raises:
            IndexError: no such sample.
        """
        self._check_sample(sample)
        found = {}
        for name, lora_a in self.parameters.items():
            path, _, kind = name.rpartition(".")
            if kind == "lora_a":
                lora_b = whole_lora_b(self.parameters[f"{path}.lora_b"], self.thirds.get(path, ()))
                found[path] = lora_a[sample], lora_b[sample]
        return found

    def _check_sample(self, sample: int) -> None:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample must be 0 to {len(self) - 1}; got {sample}")

    def __str__(self) -> str:
        lines = [f"{'':>3} {'entropy: untuned, start, now':>30} {'confidence':>15} {'token':>11}  {'start':<18} filter"]
        for i, s in enumerate(self.samples):
            entropy = f"{s.entropy_before:.3f} -> {s.entropy_start:.3f} -> {s.entropy_after:.3f}"
            confidence = f"{s.confidence_before:.3f} -> {s.confidence_after:.3f}"
            token = f"{s.token_before} -> {s.token_after}"
            values = " ".join(f"{name} {value:.2f}" for name, value in s.filter.items())
            note = f"  ({s.note})" if s.note else ""
            lines.append(f"{i:>3} {entropy:>30} {confidence:>15} {token:>11}  {s.preset:<18} {values}{note}")
        return "\n".join([*lines, "ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in self.timings_ms.items())])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Report(NamedTuple):
    """What there is to say of an episode, on the device."""

    table: Tensor  # [B, columns], what `read` takes apart
    logits: Tensor  # [B, V], float32: of the first token of the answers that are kept
    filters: tuple[str, ...]  # names of the last columns


def report(untuned: Forward, outcome: Outcome, state: EpisodeState) -> Report:
    start, answer, accepted = outcome
    kept_logits, kept_entropy = start.logits[:, 0], start.entropy
    if untuned is not start:  # a preset's answer may not be finite: such a sample goes back to the untouched image
        finite = start.entropy.isfinite()
        kept_logits = torch.where(finite[:, None], kept_logits, untuned.logits[:, 0])
        kept_entropy = torch.where(finite, kept_entropy, untuned.entropy)
    logits = torch.where(accepted[:, None], answer.logits[:, 0], kept_logits).float()
    best = torch.stack([untuned.logits[:, 0].float(), logits]).softmax(-1).max(-1)  # [2, B]
    filters = _filter_scalars(state)
    table = torch.stack(
        [
            untuned.entropy,
            start.entropy,
            torch.where(accepted, answer.entropy, kept_entropy),
            *best.indices,
            *best.values,
            accepted,
            answer.entropy,
            *filters.values(),
        ],
        1,
    )
    return Report(table, logits, tuple(filters))


def read(report: Report, presets: list[Preset]) -> list[SampleResult]:
    """The samples of an episode; waits for the device."""
    samples = []
    for row, preset in zip(report.table.tolist(), presets, strict=True):
        h_before, h_start, h_after, token_before, token_after, c_before, c_after, tuned, h_answer, *values = row
        note = ""
        failed = not math.isfinite(h_answer) or not (tuned or math.isfinite(h_start))
        if failed:
            which, entropy = ("start", h_start) if math.isfinite(h_answer) else ("tuned answer", h_answer)
            note = f"the {which}'s entropy is {entropy}"
        elif not tuned:
            note = f"the step did not lower the entropy: {h_answer:.3f}"
        samples.append(
            SampleResult(
                entropy_before=h_before,
                entropy_start=h_start,
                entropy_after=h_after,
                token_before=int(token_before),
                token_after=int(token_after),
                confidence_before=c_before,
                confidence_after=c_after,
                preset=preset.name,
                filter=dict(zip(report.filters, values, strict=True)),
                tuned=bool(tuned),
                failed=failed,
                note=note,
            )
        )
    return samples


def _filter_scalars(state: EpisodeState) -> dict[str, Tensor]:
    """sigma (of a Gaussian filter), mix, gain and bias, [B] each."""
    if state.filter is None or isinstance(state.filter, SpectralGain):
        return {}
    named = {"sigma": state.filter.log_sigma.exp()} if isinstance(state.filter, GaussianFilter) else {}
    named |= {"mix": state.filter.mix, "gain": state.filter.gain, "bias": state.filter.bias}
    return {name: value.detach() for name, value in named.items()}
