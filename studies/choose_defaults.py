"""How the defaults of TuningConfig were chosen, on the validation split.

python -m studies.choose_defaults > docs/defaults.md        (about 10 minutes on 2 cores)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from studies.degradations import degrade
from studies.demo import SEVERITIES, surroundings
from vqfast import Preset, TestTimeTuner, TuningConfig, nn, zoo
from vqfast.tuning import candidates
from vqfast.tuning.candidates import DEFAULT_PRESETS, render, select

IMAGES = 100
SHARPEN = (Preset("sharpen", 1.0, -0.5), Preset("sharpen, stretch", 1.0, -0.5, stretch=True))


class Split(NamedTuple):
    """One degradation of the validation images."""

    name: str  # "clean" for none
    inputs: list[dict[str, Tensor]]  # per kind of question, [IMAGES, ...]
    answers: list[Tensor]  # per kind of question, [IMAGES]


def validation(processor: Any) -> Iterator[Split]:
    drawn = zoo.questions("validation")[: 3 * IMAGES]
    answers = torch.tensor([processor.tokenizer.convert_tokens_to_ids(answer) for _, _, answer in drawn])
    for name, severity in {"clean": 0.0, **SEVERITIES}.items():
        images = [
            image if name == "clean" else degrade(image, name, severity, i)
            for i, (image, _, _) in enumerate(drawn[::3])
        ]
        inputs = [dict(processor(images=images, text=[drawn[k][1]] * IMAGES, return_tensors="pt")) for k in range(3)]
        yield Split(name, inputs, [answers[k::3] for k in range(3)])


def lowest_entropy(logits: Tensor, valid: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits[:, :, 0]).entropy().argmin(0)


def largest_margin(logits: Tensor, valid: Tensor) -> Tensor:
    top = logits[:, :, 0].topk(2, -1).values
    return (top[..., 0] - top[..., 1]).argmax(0)


def vote(power: int, logits: Tensor, valid: Tensor) -> Tensor:
    with mock.patch.object(candidates, "VOTE_POWER", power):
        return select(logits, valid)


RULES = {"lowest entropy": lowest_entropy, "largest margin": largest_margin}
RULES |= {f"vote, margin^{power}": partial(vote, power) for power in (1, 2, 4, 8)}


@torch.no_grad()
def search_lift(model: Any, split: Split, presets: tuple[Preset, ...]) -> dict[str, float]:
    """Accuracy gained by each rule's choice of preset, without a step."""
    half = torch.full((3,), 0.5)
    lift = dict.fromkeys(RULES, 0.0)
    for inputs, answers in zip(split.inputs, split.answers, strict=True):
        images = render(presets, inputs["pixel_values"], 7, half, half).pixels.split(IMAGES)
        logits = torch.stack([model(**{**inputs, "pixel_values": x}, logits_to_keep=1).logits for x in images])
        right = logits[:, :, 0].argmax(-1) == answers  # [P, IMAGES]
        valid = torch.ones(IMAGES, 1, dtype=torch.bool)
        for name, rule in RULES.items():
            chosen = right.gather(0, rule(logits, valid)[None])[0]
            lift[name] += (chosen.float().mean() - right[0].float().mean()).item() / 3
    return lift


def tuner_lift(model: Any, split: Split, config: TuningConfig, start_sigma: float) -> float:
    """Accuracy gained by whole episodes."""
    lift = 0.0
    start = partial(nn.GaussianFilter, sigma=start_sigma)
    with mock.patch("vqfast.tuning.state.GaussianFilter", start), TestTimeTuner(model, config) as tuner:
        for inputs, answers in zip(split.inputs, split.answers, strict=True):
            result = tuner.tune(**inputs)
            before = torch.tensor([s.token_before for s in result.samples]) == answers
            lift += ((result.logits.argmax(-1) == answers).float() - before.float()).mean().item() / 3
    return lift


def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    """One line per choice: mean over the degradations, the worst of them, and clean images, in points."""
    print(f"\n| {title} | mean | worst | clean |\n|---|---|---|---|")
    for label, lift in rows.items():
        degraded = {name: value for name, value in lift.items() if name != "clean"}
        worst = min(degraded, key=lambda name: degraded[name])
        mean = sum(degraded.values()) / len(degraded)
        print(f"| {label} | {100 * mean:+.1f} | {100 * degraded[worst]:+.1f} ({worst}) | {100 * lift['clean']:+.1f} |")


def main() -> None:
    torch.set_num_threads(2)
    about = surroundings(seed=0)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(
        "# Lift on validation\n\nWritten by `python -m studies.choose_defaults`: points of accuracy over untuned, mean"
    )
    print("over the demo's eight degradations, the worst of them, and clean images.")
    print(f"{IMAGES} images, three questions each. {about['machine']}; {versions}; {about['date']}.", flush=True)
    model, processor = zoo.load()
    splits = list(validation(processor))
    families = {"default": DEFAULT_PRESETS, "default and sharpen": DEFAULT_PRESETS + SHARPEN}
    rules: dict[str, dict[str, float]] = {}
    for family, presets in families.items():
        for split in tqdm(splits, family):
            for rule, lift in search_lift(model, split, presets).items():
                rules.setdefault(f"{rule}; {family} presets", {})[split.name] = lift
    print_table("search without a step", rules)

    one_step = {f"start sigma {s}, lr_filter {lr}": (TuningConfig(lr_filter=lr), s) for s, lr in
                [(0.7, 1.0), (1.0, 1.0), (1.5, 1.0), (2.0, 1.0), (2.0, 0.5), (2.0, 0.3)]}  # fmt: skip
    one_step["start sigma 2.0, lr_filter 1.0, train_tone"] = (TuningConfig(train_tone=True), 2.0)
    one_step["start sigma 2.0, lr_filter 1.0, LoRA only"] = (TuningConfig(filter=None), 2.0)
    search = {
        f"search, lr_filter {lr}": (TuningConfig(candidates="default", lr_filter=lr), 2.0) for lr in (1.0, 0.3, 0.1)
    }
    search["search, lr_filter 0.3, no guard"] = (TuningConfig(candidates="default", guard=False), 2.0)
    for title, configs in (("the paper's one step", one_step), ("search and one step", search)):
        print_table(
            title,
            {
                label: {split.name: tuner_lift(model, split, config, sigma) for split in splits}
                for label, (config, sigma) in tqdm(configs.items(), title)
            },
        )


if __name__ == "__main__":
    main()
