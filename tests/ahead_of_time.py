"""Compiles every GPU kernel without a GPU and reads its registers, shared memory and spills.

`python tests/ahead_of_time.py` rewrites ahead_of_time.json, with which tests/test_ahead_of_time.py compares.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from vqfast import backends
from vqfast.testing.cases import Case, OperatorCases, all_operators

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".json")
TRITON_TARGETS = (80, 90, 100)
CUDA_TARGETS = ("80", "90a")
DTYPES = (torch.bfloat16, torch.float32)
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
Usage = dict[str, int]  # registers of a thread, bytes of shared memory of a block, bytes spilled


def versions() -> dict[str, str | None]:
    """What the table depends on."""
    nvcc = shutil.which("nvcc") and subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release ([\d.]+)", nvcc or "")
    return {"triton": importlib.metadata.version("triton"), "nvcc": found[1] if found else None}


def launches(op: OperatorCases, case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[int], Any]]]:
    """(name, compile for a target) of every Triton kernel that forward and backward of a case launch."""
    from triton.runtime.jit import JITFunction

    found: list[tuple[Any, dict[str, Any]]] = []
    api = sys.modules[op.function.__module__]
    module = importlib.import_module(api.__name__.replace(".api", ".triton"))
    with (
        mock.patch.object(JITFunction, "run", lambda self, *a, **k: found.append((self, _bound(self, a, k)))),
        mock.patch.object(api, "kernel", lambda _, name: getattr(module, name)),
        mock.patch.object(backends, "choose", return_value="triton"),
        mock.patch.object(torch, "is_autocast_enabled", return_value=False),  # torch 2.11 has none for "meta"
        mock.patch.object(torch, "autocast", return_value=contextlib.nullcontext()),
    ):
        inputs = op.inputs(case, dtype, "meta", requires_grad=True)
        if "image" in op.differentiable:
            inputs["image"].requires_grad_(False)  # as in a tuning step
        result = op.function(**inputs)
        leaves = [v for v in inputs.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        torch.autograd.grad(result, leaves, torch.empty_like(result))
    for kernel, arguments in found:
        yield kernel.fn.__name__, lambda target, k=kernel, a=arguments: _compile(k, a, target)


def _bound(kernel: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(kernel.arg_names, positional, strict=False)) | named


def _compile(kernel: Any, arguments: dict[str, Any], target: int) -> Any:
    """The compiled kernel, specialised as a launch does it: ones are constants, multiples of 16 are marked."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (special and isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _triton_usage(compiled: Any) -> Usage:
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = compiled.asm["ptx"]
    architecture = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        assembler = get_ptxas(int(re.sub(r"\D", "", architecture))).path
        command = [assembler, "-v", "--gpu-name", architecture, file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True).stderr
    (usage,) = _usages(report).values()
    return usage | {"shared": compiled.metadata.shared}


def _usages(report: str) -> dict[str, Usage]:
    """Kernel -> usage, from what ptxas -v prints."""
    found = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?Used .*?)\n", report, re.DOTALL):
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", text)
        registers = re.search(r"Used (\d+) registers", text)
        found[name] = {"registers": int(registers[1]), "spills": int(spills[1]) + int(spills[2])}
    return found


def triton_kernels() -> dict[str, Usage]:
    """Usage of every Triton kernel at the shapes of the GPU benchmarks."""
    found = {}
    for op in all_operators():
        if "triton" not in op.kernels:
            continue
        for case in op.gpu_benchmarks:
            for dtype in DTYPES:
                for kernel, compile_for in launches(op, case, dtype):
                    for target in TRITON_TARGETS:
                        name = f"{kernel} {case} {str(dtype)[6:]} sm_{target}"
                        found[name] = _triton_usage(compile_for(target))
    return found


def cuda_kernels() -> dict[str, Usage]:
    """Usage of every kernel of csrc/cuda; shared memory is the launch's choice and not known here."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        reports = pool.map(_compile_cuda, [s for s in sources for _ in CUDA_TARGETS], CUDA_TARGETS * len(sources))
    return {name: usage for report in reports for name, usage in report.items()}


def _compile_cuda(source: Path, target: str) -> dict[str, Usage]:
    command = [
        "nvcc", "-std=c++20", "-O3", "-gencode", f"arch=compute_{target},code=sm_{target}", "-Xptxas", "-v", "-cubin",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT}/csrc", f"-I{Path(torch.__file__).parent}/include",
        str(source), "-o", "/dev/null",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usages = _usages(done.stderr)
    command = ["c++filt", *usages]
    demangled = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {
        f"{source.stem} {_short(name)} sm_{target}": usage
        for name, usage in zip(demangled, usages.values(), strict=True)
    }


def _short(name: str) -> str:
    """Kernel and template arguments of a demangled name."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|vqfast::|_INTERNAL\w+::|c10::|torch::headeronly::", "", name)
    return re.search(r"(\w+(<.*>)?)\(", name)[1]


def measure() -> dict[str, Any]:
    return {"versions": versions(), "triton": triton_kernels(), "cuda": cuda_kernels() if shutil.which("nvcc") else {}}


if __name__ == "__main__":
    TABLE.write_text(json.dumps(measure(), indent=1) + "\n")
