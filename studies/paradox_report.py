"""What studies.paradox reports: summary.json and a page, from its rows alone."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, product
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from studies.figures import INK, RIGHT, STYLE, WRONG, rendered, spaced
from studies.metrics import accuracy, bd_metric, calibration_error, gaps, paired_test, right_per_image
from studies.units import CODEC, Row

SIGNIFICANT = 0.05
LINES = 4  # intervals that one line's height has room for
SHADES = ("#b9d6ec", "#7fb0d8", "#4a86b8", "#2f689a", "#1d4e80")  # of severities 1 to 5
NAMES = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF", "jpeg2000": "JPEG 2000"}
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)  # bits per pixel that an axis may show
CURVES = ("#8c8880", "#7fb0d8", "#1d4e80", "#e0a93f", "#1d6b45", "#8a5a9e", "#b3382c", "#2b2a28")


@dataclass(frozen=True)
class Cell:
    """All answers of a model, condition, severity and method, or of several conditions."""

    right: np.ndarray  # [answers], bool
    confidence: np.ndarray  # [answers]; NaN where the model's was not finite
    image: np.ndarray  # [answers], its name
    bits_per_pixel: float | None
    seconds: float  # per question

    @property
    def calibration_error(self) -> float | None:
        known = np.isfinite(self.confidence)
        return calibration_error(self.confidence[known], self.right[known]) if known.any() else None


Key = tuple[str, str, float, str]  # model, condition, severity, method


def collected(rows: Iterable[Row]) -> tuple[dict[Key, Cell], dict[str, str]]:
    """The cells, and why images could not be decoded."""
    groups: dict[Key, list[Row]] = {}
    undecodable: dict[str, str] = {}
    for row in rows:
        undecodable |= row["undecodable"]
        if row["right"]:
            groups.setdefault((row["model"], row["condition"], row["severity"], row["method"]), []).append(row)
    return {key: _cell(sorted(found, key=lambda row: row["start"])) for key, found in groups.items()}, undecodable


def _cell(rows: list[Row]) -> Cell:
    columns = {name: np.array([x for row in rows for x in row[name]]) for name in ("right", "confidence", "image")}
    bits = None
    if rows[0]["bits_per_pixel"] is not None:
        bits = float(np.average([row["bits_per_pixel"] for row in rows], weights=[row["pixels"] for row in rows]))
    return Cell(
        columns["right"],
        columns["confidence"].astype(float),
        columns["image"],
        bits,
        sum(row["seconds"] for row in rows) / len(columns["right"]),
    )


def pooled(cells: Sequence[Cell]) -> Cell:
    """The same images in several conditions."""
    return Cell(
        *(np.concatenate([getattr(cell, name) for cell in cells]) for name in ("right", "confidence", "image")),
        None,
        float(np.mean([cell.seconds for cell in cells])),
    )


def difference(cell: Cell, reference: Cell) -> dict[str, float]:
    """Accuracy gained over the reference, its 95 % interval and paired p-value.

    Student's t over images; where these have different numbers of questions, of the ratio of two sums. Where every
    image gains the same, the interval has no width: `beyond` asks for p, too.

    Source: W. G. Cochran, Sampling Techniques, 3rd edition, section 2.11, ratio estimator.
    """
    right, sizes = right_per_image(cell.right, cell.image, "cell")
    gain, images, answers = (
        right - right_per_image(reference.right, cell.image, "reference")[0],
        len(sizes),
        sizes.sum(),
    )
    lift, error = gain.sum() / answers, 0.0
    if np.ptp(gain / sizes) > 0:
        error = (images / (images - 1) * ((gain - lift * sizes) ** 2).sum()) ** 0.5 / answers
    reach = error * stats.t.ppf(0.975, max(images - 1, 1))
    p = paired_test(cell.right, reference.right, cell.image)
    return dict(lift=float(lift), lift_low=float(lift - reach), lift_high=float(lift + reach), p=p)


def beyond(found: dict[str, float]) -> int:
    """1 or -1 where a difference is above or below zero with its whole interval and p < 0.05, else 0."""
    if found["p"] >= SIGNIFICANT:
        return 0
    return int(found["lift_low"] > 0) - int(found["lift_high"] < 0)


def described(cell: Cell, untuned: Cell | None) -> dict[str, Any]:
    """What summary.json says of a cell."""
    share = accuracy(cell.right, cell.image)
    nothing = dict(lift=None, lift_low=None, lift_high=None, p=None)
    return dict(
        images=len(set(cell.image)),
        questions=cell.right.size,
        accuracy=share.mean,
        low=share.low,
        high=share.high,
        **(nothing if untuned is None else difference(cell, untuned)),
        calibration_error=cell.calibration_error,
        bits_per_pixel=cell.bits_per_pixel,
        seconds_per_question=cell.seconds,
    )


def summarise(rows: Iterable[Row], configuration: dict[str, Any]) -> dict[str, Any]:
    """What summary.json holds: rows, the same pooled (severity None) over severities and over all degradations.

    The rows may come in any order; the summary is in that of the configuration.

    Raises:
        ValueError: no image could be decoded.
    """
    found, undecodable = collected(rows)
    models, conditions, methods = (list(configuration[name]) for name in ("models", "conditions", "methods"))
    order = [(model, *condition, method) for model, condition, method in product(models, conditions, methods)]
    cells = {key: found[key] for key in order if key in found}
    if not cells:
        raise ValueError(f"none of the images could be decoded: {'; '.join(undecodable.values())}")
    single = [
        dict(model=m, condition=c, severity=s, method=k)
        | described(cell, None if k == "untuned" else cells[m, c, s, "untuned"])
        | dict(over_clean=difference(cell, cells[m, "clean", 0, k]) if k == "untuned" and c != "clean" else None)
        for (m, c, s, k), cell in cells.items()
    ]
    names = list(dict.fromkeys(name for name, _ in conditions))
    groups = {name: [name] for name in names} | {"all degradations": [name for name in names if name != "clean"]}
    together = []
    for model, (label, members), method in product(models, groups.items(), methods):
        if members:
            own, untuned = (
                pooled([cell for (m, c, _, k), cell in cells.items() if (m, k) == (model, kind) and c in members])
                for kind in (method, "untuned")
            )
            row = described(own, None if method == "untuned" else untuned)
            together.append(dict(model=model, condition=label, severity=None, method=method) | row)
    if configuration["answer_tokens"] > 1:  # the confidence is the first token's, not the answer's
        for row in (*single, *together):
            row["calibration_error"] = None
    report = dict(rows=single, pooled=together, undecodable=undecodable)
    report |= dict(rates=_rates(single, models, methods), gaps=_gaps(single))
    return report


def _rates(rows: list[dict[str, Any]], models: list[str], methods: list[str]) -> list[dict[str, Any]]:
    """Bjontegaard metric of every method over untuned, where the curves share bit rates."""
    codecs = dict.fromkeys(row["condition"] for row in rows if row["bits_per_pixel"])
    found = []
    for model, codec, method in product(models, codecs, methods):
        curves = [curve(rows, model, codec, kind) for kind in ("untuned", method)]
        try:
            gain: float | None = bd_metric(*curves[0], *curves[1])
        except ValueError:  # too few levels
            gain = None
        found.append(dict(model=model, condition=codec, method=method, bd_accuracy=gain))
    return found


def curve(rows: list[dict[str, Any]], model: str, codec: str, method: str) -> tuple[list[float], list[float]]:
    """Bits per pixel, rising, and accuracies of a codec's levels; of levels that came to the same file, one."""
    wanted = [row for row in rows if (row["model"], row["condition"], row["method"]) == (model, codec, method)]
    points = dict(sorted((row["bits_per_pixel"], row["accuracy"]) for row in wanted))
    return list(points), list(points.values())


