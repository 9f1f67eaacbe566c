"""Options, the fixture that measures a row, and what is printed beside pytest-benchmark's table."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gate, machine, results
from benchmarks.peers import NAMES, PEERS
from benchmarks.rows import Row, available
from benchmarks.timing import in_turn
from vqfast import _native, backends

PRINTED = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vqfast")
    several = dict(action="append", default=[], metavar="NAME")
    group.addoption("--backend", **several, help="only these backends of vqfast; peers are compared with the first")
    group.addoption("--peer", **several, help="only these peers, beside the backends of their operators")
    group.addoption("--record", type=Path, metavar="FOLDER", help="append results to FOLDER/<device>/<op>.jsonl")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PRINTED] = []
    for option, known in (("backend", backends.BACKENDS), ("peer", NAMES)):
        setattr(config.option, option, names(f"--{option}", config.getoption(option), known))


def names(option: str, values: list[str], known: tuple[str, ...] | list[str]) -> list[str]:
    """The names of a repeated option, each a name or several with commas.

    Raises:
        pytest.UsageError: one that is not known.
    """
    given = [name for value in values for name in value.split(",")]
    if unknown := [name for name in given if name not in known]:
        raise pytest.UsageError(f"{option}: no {', '.join(unknown)}; known: {', '.join(known)}")
    return given


def pytest_report_header() -> str:
    reason = _native.load("cpu")
    native = "compiled kernels" if reason is None else f"the reference is timed as ours: {reason}"
    return f"vqfast: {machine.device()}, {native}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if _selected(item, config.option.backend, config.option.peer)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _selected(item: pytest.Item, wanted_backends: list[str], wanted_peers: list[str]) -> bool:
    row = item.callspec.params.get("row") if hasattr(item, "callspec") else None
    if not isinstance(row, Row):  # scaling and memory have no peers to choose from
        return not wanted_peers
    if wanted_peers and not set(wanted_peers) & set(PEERS[row.benchmark.op.name]):
        return False
    wanted = wanted_backends if row.implementation in backends.BACKENDS else wanted_peers
    return not wanted or row.implementation in wanted


@pytest.fixture(scope="session")
def rates(request: pytest.FixtureRequest) -> machine.Rates:
    measured = machine.measure_rates()
    request.config.stash[PRINTED].append(str(measured))
    return measured


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest):
    """Call with the fields of a row that are not the machine's; appends the row where --record says."""
    folder, machine_fields = request.config.option.record, machine.surroundings()

    def append(**fields: object) -> None:
        if folder is not None:
            results.append(folder, [fields | machine_fields])

    return append


@pytest.fixture
def say(request: pytest.FixtureRequest):
    """Call with a line to print at the end of the session."""
    return request.config.stash[PRINTED].append


@pytest.fixture
def ours(request: pytest.FixtureRequest):
    """Call with an operator and a dtype: the backend that stands for vqfast; skips where that asked for is missing."""

    def choose(op, dtype) -> str:
        there = available(op, dtype)
        name = (request.config.option.backend or there)[0]
        if name not in there:
            pytest.skip(backends.unavailable(name, op.name, "cpu", dtype))
        return name

    return choose


@pytest.fixture
def measure(benchmark, ours, rates, record):
    """Call with a row: checks ours and the row's implementation, times them in turn, notes and records the figures."""

    def run(row: Row) -> None:
        name = ours(row.benchmark.op, row.dtype)
        try:
            calls = [gate.checked(row, n) for n in dict.fromkeys((name, row.implementation))]
        except AssertionError as error:
            pytest.fail(f"wrong, therefore not timed: {row.group}, {error}", pytrace=False)
        inputs, weights, *_ = gate.subject(row.benchmark, row.case, row.dtype)
        benchmark.group = row.group
        seconds = in_turn(benchmark, [gate.step(call, weights, row.direction) for call in calls])
        if benchmark.disabled:
            return
        peer = None if row.implementation == name else row.implementation
        work = row.benchmark.work(inputs, row.direction)
        figures = results.figures(seconds[0], seconds[1] if peer else None, work, rates, row.dtype)
        benchmark.extra_info |= {key: figures[key] for key in ("speedup", "gbps", "gflops")}
        benchmark.extra_info["percent_of_floor"] = round(100 * figures["floor_us"] / figures["median_us"], 1)
        record(
            op=row.benchmark.op.name,
            case=row.case.name,
            dtype=row.dtype_name,
            direction=row.direction,
            backend=name,
            peer=peer,
            **figures,
        )

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if lines := config.stash[PRINTED]:
        terminalreporter.section("vqfast")
        for line in lines:
            terminalreporter.write_line(line)
