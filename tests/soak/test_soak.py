"""Thousands of steps in a row, of any size: memory stays where it is, and the last result has the bits of the first.

VQFAST_SOAK=1 (`make soak`) makes 5,000 steps; plain pytest makes 200 and allows memory the noise of so few.
"""

import ctypes
import gc
import os
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, CLIPConfig, CLIPVisionConfig

from vqfast import TestTimeTuner, TuningConfig, zoo

pytestmark = pytest.mark.usefixtures("one_openmp_thread")
SOAK = "VQFAST_SOAK" in os.environ
STEPS, WARM_UP, GROWTH = (5000, 500, 1.0) if SOAK else (200, 100, 3.0)  # percent of the memory after the warm-up
SIDES = (24, 32, 40, 48, 64)
STATUS = Path("/proc/self/status")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def resident() -> float:
    """MB, without what was freed and the allocator keeps: up to 20 MB, more at one moment than at another."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmRSS")) / 1024


def held(device: str) -> float:
    """MB on the device; 0 on the CPU."""
    return torch.cuda.memory_allocated() / 2**20 if device == "cuda" else 0.0


def classifier():
    """CLIP's vision encoder with random weights; it interpolates its positions to any size."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    config = CLIPConfig(vision_config=vision, num_labels=10)
    return AutoModelForImageClassification.from_config(config).eval().requires_grad_(False)


class Work:
    """Three tuners and random inputs for them."""

    def __init__(self, device: str) -> None:
        drawn = zoo.questions("validation")[::5][:60]
        images, texts, _ = zip(*drawn, strict=True)
        processor = zoo.load()[1]
        inputs = processor(images=list(images), text=list(texts), return_tensors="pt", padding=True)
        self.pool = {name: value.to(device) for name, value in inputs.items()}
        self.device, self.random = device, random.Random(0)
        stream = TuningConfig(candidates="default", search_scope="stream")
        self.tuners = [TestTimeTuner(zoo.load()[0].to(device), config) for config in (TuningConfig(), stream)]
        self.tuners.append(TestTimeTuner(classifier().to(device), TuningConfig(lora_targets=("q_proj", "fc1"))))

    def prompt(self, rows, padding):
        inputs = {name: value[rows] for name, value in self.pool.items()}
        for name in ("input_ids", "attention_mask"):
            inputs[name] = torch.nn.functional.pad(inputs[name], (padding, 0))
        return inputs

    def images(self, count, side, seed):
        pixels = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
        return {"pixel_values": (2 * pixels - 1).to(self.device), "interpolate_pos_encoding": True}

    def step(self) -> None:
        draw, which = self.random, self.random.random()
        count = draw.randint(1, 4)
        if which < 0.3:
            self.tuners[2].tune(**self.images(count, draw.choice(SIDES), draw.randrange(1000)))
            return
        inputs = self.prompt([draw.randrange(60) for _ in range(count)], draw.randrange(40))
        if which < 0.5:
            self.tuners[1].tune(**inputs, stream=str(draw.randrange(2000)))  # more names than are kept
        elif which < 0.6:
            self.tuners[0].generate(**inputs, max_new_tokens=draw.randint(1, 3))
        else:
            self.tuners[0].tune(**inputs)

    def fixed(self):
        """The same inputs each time, to every tuner that has no memory."""
        return [self.tuners[0].tune(**self.prompt([3, 1, 4], 5)), self.tuners[2].tune(**self.images(3, 40, 0))]


@pytest.mark.skipif(not STATUS.exists(), reason="reads the resident set from /proc")
@pytest.mark.parametrize("device", DEVICES)
def test_memory_and_bits_after_thousands_of_steps(device, capsys):
    work = Work(device)
    first = work.fixed()
    for step in range(STEPS):
        if step == WARM_UP:
            before, before_held = resident(), held(device)
        work.step()
    after, after_held = resident(), held(device)
    last = work.fixed()
    growth = 100 * (after / before - 1)
    with capsys.disabled():
        print(f"\n{device}: {STEPS} steps, {before:.1f} MB after {WARM_UP}, {after:.1f} MB at the end, {growth:+.2f} %")
        if device == "cuda":
            print(f"on the device {before_held:.2f} MB, then {after_held:.2f} MB")
    for one, other in zip(first, last, strict=True):
        assert torch.equal(one.logits, other.logits)
        assert one.samples == other.samples
        for name, value in one.parameters.items():
            assert torch.equal(value, other.parameters[name])
    assert growth <= GROWTH
    assert after_held <= 1.01 * before_held
