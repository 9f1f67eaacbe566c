"""What pooling evidence over a stream of images gains over the search of each image alone.

python -m studies.stream > docs/stream.md        (about 10 minutes on one core)

The constants of `vqfast.tuning.stream` were chosen on the validation split (the last table).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from studies.demo import QUESTIONS, SEVERITIES, TAPS, draw, surroundings
from vqfast import zoo
from vqfast.tuning import stream
from vqfast.tuning.candidates import DEFAULT_PRESETS, render, select
from vqfast.tuning.objective import answer_entropy
from vqfast.tuning.stream import Stream

PRESETS = len(DEFAULT_PRESETS)
BLOCKS = (1, 20, 100)  # images until the degradation changes
SEEDS = range(3)  # orders of the samples; each holds every sample once


class Samples(NamedTuple):
    """A split under clean and D - 1 degradations, S samples each, in the order of `studies.demo.draw`."""

    logits: Tensor  # [D, P, S, V]
    answers: Tensor  # [S]

    @property
    def right(self) -> Tensor:
        """Which presets answer right: [D, P, S], bool."""
        return self.logits.argmax(-1) == self.answers

    @property
    def entropy(self) -> Tensor:
        """[D, P, S], nats."""
        flat = self.logits.flatten(0, 2)[:, None]
        return answer_entropy(flat, torch.ones(flat.shape[:2], dtype=torch.bool)).view(self.logits.shape[:3])


@torch.no_grad()
def evaluate(model: Any, processor: Any, split: str) -> Samples:
    """Every preset on every sample of a split."""
    rows, spec, logits = zoo.questions(split), processor.image_processor, []
    tone = torch.tensor(spec.image_mean), torch.tensor(spec.image_std)
    for name in tqdm((None, *SEVERITIES), split):
        condition = draw(processor, rows, len(rows), 0, name)
        parts = []
        for inputs, _ in condition.batches():
            repeated = {key: value.repeat(PRESETS, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
            repeated["pixel_values"] = render(DEFAULT_PRESETS, inputs["pixel_values"], TAPS, *tone).pixels
            parts.append(model(**repeated, logits_to_keep=1).logits[:, -1].unflatten(0, (PRESETS, -1)))
        logits.append(torch.cat(parts, 1))
    return Samples(torch.stack(logits), condition.answers)


def mixed(degradations: int, samples: int, block: int, seed: int) -> list[tuple[int, int]]:
    """(degradation, sample): every sample of every degradation once, `block` of a degradation at a time."""
    generator = random.Random(seed)
    orders = [generator.sample(range(samples), samples) for _ in range(degradations)]
    return [
        (d, i)
        for start in range(0, samples, block)
        for d in generator.sample(range(degradations), degradations)
        for i in orders[d][start : start + block]
    ]


class Prototype:
    """Pooled entropies: the best two, the untouched image and a random one; all while the best one's entropy jumps."""

    def __init__(self) -> None:
        self.mean, self.reopen, self.random = [1.0] * PRESETS, 0, random.Random(0)

    def __call__(self, entropy: Sequence[float]) -> tuple[int, int]:
        best = min(range(PRESETS), key=self.mean.__getitem__)
        indices = {0, *sorted(range(PRESETS), key=self.mean.__getitem__)[:2]}
        indices.add(self.random.choice([i for i in range(PRESETS) if i not in indices]))
        if self.reopen:
            self.reopen, indices = self.reopen - 1, set(range(PRESETS))
        elif entropy[best] - self.mean[best] > 0.7:
            self.reopen, indices = 2, set(range(PRESETS))
        for i in indices:
            self.mean[i] = 0.9 * self.mean[i] + 0.1 * entropy[i]
        return min(indices, key=lambda i: 0.2 * entropy[i] + 0.8 * self.mean[i]), len(indices)


Chosen = Iterator[tuple[int, int]]  # of each sample in turn: preset, presets evaluated
Rule = Callable[[list[tuple[int, int]]], Chosen]


def streamed(samples: Samples, evaluations: int = 4, batch: int = 1) -> Rule:
    def rule(order: list[tuple[int, int]]) -> Chosen:
        state, valid = Stream(PRESETS, evaluations), torch.ones(batch, 1, dtype=torch.bool)
        for start in range(0, len(order), batch):
            rows, asked = order[start : start + batch], state.ask()
            logits = torch.stack([samples.logits[d, :, i] for d, i in rows], 1)[asked, :, None]
            yield from ((chosen, len(asked)) for chosen in state.choose(asked, logits, valid[: len(rows)]).tolist())

    return rule


def prototype(samples: Samples) -> Rule:
    entropy = samples.entropy.transpose(1, 2).tolist()

    def rule(order: list[tuple[int, int]]) -> Chosen:
        state = Prototype()
        return (state(entropy[d][i]) for d, i in order)

    return rule


def fixed(chosen: Tensor, evaluations: int) -> Rule:
    """A choice [D, S] that does not depend on the order."""
    return lambda order: ((int(chosen[d, i]), evaluations) for d, i in order)


def each_alone(samples: Samples) -> Tensor:
    """`select`: [D, S]."""
    valid = torch.ones(len(samples.answers), 1, dtype=torch.bool)
    return torch.stack([select(logits[:, :, None], valid) for logits in samples.logits])


