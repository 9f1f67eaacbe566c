"""python -m benchmarks.check [folder of a device]: have the speed-ups over peers held since they were committed?

Measures a short list anew, or takes the results in the folder, and compares ratios of times, never times, with the
committed ones of the same device. Exits 1 where a fresh speed-up is below BAND of the median of the committed ones.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import results
from benchmarks.machine import ROOT, device
from benchmarks.results import KEY, Result

BAND = 0.75  # a speed-up of one session differs from another's by up to a quarter on a busy machine
PEERS = "separable,log_softmax,addmm,bmm"  # eager: nothing to compile


def compare(fresh: list[Result], committed: list[Result]) -> list[tuple[str, float, float]]:
    """(row, fresh speed-up, median of the committed ones) of every fresh row that has committed ones."""
    known: dict[tuple[object, ...], list[float]] = {}
    for row in committed:
        if row["speedup"]:
            known.setdefault(_key(row), []).append(row["speedup"])
    return [
        (" ".join(map(str, _key(row))), row["speedup"], statistics.median(known[_key(row)]))
        for row in results.latest(fresh)
        if row["speedup"] and _key(row) in known
    ]


def _key(row: Result) -> tuple[object, ...]:
    return tuple(row[name] for name in (*KEY, "backend"))


def measure(folder: Path) -> None:
    options = [
        "--benchmark-only",
        "--benchmark-columns=median,rounds",
        "-q",
        "--peer",
        PEERS,
        "-k",
        "float32 and fwd+bwd",
        "--record",
        str(folder),
    ]
    if subprocess.run([sys.executable, "-m", "pytest", "benchmarks", *options], cwd=ROOT).returncode:
        sys.exit("not every row could be measured")


def main(folder: str = "") -> None:
    name = Path(folder).name if folder else device()
    committed = results.load(results.FOLDER / name)
    if not committed:
        print(f"no committed results of {name}: nothing to compare with (make bench records them)")
        return
    if folder:
        fresh = results.load(Path(folder))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            measure(Path(temporary))
            fresh = results.load(Path(temporary) / name)
    compared = compare(fresh, committed)
    for row, now, then in compared:
        print(f"{'slower' if now < BAND * then else 'held':7} {now:6.2f} against {then:6.2f}  {row}")
    if not compared:
        sys.exit(f"none of the fresh rows is among the committed ones of {name}")
    if any(now < BAND * then for _, now, then in compared):
        sys.exit(f"a speed-up fell below {BAND} of the median of the committed ones")


if __name__ == "__main__":
    main(*sys.argv[1:])
