"""What every operator's api.py and contract.py share: definition, autocast, first-order gradients, argument errors."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqfast import backends

AUTOCAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what autocast converts
ACTIVATION_DTYPES = (*AUTOCAST_DTYPES, torch.float64)
_libraries: list[torch.library.Library] = []  # a Library that is collected takes its definitions with it


def define(operator: str, **directions: tuple[str, Callable[..., Any]]) -> None:
    """Define `<operator>_<direction>` in every native backend's namespace, from (schema, fake implementation).

    Triton's is the function of that name in triton.py beside the fake; compiled libraries add theirs when they load.
    """
    backends.OPERATORS.append(operator)
    for name, device in backends.NATIVE.items():
        library = torch.library.Library(f"vqfast_{name}", "FRAGMENT")
        _libraries.append(library)
        for direction, (schema, fake) in directions.items():
            function = f"{operator}_{direction}"
            library.define(f"{function}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"vqfast_{name}::{function}", fake, lib=library)
            if name == "triton":
                module = fake.__module__.replace(".contract", ".triton")
                library.impl(function, functools.partial(_run_triton, module, function), device.upper())


def _run_triton(module: str, function: str, *args: Any) -> Any:
    """A function of a module that is imported, with Triton, when first called; on the device of its first argument."""
    run = getattr(importlib.import_module(module), function)
    if args[0].device.type == "cpu":  # interpreted
        return run(*args)
    with torch.cuda.device(args[0].device):
        return run(*args)


def kernel(backend: str, name: str) -> Callable[..., Any]:
    """The registered operator `name` of a native backend."""
    return getattr(getattr(torch.ops, f"vqfast_{backend}"), name)  # type: ignore[no-any-return]


def first_order(run: Callable[..., Any], operator: str, *args: Any) -> Any:
    """`run(*args)`, a backward kernel; a second derivative through it raises and is never silently zero."""
    if torch.is_grad_enabled():  # inside a backward: create_graph=True
        return _FirstOrder.apply(run, operator, *args)
    return run(*args)


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., Any], operator: str, *args: Any) -> Any:
        ctx.operator = operator
        return run(*args)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(
            f"{ctx.operator} has no second derivative in its compiled form; use backend='reference' for one"
        )


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, a repeated one as a view: torch.compile takes no tensor twice in one autograd.Function."""
    result: list[Tensor | None] = []
    for i, tensor in enumerate(tensors):
        repeated = tensor is not None and any(tensor is other for other in tensors[:i])
        result.append(tensor.view_as(tensor) if repeated and tensor is not None else tensor)
    return result


def autocast_cast(device: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors cast as autocast casts the arguments of a matrix product; unchanged where autocast is off.

    Other dtypes than its own pass through: they are refused afterwards, not converted.
    """
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in AUTOCAST_DTYPES else t for t in tensors)


def check_activation(name: str, tensor: object) -> Tensor:
    """`tensor` if it is a tensor of an activation dtype, else TypeError."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if tensor.dtype not in ACTIVATION_DTYPES:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in ACTIVATION_DTYPES)
        raise TypeError(f"{name} must be {accepted}; got {tensor.dtype}. Convert it, for example {name}.float()")
    return tensor


def check_parameter(name: str, tensor: object, activation: Tensor) -> Tensor:
    """`tensor` if it is a parameter tensor for `activation`: same device, float32 (float64 beside float64)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    expected = torch.float64 if activation.dtype == torch.float64 else torch.float32
    if tensor.dtype != expected:
        raise TypeError(f"{name} must be {expected} beside {activation.dtype} activations; got {tensor.dtype}")
    check_device(name, tensor, activation)
    return tensor


def check_device(name: str, tensor: Tensor, activation: Tensor) -> None:
    if tensor.device != activation.device:
        raise ValueError(f"{name} is on {tensor.device}, the activations on {activation.device}; move one of them")


def check_frozen_base(name: str, activation: Tensor, weight: object, bias: object) -> None:
    """weight and bias (or None) of a frozen layer beside `activation`, called `name`: same dtype, device, no gradient.

    A base that requires grad is refused rather than left silently at a gradient of zero.
    """
    for base_name, given in (("weight", weight), ("bias", bias)):
        if given is None and base_name == "bias":
            continue
        base = check_activation(base_name, given)
        if base.dtype != activation.dtype:
            raise TypeError(f"{base_name} must have the dtype of {name}, {activation.dtype}; got {base.dtype}")
        check_device(base_name, base, activation)
        if base.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{base_name} is frozen in this operator but requires grad; pass {base_name}.detach() or freeze it"
            )
