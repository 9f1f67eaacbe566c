"""Takes the studies' results into the documentation: python -m studies.results [out/studies]

Copies what is quoted of the reports of adaptor, predictive, paradox, paradox-codecs and paradox-predictive to
docs/results/ and writes docs/results.md from it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from studies.paradox_report import beyond

DOCS = Path(__file__).parents[1] / "docs"
PAGE, RESULTS = DOCS / "results.md", DOCS / "results"
PARADOX = ("rows", "pooled", "rates", "undecodable", "images", "date", "machine", "configuration")
SHOWN = ("one_step", "search")
DIFFERENCE = ("lift", "lift_low", "lift_high", "p")
PUBLISHED = "Published by the paper's authors, for their models; not measured here."
Report = dict[str, Any]


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def interval(found: dict[str, float], form: Any = percent) -> str:
    """A figure with its 95 % interval."""
    middle = found["mean"] if "mean" in found else found["value"]
    return f"{form(middle)} [{form(found['low'])}, {form(found['high'])}]"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] + [""]


def measured_on(report: Report, sample: str) -> str:
    versions = report.get("versions") or report["configuration"]["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{sample}; {report['machine']}; {packages}; {report['date']}."


def targets(report: Report) -> list[str]:
    rows = []
    for row in report["targets"]:
        found = row["measured"]
        shown = "no gap" if found is None else interval(found, "{:+.4f}".format)
        rows.append([row["target"], shown, "met" if row["met"] else "**missed**"])
    return table(["target", "measured [95 %]", ""], rows)


def figures(row: Report, clean: Report) -> list[str]:
    """Cells of a method: accuracy, lift, p, calibration error, accuracy on clean images."""
    lift = row["lift"]
    return [
        interval({**row, "mean": row["accuracy"]}),
        "" if lift is None else f"{points(lift)} [{points(row['lift_low'])}, {points(row['lift_high'])}]",
        "" if row["p"] is None else f"{row['p']:.4f}",
        "" if row["calibration_error"] is None else f"{row['calibration_error']:.3f}",
        percent(clean["accuracy"]),
    ]


METHOD = ["method", "accuracy [95 %]", "lift over untuned [95 %]", "p", "calibration error", "clean"]


def degradations(report: Report, predictive: Report) -> list[str]:
    """Untuned, the best restoration and filter over all degradations, the step and the search."""
    every = [row for row in report["pooled"] if row["condition"] == "all degradations"]
    at = {(row["condition"], row["method"]): row for row in report["pooled"]}
    other = {row["condition"]: row for row in predictive["pooled"] if row["method"] == "untuned"}
    lines = ["## Degradations, styles and codecs", ""]
    rows = [[named(row["method"]), *figures(row, at["clean", row["method"]])] for row in every]
    rows.append(["untuned, trained with PRe (seed 0)", *figures(other["all degradations"], other["clean"])])
    lines += table(METHOD, rows)
    best = {
        kind: max((r for r in every if r["method"].startswith(kind)), key=lambda r: r["accuracy"])["method"]
        for kind in ("restore:", "filter:")
    }
    columns = ["untuned", *best.values(), *SHOWN]
    conditions = [c for c in dict.fromkeys(row["condition"] for row in report["pooled"]) if c != "all degradations"]
    lines += [
        "Accuracy by degradation, over its severities or levels; of restorations and filters the best one over all:",
        "",
    ]
    lines += table(
        ["degradation", *map(named, columns)],
        [[c.replace("_", " "), *(percent(at[c, method]["accuracy"]) for method in columns)] for c in conditions],
    )
    single = [row for row in report["rows"] if row["method"] == "untuned" and row["over_clean"]]
    better = [row for row in single if beyond(row["over_clean"]) > 0]
    restored = [row for row in report["rows"] if row["method"].startswith("restore:") and row["condition"] != "clean"]
    worse = [row for row in restored if beyond(row) < 0]
    lines += [
        f"**Paradox.** Of {len(single)} degraded conditions (each at one severity or level) {len(better)} are answered "
        f"better than the clean images, beyond their 95 % interval. Restoration before the model hurts in {len(worse)} "
        f"of {len(restored)} cases beyond the interval, most in {hurt(worse)}.",
        "",
    ]
    questions = every[0]["questions"]
    seed = report["configuration"]["seed"]
    sample = f"Test split, {report['images']} images with three questions, {questions:,} answers a row; seed {seed}"
    lines += [measured_on(report, sample), ""]
    lines += ["VQ-TTT, arXiv 2506.15645. " + PUBLISHED, ""]
    lines += table(
        ["model", "benchmark", "clean", "Gaussian noise", "noise, restored by NAFNet"],
        [["Qwen2.5-VL-3B", "ScienceQA", "75.71", "73.90", "37.92"]],
    )
    return lines


def named(method: str) -> str:
    kind, _, rest = method.partition(":")
    if kind == "codec_adaptor":
        return "codec adaptor"
    return f"{kind} {rest}".replace("_", " ").strip()


def hurt(worse: list[Report]) -> str:
    if not worse:
        return "none"
    row = min(worse, key=lambda r: r["lift"])
    where = f"{row['condition'].replace('_', ' ')} {row['severity']:g}"
    return f"{where} by {named(row['method'])}: {points(row['lift'])} points"


def adaptor(report: Report, paradox: Report) -> list[str]:
    lines = ["## Universal adaptor to codecs", ""]
    lines += targets(report)
    rows = []
    for codec, found in report["codecs"].items():
        bd = found["bd_accuracy"]
        closed = found.get("generalisation_gap_closed", {})
        cells = [interval(bd[way], points) if way in bd else "" for way in ("known", "unknown", "ceiling")]
        cells += [interval(closed[way]) if way in closed else "" for way in ("known", "unknown")]
        unseen = " (never trained on)" if codec == report["settings"]["unseen"] else ""
        rows.append([codec + unseen, *cells])
    header = [
        "codec",
        "BD-accuracy, label known",
        "unknown",
        "fine-tuned with labels",
        "gap closed %, known",
        "unknown",
    ]
    lines += table(header, rows)
    lines += [
        "Accuracy in percent over every level; theta* is the model fine-tuned with labels on the codec's images:",
        "",
    ]
    ways = ("untuned", "known", "unknown", "wrong", "ceiling")
    rows = [
        [
            "clean",
            "",
            "",
            *(percent(report["clean"][way]["mean"]) if way in report["clean"] else "" for way in ways),
            "",
            "",
        ]
    ]
    for row in report["rows"]:
        gaps = [points(row["gaps"][name]) for name in ("information", "generalisation")]
        cells = (percent(row[way]["mean"]) if way in row else "" for way in ways)
        rows.append([row["codec"], f"{row['level']:g}", f"{row['bpp']:.3f}", *cells, *gaps])
    header = [
        "codec",
        "level",
        "bits per pixel",
        "untuned",
        "label known",
        "unknown",
        "wrong",
        "theta*",
        "information gap",
        "generalisation gap",
    ]
    lines += table(header, rows)
    told = report["conditioning"]
    lines += ["What the label does, over all levels of the codecs that were trained on:", ""]
    lines += table(
        ["", "untuned", "known", "unknown", "wrong", "known - unknown [95 %]", "known - wrong [95 %]"],
        [
            [
                "accuracy, %",
                *(percent(told["accuracy"][w]) for w in ways[:4]),
                *(interval(told["accuracy"][f"known - {w}"], points) for w in ("unknown", "wrong")),
            ],
            [
                "distillation loss",
                *(f"{told['loss'][w]:.4f}" for w in ways[:4]),
                *(interval(told["loss"][f"known - {w}"], "{:+.4f}".format) for w in ("unknown", "wrong")),
            ],
        ],
    )
    every = [row for row in paradox["pooled"] if row["condition"] == "all degradations"]
    at = {row["method"]: row for row in paradox["pooled"] if row["condition"] == "clean"}
    lines += [
        f"The same adapters in the paradox study, label told where it is known, over all codecs and levels "
        f"({paradox['images']} images):",
        "",
    ]
    lines += table(METHOD, [[named(row["method"]), *figures(row, at[row["method"]])] for row in every])
    sample = f"{report['split'].capitalize()} split, {report['images']} images with three questions a row"
    lines += [measured_on(report, f"{sample}; seed {report['seed']}"), ""]
    lines += ["arXiv 2512.20901, BD gains of their adaptor with JPEG. " + PUBLISHED, ""]
    lines += table(
        ["model", "POPE", "SEED", "GQA", "MMBench", "OCRBench"],
        [["Qwen2.5-VL-3B", "+12.6", "+12.9", "+11.6", "+14.9", "+52.5"]],
    )
    return lines


def predictive_regularisation(report: Report) -> list[str]:
    lines = ["## Predictive regularisation (PRe)", ""]
    lines += targets(report)
    rows = []
    for name, found in report["diagnostics"].items():
        for arm, layers in found["layers"].items():
            cells = [interval(layer, "{:.3f}".format) for layer in (*layers, found["degradation"][arm])]
            rows.append([name, arm, *cells])
    lines += table(["diagnostic", "L_PRe", "layer 0", "layer 1", "layer 2", "lost from 0 to 1"], rows)
    lines += ["![Diagnostics by layer](results/layers.png)", ""]
    accuracies = {
        arm: ", ".join(percent(row["mean"]) for row in rows) for arm, rows in report["task"]["accuracy"].items()
    }
    lines += [f"Task accuracy by seed: {accuracies['without']} without, {accuracies['with']} with.", ""]
    seeds = len(report["settings"]["seeds"])
    sample = (
        f"{report['split'].capitalize()} split, {report['images']} images; {seeds} seeds, 95 % over images and seeds"
    )
    lines += [measured_on(report, sample), ""]
    lines += ["arXiv 2603.20808, CLIP and Vicuna-7B. " + PUBLISHED, ""]
    lines += table(
        ["", "GQA", "MMStar", "TextVQA", "MMVP"],
        [["without", "62.0", "30.3", "45.5", "20.0"], ["with PRe", "62.7", "34.6", "46.6", "22.0"]],
    )
    return lines


def page(reports: dict[str, Report]) -> str:
    lines = [
        "# What the studies found",
        "",
        "Made by `make study` (`python -m studies.results` from its output). How each is run, what its figures mean:",
        "[studies.md](studies.md). All of it is the embedded digits model on its test split; accuracy in percent,",
        "brackets are 95 % confidence intervals.",
        "",
    ]
    lines += degradations(reports["paradox"], reports["paradox-predictive"])
    lines += adaptor(reports["adaptor"], reports["paradox-codecs"])
    lines += predictive_regularisation(reports["predictive"])
    return "\n".join(lines).rstrip() + "\n"


def quoted(summary: Report) -> Report:
    """Of a summary of the paradox study, what the page quotes."""
    kept = {name: summary[name] for name in PARADOX}
    kept["rows"] = [
        {name: row[name] for name in ("condition", "severity", "method", "over_clean", *DIFFERENCE)}
        for row in summary["rows"]
        if row["method"] == "untuned" or row["method"].startswith("restore:")
    ]
    return kept


def read(folder: Path) -> dict[str, Report]:
    """The reports in docs/results."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def main(folder: str = "out/studies") -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    source = Path(folder)
    for name in ("adaptor", "predictive"):
        shutil.copy(source / name / "report.json", RESULTS / f"{name}.json")
    shutil.copy(source / "predictive" / "layers.png", RESULTS / "layers.png")
    for name in ("paradox", "paradox-codecs", "paradox-predictive"):
        summary = quoted(json.loads((source / name / "summary.json").read_text()))
        (RESULTS / f"{name}.json").write_text(json.dumps(summary, indent=0) + "\n")
    PAGE.write_text(page(read(RESULTS)))


if __name__ == "__main__":
    main(*sys.argv[1:])
