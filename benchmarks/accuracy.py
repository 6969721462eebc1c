"""Whether a result is right: held to its exact value, as far off as eager PyTorch is in the same dtype and no farther.

A tensor may be off by twice eager's error, and its worst row by four times eager's worst: so a row left out, a key not attended
to or a factor of 1.06 is seen where sums over the whole tensor would hide it. A wrong result gets an error and no time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class WrongResult(Exception):
    """A function's result is farther from float64 than it may be."""


@dataclass(frozen=True)
class Error:
    """‖result − exact‖ / ‖exact‖ of a tensor, and the largest of its rows' (last dimension).

    A row is held against its own norm, or a tenth of the root mean square of all where that is more.
    """

    overall: float
    row: float


def errors(result: Sequence[Tensor], exact: Sequence[Tensor]) -> list[Error]:
    """Of every tensor; infinite for NaN, which passes no comparison."""
    return [_error(ours.double(), true.double()) for ours, true in zip(result, exact, strict=True)]


def _error(ours: Tensor, true: Tensor) -> Error:
    if not true.numel():
        return Error(0.0, 0.0)
    tiny, width = 1e-30, true.shape[-1] if true.dim() else 1
    wrong, right = (t.reshape(-1, width).norm(dim=-1) for t in (ours - true, true))
    if not wrong.isfinite().all():
        return Error(math.inf, math.inf)
    floor = max(0.1 * right.square().mean().sqrt().item(), tiny)
    return Error((wrong.norm() / right.norm().clamp_min(tiny)).item(), (wrong / right.clamp_min(floor)).max().item())


def worst(found: Sequence[Error]) -> Error:
    return Error(max(e.overall for e in found), max(e.row for e in found))


def relative_error(result: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest ‖result − exact‖ / ‖exact‖ over the tensors; infinite for NaN."""
    return worst(errors(result, exact)).overall


def allowed(dtype: torch.dtype, eager: Error | None = None) -> Error:
    """How far a tensor may be off: twice eager PyTorch's own error in that dtype, a row four times eager's worst.

    Added are an eighth of a rounding and two (in float32 5e-6 and 2e-5, for sums of thousands of terms). An ``eager`` that
    is itself off by more than eight roundings is wrong and sets no standard. Without one: four roundings, a row sixteen.
    """
    eps = torch.finfo(dtype).eps
    if eager is None or not eager.overall <= max(8 * eps, 1e-4):
        return Error(max(4 * eps, 1e-5), max(16 * eps, 4e-5))
    return Error(2 * eager.overall + max(eps / 8, 5e-6), 4 * eager.row + max(2 * eps, 2e-5))


def check(
    name: str, result: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype, eager: Sequence[Error] | None = None
) -> float:
    """The largest error of a tensor; raises ``WrongResult`` where one is more than ``allowed``, given eager's of each."""
    found = errors(result, exact)
    for number, error in enumerate(found):
        limit = allowed(dtype, eager[number] if eager else None)
        of = f" in tensor {number + 1} of {len(found)}" if len(found) > 1 else ""
        if not error.overall <= limit.overall:
            raise WrongResult(f"{name} errs by {error.overall:.2g}{of}, allowed {limit.overall:.2g}")
        if not error.row <= limit.row:
            raise WrongResult(f"{name} errs by {error.row:.2g} in a row{of}, allowed {limit.row:.2g}")
    return worst(found).overall
