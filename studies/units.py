"""Units of work of a study, model x condition x images x method, in this process or on Ray."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from studies.codecs import CODECS, compress, compress_digits
from studies.data import Dataset, is_right
from studies.degradations import DEGRADATIONS, LEVELS, degrade
from studies.methods import answer, load_model
from vqfast.images import ImageError

CHUNK = 8  # images per unit: with three questions each, one batch of studies.methods
BLOCKS = 1000  # of units on Ray, at most: a block that is not done when a run is killed is done again
CODEC = "codec:"  # before the name of a codec, as one degradation is called jpeg, too
Row = dict[str, Any]


class Condition(NamedTuple):
    """What was done to the images."""

    name: str  # "clean", a degradation, or "codec:" and a codec
    severity: float  # 0 for clean, 1 to 5 of a degradation, the level of a codec

    @property
    def codec(self) -> str | None:
        """ "<codec>:<level>" where it is one."""
        return f"{self.name.removeprefix(CODEC)}:{self.severity:g}" if self.name.startswith(CODEC) else None


CLEAN = Condition("clean", 0)


def conditions(names: Sequence[str], severities: Sequence[int], kind: str) -> list[Condition]:
    """Clean and what the names say: a degradation at every severity, a codec at all its levels.

    Args:
        names: names or shell patterns ("codec:*"); "fog:3" or "codec:jpeg:30" for one severity or level.
        severities: of 1 to 5.
        kind: of the dataset.

    Raises:
        ValueError: unknown name, severity or level; lists the known.
    """
    steps = tuple(range(1, 1 + len(next(iter(LEVELS[kind].values())))))
    known: dict[str, Sequence[float]] = dict.fromkeys(DEGRADATIONS, steps)
    known |= {CODEC + codec: levels for codec, levels in CODECS.items()}
    found = {CLEAN: None}
    for name in names:
        base, _, level = name.rpartition(":")
        matched = fnmatch.filter(known, name)
        if not matched and base not in known and name != CLEAN.name:
            raise ValueError(f"degradation must be one of {', '.join(known)}; got {name!r}")
        for match in matched:
            asked = severities if match in DEGRADATIONS else known[match]
            found |= {Condition(match, _level(match, known[match], value)): None for value in asked}
        if base in known and not matched:
            found |= {Condition(base, _level(base, known[base], level)): None}
    return list(found)


def _level(name: str, known: Sequence[float], given: float | str) -> float:
    with_value = {f"{value:g}": value for value in known}
    if str(given) not in with_value and given not in known:
        what = "level" if name.startswith(CODEC) else "severity"
        raise ValueError(f"{what} of {name} must be one of {', '.join(with_value)}; got {given!r}")
    return with_value.get(str(given), given)  # type: ignore[arg-type]


class Unit(NamedTuple):
    """What makes one row."""

    model: str
    condition: Condition
    start: int  # first image of the chunk
    method: str


@dataclass(frozen=True)
class Plan:
    """All that a worker has to know."""

    dataset: Dataset
    models: tuple[str, ...]
    conditions: tuple[Condition, ...]
    methods: tuple[str, ...]
    seed: int
    answer_tokens: int
    threads: int
    digest: str  # of the configuration

    def units(self) -> list[Unit]:
        """In an order that degrades and loads once what several units need."""
        starts = range(0, len(self.dataset.items), CHUNK)
        return list(itertools.starmap(Unit, itertools.product(self.models, self.conditions, starts, self.methods)))

    def key(self, unit: Unit) -> str:
        """sha256 of all that determines a row."""
        chunk = [(item.name, item.digest) for item in self.dataset.items[unit.start : unit.start + CHUNK]]
        return hashlib.sha256(json.dumps([self.digest, unit, chunk]).encode()).hexdigest()


class Degraded(NamedTuple):
    """The images of a chunk."""

    images: dict[int, Image.Image]  # by place in the chunk; those that could be decoded
    undecodable: dict[str, str]  # name -> why
    bits_per_pixel: float | None  # of a codec


def noise_seed(seed: int, number: int) -> int:
    """Of an image's degradation: no two seeds of a study share one."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])


