"""`python -m studies.demo`: what test-time tuning does for eight degradations of the test images, in about a minute.

Prints accuracies and times; writes report.json, report.html and the figures into the output folder.
"""

from __future__ import annotations

import datetime
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from studies import figures
from studies.degradations import degrade
from vqfast import Preset, TestTimeTuner, TuningConfig, zoo
from vqfast.tuning.candidates import DEFAULT_PRESETS, render

SEVERITIES = {
    "gaussian_noise": 0.7,
    "gaussian_blur": 5,
    "motion_blur": 17,
    "fog": 0.8,
    "low_contrast": 0.12,
    "pixelation": 8,
    "jpeg": 1,
    "snow": 0.1,
}
MODES = {"one_step": TuningConfig(), "search": TuningConfig(candidates="default")}
TAPS = MODES["one_step"].taps
QUESTIONS = len(zoo.QUESTIONS)
IMAGES, VALIDATION_IMAGES = 80, 40  # per condition; validation chooses the fixed filter
BATCH = 24  # samples per `tune`; larger ones are no faster per sample, in a search slower
WARM_UP, TIMED = 5, 30  # single-image calls
Filters = dict[str, Tensor]  # log_sigma, mix, gain -> [S]


@dataclass(frozen=True)
class Condition:
    """n images under one degradation with every question (Q) on each: S = n Q samples, image by image."""

    images: list[Image.Image]  # n
    inputs: dict[str, Tensor]  # [S, ...]
    answers: Tensor  # [S], token ids

    def batches(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Inputs and answers of at most `BATCH` samples at a time."""
        for start in range(0, len(self.answers), BATCH):
            rows = slice(start, start + BATCH)
            yield {name: value[rows] for name, value in self.inputs.items()}, self.answers[rows]


@dataclass(frozen=True)
class Outcome:
    """What came of one condition."""

    condition: Condition
    right: dict[str, Tensor]  # untuned, one_step, search and, of a degradation, fixed_filter -> [S], bool
    filters: dict[str, Filters]  # by mode
    preset: str  # the fixed filter


def draw(processor: Any, rows: list[Any], count: int, seed: int, name: str | None = None) -> Condition:
    """`count` images of `zoo.questions` rows, or all there are, each degraded once by `name` (None: clean).

    A seed draws the same images for every degradation, and an image is degraded the same way whatever `count`.
    """
    chosen = sorted(np.random.default_rng(seed).permutation(len(rows) // QUESTIONS)[:count].tolist())
    images = [rows[QUESTIONS * i][0] for i in chosen]
    if name:
        images = [degrade(x, name, SEVERITIES[name], 1000 * seed + i) for x, i in zip(images, chosen, strict=True)]
    _, texts, answers = zip(*(rows[QUESTIONS * i + q] for i in chosen for q in range(QUESTIONS)), strict=True)
    repeated = [image for image in images for _ in range(QUESTIONS)]
    inputs = processor(images=repeated, text=list(texts), return_tensors="pt", padding=True)
    return Condition(images, dict(inputs), torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(answers))))


@torch.no_grad()
def filtered_right(model: Any, processor: Any, presets: tuple[Preset, ...], condition: Condition) -> Tensor:
    """Which answers are right behind each of P fixed filters, without tuning: [P, S], bool."""
    spec, parts = processor.image_processor, []
    for inputs, answers in condition.batches():
        tone = torch.tensor(spec.image_mean), torch.tensor(spec.image_std)
        repeated = {name: value.repeat(len(presets), *[1] * (value.dim() - 1)) for name, value in inputs.items()}
        repeated["pixel_values"] = render(presets, inputs["pixel_values"], TAPS, *tone).pixels
        tokens = model(**repeated, logits_to_keep=1).logits[:, -1].argmax(-1)
        parts.append(tokens.view(len(presets), -1) == answers)
    return torch.cat(parts, 1)


def tune_all(model: Any, config: TuningConfig, condition: Condition, bar: tqdm) -> tuple[Tensor, Tensor, Filters]:
    """Tune every sample of a condition: which are right before and after, [S] each, and the filters."""
    before, after, filters = [], [], []
    with TestTimeTuner(model, config) as tuner:
        for inputs, answers in condition.batches():
            result = tuner.tune(**inputs)
            before.append(torch.tensor([s.token_before for s in result.samples]) == answers)
            after.append(result.logits.argmax(-1) == answers)
            filters.append({name: result.parameters[f"filter.{name}"] for name in ("log_sigma", "mix", "gain")})
            bar.update(len(answers))
    return torch.cat(before), torch.cat(after), {n: torch.cat([f[n] for f in filters]) for n in filters[0]}


def run_all(model: Any, processor: Any, images: int, seed: int) -> dict[str, Outcome]:
    """Every condition in every mode, "clean" first. The fixed filter is chosen on the validation split alone."""
    test, validation, outcomes = zoo.questions("test"), zoo.questions("validation"), {}
    clean = draw(processor, test, images, seed)
    with tqdm(total=len(MODES) * len(clean.answers) * (1 + len(SEVERITIES)), unit="sample") as bar:
        for name in (None, *SEVERITIES):
            bar.set_description(f"{name or 'clean':14}".replace("_", " "))
            condition = draw(processor, test, images, seed, name) if name else clean
            right, filters, preset = {}, {}, ""
            for mode, config in MODES.items():
                right["untuned"], right[mode], filters[mode] = tune_all(model, config, condition, bar)
            if name:
                like = draw(processor, validation, VALIDATION_IMAGES, seed + 1, name)
                counts = filtered_right(model, processor, DEFAULT_PRESETS, like).sum(1)
                fixed = DEFAULT_PRESETS[int(counts.argmax())]  # the first of equals
                right["fixed_filter"], preset = filtered_right(model, processor, (fixed,), condition)[0], fixed.name
            outcomes[name or "clean"] = Outcome(condition, right, filters, preset)
    return outcomes


def time_modes(model: Any, condition: Condition) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Median ms of single-image calls: mode -> phase -> ms, and mode -> wall clock. "plain" is one forward."""
    singles = [{n: v[i % len(v), None] for n, v in condition.inputs.items()} for i in range(WARM_UP + TIMED)]
    phases, wall = {}, {}

    def clock(mode: str, call: Callable[..., Any]) -> list[Any]:
        elapsed, results = [], []
        for inputs in singles:
            start = time.perf_counter()
            results.append(call(**inputs))
            elapsed.append(1e3 * (time.perf_counter() - start))
        wall[mode] = statistics.median(elapsed[WARM_UP:])
        return results[WARM_UP:]

    with torch.no_grad():
        clock("plain", functools.partial(model, logits_to_keep=1))
    phases["plain"] = {"forward": wall["plain"]}
    for mode, config in MODES.items():
        with TestTimeTuner(model, config) as tuner:
            timings = [result.timings_ms for result in clock(mode, tuner.tune)]
        phases[mode] = {name: statistics.median(t[name] for t in timings) for name in timings[0]}
    return phases, wall


def examples(model: Any, processor: Any, outcomes: dict[str, Outcome]) -> list[figures.Example]:
    """Per degradation a digit question that tuning with search mends where there is one, tuned once more.

    Of several, the first whose image is not shown already.
    """
    words, clean = processor.tokenizer.convert_ids_to_tokens, outcomes["clean"].condition
    rows: dict[str, int] = {}
    for name in SEVERITIES:
        mended = outcomes[name].right["search"] & ~outcomes[name].right["untuned"]
        fresh = torch.tensor([row not in rows.values() for row in range(len(mended))])
        rows[name] = QUESTIONS * int((2 * mended + fresh)[::QUESTIONS].argmax())
    inputs = {c: torch.stack([outcomes[n].condition.inputs[c][row] for n, row in rows.items()]) for c in clean.inputs}
    with TestTimeTuner(model, MODES["search"]) as tuner:
        result = tuner.tune(**inputs)
    with torch.no_grad():
        plain = model(**inputs, logits_to_keep=1).logits[:, -1]
    ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids(list(zoo.DIGITS)))
    return [
        figures.Example(
            degradation=name,
            images=(*(outcomes[n].condition.images[row // QUESTIONS] for n in ("clean", name)), result.image(i)[0]),
            truth=words(int(clean.answers[row])),
            answers=(words(sample.token_before), words(sample.token_after)),
            preset=sample.preset,
            probabilities=tuple(logits[i].softmax(-1)[ids].tolist() for logits in (plain, result.logits)),
        )
        for i, ((name, row), sample) in enumerate(zip(rows.items(), result.samples, strict=True))
    ]


def summarise(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Accuracies and lifts of a report, as fractions; mended and broken count the answers that search changed."""
    table: dict[str, dict[str, Any]] = {}
    for name, o in outcomes.items():
        untuned, search = o.right["untuned"], o.right["search"]
        table[name] = {"n": len(untuned), **{mode: int(r.sum()) / len(r) for mode, r in o.right.items()}}
        table[name] |= {"mended": int((search & ~untuned).sum()), "broken": int((untuned & ~search).sum())}
    rows = [{"degradation": n, "severity": s, **table[n], "preset": outcomes[n].preset} for n, s in SEVERITIES.items()]
    report: dict[str, Any] = {"rows": rows, "clean": table["clean"], "standard_error": {}}
    right = [outcomes[name].right for name in SEVERITIES]
    for mode in ("fixed_filter", *MODES):
        report[f"mean_lift_{mode}"] = statistics.fmean(row[mode] - row["untuned"] for row in rows)
        lifts = torch.stack([r[mode].float() - r["untuned"].float() for r in right])
        per_image = lifts.view(len(rows), -1, QUESTIONS).mean((0, 2))  # answers on one image go together
        report["standard_error"][mode] = (per_image.std(correction=0) / max(len(per_image) - 1, 1) ** 0.5).item()
    return report


def surroundings(seed: int) -> dict[str, Any]:
    """What a run depends on beside the code."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    packages = ("vqfast", "torch", "transformers")
    return {
        "seed": seed,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{cpu}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def main(
    images: Annotated[int, typer.Option(min=1, help="Test images per degradation; 500 for all.")] = IMAGES,
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("out/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Draws images and degradations.")] = 0,
) -> None:
    """Tune the embedded model on degraded test images and report accuracy, filters and time."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, processor = zoo.load()
    phases, wall = time_modes(model, draw(processor, zoo.questions("test"), images, seed))
    outcomes = run_all(model, processor, images, seed)
    report = {**summarise(outcomes), "phases_ms": phases, "latency_ms": wall, **surroundings(seed)}
    report |= {"images": len(outcomes["clean"].condition.images), "validation_images": VALIDATION_IMAGES}
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    filters = {name: outcomes[name].filters for name in SEVERITIES}
    pictures = figures.draw_all(out, report, examples(model, processor, outcomes), filters, TAPS)
    figures.write_page(out / "report.html", report, pictures)
    figures.print_report(report)
    print(f"\n{out / 'report.html'}")


if __name__ == "__main__":
    typer.run(main)
