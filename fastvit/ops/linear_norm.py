"""A linear, the residual sum that it goes into and the norm of that, in inference: what ends each half of a transformer block.

Where ``kernels.linear_split_norm`` counts more than one part and the rules let it, its two launches; elsewhere ``linear`` and
``add_layer_norm``, one after the other.
"""

import torch
from torch import Tensor

from . import dispatch
from ._common import contiguous, fill, kernels, matrix, scratch
from .layer_norm import _total_dtype, add_layer_norm_forward
from .linear import _matrix, _rows, linear_forward


def linear_add_norm_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float | None,
) -> tuple[Tensor | None, Tensor]:
    """(LN(total), total), total (..., N) = residual + layer_scale·(input (..., K) · weight (N, K)ᵀ + bias); eps None: no norm.

    Both of the dtype that residual and input promote to.
    """
    a, b = _rows(input), _matrix(weight)
    parts = kernels.linear_split_norm.parts_of(a, b)
    if parts > 1 and (dispatch.linear_add_norm(a, b) == "kernel" or kernels._launch.recording()):
        total = residual.new_empty(residual.shape, dtype=_total_dtype(residual, input))
        y = None if eps is None else total.new_empty(total.shape)
        partial = scratch(a.new_empty(parts, total.numel() // b.shape[0], b.shape[0], dtype=torch.float32))
        vectors = [contiguous(v) for v in (layer_scale, norm_weight, norm_bias)]
        arguments = (matrix(residual), *vectors, eps or 0.0, y, total, partial)
        kernels.linear_split_norm.launch_linear_split_norm(a, b, contiguous(bias), *arguments)
        return y, total
    branch = linear_forward(input, weight, bias, None, False)[0]
    if eps is None:
        total, dtype = branch, _total_dtype(residual, branch)
        if dtype != branch.dtype:
            total = residual.new_empty(residual.shape, dtype=dtype)
            scratch(branch)
        if layer_scale is None:
            fill(total, torch.add, residual, branch)
        else:
            fill(total, torch.addcmul, residual, branch, layer_scale)
        return None, total
    scratch(branch)
    return add_layer_norm_forward(residual, branch, norm_weight, norm_bias, eps, layer_scale, False)[:2]