class Worker:
    """Makes rows, one after the other; keeps the model and the images that it used last."""

    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(plan.threads)  # results have the same bits with the same number of threads
        self.plan = plan
        self._model = functools.lru_cache(1)(load_model)
        self._degraded = functools.lru_cache(1)(self._degrade)
        self._sheets = functools.lru_cache(1)(self._compress_sheets)

    def row(self, unit: Unit) -> Row:
        """The row of a unit, without its time the same on every call."""
        items = self.plan.dataset.items[unit.start : unit.start + CHUNK]
        images, undecodable, bits_per_pixel = self._degraded(unit.condition, unit.start)
        samples = [(i, question, accepted) for i in images for question, accepted in items[i].questions]
        model, began = self._model(unit.model, self.plan.answer_tokens), time.perf_counter()
        text, confidence, entropy = [], [], []
        if samples:
            pictures, questions = [images[i] for i, _, _ in samples], [question for _, question, _ in samples]
            text, confidence, entropy = answer(model, unit.method, pictures, questions, unit.condition.codec)
        return {
            "key": self.plan.key(unit),
            "model": unit.model,
            "dataset": self.plan.dataset.name,
            "condition": unit.condition.name,
            "severity": unit.condition.severity,
            "method": unit.method,
            "start": unit.start,
            "image": [items[i].name for i, _, _ in samples],
            "question": [question for _, question, _ in samples],
            "answer": text,
            "right": [is_right(given, accepted) for given, (_, _, accepted) in zip(text, samples, strict=True)],
            "confidence": _rounded(confidence),
            "entropy": _rounded(entropy),
            "bits_per_pixel": bits_per_pixel,
            "pixels": sum(image.width * image.height for image in images.values()),
            "undecodable": undecodable,
            "seconds": round(time.perf_counter() - began, 4),
        }

    def _degrade(self, condition: Condition, start: int) -> Degraded:
        images: dict[int, Image.Image] = {}
        undecodable, bits, bits_per_pixel = {}, 0, None
        for i, item in enumerate(self.plan.dataset.items[start : start + CHUNK]):
            try:
                image = item.image()
            except ImageError as error:
                undecodable[item.name] = str(error)
                continue
            if condition.name in DEGRADATIONS:
                strength = LEVELS[self.plan.dataset.kind][condition.name][int(condition.severity) - 1]
                image = degrade(image, condition.name, strength, noise_seed(self.plan.seed, item.number))
            elif condition.codec and self.plan.dataset.kind == "photographs":
                image, size = compress(image, condition.name.removeprefix(CODEC), condition.severity)
                bits += size
            images[i] = image
        if condition.codec and self.plan.dataset.kind == "digits":
            sheets, bits_per_pixel = self._sheets(condition)
            images = {i: sheets[start + i] for i in images}
        elif condition.codec and images:
            bits_per_pixel = bits / sum(image.width * image.height for image in images.values())
        return Degraded(images, undecodable, bits_per_pixel)

    def _compress_sheets(self, condition: Condition) -> tuple[list[Image.Image], float]:
        images = [item.image() for item in self.plan.dataset.items]
        return compress_digits(images, condition.name.removeprefix(CODEC), condition.severity)


def _rounded(values: list[float]) -> list[float | None]:
    """Six digits; None for what JSON has no number for."""
    return [round(value, 6) if math.isfinite(value) else None for value in values]


class RayWorker:
    """A `Worker` in an actor of Ray Data: JSON of units in, JSON of rows out."""

    def __init__(self, plan: Plan) -> None:
        self.worker = Worker(plan)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        groups = [json.loads(group) for group in batch["units"]]
        units = [Unit(model, Condition(*c), start, method) for g in groups for model, c, start, method in g]
        return {"row": [json.dumps(self.worker.row(unit)) for unit in units]}


def rows(plan: Plan, units: list[Unit], ray_address: str | None = None, workers: int = 1) -> Iterator[Row]:
    """The rows of units, as they are ready.

    Args:
        ray_address: "local" for a cluster that lives as long as this call, or the address of one; None: no Ray.
        workers: actors on Ray, each with `plan.threads` threads and its own model. One that dies is started again.

    Raises:
        ImportError: Ray is asked for and not installed.
    """
    if ray_address is None:
        yield from map(Worker(plan).row, units)
        return
    ray = ray_data()
    own = dict(num_cpus=workers * plan.threads + 1, include_dashboard=False) if ray_address == "local" else {}
    ray.init(ray_address, log_to_driver=False, logging_level="ERROR", **own)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        groups = [list(group) for _, group in itertools.groupby(units, lambda unit: unit[:3])]
        given = [{"units": json.dumps(group)} for group in groups]
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0) / workers)
        made = ray.data.from_items(given, override_num_blocks=min(len(given), BLOCKS)).map_batches(
            RayWorker,
            fn_constructor_args=(plan,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=plan.threads,
            **({"num_gpus": gpus} if gpus else {}),
        )
        for row in made.iter_rows():
            yield json.loads(row["row"])
    finally:
        ray.shutdown()


def ray_data() -> Any:
    """The module ray, with ray.data.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(f"--ray needs Ray Data ({error}): pip install 'ray[data]==2.60.0'") from error
    return ray
