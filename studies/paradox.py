"""`python -m studies.paradox`: degraded images, answered by several methods; beside the clean ones (docs/studies.md).

Writes rows.jsonl, which a killed run continues, summary.json and report.html into the output folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from fnmatch import filter as matching
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

import vqfast
from studies import codecs, data, degradations, methods, paradox_report, restoration, units
from studies.demo import surroundings
from studies.methods import METHODS, digest, folder_of, identity
from studies.records import Records

IMAGES = 40
SEVERITIES = [1, 3, 5]
ANSWER_TOKENS = 8  # of a dataset that is not the digits
PACKAGES = ("vqfast", "torch", "transformers", "numpy", "pillow", "scipy", "scikit-image", "opencv-python-headless")
CODE = [Path(module.__file__) for module in (data, degradations, codecs, restoration, methods, units)]
CODE += sorted(file for file in Path(vqfast.__file__).parent.rglob("*") if file.suffix in (".py", ".so"))


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """What is wrong with the user's input needs no traceback."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise typer.BadParameter(str(error)) from error


def several(help: str) -> Any:
    return typer.Option(help=f"{help} Repeat the option for more.", show_default=False)


def configured(
    dataset: data.Dataset, models: list[str], names: list[str], severities: list[int], asked: list[str], **values: Any
) -> tuple[units.Plan, dict[str, Any]]:
    """What is to be done, and the configuration that its rows depend on.

    Raises:
        ValueError: unknown model, degradation, severity or method; lists the known.
    """
    chosen = ["untuned"]  # what the others are compared with
    for name in asked:
        chosen += matching(METHODS, name) or [name]
    identities = {name: identity(name) for name in chosen}
    found = units.conditions(names, severities, dataset.kind)
    contents = json.dumps([(item.name, item.number, item.digest, item.questions) for item in dataset.items])
    configuration = dict(
        dataset=dataset.name,
        images=len(dataset.items),
        data=hashlib.sha256(contents.encode()).hexdigest(),
        models={model: digest(folder_of(model)) for model in dict.fromkeys(models)},
        conditions=found,
        methods=identities,
        versions={package: version(package) for package in PACKAGES},
        code=digest(*CODE),
        device=device(),
        cpu_target=os.environ.get("VQFAST_CPU_TARGET"),
        **values,
    )
    whole = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()
    names_of = dict(models=tuple(configuration["models"]), conditions=tuple(found), methods=tuple(identities))
    return units.Plan(dataset, **names_of, **values, digest=whole), configuration


def device() -> str:
    """What the models run on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else surroundings(0)["machine"].rpartition(", ")[0]


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there in full or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def run(plan: units.Plan, records: Records, ray_address: str | None, workers: int) -> None:
    """Make the rows that are missing, each written as soon as it is there."""
    missing = [unit for unit in plan.units() if plan.key(unit) not in records.done]
    named: set[str] = set()
    with tqdm(
        total=len(records.done) + len(missing), initial=len(records.done), unit="unit", mininterval=1, smoothing=0.05
    ) as bar:
        for row in units.rows(plan, missing, ray_address, workers) if missing else ():
            records.append(row)
            bar.set_description(f"{row['condition']} {row['severity']:g}", refresh=False)
            bar.update()
            for name in row["undecodable"].keys() - named:
                bar.write(f"left out: {row['undecodable'][name]}", file=sys.stderr)
                named.add(name)


def main(
    images: Annotated[int, typer.Option(min=1, help="Images to draw; the digits' test split has 500.")] = IMAGES,
    seed: Annotated[int, typer.Option(min=0, help="Draws images and degradations.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder to write into, or to continue.")] = Path("out/studies/paradox"),
    dataset: Annotated[str, typer.Option(help="digits, or FOLDER/questions.jsonl of your own.")] = "digits",
    split: Annotated[str, typer.Option(help="Of the digits: test or validation.")] = "test",
    models: Annotated[list[str] | None, several("digits, or a transformers folder.")] = None,
    degradations: Annotated[list[str] | None, several("A name, codec:NAME, NAME:SEVERITY, or a pattern.")] = None,
    severities: Annotated[list[int] | None, several("1 to 5; 1, 3 and 5 unless given.")] = None,
    methods: Annotated[list[str] | None, several("A method or a pattern such as 'restore:*'.")] = None,
    answer_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer; 1 for the digits, else 8.", show_default=False)
    ] = None,
    ray: Annotated[str | None, typer.Option(help="local, or the address of a Ray cluster.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on Ray, each with its own model.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of torch, per process; bits depend on it.")] = 1,
) -> None:
    """Answer questions about clean and degraded images, untuned and by every method, and compare."""
    tokens = answer_tokens or (1 if dataset == "digits" else ANSWER_TOKENS)
    with refused():
        drawn = data.load(dataset, split, images, seed)
        asked = (models or ["digits"], degradations or ["*"], severities or SEVERITIES, methods or ["*"])
        plan, configuration = configured(drawn, *asked, seed=seed, answer_tokens=tokens, threads=threads)
        if ray:
            units.ray_data()
        records = Records(out / "rows.jsonl", configuration)
    with records:
        run(plan, records, ray, workers)
        with refused():
            summary = paradox_report.summarise(records.rows(), configuration)
        about = surroundings(seed)
        report = dict(
            configuration=configuration, images=len(drawn.items), date=about["date"], machine=about["machine"]
        )
        report |= summary
        write_whole(out / "summary.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        write_whole(out / "report.html", paradox_report.page(report))
    print(out / "report.html")


if __name__ == "__main__":
    typer.run(main)
