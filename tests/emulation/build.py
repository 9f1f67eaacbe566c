"""Builds the CUDA kernels as C++ for the CPU. `python tests/emulation/build.py` prints the library's path, for
VQFAST_EMULATED_CUDA."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "c++")


def build(csrc: Path = ROOT / "csrc", pattern: str = "*.cu") -> Path:
    """Library of the kernels in csrc/cuda that match, made anew where a file or torch has changed.

    Raises:
        RuntimeError: no compiler, or what it says of an error.
    """
    if shutil.which(COMPILER) is None:
        raise RuntimeError(f"no C++ compiler: {COMPILER!r} is not on PATH")
    torch_folder = Path(torch.__file__).parent
    sources = sorted(csrc.glob(f"cuda/{pattern}"))
    headers = sorted((*csrc.glob("cuda/*.h"), *csrc.glob("common/*.h"), *Path(__file__).parent.glob("*.*")))
    contents = hashlib.sha256(f"{torch.__version__} {pattern}".encode())
    for path in (*sources, *headers):
        contents.update(path.read_bytes())
    library = ROOT / "build/emulated" / f"{contents.hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = [
        COMPILER, "-x", "c++", *map(str, sources), "-x", "none", "-o", str(unfinished),
        "-std=c++20", "-O2", "-g0", "-fopenmp", "-shared", "-fPIC", "-Wno-unknown-pragmas",
        "-DVQ_EMULATED", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{csrc}", f"-I{ROOT}/tests/emulation", f"-isystem{torch_folder}/include",
        f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    unfinished.replace(library)
    return library


if __name__ == "__main__":
    sys.stdout.write(f"{build()}\n")
