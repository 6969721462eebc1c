"""Gradients of parameters that are column sums, on the Triton kernels: the last stage of the backward passes.

Large sums take two steps, strips of rows and then these: each step is one launch for all the sums of a backward pass, in
a fixed order.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._common import kernels, scratch


class _Sum(NamedTuple):
    """out (C,) or, of strips of rows, (strips, C): the sum over the rows of x (rows, C), or of x times factor."""

    x: Tensor
    out: Tensor
    factor: Tensor | None


class ColumnSums:
    """The column sums of one backward pass: where each will be is known at once, and ``finish`` computes them all."""

    def __init__(self) -> None:
        self._strips: list[_Sum] = []
        self._totals: list[_Sum] = []

    def of_partials(self, partial: Tensor | None, like: Tensor | torch.dtype | None) -> Tensor | None:
        """Partial sums (strips, C) → (C,) in the dtype given, or of the tensor that it is ``like``, added up in one step; zeros
        for no strips. None where either is None."""
        return None if partial is None or like is None else self._total(partial, like)

    def of_rows(self, x: Tensor, like: Tensor | torch.dtype, factor: Tensor | None = None) -> Tensor:
        """x (rows, C), or x times ``factor`` (rows, C) → (C,), by strips of rows where these are many. Until ``finish`` both must
        stay as they are."""
        x, partial = _cut(x)
        factor = factor if factor is None or factor.stride(1) == 1 else factor.contiguous()
        if partial is None:
            return self._total(x, like, factor)
        self._strips.append(_Sum(x, partial, factor))
        return self._total(partial, like)

    def _total(self, x: Tensor, like: Tensor | torch.dtype, factor: Tensor | None = None) -> Tensor:
        dtype = like.dtype if isinstance(like, Tensor) else like
        if x.shape[0] == 0:
            return x.new_zeros(x.shape[1], dtype=dtype)
        out = x.new_empty(x.shape[1], dtype=dtype)
        self._totals.append(_Sum(x, out, factor))
        return out

    def finish(self) -> None:
        for sums in (self._strips, self._totals):
            _launch(sums)
            sums.clear()


def summing(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a backward pass that is given ``sums`` finish them, unless its caller gave them and will."""

    @functools.wraps(backward)
    def run(*args: Any, sums: ColumnSums | None = None) -> Any:
        if sums is not None:
            return backward(*args, sums=sums)
        sums = ColumnSums()
        grads = backward(*args, sums=sums)
        sums.finish()
        return grads

    return run


def sum_partials(partials: Iterable[Tensor | None], likes: Iterable[Tensor | torch.dtype | None]) -> list[Tensor | None]:
    """``ColumnSums.of_partials`` of each, computed."""
    sums = ColumnSums()
    results = [sums.of_partials(partial, like) for partial, like in zip(partials, likes, strict=True)]
    sums.finish()
    return results


def strip_sums(x: Tensor) -> Tensor:
    """The sums of x (rows, C) over strips of rows, (strips, C) float32, which are to be added up; x itself where rows are few
    enough for that alone."""
    x, partial = _cut(x)
    if partial is None:
        return x
    _launch([_Sum(x, partial, None)])
    return partial


def _cut(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x with a last stride of 1, and memory for the sums over its strips; None where one step is enough."""
    rows, channels = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    strips = kernels.reduce.strips_for(rows, x)
    return x, scratch(x.new_empty(strips, channels, dtype=torch.float32)) if strips > 1 else None


def _launch(sums: list[_Sum]) -> None:
    """One launch for all whose results have the same dtype and as many strips, one product among them."""
    alike: dict[tuple, tuple[list[_Sum], list[_Sum]]] = {}
    for one in sums:
        plain, products = alike.setdefault((one.out.dtype, one.out.shape[:-1]), ([], []))
        (plain if one.factor is None else products).append(one)
    for plain, products in alike.values():
        while plain or products:
            some, products = products[:1], products[1:]
            factor, room = some[0].factor if some else None, kernels.reduce.MATRICES - len(some)
            some, plain = some + plain[:room], plain[room:]
            tensors = [one.x for one in some] + [one.out for one in some]
            if factor is None:
                kernels.reduce.launch_column_sums(*tensors)
            else:
                kernels.reduce.launch_product_sums(factor, *tensors)
