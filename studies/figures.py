"""What the demo draws and prints: figures, the HTML page, the tables. It computes nothing but filter responses."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vqfast import zoo
from vqfast.nn import gaussian_taps

LABELS = {"untuned": "untuned", "fixed_filter": "best fixed filter", "one_step": "one step", "search": "search + step"}
COLOURS = {"untuned": "#b9b5ac", "fixed_filter": "#e0a93f", "one_step": "#7fb0d8", "search": "#1d4e80"}
RIGHT, WRONG, INK = "#1d6b45", "#b3382c", "#2b2a28"
PHASES = {  # phase of a step -> colour
    "prepare": "#8c8880",
    "search": "#1d4e80",
    "forward": "#7fb0d8",
    "backward": "#e0a93f",
    "update": "#8a5a9e",
    "answer": "#b9d6ec",
    "result": "#d6d2c9",
}
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8c8880",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 160,
}
TABLE: dict[str, Any] = dict(title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
BELOW: dict[str, Any] = dict(xycoords="axes fraction", textcoords="offset points", ha="center", fontsize=8)
MAX_CURVES = 300
CHANCE = sum(1 / n for n in (10, 2, 2)) / 3  # a digit of ten, odd or even, yes or no


@dataclass(frozen=True)
class Example:
    """One digit question on one degraded image, tuned with search."""

    degradation: str
    images: tuple[Image.Image, ...]  # clean, degraded, after the tuned filter
    truth: str
    answers: tuple[str, str]  # untuned, tuned
    preset: str
    probabilities: tuple[list[float], ...]  # of the ten digit words, untuned and tuned


def spaced(name: str) -> str:
    """A degradation's name as it is read."""
    return "JPEG" if name == "jpeg" else name.replace("_", " ")


def radial_response(filters: dict[str, Tensor], taps: int, frequency: Tensor) -> Tensor:
    """|gain (1 + mix (K^ - 1))| of S Gaussian filters, averaged over directions: [S, F].

    Args:
        filters: log_sigma, mix and gain, [S] each. frequency: [F], cycles per pixel.
    """
    row = gaussian_taps(filters["log_sigma"], taps)
    position = torch.arange(taps) - taps // 2
    angle = torch.linspace(0, torch.pi / 2, 19)
    along = [frequency[:, None] * axis for axis in (angle.cos(), angle.sin())]
    y, x = (torch.cos(2 * torch.pi * position * f[..., None]) @ row.T for f in along)  # [F, directions, S]
    return (filters["gain"] * (1 + filters["mix"] * (x * y - 1))).abs().mean(1).T


