"""Every GPU kernel compiles without a GPU, spills nothing, and takes the registers and shared memory of the table."""

import importlib.util
import json
import shutil

import ahead_of_time
import pytest

from vqfast import _native

TABLE = json.loads(ahead_of_time.TABLE.read_text())


def compare(kind, found):
    assert found, "nothing was compiled"
    spilled = {name: usage["spills"] for name, usage in found.items() if usage["spills"]}
    assert not spilled, f"bytes spilled: {spilled}"
    # Code for 8.0 also runs on 8.6 and 8.9, whose blocks have 99 KB.
    too_large = {n: u["shared"] for n, u in found.items() if n.endswith("sm_80") and u.get("shared", 0) > 99 << 10}
    assert not too_large, f"bytes of shared memory: {too_large}"
    changed = {
        name: (TABLE[kind].get(name), found.get(name))
        for name in sorted({*TABLE[kind], *found})
        if TABLE[kind].get(name) != found.get(name)
    }
    lines = "\n".join(f"{name}: {before} -> {after}" for name, (before, after) in changed.items())
    if TABLE["versions"] != ahead_of_time.versions():  # another compiler decides otherwise: to know, not to fail
        print(f"compiled by {ahead_of_time.versions()}, the table by {TABLE['versions']}\n{lines}")
        return
    assert not changed, f"{lines}\nIf that is intended: python tests/ahead_of_time.py"


@pytest.mark.skipif(_native.INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
def test_triton_kernels():
    compare("triton", ahead_of_time.triton_kernels())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_kernels():
    compare("cuda", ahead_of_time.cuda_kernels())
