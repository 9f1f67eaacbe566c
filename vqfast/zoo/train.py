"""Train the digits model: ``python -m vqfast.zoo.train [--folder FOLDER] [--steps N] [--seed S]``."""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vqfast.zoo import DIGITS, FOLDER, QUESTIONS, prompt, questions

VOCABULARY = (
    *("<pad>", "<unk>", "</s>", "<image>", "USER:", "ASSISTANT:"),
    *("which", "digit", "odd", "or", "even", "greater", "than", "?", "yes", "no", *DIGITS),
)
TEMPLATE = """\
{% for message in messages %}{{ message.role.upper() }}: \
{% for part in message.content %}{{ '<image>\\n' if part.type == 'image' else part.text }}{% endfor %}\
{{ ' ' if message.role == 'user' else '</s>' }}{% endfor %}\
{{ 'ASSISTANT:' if add_generation_prompt else '' }}"""
PAD, UNK, EOS, IMAGE = range(4)
BATCH = 64
STEPS = 1700
RATE = 1.5e-3
SMOOTHING = 0.03
RANGES = (0.25, 0.15, 0.125, 0.125)  # rotation (radians), scale, shifts (of half the image)


def build_processor() -> LlavaProcessor:
    """Word-level tokenizer (padding left) and Pillow image processor to 32x32, in [-1, 1]."""
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex(r"\w+:?|[^\w\s]"), behavior="removed", invert=True)
    special = dict(pad_token="<pad>", unk_token="<unk>", eos_token="</s>", image_token="<image>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
    size = dict(height=32, width=32)
    images = CLIPImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    layout = dict(patch_size=4, num_additional_image_tokens=1, vision_feature_select_strategy="default")
    return LlavaProcessor(images, tokenizer, chat_template=TEMPLATE, **layout)


def build_model() -> LlavaForConditionalGeneration:
    """Randomly initialised model: CLIP tower of 4 layers, Llama of 2 layers, both 96 wide."""
    width: dict[str, Any] = dict(hidden_size=96, num_attention_heads=3)
    special: dict[str, Any] = dict(pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS)
    vision = CLIPVisionConfig(**width, intermediate_size=288, num_hidden_layers=4, image_size=32, patch_size=4)
    text = LlamaConfig(**width, **special, intermediate_size=192, num_hidden_layers=2, vocab_size=len(VOCABULARY))
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=64, vision_feature_layer=-1
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**special, do_sample=False, max_new_tokens=2)
    return model


def augment(images: Tensor) -> Tensor:
    """Random rotation, scale and shift of (batch, 3, 32, 32) images in [-1, 1], background -1."""
    angle, scale, x, y = torch.empty(4, len(images)).uniform_(-1, 1) * torch.tensor(RANGES)[:, None]
    cos, sin = torch.cos(angle) * (1 + scale), torch.sin(angle) * (1 + scale)
    affine = torch.stack([cos, -sin, x, sin, cos, y], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False).sub(1).clamp(-1, 1)


def encode(processor: LlavaProcessor, question: str) -> list[int]:
    """Tokens of a question's prompt, the image's 64 included."""
    ids: list[int] = processor.tokenizer(prompt(question).replace("<image>", "<image>" * 64))["input_ids"]
    return ids


class Packed(NamedTuple):
    """The three questions of one image behind a single copy of its tokens, so that it is encoded once."""

    ids: Tensor  # [length], with a gap for each answer
    mask: Tensor  # [1, 1, length, length], attention: a question sees the image and itself only
    positions: Tensor  # [1, length], as if each question stood alone
    gaps: Tensor  # [3], where the answers go


def pack(processor: LlavaProcessor) -> Packed:
    """Lay the three questions behind one image."""
    encoded = [encode(processor, question) for question in QUESTIONS]
    prefix = encoded[0].index(IMAGE) + 64
    tails = [[*ids[prefix:], PAD] for ids in encoded]
    ids = torch.tensor([*encoded[0][:prefix], *chain(*tails)])
    owner = torch.tensor([-1] * prefix + [index for index, tail in enumerate(tails) for _ in tail])
    mask = ((owner[:, None] == owner) | (owner == -1)).tril()
    positions = torch.tensor([*range(prefix), *chain(*(range(prefix, prefix + len(tail)) for tail in tails))])
    gaps = torch.tensor([len(tail) for tail in tails]).cumsum(0) + prefix - 1
    return Packed(ids, mask[None, None], positions[None], gaps)


