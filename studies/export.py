"""How much of the filter's lift an exported image keeps, answered by the plain untuned model.

python -m studies.export > docs/export.md        (about 10 minutes on one core)
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from studies.demo import BATCH, MODES, QUESTIONS, SEVERITIES, draw, surroundings
from vqfast import TestTimeTuner, TuningResult, zoo

IMAGES = 80  # per degradation
SIZES = ((32, 32), (128, 128), (96, 160), (20, 20))  # of the originals, width and height; the model takes 32x32
COLUMNS = ("untuned", "filter and LoRA", "filter alone", "exported PNG")


def without_lora(result: TuningResult) -> TuningResult:
    zeros = {n: torch.zeros_like(v) if n.endswith("lora_b") else v for n, v in result.parameters.items()}
    return replace(result, parameters=zeros)


def reopened(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "PNG")
    return Image.open(file)


@torch.no_grad()
def right(model: Any, processor: Any, mode: str, size: tuple[int, int], name: str) -> Tensor:
    """Which questions on images degraded by `name` are answered right: [columns, S], bool."""
    rows = zoo.questions("test")
    condition = draw(processor, rows, IMAGES, 0, name)
    originals = [image.resize(size, Image.Resampling.BICUBIC) for image in condition.images for _ in range(QUESTIONS)]
    parts = []
    with TestTimeTuner(model, MODES[mode]) as tuner:
        for start, (inputs, answers) in zip(range(0, len(originals), BATCH), condition.batches(), strict=True):
            images = originals[start : start + BATCH]
            inputs["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]

            def tokens(inputs: dict[str, Tensor] = inputs) -> Tensor:
                return model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)

            result = tuner.tune(**inputs)
            with tuner.applied(without_lora(result)):
                filtered = tokens()
            exported = [
                reopened(result.image(i, original=image, processor=processor)[0]) for i, image in enumerate(images)
            ]
            seen = processor.image_processor(exported, return_tensors="pt")["pixel_values"]
            columns = (tokens(), result.logits.argmax(-1), filtered, tokens({**inputs, "pixel_values": seen}))
            parts.append(torch.stack([column == answers for column in columns]))
    return torch.cat(parts, 1)


def main() -> None:
    model, processor = zoo.load()
    print("# The filter's effect as an image\n")
    print(
        "`result.image(original=image, processor=processor)` and `vqfast tune --save-image` ([tuning.md](tuning.md)).\n"
    )
    print("Written by `python -m studies.export`: accuracy in percent on the test split under the demo's eight")
    print(f"degradations, {IMAGES} images and three questions each. The exported image is answered by the plain model.")
    about = surroundings(seed=0)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    print(f"{about['machine']}; {versions}; {about['date']}.\n")
    for mode in MODES:
        print(f"| {mode.replace('_', ' ')}, original | {' | '.join(COLUMNS)} | kept of the filter's lift |")
        print("|---|" + "---|" * (len(COLUMNS) + 1))
        for size in SIZES:
            each = [right(model, processor, mode, size, name) for name in tqdm(SEVERITIES, f"{mode} {size}")]
            accuracy = (100 * torch.cat(each, 1).float().mean(1)).tolist()
            untuned, _, filtered, exported = accuracy
            kept = 100 * (exported - untuned) / (filtered - untuned)
            cells = " | ".join(f"{value:.1f}" for value in accuracy)
            print(f"| {size[0]}x{size[1]} | {cells} | {kept:.0f} % |", flush=True)
        print()


if __name__ == "__main__":
    main()
