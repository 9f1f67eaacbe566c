"""The GPU kernels on the CPU, each kind in a process of its own: Triton's interpreted, CUDA's as emulated C++."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from emulation import build

from vqfast.testing.here import REQUIRED


def absent(kind: str, reason: object) -> None:
    (pytest.fail if kind in REQUIRED else pytest.skip)(f"{kind}: {reason}")


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    options = ["-q", "-p", "no:cacheprovider", f"--ignore={__file__}", "tests/ops"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    return subprocess.run(
        command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment, capture_output=True, text=True
    )


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
    if importlib.util.find_spec("triton") is None:
        absent("triton-interpret", "triton is not installed")
    assert_passed(run({"TRITON_INTERPRET": "1", "VQFAST_REQUIRE": "triton"}, "-k", "triton and not several_tasks"))


def test_cuda_emulated(emulated):
    assert_passed(run(emulated, "-k", "cuda"))


NUMERICS = "cuda and float64 and not several_tasks"


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_cuda_emulated_with_threads_in_another_order(emulated, order):
    assert_passed(run(emulated | {"VQFAST_EMULATED_ORDER": order}, "-k", NUMERICS))


BROKEN = {  # name -> (operator, file, what is in it, what it becomes)
    "no barrier after the warps' sums": (
        "lora_linear", "lora_linear_blocks.h",
        "  __syncthreads();\n  const int stride", "  const int stride",
    ),
    "no barrier after the weights of dB": (
        "lora_linear", "lora_linear.cu",
        "    __syncthreads();\n  }\n  const Side side", "  }\n  const Side side",
    ),
    "no barrier between stages": (
        "lowrank_filter2d", "lowrank_filter2d.cu",
        "    __syncthreads();  // stage is padded", "    // stage is padded",
    ),
    "halo one row off": (
        "lowrank_filter2d", "lowrank_filter2d.cu",
        "top + step - radius, left", "top + step - radius + (step == 0), left",
    ),
    "a copy not waited for": (
        "lowrank_filter2d", "lowrank_filter2d.cu",
        "    wait_for_copies<kStages - 3>();", "    wait_for_copies<kStages - 2>();",
    ),
    "no barrier of a warp between stages": (
        "lowrank_filter2d", "lowrank_filter2d_backward.cu",
        "      __syncwarp();  // stage has arrived", "      // stage has arrived",
    ),
    "no barrier before the finish": (
        "lowrank_filter2d", "lowrank_filter2d_backward.cu",
        "    __syncthreads();\n", "\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_emulation_catches(name, emulated, tmp_path):
    """A copy of the kernels with one defect fails the numerics, with the threads in at least one order."""
    operator, file, before, after = BROKEN[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(build.ROOT / "csrc", csrc)
    text = (csrc / "cuda" / file).read_text()
    assert before in text
    (csrc / "cuda" / file).write_text(text.replace(before, after, 1))
    environment = {"VQFAST_EMULATED_CUDA": str(build.build(csrc, f"{operator}*.cu"))}
    for order in ("reverse", "forward", "random"):
        done = run(environment | {"VQFAST_EMULATED_ORDER": order}, "-x", "-k", f"{operator} and {NUMERICS}")
        if done.returncode == pytest.ExitCode.TESTS_FAILED:
            return
        assert_passed(done)
    pytest.fail(f"{name}: every test passed")
