"""The sums of a block: residual + LayerScale·branch, and the norm of the result.

In inference on the torch backend a sum is written over a branch that came out of our own linears; what a module of the user's
returned may be held by others.
"""

from typing import Any

import torch
from torch import Tensor

from .. import backend
from ..ops import torch_backend
from ..ops._inplace import may_write
from . import layouts
from .dropping import active
from .operators import TORCH
from .parts import Parts, parameter
from .reading import layer_scale_of


def branch_of(
    parts: Parts, residual: layouts.Residual, drops: tuple[str, ...], branch: Tensor
) -> tuple[Tensor, Tensor | None, bool]:
    """The branch as it enters the sum, the LayerScale still to be applied to it, and whether no module touched it here."""
    owned = True
    for module in active(*(parts.child(path) for path in drops), parts.child(residual.drop)):
        branch, owned = module(branch), False
    scale = layer_scale_of(parts, residual.scale)
    drop_path = parts.part(residual.drop_path)
    if drop_path is not None and drop_path.training:
        branch, owned = drop_path(branch if scale is None else branch * scale), False
        scale = None
    return branch, scale, owned


def add_norm(
    ops: Any, chosen: str, x: Tensor, branch: Tensor, scale: Tensor | None, owned: bool, norm: Any
) -> tuple[Tensor, Tensor]:
    """(norm(total), total) of total = x + scale·branch; ``owned``: nobody else holds the branch."""
    weight, bias = parameter(norm, "weight"), parameter(norm, "bias")
    if owned and chosen == "torch" and _may_overwrite(branch, x, scale):
        return torch_backend.add_layer_norm_(x, branch, weight, bias, norm.eps, scale)
    return norms_of(ops).add_layer_norm(x, branch, weight, bias, norm.eps, layer_scale=scale)


def add(residual: Tensor, branch: Tensor, scale: Tensor | None, owned: bool) -> Tensor:
    """residual + scale·branch; ``owned``: as in ``add_norm``."""
    if owned and _may_overwrite(branch, residual, scale):
        return torch_backend.add_(residual, branch, scale)
    if scale is None:
        return residual + branch
    if residual.dtype == branch.dtype == scale.dtype:
        return torch.addcmul(residual, branch, scale)
    return residual + scale * branch


def norms_of(ops: Any) -> Any:
    """What computes sums and norms: for a compiler PyTorch's own operators, which it joins into one kernel across the ends of
    blocks, as ``handoff`` does where nothing is compiled, and calls without Python."""
    return TORCH if torch.compiler.is_compiling() and backend.get_backend() == "auto" else ops


def _may_overwrite(branch: Tensor, *others: Tensor | None) -> bool:
    """Whether a sum may be written over a ``branch`` that nobody else holds: inference, one dtype, nothing traced or mapped."""
    if not may_write() or torch.is_grad_enabled() or type(branch) is not Tensor:
        return False
    if branch.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return all(other is None or other.dtype == branch.dtype for other in others)
