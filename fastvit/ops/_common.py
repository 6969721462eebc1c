"""What the operators share: the ``torch.library`` namespace, the base Function, and the layouts kernels accept."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from . import _recipes
from ._observed import convert, fill, scratch
from ._state import direct, kernels, transforms, wants_grad

__all__ = [
    "Operator",
    "apply",
    "as_rows",
    "contiguous",
    "convert",
    "define",
    "direct",
    "distinct",
    "fill",
    "kernels",
    "library",
    "matrix",
    "run_backward",
    "scratch",
    "wants_grad",
    "with_unit_stride",
]

library = Library("fastvit", "DEF")


def define(schema: str, implementation: Any, fake: Any, keys: tuple[str, ...] = ("CUDA", "CPU")) -> Callable[..., Any]:
    """Registers ``fastvit::<schema>`` with its kernel (CUDA and, in the interpreter, CPU) and its shape function.

    Where the schema has a tensor, the implementation may return None for what was not asked for; the operator returns an empty
    tensor there. Returns a function that calls the operator, or its implementation itself, or a recipe of it, where PyTorch's
    dispatcher would do no more than that.
    """
    name = schema.split("(")[0]
    library.define(schema)

    def kernel(*args: Any) -> Any:
        out = _recipes.beneath(implementation, args)
        if isinstance(out, Tensor):
            return out
        like = next(arg for arg in args if isinstance(arg, Tensor))
        return tuple(like.new_empty(0) if t is None else t for t in out)

    for key in keys:
        library.impl(name, kernel, key)
    torch.library.register_fake(f"fastvit::{name}", fake, lib=library)
    operator = getattr(torch.ops.fastvit, name).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return operator(*args)
        return _recipes.call(implementation, operator, args)

    return call


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
    if torch.compiler.is_compiling():
        return function.apply(*args)
    if forward_ad._current_level >= 0:
        function = _refusing_forward_mode(function)
    if transforms():
        return function.apply(*args)
    out = apply_directly(function, *args)
    if _thread.applied is not None:
        _thread.applied.append((function, args, (out,) if isinstance(out, Tensor) else out))
    return out


def apply_directly(function: type[Operator], *args: Any) -> Any:
    """``function.apply`` where no transform is active, without the defaults that it looks up at every call."""
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


class _Thread(threading.local):
    applied: list[tuple] | None = None


_thread = _Thread()


@contextmanager
def applied() -> Iterator[list[tuple]]:
    """Collects (Function, inputs, outputs) of the Functions that this thread applies inside."""
    outer, found = _thread.applied, []  # type: ignore[var-annotated]
    _thread.applied = found
    try:
        yield found
    finally:
        _thread.applied = outer


def run_backward(operator: Any, *args: Any) -> tuple:
    """The raw backward operator's results, guarded against a second differentiation where one is being recorded."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return apply(_Once, operator, *args)
    return operator(*args)


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


def matrix(tensor: Tensor) -> Tensor:
    """A contiguous tensor as it is, which kernels read as rows; of any other, ``as_rows``."""
    return tensor if tensor.is_contiguous() else as_rows(tensor)


def as_rows(tensor: Tensor) -> Tensor:
    """(..., C) → (rows, C) with last stride 1; a view wherever the strides allow one."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or (rows.shape[-1] == 1 and rows.is_contiguous()) else rows.contiguous()


def with_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself when its last stride is 1, otherwise a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
