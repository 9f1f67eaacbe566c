"""python -m benchmarks.report [folder of a device]: one HTML page and PNGs in out/bench/ from saved results.

The folder is by default this machine's in benchmarks/results/. Of a folder in there, the README's table and
docs/benchmarks/summary.png are made too.
"""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from benchmarks import figures, results
from benchmarks.machine import ROOT, device
from benchmarks.peers import COMPILED, PLAIN
from benchmarks.results import Result
from benchmarks.rows import STEP
from benchmarks.timing import SUPERLINEAR, exponent
from studies.readme import README, splice
from vqfast import backends

OUT, DOCS = ROOT / "out" / "bench", ROOT / "docs" / "benchmarks"
NAME = "bench"  # of the README's markers
PLAIN_PEERS = (PLAIN, "irreducible", "forward")  # what is tuned, alone


def kind(peer: str) -> str:
    """What a peer is to its bar: eager, compiled, reference or plain."""
    if peer in backends.BACKENDS:
        return "reference"
    if peer in PLAIN_PEERS:
        return "plain"
    return "compiled" if peer.endswith(COMPILED) else "eager"


def is_curve(row: Result) -> bool:
    """Whether a row is a point of a scaling curve, whose case is "axis=value"."""
    return "=" in row["case"]


def summary(rows: list[Result]) -> list[Result]:
    """A line per operator, case and dtype with forward and backward: speed-up over the fastest peer of each kind
    (None without one), percent of the floor, and the time beside the frozen layer alone."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for row in results.latest(rows):
        if row["direction"] == STEP and not is_curve(row):
            groups.setdefault((row["op"], row["case"], row["dtype"]), []).append(row)
    lines = []
    for (op, case, dtype), group in groups.items():
        line: Result = {"op": op, "case": case, "dtype": dtype, "floor": None}
        for wanted in ("eager", "compiled", "plain"):
            line[wanted] = min((r["speedup"] for r in group if r["peer"] and kind(r["peer"]) == wanted), default=None)
        for row in group:
            if row["peer"] is None:
                line["floor"] = 100 * row["floor_us"] / row["median_us"]
        lines.append(line)
    return lines


def curves(rows: list[Result]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(operator, axis) -> points (value, microseconds)."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in results.latest(rows):
        if is_curve(row):
            axis, _, value = row["case"].partition("=")
            found.setdefault((row["op"], axis), []).append((float(value), row["median_us"]))
    return found


def measured_on(rows: list[Result]) -> str:
    """Machine, versions and dates of the rows."""
    rows = results.latest(rows)
    seen = {
        name: sorted({str(row[name]) for row in rows if row[name]}) for name in ("device", "torch", "triton", "cuda")
    }
    days = sorted({row["date"][:10] for row in rows})
    parts = [" ".join(seen["device"]), *(f"{n} {', '.join(seen[n])}" for n in ("torch", "triton", "cuda") if seen[n])]
    return "; ".join([*parts, days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"])


def table(rows: list[Result], folder: str) -> str:
    """What stands between the README's markers."""
    lines = [
        "| operator | shape | dtype | fastest eager / ours | torch.compile / ours | percent of floor |",
        "|---|---|---|---|---|---|",
    ]
    for line in summary(rows):
        ratios = (f"{line[kind]:.2f}" if line[kind] else "" for kind in ("eager", "compiled"))
        floor = f"{line['floor']:.0f}" if line["floor"] else ""
        lines.append(f"| `{line['op']}` | {line['case']} | {line['dtype']} | {' | '.join(ratios)} | {floor} |")
    beside = ", ".join(
        f"{1 / line['plain']:.2f} ({line['case']} {line['dtype']})" for line in summary(rows) if line["plain"]
    )
    return "\n".join(
        [
            *lines,
            "",
            *step_table(rows),
            "Operators: forward and backward; medians of calls made in turn."
            + (f" Time of `lora_linear` in units of the frozen layer alone: {beside}." if beside else "")
            + f" {measured_on(rows)}; benchmarks/results/{folder}.",
            "",
            "![Speed-up of every operator over the fastest eager and compiled peer](docs/benchmarks/summary.png)",
            "",
        ]
    )