def _gaps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every codec, level and adaptor: what compression costs, and what of it the adaptor gives back."""
    at = {(row["model"], row["condition"], row["severity"], row["method"]): row["accuracy"] for row in rows}
    return [
        dict(model=m, condition=c, severity=s, method=k)
        | gaps(at[m, "clean", 0, "untuned"], at[m, c, s, "untuned"], share)._asdict()
        for (m, c, s, k), share in at.items()
        if k.startswith("codec_adaptor") and c.startswith(CODEC)
    ]


def page(report: dict[str, Any]) -> str:
    """The page of a summary and what its run depended on; nothing is loaded from elsewhere."""
    rows, models = report["rows"], list(dict.fromkeys(row["model"] for row in report["rows"]))
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "none", "svg.hashsalt": "vqfast"}):
        pictures = {
            model: dict(paradox=_paradox(report, model), rates=_rate_curves(report, model))
            for model in models
            if any(row["model"] == model and row["over_clean"] for row in rows)
        }
    better = [row for row in rows if row["over_clean"] and beyond(row["over_clean"]) > 0]
    worse = [row for row in rows if row["method"].startswith("restore") and beyond(row) < 0]
    table = {(row["model"], row["condition"], row["method"]): row for row in report["pooled"]}
    lists = dict(
        models=models,
        methods=list(dict.fromkeys(row["method"] for row in rows)),
        conditions=list(dict.fromkeys(row["condition"] for row in report["pooled"])),
    )
    values = dict(report=report, pictures=pictures, better=better, worse=worse, table=table, codec=CODEC)
    return rendered("paradox.html.j2", **values, **lists, significant=SIGNIFICANT, label=label)


def label(condition: str) -> str:
    """A condition as it is read."""
    codec = condition.removeprefix(CODEC)
    return spaced(condition) if codec == condition else f"{NAMES.get(codec, codec)} codec"


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue().partition("<svg")[1] + file.getvalue().partition("<svg")[2]


def _paradox(report: dict[str, Any], model: str) -> str:
    """Degraded minus clean accuracy of the untuned model; beside it what each restoration adds."""
    shown = [row for row in report["rows"] if row["model"] == model and row["over_clean"]]
    heights = {name: max(n / LINES, 1) for name, n in Counter(row["condition"] for row in shown).items()}
    ends = accumulate(heights.values())
    places = {name: end - height / 2 for (name, height), end in zip(heights.items(), ends, strict=True)}
    figure = Figure(figsize=(10.5, 1.4 + 0.3 * sum(heights.values())), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
    for name, y in places.items():
        own = shaded([row for row in shown if row["condition"] == name])
        for i, (row, shade) in enumerate(own):
            gain = row["over_clean"]
            middle, low, high = (100 * gain[key] for key in ("lift", "lift_low", "lift_high"))
            beats = beyond(gain) > 0
            colour = RIGHT if beats else shade
            place = y + 0.6 * heights[name] * ((i + 0.5) / len(own) - 0.5)
            left.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color=colour, elinewidth=1.2)
            left.plot(middle, place, "D" if beats else "o", color=colour, markersize=7 if beats else 4)
        for row in report["pooled"]:
            if (row["model"], row["condition"]) == (model, name) and row["method"].startswith("restore"):
                colour = {-1: WRONG, 0: SHADES[0], 1: RIGHT}[beyond(row)]
                right.plot(100 * row["lift"], y, "o", color=colour, markersize=5, alpha=0.8)
    left.set_yticks(list(places.values()), [label(name) for name in places])
    left.invert_yaxis()
    left.set(xlabel="degraded minus clean, points", title="untuned; a row from mild to strong")
    right.set(xlabel="restored minus degraded, points", title="a dot per restoration")
    for ax in (left, right):
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.grid(axis="y", color="#eeebe5")
        ax.set_axisbelow(True)
    return _svg(figure)


def shaded(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """A condition's rows from mild to strong, with their shades: of codecs by place, of degradations by severity."""
    codec = rows[0]["condition"].startswith(CODEC)
    ordered = sorted(rows, key=lambda row: row["severity"], reverse=codec)
    places = [round((len(SHADES) - 1) * i / max(len(rows) - 1, 1)) for i in range(len(rows))]
    if not codec:
        places = [int(row["severity"]) - 1 for row in ordered]
    return [(row, SHADES[place]) for row, place in zip(ordered, places, strict=True)]


