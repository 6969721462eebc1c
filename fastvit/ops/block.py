"""A pre-norm transformer block in training as one autograd Function, its operators' implementations called one after another.

    z' = z + s1·MHA(LN(z))        z'' = z' + s2·MLP(LN(z'))        (Dosovitskiy et al. 2021, eqs. 2 and 3; LayerScale s1, s2)

Saved is what the operators' own Functions save, and gradients come from their backward passes. Left out are a copy and a sum
that autograd would make: the gradients of query, key and value are written side by side, as their projection's backward reads
them, and the gradient that goes past a branch is added in the norm's kernel. Whether a call is served depends on nothing that
may change before a checkpoint computes it again, a profiler for one.
Shapes: z (B, N, C); qkv is one projection (3·C, C) or three. All of one dtype and device; no mask, no dropout.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _checks
from . import _recipes, dispatch
from ._common import Operator, apply, fill, run_backward, scratch, wants_grad
from ._state import nothing_between, plain, untransformed
from .attention import attention_backward, attention_forward
from .layer_norm import add_layer_norm_backward, add_layer_norm_forward, layer_norm_forward
from .linear import _matrix, add_product, linear_backward, linear_forward, mlp_backward, mlp_forward
from .sums import strip_sums, sum_partials

Tensors = Sequence[Tensor | None]

FIXED = 13  # tensors before the projections' weights and biases


def block_forward(
    x: Tensor,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    scale1: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    scale2: Tensor | None,
    *more: Any,
) -> tuple:
    """``more``: weight and bias of one or three projections, then heads, eps of both norms, the scores' scale, the activation.

    Returns (out, normalized, mean, rstd, attended, lse, branch, normalized', total, mean', rstd', pre, mlp, *projected); branch
    and mlp are None without the LayerScale after them.
    """
    *qkv, heads, eps1, eps2, scale, activation = more
    _checks.check_layer_norm(x, norm1_weight, norm1_bias, eps1, "token")
    normalized, mean1, rstd1 = layer_norm_forward(x, norm1_weight, norm1_bias, eps1, "token")
    projected = []
    for weight, bias in _pairs(qkv):
        _checks.check_linear(x, weight, bias, None)
        projected.append(linear_forward(normalized, weight, bias, None, False)[0])
    query, key, value = _heads_of(projected, heads)
    _checks.check_attention(query, key, value, None, None, None, False, scale)
    attended, lse = attention_forward(query, key, value, None, None, None, False, scale)
    rows = _rows_of(attended)
    _checks.check_linear(rows, out_weight, out_bias, None)
    branch = linear_forward(rows, out_weight, out_bias, None, False)[0]
    _checks.check_add_layer_norm(x, branch, norm2_weight, norm2_bias, eps2, scale1)
    normalized2, total, mean2, rstd2 = add_layer_norm_forward(x, branch, norm2_weight, norm2_bias, eps2, scale1)
    _checks.check_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    mlp, pre = mlp_forward(normalized2, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, True)
    _checks.check_add_layer_norm(total, mlp, None, None, eps2, scale2)
    if scale2 is None:
        fill(mlp, torch.add, total, mlp)
        out = mlp
    else:
        out = total.new_empty(total.shape)
        fill(out, torch.addcmul, total, mlp, scale2)
    if scale1 is None:
        scratch(branch)
    kept = None if scale1 is None else branch, normalized2, total, mean2, rstd2, pre, None if scale2 is None else mlp
    return out, normalized, mean1, rstd1, attended, lse, *kept, *projected


def _pairs(qkv: Tensors) -> list[tuple[Any, Tensor | None]]:
    return list(zip(qkv[::2], qkv[1::2], strict=True))


def _heads_of(projected: list[Tensor], heads: int) -> list[Tensor]:
    """Query, key and value, (B, H, N, D), where the projections wrote them."""
    if len(projected) == 1:
        return list(projected[0].unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0))
    return [t.unflatten(2, (heads, -1)).transpose(1, 2) for t in projected]


def _rows_of(attended: Tensor) -> Tensor:
    """(B, H, N, D), in memory (B, N, H, D), as (B, N, C)."""
    return attended.transpose(1, 2).flatten(2)


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
    wants: list[bool],
    heads: int,
    scale: float,
    activation: str,
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
    """The gradients of ``block_forward``'s tensors, None where ``wants`` says so; ``projections``: results, then weights."""
    projected, weights = projections[: len(projections) // 2], projections[len(projections) // 2 :]
    grads: list[Tensor | None] = [None] * len(wants)
    dmlp, dtype = grad, x.dtype
    if scale2 is not None:
        dmlp = scratch(grad.new_empty(grad.shape))
        fill(dmlp, torch.mul, grad, scale2)
        if wants[12] and mlp is not None:
            terms = scratch(grad.new_empty(grad.shape))
            fill(terms, torch.mul, grad, mlp)
            grads[12] = sum_partials([strip_sums(_matrix(terms))], [terms])[0]
    dnormalized2, *grads[8:12] = mlp_backward(
        dmlp, normalized2, fc1_weight, fc2_weight, pre, activation, True, True, [True, *wants[8:12]]
    )
    norm = (norm2_weight, norm2_bias, scale1, mean2, rstd2, dtype, dtype)
    dtotal, dbranch, grads[6], grads[7], grads[5] = add_layer_norm_backward(scratch(dnormalized2), grad, branch, total, *norm)
    dbranch = scratch(dtotal) if dbranch is None else scratch(dbranch)
    below = any(wants[:3]) or any(wants[FIXED:])
    drows, grads[3], grads[4] = linear_backward(
        dbranch, _rows_of(attended), out_weight, None, None, True, [below, wants[3], wants[4]]
    )
    if not below:
        return tuple(grads)
    dout = scratch(drows).unflatten(2, (heads, -1)).transpose(1, 2)
    dprojected = [scratch(t.new_empty(t.shape)) for t in projected]
    query, key, value = _heads_of(list(projected), heads)
    attention_backward(
        dout, query, key, value, None, None, None, attended, lse, False, scale, False, into=_heads_of(dprojected, heads)
    )
    dnormalized: Tensor | None = None
    for index, (gradient, weight) in enumerate(zip(dprojected, weights, strict=True)):
        place = FIXED + 2 * index
        first = dnormalized is None
        dinput, grads[place], grads[place + 1] = linear_backward(
            gradient, normalized, weight, None, None, True, [first, *wants[place : place + 2]]
        )
        if dnormalized is None:
            dnormalized = scratch(dinput)
        else:
            add_product(_matrix(dnormalized), _matrix(gradient), weight.t())
    norm = (norm1_weight, norm1_bias, None, mean1, rstd1, dtype, dtype)
    assert dnormalized is not None  # one projection at least
    grads[0], _, grads[1], grads[2], _ = add_layer_norm_backward(dnormalized, scratch(dtotal), None, x, *norm)
    return tuple(grads)


def _call_backward(*args: Any) -> tuple:
    return _recipes.call(block_backward, block_backward, args)


class Block(Operator):
    """``block_forward``'s tensors, then its other arguments as one tuple, then how to call it → out."""

    @staticmethod
    def forward(ctx, *args):
        *tensors, ctx.options, call = args
        out, *kept = call((*tensors, *ctx.options))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:4], *tensors[5:9], tensors[10], tensors[12], *kept, *tensors[FIXED::2])
        return out

    @staticmethod
    def backward(ctx, grad):
        wants = list(ctx.needs_input_grad[:-2])
        if grad is None:
            return (None,) * (len(wants) + 2)
        heads, _, _, scale, activation = ctx.options
        saved = ctx.saved_tensors
        grads = run_backward(_call_backward, grad, *saved[:10], wants, heads, scale, activation, *saved[10:])
        return *(g if want else None for g, want in zip(grads, wants, strict=True)), None, None


