"""Ways to answer a question about a degraded image: models, and what is done to image or model before they answer."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from torch import Tensor

import vqfast
from studies.restoration import RESTORERS, imported, restore
from vqfast import TestTimeTuner, TuningConfig, zoo
from vqfast.integrations.transformers import find_vision_tower
from vqfast.tuning.candidates import DEFAULT_PRESETS, IDENTITY, render

BATCH = 24  # samples per call, as in studies/demo.py
FILTERS = {f"filter:{preset.name}": preset for preset in DEFAULT_PRESETS if preset != IDENTITY}
TUNERS = {"one_step": TuningConfig(), "search": TuningConfig(candidates="default")}
METHODS = ("untuned", *(f"restore:{name}" for name in RESTORERS), *FILTERS, *TUNERS)
"""Known by name alone; beside them "restore:module:function" and "codec_adaptor:FILE"."""


class Answers(NamedTuple):
    """Of each sample: the answer; probability of its first token and entropy of that token's distribution in nats."""

    text: list[str]
    confidence: list[float]
    entropy: list[float]


@dataclass(frozen=True)
class VisionLanguageModel:
    """A model with its processor, and how many tokens its answers have at most."""

    network: Any
    processor: Any
    answer_tokens: int

    def inputs(self, images: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, Tensor]:
        """What the model takes for one image and one question per sample, padded on the left."""
        texts = [self.prompt(question) for question in questions]
        found = self.processor(images=list(images), text=texts, return_tensors="pt", padding=True)
        return {name: value.to(self.network.device) for name, value in found.items()}

    def prompt(self, question: str) -> str:
        """The question behind its image in the model's chat template, or as it is where there is none."""
        if getattr(self.processor, "chat_template", None) is None:
            return f"{getattr(self.processor, 'image_token', '<image>')}\n{question}"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return str(self.processor.apply_chat_template([dict(role="user", content=content)], add_generation_prompt=True))

    @torch.no_grad()
    def generate(self, inputs: dict[str, Tensor], logits: Tensor | None = None) -> Answers:
        """Greedy answers; `logits` [B, V] of their first tokens where these are known."""
        if logits is None or self.answer_tokens > 1:
            written = self.network.generate(
                **inputs,
                max_new_tokens=self.answer_tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            logits = written.logits[0] if logits is None else logits
            tokens = written.sequences[:, inputs["input_ids"].shape[1] :]
        else:
            tokens = logits.argmax(-1, keepdim=True)
        text = self.processor.batch_decode(tokens, skip_special_tokens=True)
        first = torch.distributions.Categorical(logits=logits.double(), validate_args=False)
        return Answers([t.strip() for t in text], first.probs.amax(-1).tolist(), first.entropy().tolist())


def folder_of(model: str) -> Path:
    """Of a model by name.

    Raises:
        ValueError: neither "digits" nor a folder with a config.json.
    """
    if model == "digits":
        return zoo.FOLDER
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"model must be digits, or a transformers folder with a config.json; got {model!r}")
    return Path(model)


