"""The numerics again with the loops for narrower instruction sets, each in a process of its own."""

import os
import subprocess
import sys

import pytest

NUMERICS = "float64 and cpu and not gradcheck and not spectral"  # spectral_gain2d's clones are the loader's choice


def run(target, *arguments):
    environment = os.environ | {"VQFAST_CPU_TARGET": target}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("target", ["portable", "avx2"])
def test_numerics(target, require_backend):
    require_backend("cpu", "lowrank_filter2d")
    done = run(target, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_generic.py", "-k", NUMERICS)
    assert done.returncode == 0, done.stdout[-2000:]
    assert " passed" in done.stdout


def test_an_unknown_one_is_an_error():
    done = run("avx1024", "-c", "import torch, vqfast; vqfast.ops.softmax_entropy(torch.ones(2, 3))")
    assert "ValueError: VQFAST_CPU_TARGET must be one of portable, avx2, avx512; got 'avx1024'" in done.stderr
