"""Backends under test. VQFAST_REQUIRE=cpu,... turns the skip of a missing one into a failure."""

import pytest
import torch

from vqfast import backends
from vqfast.testing.here import REQUIRED, missing

torch.set_num_threads(2)
KNOWN = (*backends.NATIVE, "triton-interpret", "cuda-emulated")


def pytest_configure(config: pytest.Config) -> None:
    if unknown := set(REQUIRED) - set(KNOWN):
        raise pytest.UsageError(f"VQFAST_REQUIRE names {sorted(unknown)}; known: {', '.join(KNOWN)}")


@pytest.fixture
def require_backend():
    """Call with (backend, operator): skips with the reason when it is not there, fails when it is required."""

    def require(name: str, operator: str) -> None:
        if (reason := missing(name, operator)) is not None:
            (pytest.fail if name in REQUIRED else pytest.skip)(reason)

    return require


@pytest.fixture(scope="module")
def one_openmp_thread():
    """What a server of a small model should set (docs/tuning.md): threads wait for each other beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