def load_model(model: str, answer_tokens: int) -> VisionLanguageModel:
    """From disk only, without remote code; on a CUDA device if there is one.

    Raises:
        ValueError: as `folder_of`, the processor there takes no images with text, or the model is an encoder-decoder.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder: Any = folder_of(model)
    if model == "digits":
        network, processor = zoo.load()
    else:
        network = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
        processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        if not isinstance(processor, transformers.ProcessorMixin):
            raise ValueError(f"{folder} has no processor for images with text; save the model's there")
        if network.config.is_encoder_decoder:
            raise ValueError(f"{folder} is an encoder-decoder, {type(network).__name__}; give a decoder-only model")
        processor.tokenizer.padding_side = "left"
    # greedy, whatever the folder asks for: beams, penalties, several answers
    ends = {name: getattr(network.generation_config, name) for name in TOKENS}
    network.generation_config = transformers.GenerationConfig(**ends)
    network.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    return VisionLanguageModel(network, processor, answer_tokens)


TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # what generation keeps of a folder's configuration
LOADED = (".safetensors", ".json", ".jinja", ".model", ".txt")


def digest(*paths: Path) -> str:
    """sha256 of files; of a folder, of those that a model and its processor are loaded from."""
    total = hashlib.sha256()
    for path in paths:
        for file in sorted(f for f in path.iterdir() if f.suffix in LOADED) if path.is_dir() else [path]:
            total.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def identity(method: str) -> str:
    """What a method is beside its name: the digest of the file that it reads or is written in, or nothing.

    Raises:
        ValueError: unknown method, or a hook or file that is not there.
    """
    kind, _, rest = method.partition(":")
    if method in METHODS:
        return ""
    if kind == "codec_adaptor" and Path(rest).is_file():
        return digest(Path(rest))
    if kind == "restore" and ":" in rest:
        try:
            return digest(Path(inspect.getfile(inspect.unwrap(imported(rest)))))
        except (ImportError, TypeError, ValueError) as error:
            raise ValueError(f"method {method!r} names no function that can be imported: {error}") from error
    known = f"{', '.join(METHODS)}, restore:MODULE:FUNCTION, codec_adaptor:FILE of an adaptor that exists"
    raise ValueError(f"method must be one of {known}; got {method!r}")


def answer(
    model: VisionLanguageModel,
    method: str,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    codec: str | None = None,
) -> Answers:
    """The answers of a method to one question about one image per sample.

    Args:
        method: checked by `identity`.
        codec: "<codec>:<level>" that the images were compressed with, where that is known.
    """
    kind, _, rest = method.partition(":")
    if kind == "restore":
        unique = {id(image): image for image in images}
        restored = {key: restore(image, rest) for key, image in unique.items()}
        images = [restored[id(image)] for image in images]
    total = Answers([], [], [])
    with RUNS.get(kind, plain)(model, rest, codec) as run:
        for start in range(0, len(images), BATCH):
            rows = slice(start, start + BATCH)
            for column, more in zip(total, run(model.inputs(images[rows], questions[rows])), strict=True):
                column += more
    return total


Run = Callable[[dict[str, Tensor]], Answers]


@contextlib.contextmanager
def plain(model: VisionLanguageModel, _: str, codec: str | None) -> Iterator[Run]:
    yield model.generate


@contextlib.contextmanager
def behind_filter(model: VisionLanguageModel, preset: str, codec: str | None) -> Iterator[Run]:
    chosen = FILTERS[f"filter:{preset}"]
    tone = find_vision_tower(model.network, 0, (), model.processor).normalisation(model.network.device)

    def run(inputs: dict[str, Tensor]) -> Answers:
        pixels = inputs["pixel_values"]
        if pixels.dim() != 4 or len(pixels) != len(inputs["input_ids"]):
            given = f"got {list(pixels.shape)} for {len(inputs['input_ids'])} samples"
            raise ValueError(f"filter:{preset} needs one image [C, H, W] per sample, {given}; leave such methods out")
        return model.generate({**inputs, "pixel_values": render((chosen,), pixels, TuningConfig().taps, *tone).pixels})

    yield run


@contextlib.contextmanager
def tuned(config: TuningConfig, model: VisionLanguageModel, _: str, codec: str | None) -> Iterator[Run]:
    with TestTimeTuner(model.network, config, normalisation=model.processor) as tuner:

        def run(inputs: dict[str, Tensor]) -> Answers:
            result = tuner.tune(**inputs)
            if model.answer_tokens == 1:
                return model.generate(inputs, result.logits)
            with tuner.applied(result):
                return model.generate(inputs, result.logits)

        yield run


@contextlib.contextmanager
def adapted(model: VisionLanguageModel, file: str, codec: str | None) -> Iterator[Run]:
    """Told the codec where the adapters know it."""
    adapters = vqfast.insert_codec_adapters(model.network, Path(file))
    try:
        with adapters.condition(codec if codec in adapters.conditions else None):
            yield model.generate
    finally:
        adapters.remove()


# By the kind of method; the others answer plainly.
RUNS: dict[str, Callable[..., contextlib.AbstractContextManager[Run]]] = {
    "filter": behind_filter,
    "codec_adaptor": adapted,
    **{name: functools.partial(tuned, config) for name, config in TUNERS.items()},
}
