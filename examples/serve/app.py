"""Answers to questions about images, tuned on each image: `serve run examples/serve/config.yaml` (README.md)."""

import asyncio
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from fastapi import FastAPI, HTTPException, Request
from PIL import Image
from pydantic import BaseModel, DirectoryPath, PositiveFloat, PositiveInt
from ray import serve
from starlette.datastructures import UploadFile
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import vqfast
from vqfast import zoo
from vqfast.images import read_image

Row = dict[str, Tensor]  # what the processor returned for one request
Answer = dict[str, Any]
http = FastAPI(title="vqfast")


class Settings(BaseModel, extra="forbid"):
    """`args` of the application in config.yaml."""

    model: DirectoryPath | None = None  # folder of a transformers model and its processor; None: the embedded one
    max_new_tokens: PositiveInt = 32
    max_batch_size: PositiveInt = 8
    batch_wait_s: PositiveFloat = 0.05  # for a batch to fill
    max_body_bytes: PositiveInt = 8_000_000
    max_pixels: PositiveInt = 16_000_000  # of an image, by its header
    max_question: PositiveInt = 500  # characters


class TunedModel:
    """A model, its processor and its tuner; loaded from disk only and without remote code."""

    def __init__(self, folder: Path | None = None, max_new_tokens: int = 32) -> None:
        transformers.utils.logging.disable_progress_bar()
        if folder is None:
            model, self.processor = zoo.load()
        else:
            local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            model = transformers.AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True, **local)
            self.processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil", **local)
        device = "cuda" if torch.cuda.is_available() else "cpu"  # Ray hides GPUs that the replica did not ask for
        self.model: Any = model.eval().requires_grad_(False).to(device)
        self.max_new_tokens = max_new_tokens
        config = vqfast.TuningConfig(candidates="default")
        self.tuner = vqfast.TestTimeTuner(self.model, config, normalisation=self.processor)

    def encoded(self, image: Image.Image, question: str) -> Row:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return dict(self.processor(images=image, text=text, return_tensors="pt"))

    def answers(self, rows: list[Row]) -> list[Answer]:
        """Tuned in one batch, each row with a filter and adapters of its own."""
        batch = together(rows, self.processor.tokenizer.pad_token_id)
        inputs = {name: value.to(self.model.device) for name, value in batch.items()}
        result = self.tuner.tune(**inputs)
        before = self._texts(inputs)
        with self.tuner.applied(result):
            after = self._texts(inputs)
        samples = json.loads(result.to_json())["samples"]  # null where a value is not finite
        return [
            {"answer_before": old, "answer_after": new, **sample}
            for old, new, sample in zip(before, after, samples, strict=True)
        ]

    def each(self, rows: list[Row]) -> list[Answer | Exception]:
        """An answer or an error per row: one that the model cannot take fails alone."""
        try:
            return list(self.answers(rows))
        except Exception as error:
            return [error] if len(rows) == 1 else [self.each([row])[0] for row in rows]

    def _texts(self, inputs: Row) -> list[str]:
        ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def together(rows: list[Row], pad: int) -> Row:
    """One batch of the rows; prompts are padded on the left."""
    batch = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if first.shape == rows[0]["input_ids"].shape:  # a value per token
            prompts, fill = [value[0] for value in values], pad if name == "input_ids" else 0
            batch[name] = pad_sequence(prompts, batch_first=True, padding_value=fill, padding_side="left")
        else:
            batch[name] = torch.cat(values)
    return batch


@serve.deployment
@serve.ingress(http)
class VisionAnswers:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model = TunedModel(settings.model, settings.max_new_tokens)
        self.decoder = ThreadPoolExecutor(1)  # one decoded image in memory at a time
        self.worker = ThreadPoolExecutor(1)  # the only thread that uses the model
        self.probe = self.model.encoded(Image.new("RGB", (64, 64)), zoo.QUESTIONS[0])
        self.model.answers([self.probe])  # a model that does not fit fails here, not on the first request
        self.answered.set_max_batch_size(settings.max_batch_size)
        self.answered.set_batch_wait_timeout_s(settings.batch_wait_s)

    @http.post("/answer")
    async def answer(self, request: Request) -> Answer:
        """Takes a multipart form with a file `image` and a text `question`."""
        self._check_length(request.headers.get("content-length", ""))
        async with request.form(max_files=1, max_fields=1) as form:
            image, question = form.get("image"), form.get("question")
            if not isinstance(image, UploadFile) or not isinstance(question, str):
                raise HTTPException(422, "send a multipart form with a file `image` and a text `question`")
            data = await image.read()
        try:
            row = await asyncio.get_running_loop().run_in_executor(self.decoder, self._prepared, data, question)
            answer = await self.answered(row)
            if isinstance(answer, Exception):
                raise answer
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        return {"request_id": request.headers["x-request-id"], **answer}

    async def check_health(self) -> None:
        """Ray replaces a replica whose model raises, or does not come back in time."""
        await asyncio.get_running_loop().run_in_executor(self.worker, self.model.answers, [self.probe])

    @serve.batch
    async def answered(self, rows: list[Row]) -> list[Answer | Exception]:
        return await asyncio.get_running_loop().run_in_executor(self.worker, self.model.each, rows)

    def _check_length(self, length: str) -> None:
        """By the header, before the body is read."""
        if not length.isdigit():
            raise HTTPException(411, "the request has no Content-Length; send the body in one piece, not in chunks")
        if int(length) > self.settings.max_body_bytes:
            limit = f"at most {self.settings.max_body_bytes:,} are accepted"
            raise HTTPException(413, f"the body has {int(length):,} bytes, {limit}; scale the image down")

    def _prepared(self, data: bytes, question: str) -> Row:
        """ValueError: the image or the question is not accepted."""
        if not question.strip() or len(question) > self.settings.max_question:
            limit = f"1 to {self.settings.max_question} are accepted, not only spaces"
            raise ValueError(f"the question has {len(question)} characters, {limit}; ask another one")
        image = read_image(io.BytesIO(data), max_pixels=self.settings.max_pixels)
        return self.model.encoded(image, question)


def build(settings: Settings) -> serve.Application:
    return VisionAnswers.bind(settings)
