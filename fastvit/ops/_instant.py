"""Public operators on a GPU that were called like this before: a look at the signature, then the recipe (see ``_recipes``).

In inference a call comes to its recipe, or to the vendor's operator by a rule. Where a gradient is wanted it comes to an autograd
Function that runs the recipe and saves what the operator's own Function saves, whose backward is that one's.
Checks, casts and dispatch are done once a signature. Under autocast a call that has nothing to cast has a recipe as well.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backend import get_backend
from . import _common, _recipes, dispatch
from ._observed import recipe_of
from ._state import kernels, nothing_between

by_vendor: dict[tuple[Callable[..., Any], str], Callable[..., Any]] = {}  # (operator, way) → what it comes to, checks left out

Entry = Callable[[tuple, list[Tensor], list[int]], Any]


def run(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, a public operator whose first argument is a tensor."""
    first = args[0]
    if torch.compiler.is_compiling() or not isinstance(first, Tensor) or not first.is_cuda or not nothing_between():
        return function(*args)
    if get_backend() == "torch" or forward_ad._current_level >= 0 or not _recipes.undisturbed():
        return function(*args)
    cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
    seen = _recipes.signature_of(function, args, cast, torch.are_deterministic_algorithms_enabled())
    if seen is None:
        return function(*args)
    entry = _recipes.find(seen.key)
    if entry:
        return entry(args, seen.tensors, seen.pointers)
    if entry is None:
        return function(*args)
    with kernels._launch.observe() as made, dispatch.taken() as ways, _common.applied() as applied:
        out = function(*args)
    vendor = by_vendor.get((function, ways[0][2])) if len(ways) == 1 and not made and cast is None else None
    if vendor is not None:
        entry = lambda args, tensors, pointers: vendor(*args)  # noqa: E731
    elif seen.training:
        entry = _trained(made, seen.tensors, applied, out)
    else:
        entry = _inferred(made, seen.tensors, out)
    _recipes.keep(seen.key, entry)
    return out


def _inferred(made: list, tensors: list[Tensor], out: Any) -> Entry | None:
    single = isinstance(out, Tensor)
    recipe = recipe_of(made, tensors, (out,) if single else out)
    if recipe is None:
        return None

    def infer(args: tuple, tensors: list[Tensor], pointers: list[int]) -> Any:
        results = recipe(tensors, pointers)
        return results[0] if single else tuple(results)

    return infer


def _trained(made: list, tensors: list[Tensor], applied: list[tuple], out: Any) -> Entry | None:
    """Of a call that came to one Function, given the tensors among the arguments themselves."""
    if len(applied) != 1:
        return None
    function, inputs, outputs = applied[0]
    single = isinstance(out, Tensor)
    count = 1 if single else len(out)
    if any(a is not b for a, b in zip((out,) if single else out, outputs, strict=False)):
        return None
    recipe = recipe_of(made, tensors, outputs)
    template = _template(inputs, tensors)
    if recipe is None or template is None:
        return None
    replaying = _replaying(function)

    def train(args: tuple, tensors: list[Tensor], pointers: list[int]) -> Any:
        inputs = [
            other if place is None else tensors[place] if other is None else tensors[place].as_strided(*other)
            for place, other in template
        ]
        return _common.apply_directly(replaying, *inputs, (recipe, tensors, pointers, None if single else count))

    return train


def _template(inputs: tuple, tensors: list[Tensor]) -> list[tuple] | None:
    """For each of a Function's inputs: None and a number, word or None; or the place of a tensor among the arguments, beside
    shape and strides where it is a view of that one (and wants no gradient)."""
    template: list[tuple] = []
    for value in inputs:
        if not isinstance(value, Tensor):
            template.append((None, value))
            continue
        place = next((index for index, t in enumerate(tensors) if t.data_ptr() == value.data_ptr()), None)
        if place is None or value.dtype != tensors[place].dtype:
            return None
        if value is not tensors[place] and (value.requires_grad or tensors[place].requires_grad):
            return None
        template.append((place, None if value is tensors[place] else (value.shape, value.stride())))
    return template


@functools.cache
def _replaying(function: type[_common.Operator]) -> type[_common.Operator]:
    """The Function of an operator, of the same name and backward, whose forward is a recipe: the last argument."""

    def forward(ctx: Any, *args: Any) -> Any:
        recipe, tensors, pointers, count = args[-1]
        outputs = recipe(tensors, pointers)
        function.setup_context(ctx, args[:-1], outputs)
        ctx.missing = (None,) * (len(outputs) - (count or 1))
        return outputs[0] if count is None else tuple(outputs[:count])

    def backward(ctx: Any, *grads: Any) -> Any:
        return *function.backward(ctx, *grads, *ctx.missing), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(function.__name__, (_common.Operator,), members)
