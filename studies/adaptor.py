"""`python -m studies.adaptor`: adapters to image codecs, trained without labels, on compressed digits.

Trains one set of adapters for three codecs at every level of `studies.codecs` by distillation from the frozen vision
tower, and measures what they bring there and on a codec that they have never seen, beside models that were fine-tuned
with labels on each codec. Writes adapters.safetensors and report.json into the output folder and prints tables.

Source: arXiv 2512.20901; sizes, steps and learning rates are this project's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

import vqfast
from studies.bootstrap import Estimate, bootstrap
from studies.codecs import CODECS, compress_digits
from studies.demo import surroundings
from studies.figures import TABLE
from studies.metrics import accuracy, bd_metric, gaps, paired_test
from vqfast import CodecAdapters, zoo
from vqfast.zoo.train import BATCH, ask, augment, fit, language_loss, pack, tensors

SEEN = ("jpeg", "webp", "avif")
UNSEEN = "jpeg2000"  # the only one that transforms the whole image (wavelets), not blocks: furthest from the others
LEAST = {UNSEEN: 0.25}  # below it less than half of the answers are right on the validation split; by chance 0.37 are
LEVELS = {codec: tuple(x for x in levels if x >= LEAST.get(codec, 0)) for codec, levels in CODECS.items()}
STEPS, RATE = 1000, 1e-2
FINE_TUNING_STEPS, FINE_TUNING_RATE = 400, 1e-3  # of each ceiling
BOTTLENECK = 32
UNTOLD = 0.5  # share of labels that are dropped
# Pixels per side at which an epoch's images are compressed while the adapters learn: artefacts of several scales help
# with the unseen codec (BD-accuracy on the validation split +0.9 points, with 8 alone +0.1).
SIZES = (6, 8, 8, 10)
CLEAN = 0.15  # share of images that are not compressed
SIGNIFICANT = 0.05

Right = dict[str, np.ndarray]  # way of answering -> bool, [images, questions]


class Condition(NamedTuple):
    """Images of a split at one level of a codec."""

    codec: str
    level: float
    bpp: float  # bits per pixel, as `compress_digits` counts them
    images: Tensor  # [n, 3, 32, 32]

    @property
    def name(self) -> str:
        return f"{self.codec}:{self.level:g}"


LABELS = tuple(f"{codec}:{level:g}" for codec in SEEN for level in LEVELS[codec])


def wrong(label: str) -> str:
    """A label of another codec and level."""
    return LABELS[(LABELS.index(label) + len(LABELS) // 2) % len(LABELS)]


def compress(images: Tensor, codec: str, level: float, size: int | None = None) -> tuple[Tensor, float]:
    """`compress_digits` of images [n, 3, 32, 32] in [-1, 1]."""
    tones = images.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    decoded, bpp = compress_digits([Image.fromarray(x) for x in tones], codec, level, size)
    return torch.from_numpy(np.stack([np.asarray(x) for x in decoded])).permute(0, 3, 1, 2) / 127.5 - 1, bpp


def conditions(images: Tensor, codec: str) -> Iterator[Condition]:
    """Every level of a codec, but for those that the codec meets with a file of the same size as the level before."""
    before = 0.0
    for level in LEVELS[codec]:
        compressed, bpp = compress(images, codec, level)
        if bpp != before:
            yield Condition(codec, level, bpp, compressed)
        before = bpp


def training_batches(
    count: int, images: Tensor, labels: Sequence[str], clean: float = 0.0, sizes: Sequence[int | None] = (None,)
) -> Iterator[tuple[Tensor, Tensor, list[str | None], Tensor]]:
    """Batches of (originals, compressed, labels, rows of `images`), epoch after epoch: `count` in all.

    Every epoch draws each image's label anew, or, for a share of `clean`, leaves the image as it is and without a label
    (None), and augments every second image. `sizes`: drawn from for every epoch, for `compress_digits`.
    """
    while count > 0:
        rows = torch.randperm(len(images))
        originals = images[rows]
        originals[::2] = augment(originals[::2])
        size = sizes[int(torch.randint(len(sizes), ()))]
        drawn = torch.randint(len(labels), rows.shape).where(torch.rand(rows.shape) >= clean, -1)
        compressed = originals.clone()
        for i in drawn.unique().tolist():
            if i >= 0:
                codec, level = labels[i].split(":")
                compressed[drawn == i] = compress(originals[drawn == i], codec, float(level), size)[0]
        told = [None if i < 0 else labels[i] for i in drawn.tolist()]
        for batch in torch.arange(len(rows)).split(BATCH)[:count]:
            part = batch.tolist()
            yield originals[batch], compressed[batch], [told[i] for i in part], rows[batch]
        count -= -(-len(rows) // BATCH)


def features(model: Any, images: Tensor) -> Tensor:
    """What the projector receives, [B, patches, width]."""
    config = model.config
    states = model.model.vision_tower(images, output_hidden_states=True).hidden_states[config.vision_feature_layer]
    return states[:, 1:] if config.vision_feature_select_strategy == "default" else states


def distil(images: Tensor, steps: int, seed: int) -> tuple[Any, CodecAdapters, list[float]]:
    """The embedded model with trained adapters, and the loss of every step. No labels: images alone."""
    torch.manual_seed(seed)
    teacher, (model, _) = zoo.load()[0], zoo.load()
    adapters = vqfast.insert_codec_adapters(model, LABELS, BOTTLENECK)

    def losses() -> Iterator[Tensor]:
        for originals, compressed, names, _ in training_batches(steps, images, LABELS, CLEAN, SIZES):
            with torch.no_grad():
                target = features(teacher, originals)
            told = [
                None if untold else name for name, untold in zip(names, torch.rand(len(names)) < UNTOLD, strict=True)
            ]
            with adapters.condition(told):
                loss = F.mse_loss(features(model, compressed), target)
            yield loss

    values = fit(adapters.parameters(), losses(), steps, RATE, warm_up=50, label="adapters")
    adapters.requires_grad_(False)
    return model, adapters, values


def fine_tune(images: Tensor, answers: Tensor, codec: str, steps: int, seed: int) -> Any:
    """The ceiling theta*: all weights of the embedded model, tuned with labels on all levels of a codec together."""
    torch.manual_seed(seed)
    model, processor = zoo.load()
    packed, labels = pack(processor), [condition.name for condition in conditions(images, codec)]

    def losses() -> Iterator[Tensor]:
        for _, compressed, _, rows in training_batches(steps, images, labels):
            yield language_loss(ask(model, packed, compressed, answers[rows]).logits, answers[rows])

    fit(model.requires_grad_(True).parameters(), losses(), steps, FINE_TUNING_RATE, warm_up=20, label=f"theta* {codec}")
    return model.requires_grad_(False)


class Bench:
    """Answers and distances of one split under everything that is compared."""

    def __init__(self, split: str, adapted: tuple[Any, CodecAdapters], ceilings: dict[str, Any]) -> None:
        self.plain, processor = zoo.load()
        self.adapted, self.adapters = adapted
        self.ceilings, self.packed = ceilings, pack(processor)
        self.images, self.answers = tensors(processor, split)
        self.target = self.batched(lambda x: features(self.plain, x), self.images)

    @staticmethod
    @torch.no_grad()
    def batched(function: Any, *tensors: Tensor) -> Tensor:
        parts = zip(*(tensor.split(BATCH) for tensor in tensors), strict=True)
        return torch.cat([function(*part) for part in parts])

    def right(self, model: Any, images: Tensor) -> np.ndarray:
        logits = self.batched(lambda x: ask(model, self.packed, x).logits, images)
        return (logits.argmax(-1) == self.answers).numpy()

    def distance(self, model: Any, images: Tensor) -> np.ndarray:
        """The distillation loss of each image, [n]."""
        return self.batched(
            lambda x, target: (features(model, x) - target).square().mean((1, 2)), images, self.target
        ).numpy()

    def told(self, label: str | None, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        with self.adapters.condition(label):
            return self.right(self.adapted, images), self.distance(self.adapted, images)

    def measure(self, condition: Condition) -> tuple[Right, dict[str, np.ndarray]]:
        """Which answers are right, and the distances to the original's features."""
        images = condition.images
        right, distance = {"untuned": self.right(self.plain, images)}, {"untuned": self.distance(self.plain, images)}
        labels: dict[str, str | None] = {"unknown": None}
        if condition.codec in SEEN:
            labels |= {"known": condition.name, "wrong": wrong(condition.name)}
        for way, label in labels.items():
            right[way], distance[way] = self.told(label, images)
        right["ceiling"] = self.right(self.ceilings[condition.codec], images)
        return right, distance


