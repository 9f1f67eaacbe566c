"""A whole tuning step: models, what is timed beside ours, targets.

Three sides run on the same frozen model and the same pixels:

- `irreducible`: forward, gradient of the entropy of the pixels, forward. No filter, no adapter, no optimiser; but every
  saving that is no part of tuning (`lean`: patch embedding as a matrix product, only what the last position needs).
- `ours`: `TestTimeTuner.tune`, the whole call with its checks, guard and report.
- `peft`: what a PyTorch user writes: the plain model with peft's LoRA, the filter by `conv2d`, AdamW made anew.

python -m benchmarks.step {irreducible,ours,peft} prints the peak memory of a step of `vit_b16` in MB, beyond the model.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import gc
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

from benchmarks import memory
from benchmarks.peers import log_softmax_entropy
from vqfast import TestTimeTuner, TuningConfig, TuningResult, zoo
from vqfast.integrations.transformers import find_shortcuts, find_vision_tower
from vqfast.tuning.patch import lean
from vqfast.tuning.state import EpisodeState
from vqfast.tuning.telemetry import OperatorCalls

CONFIG = TuningConfig(lora_blocks=4)
IRREDUCIBLE, OURS, PEFT = "irreducible", "ours", "peft"
BASE = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
LABELS = 1000
LOGIT_STD = 2.0  # of random models
MEMORY_ROUNDS = 6
Inputs = dict[str, Any]


class Answer(NamedTuple):
    before: Tensor  # [B], entropy of the untuned answer
    after: Tensor  # [B], after the step
    logits: Tensor  # [B, V], after the step


Step = Callable[[], Answer]


class Scene(NamedTuple):
    """A frozen model, the inputs of a call, what is tuned."""

    model: nn.Module
    inputs: Inputs
    config: TuningConfig = CONFIG


class Target(NamedTuple):
    relation: str  # <= or >=
    bound: float
    unit: str

    def met(self, value: float) -> bool:
        return value <= self.bound if self.relation == "<=" else value >= self.bound


OVERHEAD, OVER_PEFT, SHARE, MEMORY, TIME = (
    "overhead",  # (ours - irreducible) / irreducible
    "over peft",  # peft / ours
    "operator calls",  # (ours - irreducible) / (peft - irreducible)
    "memory",  # (ours - irreducible) / irreducible
    "time",
)
OVER_GRAPHED_PEFT, OVER_INFERENCE = "over graphed peft", "beside graphed inference"
TARGETS = {
    ("vit_b16", OVERHEAD): Target("<=", 1.5, "%"),
    ("vit_b16", OVER_PEFT): Target(">=", 1.1, "x"),
    ("vit_b16", SHARE): Target("<=", 20, "%"),
    ("vit_b16", MEMORY): Target("<=", 5, "%"),
    ("vit_b16, batch 8", OVERHEAD): Target("<=", 4, "%"),
    ("embedded", TIME): Target("<=", 14, "ms"),
    ("embedded, search", TIME): Target("<=", 28, "ms"),
    # On an H200, bfloat16, every side graphed unless it says eager.
    ("vit_l14_336", OVERHEAD): Target("<=", 5, "%"),
    ("vit_l14_336", TIME): Target("<=", 2.2, "ms"),
    ("vit_l14_336", OVER_PEFT): Target(">=", 8, "x"),
    ("vit_l14_336", OVER_GRAPHED_PEFT): Target(">=", 1.1, "x"),
    ("vit_l14_336", MEMORY): Target("<=", 5, "%"),
    ("llava_7b", OVER_INFERENCE): Target("<=", 3.3, "x"),
}


def verdict(row: str, figure: str, value: float, unit: str = "") -> str:
    """The figure, and whether the row reaches its target where it has one."""
    target = TARGETS.get((row, figure))
    if target is None:
        return f"{figure} {value:.3g} {unit}".rstrip()
    met = "met" if target.met(value) else "NOT MET"
    return f"{figure} {value:.3g} {target.unit} ({target.relation} {target.bound:g} {target.unit} {met})"


def percent_over(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over pairs of how much longer `seconds` are than those of `base`."""
    return 100 * (ratio(seconds, base) - 1)


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over pairs of seconds / base."""
    return statistics.median(s / b for s, b in zip(seconds, base, strict=True))


def vit(
    shape: dict[str, int], side: int, patch: int, *, batch: int = 1, device: str = "cpu", dtype: Any = torch.float32
) -> Scene:
    """A classifier of images, CLIP's vision encoder with random weights."""
    torch.manual_seed(0)
    config = CLIPConfig(vision_config=CLIPVisionConfig(**shape, image_size=side, patch_size=patch), num_labels=LABELS)
    with torch.device(device):
        model = AutoModelForImageClassification.from_config(config, dtype=dtype).eval().requires_grad_(False)
        inputs = {"pixel_values": torch.randn(batch, 3, side, side, dtype=dtype)}
    return Scene(spread(model, model.classifier, inputs), inputs)


