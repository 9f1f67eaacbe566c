"""Builds csrc/ into vqfast/_C.abi3.so (LibTorch stable ABI: one build loads on torch 2.11 and later).

VQFAST_BUILD chooses: `auto` (default: cpu where a C++ compiler is found), `cpu` (required), `none` (pure Python).
"""

import os
import shutil
from pathlib import Path

from setuptools import setup

CHOICES = ("auto", "cpu", "none")
build = os.environ.get("VQFAST_BUILD", "auto")
if build not in CHOICES:
    raise SystemExit(f"VQFAST_BUILD must be one of {', '.join(CHOICES)}; got {build!r}")
compiler = os.environ.get("CXX", "c++")
if build == "cpu" and shutil.which(compiler) is None:
    raise SystemExit(
        f"VQFAST_BUILD=cpu needs a C++ compiler; {compiler!r} is not on PATH: set CXX or VQFAST_BUILD=none"
    )

arguments: dict = {}
if build == "cpu" or (build == "auto" and shutil.which(compiler)):
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    target = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # stable ABI of torch 2.11
    arguments = {
        "ext_modules": [
            CppExtension(
                "vqfast._C",
                sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
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
                    target,
                ],
            )
        ],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }

setup(**arguments)
