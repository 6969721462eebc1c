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
from ._state import direct, kernels, nothing_between

MAX_RECIPES = 4096

_SCALARS = (type(None), bool, int, float, str, torch.dtype)

_recipes: dict[tuple, "Recipe | None"] = {}


class Signature(NamedTuple):
    """``key``; the tensors among the arguments, their addresses, and whether one of them wants a gradient."""

    key: tuple
    tensors: list[Tensor]
    pointers: list[int]
    training: bool


def signature_of(function: Callable[..., Any], args: Sequence[Any], *more: Any) -> Signature | None:
    """Of a call whose first argument is a tensor; None where an argument is nothing that a recipe knows."""
    first = args[0]
    device, grad, training = first.get_device(), torch.is_grad_enabled(), False
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


# --- what is observed -----------------------------------------------------------------------------------------------------


class _Scratch(NamedTuple):
    tensor: Tensor


class _Vendor(NamedTuple):
    """``function(*tensors, out=out)``, an operator of PyTorch's that does no more than fill ``out``."""

    function: Callable[..., Any]
    out: Tensor
    tensors: tuple[Tensor, ...]


def scratch(tensor: Tensor) -> Tensor:
    """The tensor, made empty within a call that needs it no longer than to its end."""
    kernels._launch.note(_Scratch(tensor))
    return tensor


def fill(out: Tensor, function: Callable[..., Any], *tensors: Tensor) -> None:
    """``function(*tensors, out=out)`` as a step of a recipe: out has the shape of what comes; no gradient is recorded."""
    kernels._launch.note(_Vendor(function, out, tensors))
    with torch.no_grad():  # out= refuses tensors that want a gradient
        function(*tensors, out=out)


# --- what is kept ---------------------------------------------------------------------------------------------------------


class Recipe:
    """``steps``: each what to allocate, what lies within it (place, bytes from its start), the plan of some launches or the
    vendor's operator and its tensors, what to let go of afterwards. ``results``: places, None where there is no result.
    Places count a call's tensors: its arguments, then what the steps add, in order."""

    def __init__(self, steps: list[tuple], results: list[int | None]):
        self.steps = steps
        self.results = results

    def __call__(self, tensors: list, pointers: list[int]) -> list[Tensor | None]:
        like = tensors[0]
        for fresh, within, plan, vendor, spent in self.steps:
            for shape, stride, dtype in fresh:
                tensor = like.new_empty_strided(shape, stride, dtype=dtype)
                tensors.append(tensor)
                pointers.append(tensor.data_ptr())
            for place, offset in within:
                tensors.append(None)
                pointers.append(pointers[place] + offset)
            if plan is not None:
                plan.run(pointers)
            else:
                function, forms = vendor
                out, *given = [_part(tensors[place], form) for place, form in forms]
                function(*given, out=out)
            for place in spent:
                tensors[place] = None
        return [None if place is None else tensors[place] for place in self.results]


def recipe_of(made: list, tensors: list[Tensor], results: Sequence[Tensor | None]) -> Recipe | None:
    """The recipe of an observed call with these tensors as arguments; None where it did what no recipe can repeat."""
    try:
        return _Maker(made, tensors, results).recipe()
    except _NoRecipe:
        return None


class _NoRecipe(Exception):
    pass


