"""Command line: `vqfast tune IMAGE`, `vqfast profile IMAGE` and `vqfast env`. Loaded by the console script only."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    print(f"vqfast: {error.name} is not installed; get it with: pip install 'vqfast[demo]'", file=sys.stderr)
    raise SystemExit(2) from None

import torch

import vqfast

DEFAULT_QUESTION = "which digit?"  # to the embedded model
SAVED_AS = (".png", ".jpg", ".jpeg", ".webp", ".avif")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)
out = Console(markup=False, highlight=False, emoji=False)

# Of several commands.
ImageFile = Annotated[Path, typer.Argument(help="PNG, JPEG, WebP or AVIF file.")]
Question = Annotated[str | None, typer.Option(help="Default for the embedded model: 'which digit?'.")]
ModelFolder = Annotated[Path | None, typer.Option(help="Folder of a transformers model; else the embedded one.")]
Search = Annotated[bool, typer.Option(help="Search for a filter to start from; else the paper's method.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimiser steps.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def tune(
    image: ImageFile,
    question: Question = None,
    model: ModelFolder = None,
    search: Search = True,
    steps: Steps = 1,
    save_image: Annotated[Path | None, typer.Option(help="Write the filtered image here.")] = None,
    as_json: AsJson = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; the model's own, or 32.")] = None,
) -> None:
    """Answer a question about an image, before and after tuning on it. Runs on a CUDA device if there is one."""
    if save_image is not None:
        _check_output(save_image, image)
    network, processor, inputs, original = _prepared(image, question, model)
    question = question or DEFAULT_QUESTION
    limit = max_new_tokens or network.generation_config.max_new_tokens or 32
    with _expected(ValueError):
        tuner = vqfast.TestTimeTuner(network, _config(search, steps), normalisation=processor)
        result = tuner.tune(**inputs)
    sample = result.samples[0]
    before = after = _answer(network, processor, inputs, sample.token_before, limit)
    if sample.tuned or sample.preset != "identity":
        with tuner.applied(result):
            after = _answer(network, processor, inputs, sample.token_after, limit)
    clipped = None
    if save_image is not None:
        with _expected(ValueError):
            filtered, clipped = result.image(original=original, processor=processor)
        with _expected(OSError):
            filtered.save(save_image, icc_profile=filtered.info.get("icc_profile"))
    plain = json.loads(result.to_json())  # null where a value is not finite
    report = dict(image=str(image), model=str(model or "embedded"), question=question, search=search, steps=steps)
    report |= dict(answer_before=before, answer_after=after, **plain["samples"][0])
    report |= dict(timings_ms=plain["timings_ms"], saved_image=save_image and str(save_image), clipped=clipped)
    if as_json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        _print_report(report)


@app.command()
def profile(
    image: ImageFile,
    question: Question = None,
    model: ModelFolder = None,
    search: Search = False,
    steps: Steps = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Episodes whose median time is shown.")] = 20,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace of one episode here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what tuning on an image costs: time and operator calls per phase, kernel launches, peak memory."""
    if trace is not None and not trace.parent.is_dir():
        _fail(f"cannot save {trace}: there is no folder {trace.parent}; make it first")
    network, processor, inputs, _ = _prepared(image, question, model)
    with _expected(ValueError):
        tuner = vqfast.TestTimeTuner(network, _config(search, steps), normalisation=processor)
        result = tuner.profile(trace=trace, **inputs)
        timings = [tuner.tune(**inputs).timings_ms for _ in range(repeat)]
    assert result.telemetry is not None
    phases = {name: statistics.median(t[name] for t in timings) for name in timings[0]}
    total = statistics.median(sum(t.values()) for t in timings)
    calls, (mode, why) = result.telemetry.operator_calls, tuner.mode
    report = dict(
        image=str(image), model=str(model or "embedded"), mode=mode, why=why, timings_ms=phases, total_ms=total
    )
    report |= dict(operator_calls=calls, total_calls=result.telemetry.total_calls, launches=result.telemetry.launches)
    report |= dict(peak_memory_bytes=result.telemetry.peak_memory_bytes, trace=trace and str(trace))
    if as_json:
        print(json.dumps(report, indent=2))
        return
    table = Table("phase", "ms", "operator calls", box=None, pad_edge=False)
    for name, ms in phases.items():
        table.add_row(name, f"{ms:.2f}", str(calls.get(name, 0)))
    table.add_row("all", f"{total:.2f}", str(result.telemetry.total_calls))
    out.print(table)
    lines = [f"\nmode    {mode}: {why}", f"memory  {result.telemetry.peak_memory_bytes / 1e6:.1f} MB at its peak"]
    if result.telemetry.launches is not None:
        lines.append(f"kernels {result.telemetry.launches} launches")
    if trace is not None:
        lines.append(f"trace   {trace}")
    out.print("\n".join(lines), soft_wrap=True)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Show versions, what is compiled, and which backend each operator takes on each device, and why."""
    info: dict[str, Any] = vqfast.build_info()
    for package in ("triton", "transformers", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            info["versions"].setdefault(package, importlib.metadata.version(package))
    if as_json:
        print(json.dumps(info, indent=2))
        return
    kernels = {f"{name} kernels": reason or "loaded" for name, reason in info["backends"].items()}
    for name, value in (info["versions"] | kernels).items():
        out.print(f"{name:<14} {'none' if value is None else value}", soft_wrap=True)
    table = Table("operator", "device", "backend", "why", box=None, pad_edge=False)
    for operator, devices in info["operators"].items():
        for device, choice in devices.items():
            table.add_row(operator, device, choice["backend"], choice["why"])
    out.print("", table, sep="\n")


def main() -> None:
    """Entry point of the console script."""
    warnings.simplefilter("ignore")
    app()


def _fail(message: object) -> NoReturn:
    """End with one line on stderr and exit code 2."""
    print("vqfast:", " ".join(str(message).split()), file=sys.stderr)
    raise typer.Exit(2)


@contextlib.contextmanager
def _expected(error: type[Exception]) -> Iterator[None]:
    """Such an error is about the user's input: no traceback."""
    try:
        yield
    except error as problem:
        _fail(problem)