def vit_b16(batch: int = 1) -> Scene:
    return vit(BASE, 224, 16, batch=batch)


def llava(
    vision: dict[str, int], text: dict[str, int], side: int, patch: int, *, device: str, dtype: Any = torch.float32
) -> Scene:
    """LLaVA with random weights and a prompt of one image and 44 tokens of text."""
    torch.manual_seed(0)
    image_token, tokens = text["vocab_size"] - 1, (side // patch) ** 2
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=side, patch_size=patch),
        text_config=LlamaConfig(**text),
        image_token_index=image_token,
        image_seq_length=tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval().requires_grad_(False)
        words = torch.randint(3, image_token, (1, 44))
        ids = torch.cat([words[:, :5], torch.full((1, tokens), image_token), words[:, 5:]], 1)
        pixels = torch.randn(1, 3, side, side, dtype=dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return Scene(spread(model, model.lm_head, inputs), inputs)


@torch.no_grad()
def spread(model: nn.Module, head: nn.Linear, inputs: Inputs) -> nn.Module:
    """The model with logits far from uniform, where nothing moves the entropy: a check would not see a difference."""
    head.weight.mul_(LOGIT_STD / logits_of(model, inputs).float().std())
    return model


def embedded(batch: int = 1, **config: Any) -> Scene:
    """The model in the package, one question each about its first validation images."""
    model, processor = zoo.load()
    images, texts, _ = zip(*zoo.questions("validation", [zoo.QUESTIONS[0]])[:batch], strict=True)
    inputs = dict(processor(images=list(images), text=list(texts), return_tensors="pt"))
    return Scene(model, inputs, TuningConfig(**config))


def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """[B, V], of the next token or of the labels."""
    options = {"logits_to_keep": 1, "use_cache": False} if "input_ids" in inputs else {}
    logits: Tensor = model(**inputs, **options).logits
    return logits[:, -1] if logits.dim() == 3 else logits


def shared_copy(model: nn.Module) -> nn.Module:
    """The same parameters in modules of its own."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def inference(scene: Scene) -> Callable[[], Tensor]:
    """One forward without a gradient, with the savings of `irreducible`."""
    model, inputs, _ = scene
    shortcuts = find_shortcuts(model, find_vision_tower(model, 0, (), None))

    def step() -> Tensor:
        with lean(shortcuts, 1), torch.inference_mode():
            return logits_of(model, inputs)

    return step


def irreducible(scene: Scene) -> Step:
    model, inputs, _ = scene
    shortcuts = find_shortcuts(model, find_vision_tower(model, 0, (), None))

    def step() -> Answer:
        pixels = inputs["pixel_values"].detach().requires_grad_()
        with lean(shortcuts, 1):
            before = log_softmax_entropy(logits_of(model, inputs | {"pixel_values": pixels}))
            torch.autograd.grad(before.sum(), pixels)
            with torch.inference_mode():
                logits = logits_of(model, inputs)
                return Answer(before.detach(), log_softmax_entropy(logits), logits)

    return step


def ours(scene: Scene) -> Step:
    model, inputs, config = scene
    tuner = TestTimeTuner(model, config)

    def step() -> Answer:
        return answer(tuner.tune(**inputs))

    return step


def answer(result: TuningResult) -> Answer:
    entropies = [(sample.entropy_before, sample.entropy_after) for sample in result.samples]
    return Answer(*torch.tensor(entropies).unbind(1), result.logits)


def peft(scene: Scene, *, alone: bool = True, capturable: bool = False) -> Step:
    """Adapters of peft, the filter as a convolution, AdamW. Starts from the values that ours starts from.

    peft has one adapter for a batch: `alone` takes the samples one after the other, else they share it.
    """
    model, inputs, config = scene
    tower = find_vision_tower(model, config.lora_blocks, config.lora_targets, None)
    lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=list(tower.targets))
    adapted = get_peft_model(shared_copy(model), lora).eval()
    device = inputs["pixel_values"].device
    values = EpisodeState(config, tower.targets, tower.normalisation(device), 1).snapshot()
    log_sigma, mix = (nn.Parameter(values[f"filter.{name}"][0]) for name in ("log_sigma", "mix"))
    loras = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in loras.items():
            path, _, kind = name.removeprefix("base_model.model.").removesuffix(".default.weight").rpartition(".")
            parameter.copy_(values[f"{path}.{kind.lower()}"][0])
    trained = [log_sigma, mix, *loras.values()]
    start = [p.detach().clone() for p in trained]

    def logits(part: Inputs) -> Tensor:
        filtered = convolved(part["pixel_values"], log_sigma, mix, config.taps)
        return logits_of(adapted, part | {"pixel_values": filtered})

    def tune(part: Inputs) -> Answer:
        with torch.no_grad():
            for parameter, value in zip(trained, start, strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(
            [
                {"params": [log_sigma, mix], "lr": config.filter_rate},
                {"params": list(loras.values()), "lr": config.lr_lora},
            ],
            weight_decay=0,
            capturable=capturable,
        )
        optimizer.zero_grad()
        before = log_softmax_entropy(logits(part))
        before.sum().backward()
        optimizer.step()
        with torch.no_grad():
            after = logits(part)
            return Answer(before.detach(), log_softmax_entropy(after), after)

    def step() -> Answer:
        parts = samples(inputs) if alone else [inputs]
        return Answer(*map(torch.cat, zip(*map(tune, parts), strict=True)))

    return step


def convolved(pixels: Tensor, log_sigma: Tensor, mix: Tensor, taps: int) -> Tensor:
    """A Gaussian mixed in. Its taps sum to 1, so normalised pixels give what raw ones would."""
    radius = taps // 2
    position = torch.arange(-radius, radius + 1, device=pixels.device)
    row = torch.exp(-(position**2) / (2 * log_sigma.exp() ** 2))
    row = (row / row.sum()).to(pixels.dtype)
    kernel = (row[:, None] * row).expand(pixels.shape[1], 1, taps, taps)
    blurred = F.conv2d(F.pad(pixels, (radius,) * 4, mode="reflect"), kernel, groups=pixels.shape[1])
    return pixels + mix * (blurred - pixels)


def samples(inputs: Inputs) -> list[Inputs]:
    """The samples of a batch, each a batch of one."""
    return [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(inputs["pixel_values"].shape[0])]


SIDES: dict[str, Callable[[Scene], Step]] = {IRREDUCIBLE: irreducible, OURS: ours, PEFT: peft}


def unguarded(scene: Scene) -> Answer:
    """One call of ours that keeps the step whatever comes of it, as the peer does."""
    model, inputs, config = scene
    with TestTimeTuner(model, dataclasses.replace(config, guard=False)) as tuner:
        return answer(tuner.tune(**inputs))


def check(name: str, expected: Answer, actual: Answer, tight: float, loose: float) -> None:
    """Untuned entropies agree within `tight`, tuned ones within `loose`, relative.

    AdamW's first step moves a parameter by its rate in the direction of the gradient's sign, so a small gradient that
    rounding turns around moves it the other way.

    Raises:
        AssertionError: they do not.
    """
    for figure, tolerance in (("before", tight), ("after", loose)):
        wanted, found = (getattr(answer, figure).float().cpu() for answer in (expected, actual))
        error = float(((found - wanted) / wanted).abs().max())
        if not error <= tolerance:
            raise AssertionError(f"{name}: entropy {figure} the step: error {error:.1e} > {tolerance:.0e}")


def check_untuned(expected: Answer, actual: Answer, tight: float) -> None:
    """The irreducible step's entropy is that of our untuned answer."""
    check(IRREDUCIBLE, expected, actual._replace(after=expected.after), tight, tight)


def operator_calls(step: Callable[[], object]) -> Counter[str]:
    """Of a step that is not the first."""
    step()
    with OperatorCalls() as counted:
        step()
    return counted.by_name


def peak_megabytes(side: str) -> float:
    """Peak resident memory of one step of vit_b16, above the process with its model: a side's state counts, parameters,
    libraries and threads do not."""
    scene, small = vit_b16(), vit(SMALL, 32, 16)
    for make in SIDES.values():
        make(small)()
    irreducible(scene)()
    _give_back()
    before = memory.resident("VmRSS")
    step = SIDES[side](scene)
    step()  # fills what is kept from step to step
    peaks = []
    for _ in range(MEMORY_ROUNDS):
        _give_back()
        memory.RESET.write_text("5")  # VmHWM := VmRSS
        step()
        peaks.append(memory.resident("VmHWM") - before)
    return 1e-6 * min(peaks)  # what an allocator keeps by chance only adds


def _give_back() -> None:
    """Return freed memory to the system: what earlier steps left over is no part of the next one's peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    print(peak_megabytes(sys.argv[1]))
