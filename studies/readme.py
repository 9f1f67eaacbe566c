"""Takes a demo's results into the documentation: python -m studies.readme [out/demo]

Copies report.json and the gallery to docs/demo/ and rewrites the table between the markers in README.md from it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "demo"
COPIED = ("report.json", "gallery.png")


def table(report: dict[str, Any]) -> str:
    """Markdown table of a report, accuracies in percent, with what it was measured on."""
    lines = [
        "| degradation | untuned | best fixed filter | one step | candidate search |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [f"{100 * row[key]:.1f}" for key in ("untuned", "fixed_filter", "one_step", "search")]
        lines.append(f"| {row['degradation'].replace('_', ' ')} | {' | '.join(cells)} |")
    lift = [f"**{100 * report[f'mean_lift_{mode}']:+.1f}**" for mode in ("one_step", "search")]
    lines.append(f"| mean lift | | | {' | '.join(lift)} |")
    clean = [f"{100 * report['clean'][mode]:.1f}" for mode in ("untuned", "one_step", "search")]
    lines.append(f"| clean images | {clean[0]} | | {clean[1]} | {clean[2]} |")
    times = ", ".join(f"{mode.replace('_', ' ')} {ms:.0f} ms" for mode, ms in report["latency_ms"].items())
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    return "\n".join(
        [
            *lines,
            "",
            f"Accuracy in percent, n = {report['rows'][0]['n']} questions per row from the test split. "
            f"Median time for one image: {times}. {report['machine']}; {versions}; {report['date']}.",
            "",
        ]
    )


def splice(text: str, name: str, content: str) -> str:
    """`text` with what is between the markers `name: begin` and `name: end` replaced."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, rest = text.split(begin)
    return before + begin + content + end + rest.split(end)[1]


def spliced(readme: str, report: dict[str, Any]) -> str:
    """`readme` with the demo's table replaced."""
    return splice(readme, "demo", table(report))


def main(folder: str = "out/demo") -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copy(Path(folder) / name, RESULTS / name)
    report = json.loads((RESULTS / "report.json").read_text())
    README.write_text(spliced(README.read_text(), report))


if __name__ == "__main__":
    main(*sys.argv[1:])
