"""Backends under test. VQFAST_REQUIRE=cpu,... turns the skip of a missing one into a failure."""

import os

import pytest
import torch

from vqfast import backends

torch.set_num_threads(2)
REQUIRED = [name for name in os.environ.get("VQFAST_REQUIRE", "").split(",") if name]


def pytest_configure(config: pytest.Config) -> None:
    unknown = set(REQUIRED) - set(backends.NATIVE)
    if unknown:
        raise pytest.UsageError(f"VQFAST_REQUIRE names {sorted(unknown)}; known: {list(backends.NATIVE)}")


@pytest.fixture
def require_backend():
    """Call with (backend, operator): skips with the reason when it is not there, fails when it is required."""

    def require(name: str, operator: str) -> None:
        if name == "reference":
            return
        reason = backends.unavailable(name, operator, backends.NATIVE[name][0], torch.float32)
        if reason is not None:
            (pytest.fail if name in REQUIRED else pytest.skip)(reason)

    return require
