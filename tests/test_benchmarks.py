"""The instrument that measures: order of calls, gate, options, rows, table, check. No time is asserted."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
from benchmarks import check, conftest, gate, gpu, machine, report, results
from benchmarks.peers import PEERS, eager, log_softmax_entropy
from benchmarks.rows import STEP, Benchmark, Row, rows
from benchmarks.test_softmax_entropy import BENCHMARK
from benchmarks.timing import ROUNDS, exponent
from vqfast.testing.cases import (
    cosine_alignment,
    film_adapter,
    linear_softmax_entropy,
    lora_linear,
    lowrank_filter2d,
    softmax_entropy,
)

SESSION = """
import pytest
from benchmarks.peers import PEERS, eager, log_softmax_entropy
from benchmarks.rows import rows
from benchmarks.test_softmax_entropy import BENCHMARK
from benchmarks.timing import in_turn

PEERS["softmax_entropy"]["wrong"] = eager(lambda logits: 1.01 * log_softmax_entropy(logits))


@pytest.mark.parametrize("row", rows(BENCHMARK, BENCHMARK.op.cases[0], ("log_softmax", "wrong")), ids=str)
def test_rows(row, measure):
    measure(row)


def test_order(benchmark):
    order = []
    ours, peer = in_turn(benchmark, [lambda: order.append("ours"), lambda: order.append("peer")])
    print(f"rounds {len(ours)} and {len(peer)}, in turn: {order == ['ours', 'peer'] * (len(order) // 2)}")