def _rate_curves(report: dict[str, Any], model: str) -> str:
    """Accuracy over bits per pixel, a panel per codec; of restorations and filters the best one over all codecs."""
    mine = [row for row in report["rows"] if row["model"] == model]
    codecs = list(dict.fromkeys(row["condition"] for row in mine if row["bits_per_pixel"]))
    if not codecs:
        return ""
    methods = _shown_methods(mine, codecs)
    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    axes = figure.subplots(1, len(codecs), sharey=True, squeeze=False)[0]
    clean = next(row["accuracy"] for row in mine if (row["condition"], row["method"]) == ("clean", "untuned"))
    for ax, codec in zip(axes, codecs, strict=True):
        ax.axhline(100 * clean, color=INK, linewidth=0.8, linestyle=":")
        for method, (line, colour) in zip(methods, cycle(product(("o-", "s--", "^:"), CURVES)), strict=False):
            rates, shares = curve(mine, model, codec, method)
            ax.plot(rates, 100 * np.array(shares), line, color=colour, markersize=3.5, label=method)
        ax.set(xscale="log", xlabel="bits per pixel", title=label(codec))
        shown = [tick for tick in RATES if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]]
        ax.set_xticks(shown, [f"{tick:g}" for tick in shown])
        ax.minorticks_off()
    axes[0].set_ylabel("right answers, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return _svg(figure)


def _shown_methods(rows: list[dict[str, Any]], codecs: list[str]) -> list[str]:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    total = {
        m: sum(row["accuracy"] for row in rows if row["method"] == m and row["condition"] in codecs) for m in methods
    }
    best = {kind: [m for m in methods if m.startswith(kind)] for kind in ("restore:", "filter:")}
    others = [m for m in methods if not m.startswith(tuple(best))]
    return others + [max(found, key=total.__getitem__) for found in best.values() if found]
