"""Gradients of parameters that are column sums, on the Triton kernels: the last stage of the backward passes."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ._common import kernels, scratch


def sum_partials(partials: Iterable[Tensor | None], likes: Iterable[Tensor | torch.dtype | None]) -> list[Tensor | None]:
    """Partial sums (strips, C) each → (C,) in the dtype given, or of the tensor that is ``like`` it, all in one launch and a
    fixed order; zeros for no strips. None where either is None."""
    sums: list[Tensor | None] = []
    sources, results = [], []
    for partial, like in zip(partials, likes, strict=True):
        if partial is None or like is None:
            sums.append(None)
            continue
        dtype = like.dtype if isinstance(like, Tensor) else like
        if partial.shape[0] == 0:
            sums.append(partial.new_zeros(partial.shape[1], dtype=dtype))
        else:
            out = partial.new_empty(partial.shape[1], dtype=dtype)
            sums.append(out)
            sources.append(partial)
            results.append(out)
    if sources:
        kernels.reduce.launch_column_sums(*sources, *results)
    return sums


def strip_sums(x: Tensor) -> Tensor:
    """The sums of x (rows, C) over strips of rows, (strips, C) float32, which ``sum_partials`` adds up; x itself where rows are
    few enough for that alone."""
    rows, channels = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    strips = kernels.reduce.strips_for(rows, x)
    if strips <= 1:
        return x
    partial = scratch(x.new_empty(strips, channels, dtype=torch.float32))
    kernels.reduce.launch_column_sums(x, partial)
    return partial