"""


def run_pytest(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONPATH": str(machine.ROOT)}
    return subprocess.run(command, cwd=machine.ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """What a session over a small case prints, and the rows it records."""
    folder = tmp_path_factory.mktemp("session")
    (folder / "test_small.py").write_text(SESSION)
    done = run_pytest(str(folder / "test_small.py"), "-rP", "--record", str(folder / "results"))
    (file,) = (folder / "results").glob("*/*.jsonl")
    return done.stdout, file, [json.loads(line) for line in file.read_text().splitlines()]


def test_calls_are_made_in_turn(session):
    assert f"rounds {ROUNDS[1]} and {ROUNDS[1]}, in turn: True" in session[0]


def test_a_wrong_peer_is_not_timed(session):
    printed, _, recorded = session
    assert "wrong, therefore not timed: softmax_entropy rows float32 fwd+bwd, wrong: result: error" in printed
    assert "1 failed" in printed
    assert "wrong" not in [row["peer"] for row in recorded]


def test_a_recorded_row_has_exactly_the_fields(session):
    _, file, recorded = session
    assert (file.parent.name, file.name) == (machine.device(), "softmax_entropy.jsonl")
    assert "log_softmax" in [row["peer"] for row in recorded]
    for row in recorded:
        assert tuple(row) == results.FIELDS
        assert row["op"] == "softmax_entropy"
        assert row["dtype"] == "float32"
        assert (row["peer"] is None) == (row["speedup"] is None) == (row["peer_median_us"] is None)


def test_header_names_what_stands_for_vqfast(session, monkeypatch):
    assert f"vqfast: {machine.device()}" in session[0]
    monkeypatch.setattr(conftest._native, "load", lambda _: "not built")
    assert conftest.pytest_report_header().endswith("the reference is timed as ours: not built")


def test_unknown_names_are_errors_that_list_the_known(tmp_path):
    done = run_pytest("--collect-only", "--peer", "peft,dens", str(tmp_path))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--peer: no dens; known: addmm, block, bmm," in done.stderr
    with pytest.raises(pytest.UsageError, match="--backend: no gpu; known: reference, cpu"):
        conftest.names("--backend", ["gpu"], ("reference", "cpu"))
    assert conftest.names("--backend", ["cpu,reference", "cpu"], ("reference", "cpu")) == ["cpu", "reference", "cpu"]


@pytest.mark.parametrize(
    ("backends", "peers", "kept"),
    [
        ([], [], ["reference", "log_softmax", "log_softmax-compiled"]),
        (["cpu"], [], ["log_softmax", "log_softmax-compiled"]),
        ([], ["log_softmax"], ["reference", "log_softmax"]),
        ([], ["dense"], []),
    ],
)
def test_options_select_rows(backends, peers, kept):
    case = BENCHMARK.op.cases[0]
    there = [Row(BENCHMARK, case, torch.float32, STEP, n) for n in ("reference", "log_softmax", "log_softmax-compiled")]
    items = {row.implementation: SimpleNamespace(callspec=SimpleNamespace(params={"row": row})) for row in there}
    assert [name for name, item in items.items() if conftest._selected(item, backends, peers)] == kept


def test_gate_checks_gradients(monkeypatch):
    def forward_only(logits):
        return log_softmax_entropy(logits.detach()) + 0 * logits.sum()

    monkeypatch.setitem(PEERS["softmax_entropy"], "forward only", eager(forward_only))
    with pytest.raises(AssertionError, match="forward only: dlogits: error"):
        gate.checked(Row(BENCHMARK, BENCHMARK.op.cases[0], torch.float32, STEP, "forward only"), "forward only")


def test_peers_are_right_on_small_cases():
    filters, head = lowrank_filter2d.OPERATOR, linear_softmax_entropy.OPERATOR
    own = lowrank_filter2d._case("own", (2, 3, 12, 14), 5, 2, own=True)
    shared_lora = lora_linear._case("rows", (6,), 16, 12, 4)
    adapter = ("x", "down", "up", "scale", "shift")
    own_lora = lora_linear._case("own", (2, 6), 16, 12, 4, samples=2)
    for op, case, leaves, names in (
        (filters, filters.cases[0], ("taps_y", "taps_x", "mix"), ("dense", "separable", "slices")),
        (filters, own, ("taps_y", "taps_x", "mix"), ("dense", "separable", "slices")),
        (softmax_entropy.OPERATOR, softmax_entropy.OPERATOR.cases[0], ("logits",), ("log_softmax",)),
        (head, head.cases[0], ("hidden",), ("log_softmax",)),
        (cosine_alignment.OPERATOR, cosine_alignment.OPERATOR.cases[0], ("prediction",), ("cosine_similarity",)),
        (lora_linear.OPERATOR, shared_lora, ("x", "lora_a", "lora_b"), ("addmm", "plain")),
        (lora_linear.OPERATOR, own_lora, ("x", "lora_a", "lora_b"), ("bmm", "vmap", "plain")),
        *((film_adapter.OPERATOR, case, adapter, ("linears",)) for case in film_adapter.OPERATOR.cases[:5]),
        (film_adapter.OPERATOR, film_adapter._case("block", (5,), 64, 4), adapter, ("block",)),
    ):
        for row in rows(Benchmark(op, leaves, BENCHMARK.work), case, names):
            gate.checked(row, row.implementation)


def test_exponent():
    assert exponent([1, 2, 4, 8], [3, 3 * 2**1.5, 3 * 4**1.5, 3 * 8**1.5]) == pytest.approx(1.5)


def result(peer, speedup, **changed):
    """A row as it is stored."""
    row = dict(op="softmax_entropy", case="32x32000", dtype="float32", direction=STEP, backend="cpu", peer=peer)
    row |= dict(median_us=200.0, p20_us=190.0, p80_us=230.0, peer_median_us=speedup and 200 * speedup, speedup=speedup)
    row |= dict(gbps=20.0, gflops=50.0, floor_us=100.0, device="some-cpu-2-threads", torch="2.13.0+cpu")
    row |= dict(triton="3.7.1", cuda=None, commit="abc", dirty=False, date="2026-11-21T10:00:00+00:00")
    assert tuple(row) == results.FIELDS
    return row | changed


STORED = [
    result(None, None),
    result("reference", 1.5),
    result("log_softmax", 4.6),  # an older row of the next
    result("log_softmax", 4.0),
    result("log_softmax-compiled", 2.5),
    result(None, None, op="lora_linear", case="577x1024x1024-r8"),
    result("peft", 1.4, op="lora_linear", case="577x1024x1024-r8"),
    result("addmm", 1.2, op="lora_linear", case="577x1024x1024-r8"),
    result("plain", 0.8, op="lora_linear", case="577x1024x1024-r8"),
    *(result(None, None, case=f"batch={n}", median_us=100.0 * n**1.5) for n in (1, 4, 16)),
]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """The folder of a device whose rows are committed."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "committed")
    results.append(results.FOLDER, STORED)
    return results.FOLDER / "some-cpu-2-threads"


def test_rows_come_back_as_they_were_stored(stored):
    assert sorted(map(str, results.load(stored))) == sorted(map(str, STORED))
    with pytest.raises(AssertionError, match="a row has"):
        results.append(results.FOLDER, [STORED[0] | {"more": 1}])