def real_levels(bench: Bench) -> dict[str, list[float]]:
    """Of each codec the levels that cost answers beyond chance, some of which the ceiling gets back."""
    original, levels = bench.right(bench.plain, bench.images), dict[str, list[float]]()
    for codec, ceiling in bench.ceilings.items():
        levels[codec] = []
        for condition in tqdm(list(conditions(bench.images, codec)), f"levels {codec}"):
            untuned, tuned = bench.right(bench.plain, condition.images), bench.right(ceiling, condition.images)
            costs = untuned.mean() < original.mean() and paired_test(original, untuned) < SIGNIFICANT
            if costs and tuned.mean() > untuned.mean():
                levels[codec].append(condition.level)
    return levels


def estimate(value: Estimate) -> dict[str, float]:
    return value._asdict()


def summarise(codec: str, rows: list[tuple[Condition, Right]], levels: Sequence[float], clean: float) -> dict[str, Any]:
    """Bjontegaard metrics, and the gaps pooled over `levels`, with intervals over images."""
    bpp = [condition.bpp for condition, _ in rows]
    stacked = {way: np.stack([right[way] for _, right in rows]) for way in rows[0][1]}  # [levels, images, questions]
    images = stacked["untuned"].shape[1]

    def bd(way: str, drawn: np.ndarray) -> float:
        curves = (stacked[name][:, drawn].mean((1, 2)) for name in ("untuned", way))
        before, after = curves
        return bd_metric(bpp, before, bpp, after)

    ways = [way for way in ("known", "unknown", "ceiling") if way in stacked]
    summary: dict[str, Any] = {
        "codec": codec,
        "images": images,
        "bd_accuracy": {way: estimate(bootstrap(lambda drawn, way=way: bd(way, drawn), images)) for way in ways},
        "real_levels": list(levels),
    }
    kept = [condition.level in levels for condition, _ in rows]
    if any(kept) and stacked["ceiling"][kept].mean() > stacked["untuned"][kept].mean():
        pooled = {way: right[kept].mean((0, 2)) for way, right in stacked.items()}  # [images]

        def share(way: str, drawn: np.ndarray) -> float:
            before, after, ceiling = (pooled[name][drawn].mean() for name in ("untuned", way, "ceiling"))
            return float((after - before) / (ceiling - before)) if ceiling != before else float("nan")

        summary["gaps"] = gaps(clean, pooled["untuned"].mean(), pooled["ceiling"].mean())._asdict()
        summary["pooled_accuracy"] = {way: float(value.mean()) for way, value in pooled.items()}
        summary["generalisation_gap_closed"] = {
            way: estimate(bootstrap(lambda drawn, way=way: share(way, drawn), images))
            for way in ways
            if way != "ceiling"
        }
    return summary


