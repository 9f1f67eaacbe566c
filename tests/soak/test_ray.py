"""The paradox study over Ray: the rows of one process, also with a worker killed. VQFAST_SOAK=1, `make soak`."""

import os
import signal

import psutil
import pytest
import torch

pytest.importorskip("cv2", reason="needs the extra: pip install vqfast[studies]")
if "VQFAST_SOAK" not in os.environ:
    pytest.skip("takes a cluster: VQFAST_SOAK=1", allow_module_level=True)
pytest.importorskip("ray.data", reason="ray is not installed: pip install 'ray[data]==2.60.0'")
from studies import data, units


@pytest.fixture(scope="module")
def plan():
    dataset = data.load("digits", "validation", 40, 0)
    conditions = units.conditions(["fog", "codec:webp", "snow"], [1, 5], dataset.kind)
    return units.Plan(dataset, ("digits",), tuple(conditions), ("untuned", "search"), 0, 1, 1, "")


def untimed(rows):
    return sorted(({k: v for k, v in row.items() if k != "seconds"} for row in rows), key=lambda row: row["key"])


@pytest.fixture(scope="module")
def expected(plan):
    before = torch.get_num_threads()
    yield untimed(units.rows(plan, plan.units()))
    torch.set_num_threads(before)


def workers():
    """The processes of the actors, which are descendants of this one."""
    named = {p: " ".join(p.cmdline()) for p in psutil.Process().children(recursive=True) if p.is_running()}
    return [process for process, name in named.items() if "MapWorker" in name]


def test_rows_are_those_of_one_process(plan, expected):
    assert untimed(units.rows(plan, plan.units(), "local", workers=2)) == expected
    assert not workers()


def test_a_killed_worker_loses_nothing(plan, expected):
    rows, found = units.rows(plan, plan.units(), "local", workers=2), []
    killed = None
    for row in rows:
        found.append(row)
        if killed is None:
            killed = workers()[0]
            os.kill(killed.pid, signal.SIGKILL)
            left = len(expected) - len(found)
    assert left > len(expected) / 2, "killed too late to say anything"
    assert not killed.is_running()
    assert untimed(found) == expected