def tensors(processor: LlavaProcessor, split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) and answer tokens (n, 3) of a split."""
    rows = questions(split)
    images = processor.image_processor([image for image, _, _ in rows[:: len(QUESTIONS)]], return_tensors="pt")
    answers = processor.tokenizer.convert_tokens_to_ids([answer for _, _, answer in rows])
    return images["pixel_values"], torch.tensor(answers).view(-1, len(QUESTIONS))


def ask(
    model: LlavaForConditionalGeneration, packed: Packed, images: Tensor, answers: Tensor | None = None, **options: Any
) -> Any:
    """One forward with the three questions on every image of (batch, 3, 32, 32); `options` go to the model.

    The output's logits are (batch, 3, vocabulary), where the answers are expected; with `answers` (batch, 3) in the
    gaps they are (batch, 6, vocabulary), then where `</s>` is.
    """
    ids, kept = packed.ids.repeat(len(images), 1), packed.gaps - 1
    if answers is not None:
        ids[:, packed.gaps] = answers
        kept = torch.cat([kept, packed.gaps])
    return model(
        input_ids=ids,
        pixel_values=images,
        attention_mask=packed.mask.expand(len(images), -1, -1, -1),
        position_ids=packed.positions,
        logits_to_keep=kept,
        use_cache=False,
        **options,
    )


def language_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean cross entropy of the answers and of the `</s>` behind them, with label smoothing; logits of `ask`."""
    targets = torch.cat([answers, torch.full_like(answers, EOS)], 1)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=SMOOTHING)


def batches(count: int, steps: int) -> Tensor:
    """Rows of `count` images for every step, (steps, 64): epoch after epoch, each in a random order."""
    epochs = math.ceil(steps * BATCH / count)
    return torch.cat([torch.randperm(count) for _ in range(epochs)])[: steps * BATCH].view(steps, BATCH)


def fit(
    parameters: Iterable[nn.Parameter],
    losses: Iterable[Tensor],
    steps: int,
    rate: float,
    warm_up: int = 100,
    label: str = "",
) -> list[float]:
    """A step of AdamW for each of `steps` losses, which are computed one at a time; returns their values.

    The learning rate rises to `rate` in `warm_up` steps and falls as a cosine; gradients are clipped to norm 1.
    """
    trained, values = list(parameters), []
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for loss in tqdm(losses, label, total=steps, unit="step"):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        values.append(loss.item())
    return values


def train(steps: int = STEPS, seed: int = 0) -> LlavaForConditionalGeneration:
    """Train from scratch; the seed fixes the weights bitwise on one machine with one number of threads."""
    torch.manual_seed(seed)
    processor, model = build_processor(), build_model()
    images, answers = tensors(processor, "train")
    packed = pack(processor)

    def losses() -> Iterator[Tensor]:
        for rows in batches(len(images), steps):
            yield language_loss(ask(model, packed, augment(images[rows]), answers[rows]).logits, answers[rows])

    fit(model.parameters(), losses(), steps, RATE)
    model.eval()
    return model


@torch.inference_mode()
def report(model: LlavaForConditionalGeneration, split: str) -> None:
    """Print per question: accuracy (argmax over the vocabulary), mean probability of that answer, mean loss."""
    processor = build_processor()
    images, answers = tensors(processor, split)
    for question, expected in zip(QUESTIONS, answers.T, strict=True):
        ids = torch.tensor(encode(processor, question)).expand(len(images), -1)
        logits = model(input_ids=ids, pixel_values=images, logits_to_keep=1).logits[:, 0]
        confidence, answer = logits.softmax(1).max(1)
        accuracy, loss = (answer == expected).double().mean(), F.cross_entropy(logits, expected)
        print(f"{split:10}  {question:18}  accuracy {accuracy:.3f}  confidence {confidence.mean():.3f}  nll {loss:.3f}")


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write model and processor to ``folder``, replacing it whole."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        model.save_pretrained(new)
        build_processor().save_pretrained(new)
        (new / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner only
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    model = train(arguments.steps, arguments.seed)
    save(model, arguments.folder)
    report(model, "validation")
    report(model, "test")


if __name__ == "__main__":
    main()
