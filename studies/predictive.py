"""`python -m studies.predictive`: fine-tuning with and without predictive regularisation, layer by layer.

Fine-tunes projector and language model of the embedded model, the vision tower frozen, on the same batches with
L = L_LM and with L = L_LM + 0.5 L_PRe (`vqfast.nn.predictive_loss` at the middle layer), and looks at the visual tokens
in every layer. Writes a transformers folder per seed and arm, report.json and layers.png into the output folder.

Source: arXiv 2603.20808. From this project: that it starts at the embedded model's weights, and the definition of the
diagnostics on digits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from studies.bootstrap import bootstrap
from studies.demo import surroundings
from studies.figures import TABLE
from studies.metrics import accuracy
from vqfast import zoo
from vqfast.nn import PredictiveHead, predictive_loss
from vqfast.zoo.train import BATCH, IMAGE, RATE, ask, augment, batches, fit, language_loss, pack, save, tensors

ARMS = {"without": 0.0, "with": 0.5}  # weight of L_PRe
LAYER = 1  # of hidden_states 0 to 2: behind the first of the language model's two layers
STEPS = 200
SEEDS = 3
PATCH = 4  # pixels per side of the vision tower's patches
STROKE = -0.25  # mean tone of a patch, -1 to 1, from which on it belongs to the stroke
MARGIN = 0.005  # of accuracy; an interval that reaches further down counts as worse
DIAGNOSTICS = {
    "probe": "accuracy of a linear probe",
    "contrast": "semantic contrast ratio",
    "dimension": "effective dimension",
}


def fine_tune(weight: float, steps: int, seed: int, label: str = "") -> tuple[Any, dict[str, float]]:
    """A fine-tuned copy of the embedded model and its losses over the last 50 steps.

    The batches depend on steps and seed alone, the start of the head on the seed.
    """
    model, processor = zoo.load()
    images, answers = tensors(processor, "train")
    packed = pack(processor)
    visual = packed.ids == IMAGE
    torch.manual_seed(seed)
    head = PredictiveHead(model.config.text_config.hidden_size)  # in both arms: it draws from the generator
    model.requires_grad_(True)
    model.model.vision_tower.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts: list[tuple[float, float]] = []

    def losses() -> Iterator[Tensor]:
        for rows in batches(len(images), steps):
            output = ask(model, packed, augment(images[rows]), answers[rows], output_hidden_states=True)
            language = language_loss(output.logits, answers[rows])
            predictive = predictive_loss(output, LAYER, visual.expand(len(rows), -1), head)
            parts.append((language.item(), predictive.item()))
            yield language + weight * predictive if weight else language

    fit([*trained, *(head.parameters() if weight else ())], losses(), steps, RATE, label=label)
    language, predictive = np.mean(parts[-50:], 0).tolist()
    return model.requires_grad_(False), {"language": language, "predictive": predictive}


class Tokens(NamedTuple):
    """What a model makes of a split."""

    states: Tensor  # [layers + 1, images, patches, width], visual tokens
    right: np.ndarray  # [images, questions], bool


@torch.no_grad()
def visual_tokens(model: Any, images: Tensor, answers: Tensor) -> Tokens:
    packed, states, right = pack(zoo.load()[1]), [], []
    visual = packed.ids == IMAGE
    for part, expected in zip(images.split(BATCH), answers.split(BATCH), strict=True):
        output = ask(model, packed, part, output_hidden_states=True)
        states.append(torch.stack([state[:, visual] for state in output.hidden_states]))
        right.append(output.logits.argmax(-1) == expected)
    return Tokens(torch.cat(states, 1), torch.cat(right).numpy())


def probe(train: Tensor, train_classes: Tensor, test: Tensor, test_classes: Tensor) -> np.ndarray:
    """Which test images logistic regression on the mean visual token gets right: bool [images].

    train, test: tokens [images, patches, width]; features are standardised, scikit-learn's own C = 1.
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    classifier.fit(train.mean(1).numpy(), train_classes.numpy())
    return classifier.predict(test.mean(1).numpy()) == test_classes.numpy()


def stroke(images: Tensor) -> Tensor:
    """Which patches of images [n, 3, 32, 32] in [-1, 1] belong to the digit's stroke: bool [n, patches]."""
    return F.avg_pool2d(images[:, 0], PATCH).flatten(1) > STROKE