def _config(search: bool, steps: int) -> vqfast.TuningConfig:
    return vqfast.TuningConfig(steps=steps, candidates="default" if search else None)


def _prepared(image: Path, question: str | None, model: Path | None) -> tuple[Any, Any, Any, Any]:
    """Model, processor, the processor's output for the image, and the image; on a CUDA device if there is one."""
    for package in ("transformers", "PIL", "jinja2"):
        if importlib.util.find_spec(package) is None:
            _fail(f"{package} is not installed; get it with: pip install 'vqfast[demo]'")
    from vqfast.images import read_image

    question = DEFAULT_QUESTION if question is None and model is None else question
    if not question or not question.strip():
        _fail("there is no question; give one: --question TEXT")
    with _expected(ValueError):
        pixels = read_image(image)
    network, processor = _load(model)
    network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    with _expected(ValueError):
        inputs = processor(images=pixels, text=_prompt(processor, question), return_tensors="pt").to(network.device)
    return network, processor, inputs, pixels


def _check_output(path: Path, image: Path) -> None:
    if not path.parent.is_dir():
        _fail(f"cannot save {path}: there is no folder {path.parent}; make it first")
    if path.is_dir() or path.suffix.lower() not in SAVED_AS:
        _fail(f"cannot save {path}: give the name of a file that ends in {', '.join(SAVED_AS)}")
    if path.exists() and image.exists() and path.samefile(image):
        _fail(f"cannot save {path}: it is the image that is read; give another name")


def _load(folder: Path | None) -> tuple[Any, Any]:
    """Model and processor, from disk only and without remote code."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if folder is None:
        from vqfast import zoo

        return zoo.load()
    if not folder.is_dir():
        _fail(f"there is no folder {folder}; --model takes a folder with config.json and model.safetensors")
    auto_model: Any = transformers.AutoModelForImageTextToText
    local = {"local_files_only": True, "trust_remote_code": False}
    weights = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, loaded = auto_model.from_pretrained(folder, **weights, **local)
        processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil", **local)
    except Exception as error:  # transformers raises almost anything on files that do not fit together
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        _fail(f"{folder} does not load as a vision-language model: {reason}")
    if not isinstance(processor, transformers.ProcessorMixin):
        _fail(f"{folder} has no processor for images and text, only {type(processor).__name__}; save the model's there")
    if unfit := sorted(map(str, (*loaded["missing_keys"], *loaded["mismatched_keys"]))):
        _fail(f"the weights in {folder} do not fit its config.json: {len(unfit)} missing or misshapen, as {unfit[0]}")
    return model, processor


def _prompt(processor: Any, question: str) -> str:
    if getattr(processor, "chat_template", None) is None:
        return f"<image>\n{question}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def _answer(model: Any, processor: Any, inputs: Any, first: int, limit: int) -> str:
    """The greedy answer, without special tokens; its first token is known."""
    ids = torch.tensor([[first]])
    if limit > 1:
        ids = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return str(processor.batch_decode(ids, skip_special_tokens=True)[0]).strip()


def _print_report(report: dict[str, Any]) -> None:
    table = Table("", "before", "after", box=None, pad_edge=False)
    for name, key in (("answer", "answer"), ("confidence", "confidence"), ("entropy (nats)", "entropy")):
        values = (report[f"{key}_before"], report[f"{key}_after"])
        table.add_row(name, *(f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    out.print(table)
    method = "chosen by the search" if report["search"] else "no search, the paper's method"
    lines = [
        f"\nstart   {report['preset']}, {method}",
        f"steps   {report['steps']}, {report['note'] or 'taken over'}",
        "filter  " + ", ".join(f"{name} {value:.2f}" for name, value in report["filter"].items()),
        "ms      " + ", ".join(f"{name} {ms:.1f}" for name, ms in report["timings_ms"].items()),
    ]
    if report["saved_image"]:
        lines.append(f"saved   {report['saved_image']}, {report['clipped']:.1%} of its values clipped")
    out.print("\n".join(lines), soft_wrap=True)
