"""Operators in inference on a GPU that were called like this before: their results allocated, their kernels launched, no more.

A call's signature is all that decides what it does: the backend in force and, of every tensor, shape, strides, dtype, device
and alignment, beside every other argument. The first call of a signature runs whole, is observed, and leaves a recipe if all it
did was to launch kernels on its arguments and its results, or to go to the vendor's operator by a rule; copies, scratch memory
and other operators of PyTorch's leave none.
Where anything else has a say (a gradient, autocast, a compiler, a mode, a trace, a hook), a call runs whole.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..backend import get_backend
from . import dispatch
from ._common import kernels, nothing_between

MAX_RECIPES = 4096

Recipe = Callable[[tuple, list[int]], Any]

_recipes: dict[tuple, Recipe | None] = {}

by_vendor: dict[tuple[Callable[..., Any], str], Callable[..., Any]] = {}  # (operator, way) → what it comes to, checks left out


class _Recipe:
    """``results``: shape, strides and dtype of each; ``single``: one tensor is returned, not a tuple."""

    def __init__(self, plan: Any, results: list[tuple], single: bool):
        self.plan, self.results, self.single = plan, results, single

    def __call__(self, args: tuple, pointers: list[int]) -> Any:
        like = args[0]
        results = tuple([like.new_empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in self.results])
        pointers += [result.data_ptr() for result in results]
        self.plan.run(pointers)
        return results[0] if self.single else results


def run(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, a public operator whose first argument is a tensor."""
    first = args[0]
    if torch.compiler.is_compiling() or not isinstance(first, Tensor) or not first.is_cuda:
        return function(*args)
    grad = torch.is_grad_enabled()
    if (grad and first.requires_grad) or not nothing_between() or torch.is_autocast_enabled("cuda"):
        return function(*args)
    backend = get_backend()
    if backend == "torch" or forward_ad._current_level >= 0 or dispatch.collecting() or not kernels._plans.undisturbed():
        return function(*args)
    device = first.get_device()
    signature: list[Any] = [function, backend, device]
    if first.dtype is torch.float32:
        signature.append(kernels._launch.input_precision(torch.float32))
    pointers = []
    for arg in args:
        kind = arg.__class__
        if kind is Tensor or kind is nn.Parameter:
            if (grad and arg.requires_grad) or arg.is_neg() or arg.get_device() != device:
                return function(*args)
            pointer = arg.data_ptr()
            pointers.append(pointer)
            signature += (arg.shape, arg.stride(), arg.dtype, pointer & 15 == 0)
        elif kind in _SCALARS:
            signature += (kind, arg)  # True == 1 == 1.0
        else:
            return function(*args)
    key = tuple(signature)
    recipe = _recipes.get(key)
    if recipe is not None:
        return recipe(args, pointers)
    if key in _recipes or 0 in pointers or len(set(pointers)) < len(pointers):  # tensors are told apart by where they lie
        return function(*args)
    return _observed(key, function, args, pointers)


_SCALARS = (type(None), bool, int, float, str)


def _observed(key: tuple, function: Callable[..., Any], args: tuple, pointers: list[int]) -> Any:
    with kernels._launch.observe() as made, dispatch.taken() as ways:
        out = function(*args)
    results = (out,) if isinstance(out, Tensor) else out
    pointers += [result.data_ptr() for result in results]
    used = {value.data_ptr() for _, _, arguments, _ in made for value in arguments.values() if isinstance(value, Tensor)}
    recipe: Recipe | None = None
    vendor = by_vendor.get((function, ways[0][2])) if len(ways) == 1 and not made else None
    if vendor is not None:
        recipe = lambda args, pointers: vendor(*args)  # noqa: E731
    elif all(result.data_ptr() in used for result in results):
        places = {pointer: index for index, pointer in enumerate(pointers)}
        plan = kernels._plans.plan_of(args[0].get_device(), made, lambda tensor: places.get(tensor.data_ptr()))
        recipe = plan and _Recipe(plan, [(r.shape, r.stride(), r.dtype) for r in results], isinstance(out, Tensor))
    if len(_recipes) >= MAX_RECIPES:
        _recipes.clear()
    _recipes[key] = recipe
    return out