def conditioning(measured: list[tuple[Right, dict[str, np.ndarray]]]) -> dict[str, Any]:
    """The right label against none and a wrong one over all conditions: accuracy and distillation loss."""
    report: dict[str, Any] = {}
    for quantity, values in (("accuracy", [right for right, _ in measured]), ("loss", [loss for _, loss in measured])):
        means = {
            way: np.stack([row[way].reshape(len(row[way]), -1).mean(1) for row in values]).mean(0)
            for way in ("untuned", "known", "unknown", "wrong")
        }
        report[quantity] = {way: float(value.mean()) for way, value in means.items()}
        for way in ("unknown", "wrong"):
            difference = means["known"] - means[way]
            report[quantity][f"known - {way}"] = estimate(
                bootstrap(lambda drawn, x=difference: float(x[drawn].mean()), len(difference))
            )
    return report


def targets(summaries: dict[str, Any], clean: dict[str, Any], told: dict[str, Any]) -> list[dict[str, Any]]:
    """What the study set out to reach."""
    rows = []
    for codec in ("jpeg", "webp"):
        closed = summaries[codec].get("generalisation_gap_closed", {}).get("known")
        rows.append(
            (f"share of the generalisation gap closed, {codec}, at least 0.5", closed, lambda x: x["value"] >= 0.5)
        )
    unseen = summaries[UNSEEN]["bd_accuracy"]["unknown"]
    rows.append((f"BD-accuracy on the unseen {UNSEEN} above 0", unseen, lambda x: x["value"] > 0))
    rows.append(("accuracy lost on clean images at most 0", clean["lost"], lambda x: x["value"] <= 0))
    loss = told["loss"]["known - wrong"]
    rows.append(("distillation loss with the right label below that with a wrong one", loss, lambda x: x["high"] < 0))
    return [
        {"target": text, "measured": found, "met": found is not None and bool(met(found))} for text, found, met in rows
    ]


