"""A small vision-language model in the package: LLaVA architecture, three questions on handwritten digits.

Data: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(CC BY 4.0), read through ``sklearn.datasets.load_digits``. Trained by ``python -m vqfast.zoo.train``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import LlavaForConditionalGeneration

    from vqfast.zoo.processor import DigitsProcessor

__all__ = ["FOLDER", "QUESTIONS", "load", "prompt", "questions"]

FOLDER = Path(__file__).parent / "digits"
"""Plain ``transformers`` folder of the model and its processor."""

QUESTIONS = ("which digit?", "odd or even?", "greater than four?")
"""The questions the model was trained on, without the prompt template."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = {"train": slice(0, 1097), "validation": slice(1097, 1297), "test": slice(1297, 1797)}


def load() -> tuple[LlavaForConditionalGeneration, DigitsProcessor]:
    """Load the model (float32, eval mode, no gradients required) and its processor from ``FOLDER``, offline.

    ``processor(images=image, text=prompt(question), return_tensors="pt")`` gives the model's inputs: ``input_ids`` and
    ``attention_mask`` (batch, 69 or 70) and ``pixel_values`` (batch, 3, 32, 32). Words outside the vocabulary raise
    ``ValueError``.
    """
    from transformers import LlavaForConditionalGeneration

    from vqfast.zoo.processor import DigitsProcessor

    model = LlavaForConditionalGeneration.from_pretrained(FOLDER, use_safetensors=True, local_files_only=True)
    processor = DigitsProcessor.from_pretrained(FOLDER, backend="pil", local_files_only=True)
    return model.eval().requires_grad_(False), processor


def prompt(question: str) -> str:
    """Wrap a bare question in the model's chat template, with the ``<image>`` placeholder."""
    return f"USER: <image>\n{question} ASSISTANT:"


def questions(split: str = "test", kinds: Sequence[str] | None = None) -> list[tuple[Image, str, str]]:
    """Return (32x32 RGB image, prompt, one-word answer) of a split, image by image, then kind by kind.

    The 1797 images, in the order of ``numpy.random.RandomState(0).permutation(1797)``, are split into "train" (1097),
    "validation" (200) and "test" (500). ``kinds`` selects from ``QUESTIONS``; None means all three.

    Raises ``ValueError`` on an unknown split or kind, ``ImportError`` without scikit-learn.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    kinds = QUESTIONS if kinds is None else kinds
    if unknown := set(kinds).difference(QUESTIONS):
        raise ValueError(f"kinds must be among {QUESTIONS}, not {sorted(unknown)}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install vqfast[demo]") from error
    import numpy as np
    from PIL import Image

    data = load_digits()
    result = []
    for index in np.random.RandomState(0).permutation(1797)[SPLITS[split]]:
        pixels = np.rint(data.images[index] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        digit = int(data.target[index])
        answers = (DIGITS[digit], ("even", "odd")[digit % 2], ("no", "yes")[digit > 4])
        result += [(image, prompt(kind), answers[QUESTIONS.index(kind)]) for kind in kinds]
    return result