def contrast(tokens: Tensor, stroke: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Cohesion and coupling of every image, [images], whose means' quotient is the semantic contrast ratio.

        cohesion_n = mean of cos(h_i, h_j), i != j both on the stroke of image n
        coupling_n = mean of cos(h_i, h_j), i on the stroke and j on the background of image n
        ratio      = mean_n cohesion_n / mean_n coupling_n

    tokens: [images, patches, width]; stroke: bool [images, patches], with two or more on the stroke and one off it.
    """
    cosines = F.normalize(tokens.double(), dim=-1)
    cosines = cosines @ cosines.mT
    inside = (stroke[:, :, None] & stroke[:, None]) & ~torch.eye(stroke.shape[1], dtype=torch.bool)
    across = stroke[:, :, None] & ~stroke[:, None]
    means = ((cosines * pairs).sum((1, 2)) / pairs.sum((1, 2)) for pairs in (inside, across))
    cohesion, coupling = (mean.numpy() for mean in means)
    return cohesion, coupling


def effective_dimension(tokens: Tensor) -> np.ndarray:
    """Participation ratio of the principal components of every image's patches, [images]: 1 to the width.

        d_n = (sum_k l_k)^2 / sum_k l_k^2 = tr(C)^2 / tr(C^2),    l_k: eigenvalues of the patches' covariance C

    tokens: [images, patches, width].
    """
    centred = tokens.double() - tokens.double().mean(1, keepdim=True)
    covariance = centred.mT @ centred
    trace = covariance.diagonal(dim1=1, dim2=2).sum(1)
    return (trace.square() / covariance.square().sum((1, 2))).numpy()


class Layers(NamedTuple):
    """Diagnostics of one model, image by image, [layers, images], and its answers, [images, questions]."""

    probe: np.ndarray  # bool
    cohesion: np.ndarray
    coupling: np.ndarray
    dimension: np.ndarray
    right: np.ndarray  # bool

    def value(self, diagnostic: str, layer: int, drawn: np.ndarray) -> float:
        """A diagnostic of DIAGNOSTICS over the images `drawn`."""
        if diagnostic == "contrast":
            return float(self.cohesion[layer, drawn].mean() / self.coupling[layer, drawn].mean())
        return float(getattr(self, diagnostic)[layer, drawn].mean())

    def degradation(self, diagnostic: str, drawn: np.ndarray) -> float:
        """What a diagnostic loses from the language model's input to the middle layer."""
        return self.value(diagnostic, 0, drawn) - self.value(diagnostic, LAYER, drawn)


def examine(model: Any, split: str) -> Layers:
    """Diagnostics on a split; the probes are trained on the train split."""
    processor = zoo.load()[1]
    (train, train_answers), (images, answers) = tensors(processor, "train"), tensors(processor, split)
    fitted, found = visual_tokens(model, train, train_answers), visual_tokens(model, images, answers)
    classes, on = (train_answers[:, 0], answers[:, 0]), stroke(images)
    probes = [probe(a, classes[0], b, classes[1]) for a, b in zip(fitted.states, found.states, strict=True)]
    contrasts = [contrast(state, on) for state in found.states]
    return Layers(
        probe=np.stack(probes),
        cohesion=np.stack([cohesion for cohesion, _ in contrasts]),
        coupling=np.stack([coupling for _, coupling in contrasts]),
        dimension=np.stack([effective_dimension(state) for state in found.states]),
        right=found.right,
    )


Arms = dict[str, list[Layers]]  # arm -> the models of every seed


def over_seeds(statistic: Callable[[int, np.ndarray], float], arms: Arms) -> dict[str, float]:
    """Mean over seeds of a statistic of (seed, images drawn), with its interval over images and seeds."""

    def mean(drawn: np.ndarray, seeds: np.ndarray) -> float:
        return float(np.mean([statistic(seed, drawn) for seed in seeds]))

    return bootstrap(mean, len(arms["with"][0].right), len(arms["with"]))._asdict()


def diagnose(arms: Arms, name: str) -> dict[str, Any]:
    """One of DIAGNOSTICS: in every layer, and what it loses up to the middle one, with and without L_PRe."""
    images, depth = np.arange(len(arms["with"][0].right)), len(arms["with"][0].probe)
    found: dict[str, Any] = {"layers": {}, "degradation": {}, "degradation_by_seed": {}}
    for arm, models in arms.items():
        found["layers"][arm] = [
            over_seeds(lambda i, x, models=models, k=k: models[i].value(name, k, x), arms) for k in range(depth)
        ]
        found["degradation"][arm] = over_seeds(lambda i, x, models=models: models[i].degradation(name, x), arms)
        found["degradation_by_seed"][arm] = [model.degradation(name, images) for model in models]
    without, with_ = arms["without"], arms["with"]
    found["reduction"] = over_seeds(lambda i, x: without[i].degradation(name, x) - with_[i].degradation(name, x), arms)
    found["middle"] = over_seeds(lambda i, x: with_[i].value(name, LAYER, x) - without[i].value(name, LAYER, x), arms)
    return found


def summarise(arms: Arms) -> dict[str, Any]:
    """Diagnostics, task accuracy and whether the targets are met."""
    summary: dict[str, Any] = {"diagnostics": {name: diagnose(arms, name) for name in DIAGNOSTICS}}
    summary["task"] = {
        "accuracy": {arm: [accuracy(model.right)._asdict() for model in models] for arm, models in arms.items()},
        "with - without": over_seeds(
            lambda i, x: float(arms["with"][i].right[x].mean() - arms["without"][i].right[x].mean()), arms
        ),
    }
    summary["targets"] = targets(summary)
    return summary


def targets(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What the study set out to reach."""
    rows = []
    for name, found in summary["diagnostics"].items():
        degraded, reduction = found["degradation"]["without"]["low"] > 0, found["reduction"]
        rows.append(
            {
                "target": f"{DIAGNOSTICS[name]}: degradation measurably smaller with the regularisation",
                "measured": reduction,
                "degraded_without": degraded,
                "met": degraded and reduction["low"] > 0,
            }
        )
    difference = summary["task"]["with - without"]
    rows.append(
        {
            "target": f"task accuracy not worse by more than {MARGIN}",
            "measured": difference,
            "met": difference["low"] > -MARGIN,
        }
    )
    return rows


def draw(path: Path, report: dict[str, Any]) -> None:
    """The three diagnostics by layer and arm."""
    figure, axes = plt.subplots(1, len(DIAGNOSTICS), figsize=(11, 3.2), layout="constrained")
    for axis, (name, title) in zip(axes, DIAGNOSTICS.items(), strict=True):
        for shift, (arm, layers) in zip((-0.03, 0.03), report["diagnostics"][name]["layers"].items(), strict=True):
            values, lows, highs = (np.array([row[key] for row in layers]) for key in ("value", "low", "high"))
            x = np.arange(len(layers)) + shift
            axis.errorbar(x, values, (values - lows, highs - values), marker="o", capsize=3, label=f"{arm} L_PRe")
        axis.plot(report["start"][name], color="grey", linestyle=":", label="before fine-tuning")
        axis.set(title=title, xlabel="layer", xticks=range(len(layers)))
    axes[0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_report(report: dict[str, Any]) -> None:
    """Tables of what report.json holds."""
    console, table = Console(), Table(title=f"means over seeds, {report['split']} split", **TABLE)
    for name in ("diagnostic", "L_PRe", "layer 0", "layer 1", "layer 2", "degradation"):
        table.add_column(name, justify="left" if name in ("diagnostic", "L_PRe") else "right")
    for name, found in report["diagnostics"].items():
        for arm, layers in found["layers"].items():
            cells = (f"{row['value']:.3f}" for row in (*layers, found["degradation"][arm]))
            table.add_row(DIAGNOSTICS[name], arm, *cells)
    console.print(table)
    for row in report["targets"]:
        measured = "{value:+.4f} [{low:+.4f}, {high:+.4f}]".format(**row["measured"])
        note = "" if row.get("degraded_without", True) else " (no degradation without it)"
        state = "met   " if row["met"] else "MISSED"
        console.print(f"{state} {row['target']}: {measured}{note}", highlight=False, markup=False)


def main(
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("out/studies/predictive"),
    steps: Annotated[int, typer.Option(min=1, help="Steps of every run.")] = STEPS,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = SEEDS,
    split: Annotated[str, typer.Option(help="Split to measure on: validation or test.")] = "test",
) -> None:
    """Fine-tune the embedded model with and without predictive regularisation and compare its layers."""
    if split not in ("validation", "test"):
        raise typer.BadParameter(f"split must be validation or test; got {split!r}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    start = examine(zoo.load()[0], split)
    everything = np.arange(len(start.right))
    arms: Arms = {arm: [] for arm in ARMS}
    losses: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for seed in range(seeds):
        for arm, weight in ARMS.items():
            model, last = fine_tune(weight, steps, seed, f"seed {seed} {arm}")
            save(model, out / f"{arm}-{seed}")
            arms[arm].append(examine(model, split))
            losses[arm].append(last)
    report: dict[str, Any] = {
        "split": split,
        "images": len(start.right),
        "questions": len(zoo.QUESTIONS),
        **summarise(arms),
        "start": {
            **{name: [start.value(name, k, everything) for k in range(len(start.probe))] for name in DIAGNOSTICS},
            "accuracy": accuracy(start.right)._asdict(),
        },
        "losses_last_50_steps": losses,
        "settings": {
            "weights": ARMS,
            "layer": LAYER,
            "steps": steps,
            "rate": RATE,
            "batch": BATCH,
            "stroke": STROKE,
            "seeds": list(range(seeds)),
        },
        **surroundings(seed=0),
    }
    (out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    draw(out / "layers.png", report)
    print_report(report)


if __name__ == "__main__":
    typer.run(main)