def study(steps: int, fine_tuning_steps: int, split: str, seed: int) -> tuple[CodecAdapters, dict[str, Any]]:
    """Train, choose the levels on the validation split, measure."""
    images, answers = tensors(zoo.load()[1], "train")
    model, adapters, losses = distil(images, steps, seed)
    ceilings = {codec: fine_tune(images, answers, codec, fine_tuning_steps, seed) for codec in CODECS}
    levels = real_levels(Bench("validation", (model, adapters), ceilings))
    bench = Bench(split, (model, adapters), ceilings)
    untuned, adapted = bench.right(bench.plain, bench.images), bench.told(None, bench.images)[0]
    lost = (untuned.astype(float) - adapted).mean(1)
    clean: dict[str, Any] = {"untuned": accuracy(untuned)._asdict(), "unknown": accuracy(adapted)._asdict()}
    clean["lost"] = estimate(bootstrap(lambda drawn: float(lost[drawn].mean()), len(lost)))
    rows, summaries, seen = [], {}, []
    for codec in CODECS:
        measured = []
        for condition in tqdm(list(conditions(bench.images, codec)), f"{split} {codec}"):
            right, distance = bench.measure(condition)
            measured.append((condition, right))
            if codec in SEEN:
                seen.append((right, distance))
            row: dict[str, Any] = {"codec": codec, "level": condition.level, "bpp": condition.bpp}
            row |= {way: accuracy(value)._asdict() for way, value in right.items()}
            row["loss"] = {way: float(value.mean()) for way, value in distance.items()}
            row["gaps"] = gaps(untuned.mean(), right["untuned"].mean(), right["ceiling"].mean())._asdict()
            rows.append(row)
        summaries[codec] = summarise(codec, measured, levels[codec], untuned.mean())
    told = conditioning(seen)
    return adapters, {
        "split": split,
        "images": len(bench.images),
        "questions": len(zoo.QUESTIONS),
        "clean": clean,
        "rows": rows,
        "codecs": summaries,
        "conditioning": told,
        "targets": targets(summaries, clean, told),
        "losses": {"first_50_steps": float(np.mean(losses[:50])), "last_50_steps": float(np.mean(losses[-50:]))},
    }


def print_report(report: dict[str, Any]) -> None:
    """Tables of what report.json holds."""
    ways = ("untuned", "known", "unknown", "wrong", "ceiling")
    console, table = Console(), Table(title=f"right answers, %, {report['split']} split", **TABLE)
    for name in ("codec", "level", "bits/pixel", *ways):
        table.add_column(name, justify="left" if name == "codec" else "right")
    clean = report["clean"]
    table.add_row("none", "", "", *(f"{100 * clean[way]['mean']:.1f}" if way in clean else "" for way in ways))
    for row in report["rows"]:
        cells = (f"{100 * row[way]['mean']:.1f}" if way in row else "" for way in ways)
        table.add_row(row["codec"], f"{row['level']:g}", f"{row['bpp']:.3f}", *cells)
    console.print(table)
    for codec, summary in report["codecs"].items():
        bd = ", ".join(f"{way} {100 * x['value']:+.2f}" for way, x in summary["bd_accuracy"].items())
        closed = summary.get("generalisation_gap_closed", {})
        parts = ", ".join(f"{way} {x['value']:.2f} [{x['low']:.2f}, {x['high']:.2f}]" for way, x in closed.items())
        console.print(
            f"{codec}: BD-accuracy {bd} points; generalisation gap closed: {parts or 'no gap'}", highlight=False
        )
    for row in report["targets"]:
        measured = row["measured"] and "{value:.4f} [{low:.4f}, {high:.4f}]".format(**row["measured"])
        console.print(
            f"{'met   ' if row['met'] else 'MISSED'} {row['target']}: {measured}", highlight=False, markup=False
        )


def main(
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("out/studies/adaptor"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of the adapters.")] = STEPS,
    fine_tuning_steps: Annotated[int, typer.Option(min=1, help="Steps of each fine-tuned model.")] = FINE_TUNING_STEPS,
    split: Annotated[str, typer.Option(help="Split to measure on: validation or test.")] = "test",
    seed: Annotated[int, typer.Option(min=0, help="Of training.")] = 0,
) -> None:
    """Train adapters to image codecs without labels and measure them, beside fine-tuning with labels."""
    if split not in ("validation", "test"):
        raise typer.BadParameter(f"split must be validation or test; got {split!r}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    adapters, report = study(steps, fine_tuning_steps, split, seed)
    report["settings"] = {
        "steps": steps,
        "rate": RATE,
        "bottleneck": BOTTLENECK,
        "labels_dropped": UNTOLD,
        "clean_share": CLEAN,
        "sizes": SIZES,
        "batch": BATCH,
        "fine_tuning_steps": fine_tuning_steps,
        "fine_tuning_rate": FINE_TUNING_RATE,
        "unseen": UNSEEN,
        "labels": LABELS,
    }
    report |= surroundings(seed)
    out.mkdir(parents=True, exist_ok=True)
    adapters.save(out / "adapters.safetensors")
    (out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print_report(report)


if __name__ == "__main__":
    typer.run(main)
