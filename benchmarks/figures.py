"""What the report draws. It reads result rows and computes nothing but ratios of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.results import Result
from benchmarks.timing import SUPERLINEAR, exponent
from studies.figures import INK, STYLE, WRONG

KINDS = {"eager": "#7fb0d8", "compiled": "#1d4e80", "reference": "#b9b5ac", "plain": "#e0a93f"}
OPERATORS = ("#1d4e80", "#b3382c", "#e0a93f", "#1d6b45", "#8a5a9e")
GREY = "#8c8880"
WIDTH = 10.5
RATIOS = (0.5, 1, 2, 5, 10, 20, 50)


def _ratio_axis(ax: Axes, largest: float) -> None:
    ax.axvline(1, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    ax.set(xscale="log", xlabel="time of the peer / time of vqfast")
    ax.set_xticks(RATIOS, [f"{x:g}" for x in RATIOS])
    ax.minorticks_off()
    ax.set_xlim(0.4, max(2.5, 1.4 * largest))
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()


def summary(ax: Axes, lines: list[Result]) -> None:
    """Two bars per line of the README's table."""
    for kind, shift in (("eager", -0.2), ("compiled", 0.2)):
        shown = [(y + shift, line[kind]) for y, line in enumerate(lines) if line[kind]]
        places, ratios = np.array(shown).reshape(-1, 2).T
        ax.barh(places, ratios - 1, 0.36, left=1, color=KINDS[kind], label=f"fastest {kind} peer")
    ax.set_yticks(range(len(lines)), [f"{line['op']} {line['case']} {line['dtype']}" for line in lines], fontsize=9)
    _ratio_axis(ax, max(line[kind] or 0 for line in lines for kind in ("eager", "compiled")))
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=2)


def speedups(ax: Axes, rows: list[Result], kind: Callable[[str], str]) -> None:
    """A bar per row with a peer, a gap between groups."""
    place, labels, before = 0.0, {}, None
    for row in rows:
        group = f"{row['op']} {row['case']} {row['dtype']} {row['direction']}"
        if group != before:
            place += 1.2
            ax.annotate(group, (0, place), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points")
            ax.texts[-1].set(va="center", fontsize=9, fontweight="bold")
            before, place = group, place + 1
        ax.barh(place, row["speedup"] - 1, 0.8, left=1, color=KINDS[kind(row["peer"])])
        end = max(row["speedup"], 1)
        ax.annotate(f"{row['speedup']:.2f}", (end, place), (4, 0), textcoords="offset points", va="center")
        ax.texts[-1].set(fontsize=8)
        labels[place] = row["peer"]
        place += 1
    ax.set_yticks(list(labels), list(labels.values()), fontsize=9)
    ax.set_ylim(0, place + 0.5)
    _ratio_axis(ax, max(row["speedup"] for row in rows))


def roofline(ax: Axes, rows: list[Result]) -> None:
    """Every operator alone: operations per byte against operations per second, under the roofs of the floors."""
    bandwidth = max(row["gbps"] * row["median_us"] / row["floor_us"] for row in rows)
    peak = {
        dtype: max(row["gflops"] * row["median_us"] / row["floor_us"] for row in rows if row["dtype"] == dtype)
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
    }
    intensity = np.geomspace(0.5, 1000, 200)
    for dtype, rate in peak.items():
        ax.plot(intensity, np.minimum(bandwidth * intensity, rate), color=GREY, linewidth=1)
        ax.annotate(dtype, (1000, min(bandwidth * 1000, rate)), (0, 4), textcoords="offset points", ha="right")
    marks = {"float32": "o", "bfloat16": "s"}
    for op, colour in zip(dict.fromkeys(row["op"] for row in rows), OPERATORS, strict=False):
        for dtype, mark in marks.items():
            own = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
            x, y = [row["gflops"] / row["gbps"] for row in own], [row["gflops"] for row in own]
            ax.scatter(x, y, 36, colour, marker=mark, label=f"{op} {dtype}" if own else None)
    ax.set(xscale="log", yscale="log", xlabel="floating-point operations per byte", ylabel="GFLOP/s")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.figure.legend(*ax.get_legend_handles_labels(), loc="outside right upper", fontsize=9)


def scaling(figure: Figure, curves: dict[tuple[str, str], list[tuple[float, float]]]) -> None:
    """A panel per operator and axis, with a dotted line of proportional time; a superlinear exponent in red."""
    panels = list(figure.subplots(-(-len(curves) // 4), 4, squeeze=False).flat)
    for ax in panels:
        ax.set_visible(False)
    for ax, ((op, axis), points) in zip(panels, curves.items(), strict=False):
        values, times = zip(*sorted(points), strict=True)
        found = exponent(values, times)
        ax.set_visible(True)
        ms = np.array(times) / 1000
        ax.loglog(values, ms[-1] * np.array(values) / values[-1], color=GREY, linewidth=0.8, linestyle=":")
        ax.plot(values, ms, color=KINDS["compiled"], marker="o", markersize=4)
        ax.set_title(f"{op}\n{axis}, exponent {found:.2f}", fontsize=9, color=WRONG if found > SUPERLINEAR else INK)
        ax.set_xticks(values, [f"{v:g}" for v in values], fontsize=8, rotation=45, ha="right")
        ends = (ms[0], ms[-1]) if ms[-1] > 2 * ms[0] else (ms[-1],)  # labels that do not overlap
        ax.set_yticks(ends, [f"{x:.2g}" for x in ends], fontsize=8)
        ax.minorticks_off()
    figure.supylabel("milliseconds", fontsize=10)


def draw(path: Path, height: float, paint: Callable[[Figure], None]) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure)
        figure.savefig(path)
