"""Builds csrc/cpu into vqfast/_C.abi3.so and csrc/cuda into vqfast/_cuda.abi3.so (LibTorch stable ABI: one build loads
on torch 2.11 and later).

VQFAST_BUILD chooses: `auto` (default: what the compilers that are found can build; CUDA beside a CUDA build of torch),
`cpu` (required), `cuda` (required, with cpu; beside any torch), `none` (pure Python). VQFAST_CUDA_ARCHITECTURES names
the GPUs, as "80;90a"; default: all that nvcc knows of 80, 90a and 100. Code for 80 runs on later GPUs, too.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import setup

CHOICES = ("auto", "cpu", "cuda", "none")
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # stable ABI of torch 2.11
build = os.environ.get("VQFAST_BUILD", "auto")
if build not in CHOICES:
    raise SystemExit(f"VQFAST_BUILD must be one of {', '.join(CHOICES)}; got {build!r}")
compiler = os.environ.get("CXX", "c++")
if build in ("cpu", "cuda") and shutil.which(compiler) is None:
    raise SystemExit(
        f"VQFAST_BUILD={build} needs a C++ compiler; {compiler!r} is not on PATH: set CXX or VQFAST_BUILD=none"
    )


def cuda_folder() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, or that of the nvcc on PATH, or where it is usually installed."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    for folder in map(Path, filter(None, candidates)):
        if (folder / "bin/nvcc").exists() and (folder / "include/cuda_runtime.h").exists():
            return folder
    return None


def nvcc_release(folder: Path) -> str:
    text = subprocess.run([folder / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def sources(kind: str, pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", kind).glob(pattern))


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "vqfast._C",
        sources("cpu", "*.cpp"),
        include_dirs=[str(Path("csrc").absolute())],
        py_limited_api=True,
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-g0",
            "-fopenmp-simd",
            "-Wall",
            "-Wno-unused-parameter",
            "-Wno-psabi",  # vectors are passed to inlined functions only
            TARGET,
        ],
    )


def cuda_extension(folder: Path):
    import torch
    from torch.utils import cpp_extension

    release = nvcc_release(folder)
    cpp_extension.CUDA_HOME = str(folder)  # beside a torch without CUDA neither is set
    torch.version.cuda = torch.version.cuda or release
    known = ["80", "90a", *(["100"] if tuple(map(int, release.split("."))) >= (12, 8) else [])]
    architectures = os.environ.get("VQFAST_CUDA_ARCHITECTURES", ";".join(known)).split(";")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    if "80" in architectures:
        targets.append("-gencode=arch=compute_80,code=compute_80")  # compiled by the driver for GPUs to come
    return cpp_extension.CppExtension(
        "vqfast._cuda",
        sources("cuda", "*.cu"),
        include_dirs=[str(Path("csrc").absolute()), str(folder / "include")],
        py_limited_api=True,
        extra_compile_args={"cxx": [TARGET], "nvcc": ["-std=c++20", "-O3", TARGET, *targets]},
        library_dirs=[str(folder / name) for name in ("lib64", "lib")],
        libraries=["cudart_static", "dl", "rt", "pthread"],
    )


def extensions() -> list:
    if build == "none" or shutil.which(compiler) is None:
        return []
    found = [cpu_extension()]
    folder = cuda_folder()
    if build == "cuda":
        if folder is None:
            raise SystemExit("VQFAST_BUILD=cuda needs nvcc: put it on PATH or set CUDA_HOME")
        found.append(cuda_extension(folder))
    elif build == "auto" and folder is not None:
        import torch

        if torch.version.cuda and torch.version.cuda.split(".")[0] == nvcc_release(folder).split(".")[0]:
            found.append(cuda_extension(folder))
    return found


arguments: dict = {}
if modules := extensions():
    from torch.utils.cpp_extension import BuildExtension

    arguments = {
        "ext_modules": modules,
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }

setup(**arguments)
