"""What importing costs, which backend runs, what build_info says."""

import subprocess
import sys

import pytest
import torch

import vqfast
from vqfast import backends

HEAVY = ("transformers", "peft", "triton", "torch._dynamo", "sklearn", "PIL", "matplotlib", "vqfast.zoo")


def test_import_is_light():
    code = f"import sys, vqfast; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_build_info_names_a_backend_and_a_reason_for_every_operator():
    info = vqfast.build_info()
    assert set(info["operators"]) == set(vqfast.ops.__all__)
    for devices in info["operators"].values():
        assert devices["cpu"]["backend"] in backends.BACKENDS
        assert devices["cpu"]["why"]


def test_automatic_choice_takes_the_kernel_and_float64_the_reference(require_backend):
    require_backend("cpu", "softmax_entropy")
    assert backends.choose("softmax_entropy", "cpu", torch.float32, None) == "cpu"
    assert backends.choose("softmax_entropy", "cpu", torch.float64, None) == "reference"


def test_backend_block_nests_and_ends(require_backend):
    require_backend("cpu", "softmax_entropy")
    chosen = lambda: backends.choose("softmax_entropy", "cpu", torch.float32, None)  # noqa: E731
    with vqfast.backend("reference"):
        assert chosen() == "reference"
        with vqfast.backend(None):
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert chosen() == "cpu"
    with pytest.raises(ValueError, match="backend must be one of reference, cpu"), vqfast.backend("cuda11"):
        pass


def test_without_compiled_code_the_reference_runs_and_says_why(monkeypatch):
    reason = "no cpu kernels in this install (build them: VQFAST_BUILD=cpu pip install --no-build-isolation .)"
    monkeypatch.setattr("vqfast._native.load", lambda _: reason)
    assert backends.choose("softmax_entropy", "cpu", torch.float32, None) == "reference"
    assert vqfast.build_info()["operators"]["softmax_entropy"]["cpu"] == {
        "backend": "reference",
        "why": f"cpu: {reason}",
    }
    with pytest.raises(backends.BackendUnavailableError, match="VQFAST_BUILD=cpu pip install"):
        vqfast.ops.softmax_entropy(torch.randn(3), backend="cpu")