class _Maker:
    """Tells the tensors of an observed call apart by where they lie, and gives each a place."""

    def __init__(self, made: list, tensors: list[Tensor], results: Sequence[Tensor | None]):
        returned = {t.data_ptr(): t for t in results if t is not None}
        spare = {entry.tensor.data_ptr(): entry.tensor for entry in made if type(entry) is _Scratch}
        self.spare = {pointer: t for pointer, t in spare.items() if returned.get(pointer) is not t}
        self.fresh = self.spare | returned
        self.known: dict[int, Tensor] = {t.data_ptr(): t for t in tensors}
        self.places: dict[int, int] = {pointer: place for place, pointer in enumerate(self.known)}
        self.count, self.results, self.device = len(tensors), results, tensors[0].get_device()
        self.steps = _grouped([entry for entry in made if type(entry) is not _Scratch])
        ambiguous = len(self.known) < len(tensors) or len(self.fresh) < len(self.spare) + len(returned)
        if ambiguous or 0 in self.known or 0 in self.fresh or not self.steps or not self.fresh.keys().isdisjoint(self.known):
            raise _NoRecipe
        # An argument of the same signature is as well aligned if this one is aligned at all.
        bases = self.fresh | {pointer: t for pointer, t in self.known.items() if pointer % 16 == 0}
        self.extents = [(pointer, pointer + _extent(t)) for pointer, t in bases.items()]

    def recipe(self) -> Recipe:
        steps = [self._kept(step) for step in self.steps]
        if any(t is not None and t.data_ptr() not in self.places for t in self.results):
            raise _NoRecipe  # no kernel wrote it
        last = {self._base(t): index for index, step in enumerate(self.steps) for t in _tensors_of(step)}
        for pointer in self.spare:
            if pointer in last:
                steps[last[pointer]][-1].append(self.places[pointer])
        return Recipe(steps, [None if t is None else self.places[t.data_ptr()] for t in self.results])

    def _kept(self, step: Any) -> tuple:
        tensors = _tensors_of(step)
        fresh, within = [], []
        for tensor in tensors:
            base = self._base(tensor)
            if base not in self.places:
                self.known[base] = made = self.fresh[base]
                self._place(base)
                fresh.append((made.shape, made.stride(), made.dtype))
        for tensor in tensors:
            pointer, base = tensor.data_ptr(), self._base(tensor)
            if pointer not in self.places:
                self._place(pointer)
                within.append((self.places[base], pointer - base))
        if type(step) is _Vendor:
            return fresh, within, None, (step.function, [self._form(t) for t in tensors]), []
        plan = kernels._plans.plan_of(self.device, step, lambda tensor: self.places[tensor.data_ptr()])
        if plan is None:
            raise _NoRecipe
        return fresh, within, plan, None, []

    def _place(self, pointer: int) -> None:
        self.places[pointer] = self.count
        self.count += 1

    def _base(self, tensor: Tensor) -> int:
        """Where the argument, result or scratch tensor begins that ``tensor`` is or lies in."""
        pointer = tensor.data_ptr()
        if pointer in self.known or pointer in self.fresh:
            return pointer
        around = [start for start, end in self.extents if start < pointer < end]
        if len(around) != 1:
            raise _NoRecipe
        return around[0]

    def _form(self, tensor: Tensor) -> tuple[int, tuple | None]:
        """(place; shape, stride and offset within the tensor there, where it is not that one as it is)."""
        pointer, base = tensor.data_ptr(), self._base(tensor)
        whole = self.known[base]
        if whole.dtype != tensor.dtype:
            raise _NoRecipe
        if (pointer, tensor.shape, tensor.stride()) == (base, whole.shape, whole.stride()):
            return self.places[base], None
        return self.places[base], (tensor.shape, tensor.stride(), (pointer - base) // tensor.element_size())


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _part(tensor: Tensor, form: tuple | None) -> Tensor:
    if form is None:
        return tensor
    shape, stride, offset = form
    return tensor.as_strided(shape, stride, tensor.storage_offset() + offset if offset else None)


def _grouped(made: list) -> list[Any]:
    """Launches one after the other as one list, the vendor's operators between them."""
    steps: list[Any] = []
    for entry in made:
        if type(entry) is _Vendor:
            steps.append(entry)
        elif steps and type(steps[-1]) is list:
            steps[-1].append(entry)
        else:
            steps.append([entry])
    return steps


def _tensors_of(step: Any) -> list[Tensor]:
    if type(step) is _Vendor:
        return [step.out, *step.tensors]
    return [value for _, _, arguments, _ in step for value in arguments.values() if isinstance(value, Tensor)]


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