def test_table(stored):
    text = report.table(results.load(stored), stored.name)
    assert "| `softmax_entropy` | 32x32000 | float32 | 4.00 | 2.50 | 50 |\n" in text
    assert "| `lora_linear` | 577x1024x1024-r8 | float32 | 1.20 |  | 50 |\n" in text
    assert "frozen layer alone: 1.25 (577x1024x1024-r8 float32)" in text
    assert "some-cpu-2-threads; torch 2.13.0+cpu; triton 3.7.1; 2026-11-21; benchmarks/results/some-cpu" in text
    assert "batch=" not in text
    page = "before\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nafter\n"
    assert report.section(page) == "old\n"
    assert report.section(report.spliced(page, stored)) == text


def test_report_is_one_page(stored, tmp_path, monkeypatch):
    for name in ("README", "DOCS"):
        monkeypatch.setattr(report, name, tmp_path / name)
    report.README.write_text("<!-- bench: begin -->\n<!-- bench: end -->\n")
    report.main(str(stored), tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "report.html", "summary.png", "speedups.png", "roofline.png", "scaling.png",
    }  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "1.50 superlinear" in page
    assert str(tmp_path) not in page
    assert (report.DOCS / "summary.png").exists()
    assert report.section(report.README.read_text()) == report.table(results.load(stored), stored.name)


def test_check_flags_a_ratio_that_fell(stored, tmp_path, capsys):
    fresh = tmp_path / "fresh"
    results.append(fresh, STORED)
    check.main(str(fresh / stored.name))
    assert "slower" not in capsys.readouterr().out
    results.append(fresh, [result("peft", 1.4 * 0.7, op="lora_linear", case="577x1024x1024-r8")])
    with pytest.raises(SystemExit, match=r"below 0.75 of the median"):
        check.main(str(fresh / stored.name))
    assert "slower    0.98 against   1.40  lora_linear 577x1024x1024-r8" in capsys.readouterr().out


def test_check_without_committed_results_says_so(stored, capsys):
    check.main("another-cpu-8-threads")
    assert "no committed results of another-cpu-8-threads" in capsys.readouterr().out


def test_device_is_a_slug(monkeypatch):
    monkeypatch.setattr(machine, "processor", lambda: "AMD EPYC (tm) 9/B14")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert machine.device() == "amd-epyc-tm-9-b14-2-threads"


def test_gpu_rehearsal(tmp_path):
    """The command for a GPU, without one: rows of the interpreted kernel and its peers, and the summary."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "-k", "spectral", str(tmp_path)]
    done = subprocess.run(
        command, cwd=machine.ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("rehearsal-*/operators.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(row["implementation"], row["direction"]) for row in found} >= {("triton", "bwd"), ("rfft", "fwd+bwd")}
    assert not [row for row in found if "error" in row]
    assert "spectral_gain2d        radix_3_and_5            float32   fwd+bwd triton" in done.stdout


@pytest.mark.parametrize(
    ("op", "case", "direction", "ours", "peer", "verdict"),
    [
        ("lowrank_filter2d", "1x3x336x336-k7-r1", "fwd", 4.9, 50, "<= 5 us met"),
        ("lowrank_filter2d", "1x3x336x336-k7-r1", "bwd", 9.1, 50, "<= 9 us NOT MET"),
        ("lowrank_filter2d", "64x3x336x336-k7-r1", "fwd", 40, 50, ">= 75 % of copy NOT MET"),
        ("lora_linear", "577x1024x1024-r8", "fwd+bwd", 13.4, 10, "<= 1.35 x plain (1.34) met"),
        ("lora_linear", "577x1024x1024-r8", "fwd+bwd", 13.6, 10, "<= 1.35 x plain (1.36) NOT MET"),
    ],
)
def test_gpu_summary_holds_rows_to_their_targets(op, case, direction, ours, peer, verdict):
    def row(implementation, us):
        figures = dict(median_us=us, hot_us=us, percent_of_copy=70.0)
        return dict(op=op, case=case, dtype="bfloat16", direction=direction, implementation=implementation, **figures)

    slower, failed = row("triton", 2 * ours), row("cuda", 0) | {"error": "wrong"}
    _, line = gpu.summary([row("cuda", ours), slower, row("plain", peer), row("reference", 3 * ours), failed])
    assert line.endswith(verdict)
    assert f" cuda {ours:>12.1f}" in line
    assert "3.00" in line
