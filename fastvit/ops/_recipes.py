"""Recipes: calls on a GPU that were seen once whole, made again as allocations, launches and products alone.

A call's signature is all that decides what it does: the backend in force and, of every tensor, shape, strides, dtype, device
and alignment, beside every other argument. The first call of a signature is observed, and leaves a recipe if all it did was to
allocate results (and what it calls ``scratch``), to launch kernels on these and its arguments, and to ``fill`` them by
PyTorch's operators; copies and other operators leave none. A recipe holds no tensor.
Where anything else has a say (a compiler, a mode, a trace, a hook), a call runs whole.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backend import get_backend
from . import dispatch
from ._observed import Recipe, recipe_of
from ._state import direct, kernels, nothing_between

MAX_RECIPES = 4096

_SCALARS = (type(None), bool, int, float, str, torch.dtype)

_recipes: dict[tuple, Recipe | None] = {}


class Signature(NamedTuple):
    """``key``; the tensors among the arguments, their addresses, and whether one of them wants a gradient."""

    key: tuple
    tensors: list[Tensor]
    pointers: list[int]
    training: bool


def signature_of(function: Callable[..., Any], args: Sequence[Any], *more: Any) -> Signature | None:
    """Of a call whose first argument is a tensor; None where an argument is nothing that a recipe knows."""
    first = args[0]
    grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()  # as in ``wants_grad``
    device, training = first.get_device(), False
    key: list[Any] = [function, get_backend(), device, *more]
    if first.dtype is torch.float32:
        key.append(kernels._launch.input_precision(torch.float32))
    tensors, pointers = [], []
    for arg in args:
        kind = arg.__class__
        if kind is Tensor or kind is nn.Parameter:
            if arg.is_neg() or arg.get_device() != device:
                return None
            if grad and arg.requires_grad:
                training = True
            pointer = arg.data_ptr()
            tensors.append(arg)
            pointers.append(pointer)
            key += (arg.shape, arg.stride(), arg.dtype, pointer & 15 == 0)
        elif kind in _SCALARS:
            key += (kind, arg)  # True == 1 == 1.0
        elif kind is list or kind is tuple:
            key.append((kind, *arg))
        else:
            return None
    key.append(training)
    return Signature(tuple(key), tensors, pointers, training)


# --- what is remembered -----------------------------------------------------------------------------------------------------


def find(key: tuple) -> Any:
    """The recipe of a signature, None where it has none, False where it has not been seen."""
    return _recipes.get(key, False)


def keep(key: tuple, recipe: Any) -> None:
    if len(_recipes) >= MAX_RECIPES:
        _recipes.clear()
    _recipes[key] = recipe


def forget() -> None:
    """Observes anew: for rules that changed."""
    _recipes.clear()


# --- raw operators --------------------------------------------------------------------------------------------------------


def undisturbed() -> bool:
    """Whether recipes may be used now: nobody wants to see each launch or each decision, and none is being tried out."""
    return kernels._plans.undisturbed() and not kernels._launch.observed() and not dispatch.collecting()


def call(implementation: Callable[..., Any], operator: Callable[..., Any], args: tuple) -> Any:
    """``operator(*args)``, whose kernels ``implementation`` launches."""
    first = args[0]
    if torch.compiler.is_compiling() or not nothing_between():
        return operator(*args)
    seen = signature_of(implementation, args) if first.is_cuda and undisturbed() else None
    if seen is None or seen.training:
        return implementation(*args) if direct(*args) else operator(*args)
    return follow(seen, find(seen.key), implementation, args)


def beneath(implementation: Callable[..., Any], args: tuple) -> Any:
    """``implementation(*args)`` where the dispatcher calls it, as it does for a compiled graph."""
    seen = signature_of(implementation, args) if args[0].is_cuda and undisturbed() else None
    if seen is None or seen.training:
        return implementation(*args)
    return follow(seen, find(seen.key), implementation, args)


def follow(seen: Signature, recipe: Any, implementation: Callable[..., Any], args: Sequence[Any]) -> Any:
    """``implementation(*args)`` of a signature, ``recipe`` being what ``find`` says of it."""
    if recipe:
        results = recipe(seen.tensors, seen.pointers)
        return results[0] if len(results) == 1 else tuple(results)
    if recipe is None:
        return implementation(*args)
    with kernels._launch.observe() as made:
        out = implementation(*args)
    keep(seen.key, recipe_of(made, seen.tensors, (out,) if isinstance(out, Tensor) else out))
    return out
