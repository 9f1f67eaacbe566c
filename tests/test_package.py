"""What importing costs, which backend runs, what build_info says."""

import subprocess
import sys

import pytest
import torch

import vqfast
from vqfast import _native, backends

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


@pytest.fixture
def gpu(monkeypatch):
    """Call with a compute capability: torch then says that there is one such GPU. Nothing is loaded yet."""
    _native.load.cache_clear()

    def pretend(capability):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old")

    yield pretend
    _native.load.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_without_a_gpu_the_cause_and_the_remedy_are_named(name):
    match = "lora_linear: torch .* (is built without CUDA .install|sees no GPU .check)"
    with pytest.raises(backends.BackendUnavailableError, match=match):
        vqfast.ops.lora_linear(
            torch.ones(2, 3), torch.ones(4, 3), None, torch.ones(1, 3), torch.ones(4, 1), 1.0, backend=name
        )


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_an_old_gpu_is_refused(name, gpu):
    gpu((7, 5))
    assert "GPU 0, Old, has compute capability 7.5, the kernels need 8.0 (hide it" in _native.load(name)


def test_a_library_that_does_not_load_is_named(gpu, monkeypatch, tmp_path):
    gpu((9, 0))
    monkeypatch.setitem(_native.LIBRARIES, "cuda", tmp_path / "_cuda.abi3.so")
    assert "no cuda kernels in this install (build them: VQFAST_BUILD=cuda" in _native.load("cuda")
    _native.load.cache_clear()
    (tmp_path / "_cuda.abi3.so").write_bytes(b"no library")
    assert f"_cuda.abi3.so does not load with torch {torch.__version__} (rebuild" in _native.load("cuda")


def test_a_gpu_backend_does_not_take_cpu_tensors(gpu):
    gpu((9, 0))
    with pytest.raises(backends.BackendUnavailableError, match="'triton' runs on cuda tensors, the input is on cpu"):
        vqfast.ops.softmax_entropy(torch.ones(2, 3), backend="triton")
