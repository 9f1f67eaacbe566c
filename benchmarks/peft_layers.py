"""Forward and backward of a ViT-B/16 with LoRA of peft on every block: as peft runs it, and accelerated.

python -m benchmarks.peft_layers [BATCH] [ROUNDS]
"""

import sys
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.step import BASE, ratio
from benchmarks.timing import timed
from vqfast.integrations.peft import accelerate

TARGETS = {"q, v": ["q_proj", "v_proj"], "all": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}


def main(batch: int = 1, rounds: int = 15) -> None:
    for name, targets in TARGETS.items():
        torch.manual_seed(0)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        model = get_peft_model(CLIPVisionModel(CLIPVisionConfig(**BASE, image_size=224, patch_size=16)), config)
        for parameter in model.parameters():  # B starts at zero, which is quicker than what comes of it
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
        call = forward_and_backward(model, torch.randn(batch, 3, 224, 224))
        peft, ours = [], []
        for _ in range(rounds + 2):  # two to warm up
            peft.append(timed(call))
            with accelerate(model):
                ours.append(timed(call))
        peft, ours = peft[2:], ours[2:]
        print(f"LoRA on {name}, batch {batch}: peft / accelerated {ratio(peft, ours):.2f}, {rounds} rounds")


def forward_and_backward(model: torch.nn.Module, pixels: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        model.zero_grad()
        model(pixel_values=pixels).pooler_output.sum().backward()

    return call


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
