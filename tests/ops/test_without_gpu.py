"""The GPU kernels on the CPU, each kind in a process of its own: Triton's interpreted, CUDA's as emulated C++."""

import os
import subprocess
import sys

import pytest
from emulation import build

from vqfast import _native
from vqfast.testing.here import REQUIRED

NUMERICS = "float64 and not gradcheck and not reference"


def absent(kind: str, reason: object) -> None:
    (pytest.fail if kind in REQUIRED else pytest.skip)(f"{kind}: {reason}")


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    options = ["-q", "-p", "no:cacheprovider", f"--ignore={__file__}", "tests/ops"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def assert_passed(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture(scope="session")
def emulated() -> dict[str, str]:
    """Environment of a process whose backend `cuda` is the emulated library."""
    try:
        return {"VQFAST_EMULATED_CUDA": str(build.build()), "VQFAST_REQUIRE": "cuda"}
    except RuntimeError as error:
        absent("cuda-emulated", error)


def test_triton_interpreted():
    if _native.load("triton") == "triton is not installed (pip install triton)":
        absent("triton-interpret", _native.load("triton"))
    assert_passed(run({"TRITON_INTERPRET": "1", "VQFAST_REQUIRE": "triton"}, "-k", "triton and not several_tasks"))


def test_cuda_emulated(emulated):
    assert_passed(run(emulated, "-k", "cuda"))