def gallery(figure: Figure, examples: list[Example]) -> None:
    """A column per example: the images with the truth and the answers below."""
    axes = figure.subplots(3, len(examples))
    for column, example in zip(axes.T, examples, strict=True):
        for ax, image, word in zip(column, example.images, (example.truth, *example.answers), strict=True):
            ax.imshow(image, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_xlabel(word, color=RIGHT if word == example.truth else WRONG, fontsize=12, labelpad=3)
        column[0].set_title(spaced(example.degradation))
        column[2].annotate(example.preset, (0.5, 0), (0, -28), **BELOW).set_in_layout(False)
    for ax, name in zip(axes[:, 0], ("clean", "degraded", "after tuning"), strict=True):
        ax.set_ylabel(name, fontsize=11, labelpad=8)
    figure.get_layout_engine().set(rect=(0, 0.045, 1, 0.955), hspace=0.02)


def responses(figure: Figure, filters: dict[str, dict[str, dict[str, Tensor]]], taps: int) -> None:
    """A row per mode, a column per degradation, a curve per sample."""
    frequency = torch.linspace(0, 0.5, 51)
    axes = figure.subplots(2, len(filters), sharex=True, sharey=True)
    for column, (name, modes) in zip(axes.T, filters.items(), strict=True):
        column[0].set_title(spaced(name))
        for ax, (mode, parameters) in zip(column, modes.items(), strict=True):
            curves = radial_response(parameters, taps, frequency)[:MAX_CURVES]
            opacity = max(6 / len(curves), 0.01)
            ax.axhline(1, color="#8c8880", linewidth=0.8, linestyle=":")
            ax.plot(frequency, curves.T, color=COLOURS["search"], alpha=min(opacity, 1), linewidth=1.6)
            ax.set(yscale="log", xlim=(0, 0.5), ylim=(0.03, 30))
            ax.set_xticks([0, 0.25, 0.5], ["0", "¼", "½"])
            ax.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
            ax.minorticks_off()
            column[0].tick_params(bottom=False)
            axes[list(modes).index(mode), 0].set_ylabel(f"{LABELS[mode]}\ngain")
    figure.supxlabel("frequency, cycles per pixel", fontsize=10)


def probabilities(figure: Figure, examples: list[Example]) -> None:
    """A panel per example: bars of the ten digit words."""
    axes, place = figure.subplots(2, -(-len(examples) // 2), sharey=True), np.arange(len(zoo.DIGITS))
    for ax, example in zip(axes.flat, examples, strict=False):
        for values, mode, shift in zip(example.probabilities, ("untuned", "search"), (-0.2, 0.2), strict=True):
            ax.bar(place + shift, values, 0.4, color=COLOURS[mode], label=LABELS[mode])
        ax.set(title=spaced(example.degradation), ylim=(0, 1))
        ax.set_xticks(place, zoo.DIGITS, rotation=90, fontsize=9)
        ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        for label, word in zip(ax.get_xticklabels(), zoo.DIGITS, strict=True):
            label.set(color=RIGHT, fontweight="bold") if word == example.truth else None
    figure.supylabel("probability of the word", fontsize=10)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)


def accuracy(figure: Figure, report: dict[str, Any]) -> None:
    """Grouped bars, a group per condition."""
    ax: Axes = figure.subplots()
    rows = [{"degradation": "clean", **report["clean"]}, *report["rows"]]
    for i, (mode, label) in enumerate(LABELS.items()):
        heights = [100 * row[mode] if mode in row else np.nan for row in rows]
        ax.bar(np.arange(len(rows)) + 0.2 * (i - 1.5), heights, 0.19, color=COLOURS[mode], label=label)
    ax.axhline(100 * CHANCE, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    ax.annotate("chance", (1, 100 * CHANCE), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points")
    ax.texts[0].set(va="center", fontsize=9)
    ax.set_xticks(range(len(rows)), [spaced(row["degradation"]).replace(" ", "\n") for row in rows])
    ax.tick_params(axis="x", length=0)
    ax.set(ylabel="right answers, %", ylim=(0, 100), xlim=(-0.5, len(rows) - 0.5))
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=4)


def latency(figure: Figure, report: dict[str, Any]) -> None:
    """Stacked bars of the phases."""
    ax: Axes = figure.subplots()
    modes = [("plain", "untuned", 0.0), *((m, LABELS[m], report[f"mean_lift_{m}"]) for m in ("one_step", "search"))]
    for y, (mode, _, lift) in enumerate(modes):
        left, shown = 0.0, report["phases_ms"][mode]
        for phase, ms in shown.items():
            ax.barh(y, ms, 0.6, left=left, color=PHASES[phase])
            if ms > 0.05 * report["latency_ms"]["search"]:
                dark = phase in ("search", "update")
                ax.text(left + ms / 2, y, phase, ha="center", va="center", fontsize=9, color="white" if dark else INK)
            left += ms
        note = f"{report['latency_ms'][mode]:.0f} ms" + (f", {100 * lift:+.1f} points" if mode != "plain" else "")
        ax.annotate(note, (left, y), (6, 0), textcoords="offset points", va="center")
    ax.set_yticks(range(len(modes)), [label for _, label, _ in modes])
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel="milliseconds for one image, one question", xlim=(0, 1.25 * report["latency_ms"]["search"]))


def draw_all(
    out: Path, report: dict[str, Any], examples: list[Example], filters: dict[str, Any], taps: int
) -> dict[str, Path]:
    """Write every figure into `out` as PNG: name -> path. filters: degradation -> mode -> parameter -> [S]."""
    figures: dict[str, tuple[tuple[float, float], Callable[[Figure], None]]] = {
        "accuracy": ((10.5, 3.8), lambda f: accuracy(f, report)),
        "gallery": ((10.5, 5.2), lambda f: gallery(f, examples)),
        "probabilities": ((10.5, 4.6), lambda f: probabilities(f, examples)),
        "responses": ((10.5, 3.6), lambda f: responses(f, filters, taps)),
        "latency": ((10.5, 2.2), lambda f: latency(f, report)),
    }
    paths = {name: out / f"{name}.png" for name in figures}
    with matplotlib.rc_context(STYLE):
        for name, (size, draw) in figures.items():
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            figure.savefig(paths[name])
    return paths


def write_page(path: Path, report: dict[str, Any], pictures: dict[str, Path]) -> None:
    """One HTML file with everything in it."""
    encoded = {name: base64.b64encode(file.read_bytes()).decode() for name, file in pictures.items()}
    path.write_text(rendered("report.html.j2", **report, pictures=encoded, labels=LABELS))


def rendered(template: str, **values: Any) -> str:
    """A page from a template of this folder."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters |= {"percent": lambda x: f"{100 * x:.1f}", "points": lambda x: f"{100 * x:+.1f}", "spaced": spaced}
    return page.get_template(template).render(**values) + "\n"


def print_report(report: dict[str, Any]) -> None:
    """The tables, from what report.json holds."""
    console = Console()
    for table in (accuracy_table(report), phases_table(report)):
        console.print(table, "")
    for mode in ("one_step", "search"):
        lift, error, ms = report[f"mean_lift_{mode}"], report["standard_error"][mode], report["latency_ms"]
        console.print(
            f"{LABELS[mode]:13} mean lift {100 * lift:+.1f} ± {100 * error:.1f} points for {ms[mode]:.0f} ms, "
            f"{ms[mode] / ms['plain']:.1f} plain forwards",
            highlight=False,
        )


def accuracy_table(report: dict[str, Any]) -> Table:
    """A row per condition, then the mean lifts."""
    table = Table(title="right answers, %", **TABLE)
    for name in ("degradation", "severity", "n", "untuned", "fixed", "filter", "one step", "search"):
        table.add_column(name, justify="left" if name in ("degradation", "filter") else "right", no_wrap=True)
    lines = [{"degradation": "clean", "severity": "", "preset": "", **report["clean"]}, *report["rows"]]
    for i, row in enumerate(lines):
        cells = [f"{100 * row[mode]:.1f}" if mode in row else "" for mode in LABELS]
        cells.insert(2, row["preset"])
        last = i in (0, len(lines) - 1)
        table.add_row(spaced(row["degradation"]), str(row["severity"]), str(row["n"]), *cells, end_section=last)
    fixed, *lifts = (f"{100 * report[f'mean_lift_{mode}']:+.1f}" for mode in list(LABELS)[1:])
    table.add_row("mean lift", "", "", "", fixed, "", *lifts)
    return table


def phases_table(report: dict[str, Any]) -> Table:
    """Plain inference and the modes, phase by phase."""
    table = Table(title="median ms per answer", **TABLE)
    table.add_column("")
    for phase in (*PHASES, "total"):
        table.add_column(phase, justify="right")
    for mode, phases in report["phases_ms"].items():
        cells = (f"{phases[phase]:.1f}" if phase in phases else "" for phase in PHASES)
        table.add_row(LABELS.get(mode, "untuned"), *cells, f"{report['latency_ms'][mode]:.1f}")
    return table
