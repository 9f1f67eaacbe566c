"""Datasets of questions about images: the embedded digits, or a folder of a user's own (docs/studies.md)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vqfast import zoo
from vqfast.images import ImageError, read_image

MAX_SIDE = 16_383  # pixels; a WebP file holds no more
SPLITS = ("validation", "test")  # of the digits that no model was trained on


@dataclass(frozen=True)
class Item:
    """One image with its questions."""

    name: str
    number: int  # place in the whole dataset, from which the seed of its degradation comes
    source: Image.Image | Path
    digest: str  # sha256 of the pixels, or of the file
    questions: tuple[tuple[str, tuple[str, ...]], ...]  # question, accepted answers

    def image(self) -> Image.Image:
        """The RGB image.

        Raises:
            ImageError: the file cannot be decoded, or the image is wider or higher than the codecs take.
        """
        image = read_image(self.source) if isinstance(self.source, Path) else self.source
        if max(image.size) > MAX_SIDE:
            size = f"{image.width} x {image.height} pixels, at most {MAX_SIDE:,} a side are accepted"
            raise ImageError(f"{self.source} has {size}; scale it down")
        return image


@dataclass(frozen=True)
class Dataset:
    """Images that were drawn from a dataset, in its order."""

    name: str
    kind: str  # "digits" or "photographs", as in studies.degradations.LEVELS
    items: tuple[Item, ...]


def load(name: str, split: str, count: int | None, seed: int) -> Dataset:
    """The dataset, or `count` images of it: the same ones for a seed.

    Args:
        name: "digits", or the path of a JSONL file of questions with its images in the same folder or below.
        split: of the digits, "validation" or "test". A file is one split.

    Raises:
        ValueError: no such dataset or split, or a line of the file that says no question.
    """
    if name == "digits":
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
        items = digits(split)
    elif Path(name).is_file():
        items = read_questions(Path(name))
    else:
        raise ValueError(f"dataset must be digits, or a JSONL file of questions that exists; got {name!r}")
    chosen = sorted(np.random.default_rng(seed).permutation(len(items))[:count].tolist())
    return Dataset(name, "digits" if name == "digits" else "photographs", tuple(items[i] for i in chosen))


def digits(split: str) -> list[Item]:
    """The images of `zoo.questions`, with the three bare questions."""
    rows, items = zoo.questions(split), []
    for number, start in enumerate(range(0, len(rows), len(zoo.QUESTIONS))):
        image = rows[start][0]
        answers = ((answer,) for _, _, answer in rows[start : start + len(zoo.QUESTIONS)])
        pairs = tuple(zip(zoo.QUESTIONS, answers, strict=True))
        items.append(Item(f"{split} {number}", number, image, hashlib.sha256(image.tobytes()).hexdigest(), pairs))
    return items


def read_questions(file: Path) -> list[Item]:
    """One item per image of a JSONL file, in the order of their first question. Images are not decoded yet.

    Raises:
        ValueError: a line that is not as docs/studies.md says; names it and what is wrong.
    """
    folder, found = file.parent.resolve(), dict[str, list[tuple[str, tuple[str, ...]]]]()
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            json.dumps(row, ensure_ascii=False).encode()  # refuses half characters, which no file can be named by
            image, question, accepted = _checked(row)
            file_named = (folder / image).resolve()  # one image, however it is written
            if not file_named.is_relative_to(folder):
                raise ValueError(f"image {image!r} leaves the folder {folder}; move it there")
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        found.setdefault(str(file_named.relative_to(folder)), []).append((question, accepted))
    if not found:
        raise ValueError(f"{file} holds no question; one line is {EXAMPLE}")
    return [
        Item(name, number, folder / name, _digest(folder / name), tuple(questions))
        for number, (name, questions) in enumerate(found.items())
    ]


EXAMPLE = '{"image": "a.jpg", "question": "what is this?", "answer": ["cat", "a cat"]}'


def _checked(row: Any) -> tuple[str, str, tuple[str, ...]]:
    if not isinstance(row, dict):
        raise ValueError(f"is no JSON object; write {EXAMPLE}")
    answer = row.get("answer")
    accepted = answer if isinstance(answer, list) else [answer]
    for key, values in {"image": [row.get("image")], "question": [row.get("question")], "answer": accepted}.items():
        if not values or not all(isinstance(value, str) and value.strip() for value in values):
            several = " or a list of such" if key == "answer" else ""
            raise ValueError(f"{key!r} must be a text that is not empty{several}; got {row.get(key)!r}")
    return row["image"], row["question"], tuple(accepted)


def _digest(file: Path) -> str:
    """sha256 of a file, or "unreadable": decoding says later what is wrong with it."""
    try:
        if file.is_file():  # reading a pipe would wait
            return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        pass
    return "unreadable"


def normalised(answer: str) -> str:
    """An answer as it is compared: without space around it, in lower case, without a full stop at the end."""
    return answer.strip().lower().removesuffix(".").rstrip()


def is_right(answer: str, accepted: tuple[str, ...]) -> bool:
    """Whether an answer is one of those that are accepted, after normalisation."""
    return normalised(answer) in map(normalised, accepted)
