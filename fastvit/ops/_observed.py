"""From what an operator was seen to do, a recipe that does it again (see ``_recipes``). Which tensor is which: by where it lies.

An operator's launches are seen by themselves; it says what it ``fill``s by one of PyTorch's, and which memory is ``scratch``,
neither argument nor result. A tensor from elsewhere (a copy, say) has no place among these, and then there is no recipe. So an
operator may do one thing only that is not seen: make empty tensors and views. It writes into no tensor otherwise.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._state import kernels

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


def convert(source: Tensor, *, out: Tensor) -> None:
    """``source`` in the dtype of ``out``, to ``fill`` by."""
    out.copy_(source)


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
        empty = list({id(t): t for t in results if t is not None and not t.numel()}.values())
        self.forms = [(t.shape, t.stride(), t.dtype) for t in empty]  # made first, since they lie nowhere
        self.empty = {id(t): len(tensors) + index for index, t in enumerate(empty)}
        returned = {t.data_ptr(): t for t in results if t is not None and t.numel()}
        spare = {entry.tensor.data_ptr(): entry.tensor for entry in made if type(entry) is _Scratch}
        self.spare = {pointer: t for pointer, t in spare.items() if returned.get(pointer) is not t}
        self.fresh = self.spare | returned
        self.known: dict[int, Tensor] = {t.data_ptr(): t for t in tensors}
        self.places: dict[int, int] = {pointer: place for place, pointer in enumerate(self.known)}
        self.count, self.results, self.device = len(tensors) + len(empty), results, tensors[0].get_device()
        self.steps = _grouped([entry for entry in made if type(entry) is not _Scratch])
        ambiguous = len(self.known) < len(tensors) or len(self.fresh) < len(self.spare) + len(returned)
        if ambiguous or 0 in self.known or 0 in self.fresh or not self.steps or not self.fresh.keys().isdisjoint(self.known):
            raise _NoRecipe
        # An argument of the same signature is as well aligned if this one is aligned at all.
        bases = self.fresh | {pointer: t for pointer, t in self.known.items() if pointer % 16 == 0}
        self.extents = [(pointer, pointer + _extent(t)) for pointer, t in bases.items()]

    def recipe(self) -> Recipe:
        steps = [self._kept(step) for step in self.steps]
        places = {id(t): self.places.get(t.data_ptr()) for t in self.results if t is not None} | self.empty
        if None in places.values():
            raise _NoRecipe  # no kernel wrote it
        steps[0][0][:0] = self.forms
        last = {self._base(t): index for index, step in enumerate(self.steps) for t in _tensors_of(step)}
        for pointer in self.spare:
            if pointer in last:
                steps[last[pointer]][-1].append(self.places[pointer])
        return Recipe(steps, [places.get(id(t)) for t in self.results])

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