def block(tensors: list[Any], heads: int, eps: tuple[float, float], scale: float, activation: str) -> Tensor | None:
    """The block's output for ``block_forward``'s tensors; None where one Function does not serve it: no gradient is wanted, not
    one dtype, nothing to compute, something stands between a call and its kernels, or a rule gives a part to the vendor."""
    x = tensors[0]
    if torch.is_autocast_enabled("cuda" if x.is_cuda else x.device.type) or forward_ad._current_level >= 0:
        return None
    options, seen, recipe = (heads, *eps, scale, activation), None, False
    if x.is_cuda and nothing_between() and _recipes.undisturbed():
        seen = _recipes.signature_of(block_forward, (*tensors, *options), torch.are_deterministic_algorithms_enabled())
        recipe = seen is not None and _recipes.find(seen.key)
    if not recipe and not _serves(tensors, heads, scale, activation):
        return None

    def call(args: tuple) -> tuple:
        return block_forward(*args) if seen is None else _recipes.follow(seen, recipe, block_forward, args)

    return apply(Block, *tensors, options, call)


def _serves(tensors: list[Any], heads: int, scale: float, activation: str) -> bool:
    present = [t for t in tensors if t is not None]
    x, qkv, fc1_weight = tensors[0], tensors[FIXED::2], tensors[8]
    if not wants_grad(*present) or not untransformed() or not plain(*present):
        return False
    if any(t.dtype != x.dtype or t.device != x.device for t in present):
        return False
    if x.dim() != 3 or x.numel() == 0 or any(weight.dim() != 2 for weight in (tensors[3], fc1_weight, tensors[10], *qkv)):
        return False
    head_dim = qkv[0].shape[0] // (heads if len(qkv) == 3 else 3 * heads)
    probe = x.new_empty(1).expand(x.shape[0], heads, x.shape[1], head_dim)  # for its shape
    if dispatch.attention(probe, probe, probe, None, None, False, scale, *present) != "kernel":
        return False
    return dispatch.linear(x, fc1_weight, tensors[9], activation) == "kernel"
