"""The service as README.md starts it, under load, with a replica killed. Part of `make soak`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install -r examples/serve/requirements.txt")
httpx = pytest.importorskip("httpx", reason="httpx is not installed: pip install -r examples/serve/requirements.txt")

ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1:8000"
UP_S, DOWN_S, LOAD_S = 120, 60, 300
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # every address is 127.0.0.1, on Linux, too
}


def answers() -> bool:
    try:
        return httpx.get(f"{URL}/answer", trust_env=False).status_code == 405
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """Ends what it started: `serve run` takes its cluster with it."""
    if answers():
        pytest.skip(f"something answers at {URL} already")
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "examples/serve/config.yaml"]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + UP_S
        while not answers():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(DOWN_S)


def load(folder: Path, *options: str) -> dict:
    command = [sys.executable, "-m", "examples.serve.load", "--output", str(folder / "load.json"), *options]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=LOAD_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "load.json").read_text())


def test_every_request_gets_its_own_answer_and_bad_ones_are_refused(service, tmp_path):
    report = load(tmp_path, "--requests", "110")
    assert report["last statuses of good requests"] == {"200": 110}
    assert report["bad requests"] == 11
    assert report["largest difference to the request alone"] < report["smallest difference to another request"] / 10


def test_no_request_is_lost_silently_when_a_replica_dies(service, tmp_path):
    report = load(tmp_path, "--requests", "60", "--kill-replica", "--retries", "3")
    assert report["last statuses of good requests"] == {"200": 60}
    assert report["seconds from the kill until all replicas run"] is not None


def test_a_row_that_the_model_cannot_take_fails_alone():
    from examples.serve.app import TunedModel
    from vqfast import zoo

    tuned = TunedModel()
    images = [image for image, _, _ in zoo.questions()[:9:3]]
    rows = [tuned.encoded(image, question) for image, question in zip(images, zoo.QUESTIONS, strict=True)]
    alone = tuned.each(rows)
    rows[1]["input_ids"] = rows[1]["input_ids"].clone()
    rows[1]["input_ids"][0, -1] = 1000  # beyond the vocabulary
    first, second, third = tuned.each(rows)
    assert isinstance(second, Exception)
    for answer, expected in ((first, alone[0]), (third, alone[2])):
        assert answer["answer_after"] == expected["answer_after"]
        assert answer["entropy_after"] == pytest.approx(expected["entropy_after"], abs=1e-4)
