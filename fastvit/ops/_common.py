"""What the operators share: the ``torch.library`` namespace, the base Function, and the layouts kernels accept."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

library = Library("fastvit", "DEF")


def define(schema: str, implementation: Any, fake: Any, keys: tuple[str, ...] = ("CUDA", "CPU")) -> None:
    """Registers ``fastvit::<schema>`` with its kernel (CUDA and, in the interpreter, CPU) and its shape function."""
    name = schema.split("(")[0]
    library.define(schema)
    for key in keys:
        library.impl(name, implementation, key)
    torch.library.register_fake(f"fastvit::{name}", fake, lib=library)


class Operator(torch.autograd.Function):
    """Base of the operators' Functions: composes with ``torch.func.grad``, refuses ``vmap`` in one sentence."""

    @staticmethod
    def vmap(info, in_dims, *args):
        raise RuntimeError(
            "fastvit's Triton operators do not support torch.func.vmap; put the mapped dimension into the batch dimension,"
            " or use the PyTorch backend: with fastvit.use_backend('torch')"
        )


class _Once(Operator):
    """A raw backward operator whose results refuse to be differentiated again, instead of counting as constants."""

    @staticmethod
    def forward(operator, *args):
        return operator(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "fastvit's Triton operators can be differentiated once; for second derivatives use the functions of fastvit.reference"
        )


def _refuse_forward_mode(ctx, *tangents):
    raise RuntimeError(
        "fastvit's Triton operators have no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad);"
        " use the functions of fastvit.reference"
    )


@functools.cache
def _refusing_forward_mode(function: type[Operator]) -> type[Operator]:
    return type(function.__name__, (function,), {"jvp": staticmethod(_refuse_forward_mode)})


def apply(function: type[Operator], *args: Any) -> Any:
    """``function.apply``; forward-mode differentiation is refused by a subclass, as torch.compile takes no Function with
    a ``jvp`` of its own."""
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        function = _refusing_forward_mode(function)
    return function.apply(*args)


def run_backward(operator: Any, *args: Any) -> tuple:
    """The raw backward operator's results, guarded against a second differentiation where one is being recorded."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return apply(_Once, operator, *args)
    return operator(*args)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether to go through the Function: a gradient is wanted, or a ``torch.func`` transform or forward-mode
    differentiation, which the Function refuses and the raw operators would ignore, hides whether one is."""
    if not torch.compiler.is_compiling() and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, with a view in place of each repeated one: torch.compile refuses a Function given one tensor twice."""
    if not torch.compiler.is_compiling():
        return list(tensors)
    seen: list[Tensor] = []
    out: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is not None and any(tensor is other for other in seen):
            tensor = tensor.view_as(tensor)
        if tensor is not None:
            seen.append(tensor)
        out.append(tensor)
    return out


def as_rows(tensor: Tensor) -> Tensor:
    """(..., C) → (rows, C) with last stride 1; a view wherever the strides allow one."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or (rows.shape[-1] == 1 and rows.is_contiguous()) else rows.contiguous()


def with_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself when its last stride is 1, otherwise a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