def cell(samples: Samples, rule: Rule, block: int) -> str:
    """Accuracy in %, its difference to `each_alone` in points with its standard error over images; evaluations."""
    right, alone = samples.right, each_alone(samples)
    degradations, count = alone.shape
    gain, accuracy, evaluated = torch.zeros(count), 0.0, 0.0
    for seed in SEEDS:
        order = mixed(degradations, count, block, seed)
        for (d, i), (preset, evaluations) in zip(order, rule(order), strict=True):
            hit = float(right[d, preset, i])
            gain[i] += hit - float(right[d, alone[d, i], i])
            accuracy, evaluated = accuracy + hit, evaluated + evaluations
    total = len(SEEDS) * degradations * count
    images = gain.view(-1, QUESTIONS).sum(1) * (count // QUESTIONS) / total
    error = images.std() / len(images) ** 0.5
    difference = f"{100 * images.mean():+.1f} ± {100 * error:.1f}"
    return f"{100 * accuracy / total:.1f} ({difference}), {evaluated / total:.2f}"


def print_row(label: str, samples: Samples, rule: Rule, blocks: Sequence[int] = BLOCKS) -> None:
    print(f"| {label} | " + " | ".join(cell(samples, rule, block) for block in blocks) + " |", flush=True)


def print_head(title: str) -> None:
    print(f"\n| {title} | changes every image | every 20 | every 100 |\n|---|---|---|---|")


def print_table(title: str, samples: Samples, everywhere: int) -> None:
    """Every rule on a split; `everywhere` is the preset of the row that takes one for all images."""
    right, entropy = samples.right, samples.entropy
    shape = right.shape[0], right.shape[2]
    alone = each_alone(samples)
    print_head(title)
    print_row("untuned", samples, fixed(torch.zeros(shape, dtype=torch.long), 1))
    print_row("each image alone: vote (`select`)", samples, fixed(alone, PRESETS))
    print_row("each image alone: lowest entropy", samples, fixed(entropy.argmin(1), PRESETS))
    print_row("prototype: pooled entropy, all presets on a jump", samples, prototype(samples))
    print_row("**`Stream`**", samples, streamed(samples))
    print_row("`Stream`, batches of 8", samples, streamed(samples, batch=8))
    print_row(f"for all: {DEFAULT_PRESETS[everywhere].name} *", samples, fixed(torch.full(shape, everywhere), 1))
    by_mean = entropy.mean(-1).argmin(1)[:, None].expand(shape)
    print_row("per degradation, by mean entropy **", samples, fixed(by_mean, 1))
    print_row(
        "per degradation, by answers **", samples, fixed(right.float().mean(-1).argmax(1)[:, None].expand(shape), 1)
    )
    print_row("oracle: any preset right **", samples, fixed(right.int().argmax(1), PRESETS))


class PooledEntropy(Stream):
    """`Stream` on negative entropy instead of the margin."""

    def choose(self, indices: Sequence[int], logits: Tensor, valid: Tensor) -> Tensor:
        entropy = torch.stack([answer_entropy(x, valid) for x in logits])[..., None, None]
        return super().choose(indices, torch.cat([-entropy, torch.full_like(entropy, -10.0)], -1), valid)


def print_sensitivity(title: str, samples: Samples) -> None:
    """`Stream` with one constant changed at a time."""
    print_head(title)
    print_row("as it is", samples, streamed(samples))
    changes = {"RATE": (0.005, 0.02, 0.05), "OWN": (0.0, 0.05, 0.2, 0.4), "OPENING": (1, 16)}
    for name, values in changes.items():
        for value in values:
            with mock.patch.object(stream, name, value):
                print_row(f"`{name}` {value}", samples, streamed(samples))
    for evaluations in (3, 6, PRESETS):
        print_row(f"{evaluations} evaluations", samples, streamed(samples, evaluations))
    with mock.patch(f"{__name__}.Stream", PooledEntropy):
        print_row("negative entropy for the margin", samples, streamed(samples))


INTRODUCTION = """# Search for a stream of images

Written by `python -m studies.stream`. Streams of clean images and the demo's eight degradations in random order, all
three questions, without a step. Each cell: accuracy in %, the difference to the search of each image alone in points
with its standard error over images, and presets evaluated per image."""

NOTES = """
\\* one evaluation; the preset that is right most often on the validation split, over all its degradations.
\\*\\* knows what a stream does not: which images share a degradation, or the answers."""


def main() -> None:
    about = surroundings(seed=0)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(INTRODUCTION)
    print(f"{len(SEEDS)} orders of the samples. {about['machine']}; {versions}; {about['date']}.", flush=True)
    model, processor = zoo.load()
    validation, test = (evaluate(model, processor, split) for split in ("validation", "test"))
    everywhere = int(validation.right.float().mean((0, 2)).argmax())
    print_table("test split (500 images), constants final", test, everywhere)
    print(NOTES)
    print_table("validation split (200 images)", validation, everywhere)
    print("\nThe choice of constants, one changed at a time:")
    print_sensitivity("validation split, `Stream`", validation)


if __name__ == "__main__":
    main()
