"""The gradients of a pre-norm transformer block, from the operators' own backward passes (see ``block``)."""

import torch
from torch import Tensor

from ._common import convert, fill, scratch
from .attention import attention_backward
from .image_attention import image_attention_backward
from .layer_norm import add_layer_norm_backward
from .linear import _matrix, add_product, linear_backward, mlp_backward
from .sums import ColumnSums

FIXED = 15  # tensors before the projections' weights and biases; the last two are tables of relative positions


def heads_of(projected: list[Tensor], heads: int) -> list[Tensor]:
    """Query, key and value, (B, H, N, D), where the projections wrote them."""
    if len(projected) == 1:
        return list(projected[0].unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0))
    return [t.unflatten(2, (heads, -1)).transpose(1, 2) for t in projected]


def rows_of(attended: Tensor, window: int | None) -> Tensor:
    """(B, H, N, D), in memory (B, N, H, D), as (B, N, C); of images (B, Hi, Wi, C) as it is."""
    return attended.transpose(1, 2).flatten(2) if window is None else attended


def size_of(x: Tensor, window: int) -> list[int]:
    """(h, w) that tokens of images x (B, Hi, Wi, C) attend within."""
    return [window, window] if window else list(x.shape[1:3])


def _scaled(grad: Tensor, scale: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of a branch from that of its sum: times LayerScale (C,) and what its samples (B, 1, 1) were multiplied by."""
    if scale is None and mask is None and grad.dtype == dtype:
        return grad
    out = scratch(grad.new_empty(grad.shape, dtype=dtype))
    factors = [factor for factor in (scale, mask) if factor is not None]
    fill(out, torch.mul, grad, factors[0]) if factors else fill(out, convert, grad)
    for factor in factors[1:]:
        fill(out, torch.mul, out, factor)
    return out


def block_backward(
    grad: Tensor,
    x: Tensor,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    out_weight: Tensor,
    scale1: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    scale2: Tensor | None,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    pad_qkv: Tensor | None,
    mask1: Tensor | None,
    mask2: Tensor | None,
    wants: list[bool],
    heads: int,
    scale: float,
    activation: str,
    window: int | None,
    dtype: torch.dtype,
    normalized: Tensor,
    mean1: Tensor,
    rstd1: Tensor,
    attended: Tensor,
    lse: Tensor,
    branch: Tensor | None,
    normalized2: Tensor,
    total: Tensor,
    mean2: Tensor,
    rstd2: Tensor,
    pre: Tensor,
    mlp: Tensor | None,
    *projections: Tensor,
) -> tuple:
    """The gradients of ``block_forward``'s tensors, None where ``wants`` says so; ``dtype``: of those of the linears' parameters;
    ``projections``: results, then weights."""
    projected, weights = projections[: len(projections) // 2], projections[len(projections) // 2 :]
    grads: list[Tensor | None] = [None] * len(wants)
    sums = ColumnSums()  # of all that follows, two launches at its end
    dmlp = _scaled(grad, scale2, mask2, normalized2.dtype)
    if scale2 is not None and wants[12] and mlp is not None:
        grads[12] = sums.of_rows(_matrix(grad), scale2, _matrix(mlp))
    given = (dmlp, normalized2, fc1_weight, fc2_weight, pre, activation, True, True, [True, *wants[8:12]], dtype)
    dnormalized2, *grads[8:12] = mlp_backward(*given, sums=sums)
    apart = mask1 is not None and scale1 is None  # from the gradient of the sum, rounded once
    norm = (norm2_weight, norm2_bias, scale1, mean2, rstd2, total.dtype, total.dtype if apart else attended.dtype)
    dtotal, dbranch, grads[6], grads[7], grads[5] = add_layer_norm_backward(
        scratch(dnormalized2), grad, branch, total, *norm, sums=sums
    )
    scratch(dtotal)
    if apart:
        dbranch = _scaled(dtotal, None, mask1, attended.dtype)
    elif dbranch is None:
        dbranch = dtotal
    else:
        scratch(dbranch)
        if mask1 is not None:
            fill(dbranch, torch.mul, dbranch, mask1)
    below = any(wants[:3]) or any(wants[13:])
    drows, grads[3], grads[4] = linear_backward(
        dbranch, rows_of(attended, window), out_weight, None, None, True, [below, wants[3], wants[4]], dtype, sums=sums
    )
    if not below:
        sums.finish()
        return tuple(grads)
    scratch(drows)
    dpad = None
    if window is None:
        dprojected = [scratch(t.new_empty(t.shape)) for t in projected]
        query, key, value = heads_of(list(projected), heads)
        dout = drows.unflatten(2, (heads, -1)).transpose(1, 2)
        into = heads_of(dprojected, heads)
        attention_backward(dout, query, key, value, None, None, None, attended, lse, False, scale, False, into=into)
    else:
        tables, size = (rel_pos_h, rel_pos_w), size_of(x, window)
        wants_tables, wants_pad = any(wants[13:FIXED]), pad_qkv is not None and wants[FIXED + 1]
        dqkv, *grads[13:FIXED], dpad = image_attention_backward(
            drows, projected[0], *tables, pad_qkv, attended, lse, heads, size, scale, wants_tables, wants_pad
        )
        dprojected = [scratch(dqkv)]
    dnormalized: Tensor | None = None
    for index, (gradient, weight) in enumerate(zip(dprojected, weights, strict=True)):
        place = FIXED + 2 * index
        first = dnormalized is None
        dinput, grads[place], grads[place + 1] = linear_backward(
            gradient, normalized, weight, None, None, True, [first, *wants[place : place + 2]], dtype, sums=sums
        )
        if dnormalized is None:
            dnormalized = scratch(dinput)
        else:
            add_product(_matrix(dnormalized), _matrix(gradient), weight.t())
    norm = (norm1_weight, norm1_bias, None, mean1, rstd1, x.dtype, x.dtype)
    assert dnormalized is not None  # one projection at least
    grads[0], _, grads[1], grads[2], _ = add_layer_norm_backward(dnormalized, dtotal, None, x, *norm, sums=sums)
    sums.finish()
    dbias = grads[FIXED + 1]
    if dpad is not None and dbias is not None:  # what padded tokens hold is the projection's bias
        fill(dbias, torch.add, dbias, scratch(dpad))
    return tuple(grads)