def step_table(rows: list[Result]) -> list[str]:
    """Whole steps beside the irreducible one and beside peft; nothing without such rows."""
    steps = [row for row in results.latest(rows) if row["op"] == "step" and row["speedup"] and not is_curve(row)]
    beside = {(row["case"], row["peer"]): row["speedup"] for row in steps}
    if not steps:
        return []
    lines = ["| whole step | time over irreducible | eager + peft / ours |", "|---|---|---|"]
    for case in dict.fromkeys(row["case"] for row in steps):
        irreducible, peft = beside.get((case, "irreducible")), beside.get((case, "peft"))
        over = f"{1 / irreducible:.3f}" if irreducible else ""
        lines.append(f"| {case} | {over} | {f'{peft:.2f}' if peft else ''} |")
    definition = (
        "The irreducible step is the frozen model's forward, gradient of the pixels and forward, and no tuning at all"
    )
    return [*lines, "", f"{definition} ([definitions](docs/benchmarks.md)).", ""]


def section(readme: str) -> str:
    """What stands between the README's markers now."""
    found = re.search(f"<!-- {NAME}: begin -->\n(.*)<!-- {NAME}: end -->\n", readme, re.DOTALL)
    assert found, f"README.md has no {NAME} markers"
    return found[1]


def spliced(readme: str, folder: Path) -> str:
    """`readme` with the table of a device's results between the markers."""
    return splice(readme, NAME, table(results.load(folder), folder.name))


def draw_all(out: Path, rows: list[Result]) -> dict[str, Path]:
    """Every figure that there are rows for: name -> path."""
    rows = results.latest(rows)
    compared = [row for row in rows if row["speedup"]]
    alone = [row for row in rows if row["peer"] is None and row["floor_us"] and not is_curve(row)]
    lines, points = [line for line in summary(rows) if line["eager"] or line["compiled"]], curves(rows)
    groups = {(row["op"], row["case"], row["dtype"], row["direction"]) for row in compared}
    wanted: dict[str, tuple[bool, float, Callable[[Figure], None]]] = {
        "summary": (bool(lines), 1.3 + 0.3 * len(lines), lambda f: figures.summary(f.subplots(), lines)),
        "speedups": (
            bool(compared),
            1 + 0.18 * (len(compared) + 2 * len(groups)),
            lambda f: figures.speedups(f.subplots(), compared, kind),
        ),
        "roofline": (bool(alone), 4.2, lambda f: figures.roofline(f.subplots(), alone)),
        "scaling": (bool(points), 0.4 + 2.3 * -(-len(points) // 4), lambda f: figures.scaling(f, points)),
    }
    paths = {name: out / f"{name}.png" for name, (there, _, _) in wanted.items() if there}
    for name, path in paths.items():
        figures.draw(path, *wanted[name][1:])
    return paths


def write_page(path: Path, rows: list[Result], pictures: dict[str, Path]) -> None:
    """One HTML file with everything in it."""
    loader = jinja2.FileSystemLoader([Path(__file__).parent, ROOT / "studies"])
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters |= {"short": lambda x, digits=3: "" if x is None else f"{x:.{digits}g}"}
    encoded = {name: base64.b64encode(file.read_bytes()).decode() for name, file in pictures.items()}
    exponents = [
        (op, axis, points, exponent(*zip(*points, strict=True))) for (op, axis), points in curves(rows).items()
    ]
    html = page.get_template("report.html.j2").render(
        lines=summary(rows),
        rows=[row for row in results.latest(rows) if not is_curve(row)],
        exponents=exponents,
        superlinear=SUPERLINEAR,
        pictures=encoded,
        measured_on=measured_on(rows),
        commits=", ".join(dict.fromkeys(f"{r['commit']}{' with changes' if r['dirty'] else ''}" for r in rows)),
    )
    path.write_text(html + "\n")


def main(folder: str = "", out: Path = OUT) -> None:
    source = Path(folder) if folder else results.FOLDER / device()
    rows = results.load(source)
    if not rows:
        sys.exit(f"no results in {source}; record some: make bench")
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(out, rows)
    write_page(out / "report.html", rows, pictures)
    if source.resolve().parent == results.FOLDER:
        DOCS.mkdir(parents=True, exist_ok=True)
        (DOCS / "summary.png").write_bytes(pictures["summary"].read_bytes())
        README.write_text(spliced(README.read_text(), source.resolve()))
    print(out / "report.html")


if __name__ == "__main__":
    main(*sys.argv[1:])
