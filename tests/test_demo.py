"""The demo on a few images: what it writes and prints agrees and can be passed on."""

import json
import re
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("typer")
from studies import demo
from vqfast import zoo

MODES = ("one_step", "search")
FIGURES = {"accuracy", "gallery", "latency", "probabilities", "responses"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def printed(folder):
    """What the demo printed, part by part, on two images with two images to choose the fixed filter."""
    written, threads = [], torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VALIDATION_IMAGES": 2, "TIMED": 2, "WARM_UP": 1}.items():
            patch.setattr(demo, name, value)
        patch.setattr("rich.console.Console.print", lambda _, *parts, **__: written.extend(parts))
        torch.set_num_threads(1)  # too small to share; threads that wait for each other stall on a busy machine
        demo.main(images=2, out=folder)
        torch.set_num_threads(threads)
    return written


@pytest.fixture(scope="module")
def report(folder, printed):
    return json.loads((folder / "report.json").read_text())


def test_keys(report):
    assert report.keys() >= {"clean", "date", "machine", "mean_lift_one_step", "mean_lift_search", "phases_ms", "rows"}
    assert report.keys() >= {"seed", "versions"}
    assert [(row["degradation"], row["severity"]) for row in report["rows"]] == list(demo.SEVERITIES.items())
    for row in report["rows"]:
        assert row.keys() >= {"n", "untuned", "fixed_filter", "one_step", "search"}
    assert report["clean"].keys() >= {"n", "untuned", "one_step", "search"}
    assert all(ms > 0 for phases in report["phases_ms"].values() for ms in phases.values())
    assert report["phases_ms"].keys() == {"plain", *MODES}
    assert "search" in report["phases_ms"]["search"]


def test_fractions(report):
    for row in (report["clean"], *report["rows"]):
        assert row["n"] == 6
        for mode in {"untuned", "fixed_filter", *MODES} & row.keys():
            assert 0 <= row[mode] <= 1
            assert row[mode] * 6 == pytest.approx(round(row[mode] * 6))
        assert row["mended"] - row["broken"] == round(6 * (row["search"] - row["untuned"]))


@pytest.mark.parametrize("mode", MODES)
def test_mean_lift(mode, report, printed, folder):
    """One number in the rows, the report, the page and the table."""
    lift = statistics.fmean(row[mode] - row["untuned"] for row in report["rows"])
    assert report[f"mean_lift_{mode}"] == pytest.approx(lift, abs=1e-12)
    points = f"{100 * lift:+.1f}"
    assert f"<b>{points} points</b>" in (folder / "report.html").read_text()
    assert any(f"mean lift {points} " in part for part in printed if isinstance(part, str))
    column = {"one_step": -2, "search": -1}[mode]
    assert list(printed[0].columns[column].cells)[-1] == points


def test_figures(folder, report):
    assert {path.stem for path in folder.glob("*.png")} == FIGURES
    for path in folder.glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 200
        assert (pixels < 200).mean() > 0.01


def test_page_is_self_contained(folder, report):
    page = (folder / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == len(FIGURES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    text = re.sub(r"base64,[\w+/=]+", "", page)
    assert not re.search(r"https?://|file:|url\(|@import|/(home|root|tmp|work|usr)\b", text)
    assert "{{" not in text
    assert not re.search(r"/(home|root|tmp|work|usr)\b", json.dumps(report))


def test_same_seed_same_images():
    """A severity's randomness comes from the seed and the image, not from what else is drawn."""
    _, processor = zoo.load()
    rows = zoo.questions("test")
    first, again, more, other = (
        demo.draw(processor, rows, count, seed, "gaussian_noise") for count, seed in ((3, 0), (3, 0), (500, 0), (3, 1))
    )
    pixels = [image.tobytes() for image in first.images]
    assert pixels == [image.tobytes() for image in again.images]
    assert set(pixels) <= {image.tobytes() for image in more.images}
    assert len(more.images) == 500
    assert not set(pixels) & {image.tobytes() for image in other.images}
    assert (first.inputs["pixel_values"][0] == first.inputs["pixel_values"][2]).all()
