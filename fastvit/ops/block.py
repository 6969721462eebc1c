"""A pre-norm transformer block, its operators' implementations called one after another: in training as one autograd Function.

    z' = z + s1·MHA(LN(z))        z'' = z' + s2·MLP(LN(z'))        (Dosovitskiy et al. 2021, eqs. 2 and 3; LayerScale s1, s2)

Saved is what the operators' own Functions save, and gradients come from their backward passes. Left out are a copy and a sum
that autograd would make: the gradients of query, key and value are written side by side, as their projection's backward reads
them, and the gradient that goes past a branch is added in the norm's kernel. Whether a call is served depends on nothing that
may change before a checkpoint computes it again, a profiler or a function mode for one; a dispatch mode, which has to see
operators, must be in force both times or neither. In inference a small block is one recipe, no more.
Shapes: z (B, N, C); qkv is one projection (3·C, C) or three. All of one dtype and device; no mask, no dropout.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _checks
from . import _recipes, dispatch
from ._common import Operator, apply, fill, run_backward, scratch, wants_grad
from ._state import nothing_between, plain, untransformed
from .attention import attention_forward
from .block_backward import FIXED, block_backward, heads_of, rows_of
from .layer_norm import add_layer_norm_forward, layer_norm_forward
from .linear import linear_forward, mlp_forward

SMALL = 2**22  # elements of z: 100 µs of a GPU's time and more beyond that (at 768 channels and 790 TFLOP/s)


class Options(NamedTuple):
    heads: int
    eps1: float
    eps2: float
    scale: float  # of the scores
    activation: str


class _Steps(NamedTuple):
    """What a block comes to on its way to the last sum; statistics, lse and pre are None unless they are to be saved."""

    normalized: Tensor
    mean1: Tensor | None
    rstd1: Tensor | None
    attended: Tensor
    lse: Tensor | None
    branch: Tensor
    normalized2: Tensor
    total: Tensor
    mean2: Tensor | None
    rstd2: Tensor | None
    pre: Tensor | None
    mlp: Tensor
    projected: list[Tensor]


def _steps(save: bool, normalized: Tensor | None, tensors: Sequence[Any], options: Options) -> _Steps:
    """``normalized``: LN(z) where it is there already."""
    x, norm1_weight, norm1_bias, out_weight, out_bias, scale1, norm2_weight, norm2_bias = tensors[:8]
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale2 = tensors[8:FIXED]
    heads, eps1, eps2, scale, activation = options
    _checks.check_layer_norm(x, norm1_weight, norm1_bias, eps1, "token")
    mean1 = rstd1 = None
    if normalized is None:
        normalized, mean1, rstd1 = layer_norm_forward(x, norm1_weight, norm1_bias, eps1, "token", save)
    projected = []
    for weight, bias in zip(tensors[FIXED::2], tensors[FIXED + 1 :: 2], strict=True):
        _checks.check_linear(x, weight, bias, None)
        projected.append(linear_forward(normalized, weight, bias, None, False)[0])
    query, key, value = heads_of(projected, heads)
    _checks.check_attention(query, key, value, None, None, None, False, scale)
    attended, lse = attention_forward(query, key, value, None, None, None, False, scale, save)
    rows = rows_of(attended)
    _checks.check_linear(rows, out_weight, out_bias, None)
    branch = linear_forward(rows, out_weight, out_bias, None, False)[0]
    _checks.check_add_layer_norm(x, branch, norm2_weight, norm2_bias, eps2, scale1)
    normalized2, total, mean2, rstd2 = add_layer_norm_forward(x, branch, norm2_weight, norm2_bias, eps2, scale1, save)
    _checks.check_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    mlp, pre = mlp_forward(normalized2, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, save)
    _checks.check_add_layer_norm(total, mlp, None, None, eps2, scale2)
    return _Steps(normalized, mean1, rstd1, attended, lse, branch, normalized2, total, mean2, rstd2, pre, mlp, projected)


def _sum(out: Tensor, total: Tensor, mlp: Tensor, scale2: Tensor | None) -> Tensor:
    fill(out, torch.add, total, mlp) if scale2 is None else fill(out, torch.addcmul, total, mlp, scale2)
    return out


def block_forward(*args: Any) -> tuple:
    """(z, norm1's weight and bias, attention's projection's, s1, norm2's, fc1's, fc2's, s2, those of qkv; heads, eps of both
    norms, the scores' scale, the activation) → (z'', what ``block_backward`` asks for: branch and mlp under LayerScale alone)."""
    tensors, options = args[: -len(Options._fields)], Options(*args[-len(Options._fields) :])
    scale1, scale2 = tensors[5], tensors[12]
    made = _steps(True, None, tensors, options)
    if scale1 is None:
        scratch(made.branch)
    out = _sum(made.mlp if scale2 is None else made.total.new_empty(made.total.shape), made.total, made.mlp, scale2)
    made = made._replace(branch=None if scale1 is None else made.branch, mlp=None if scale2 is None else made.mlp)  # type: ignore[arg-type]
    return out, *made[:-1], *made.projected


def block_inference(*args: Any) -> Any:
    """(``block_forward``'s, then LN(z) or None, and weight, bias and eps of a norm, eps None for no norm) → z'', or with a norm
    (LN(z''), z'')."""
    *first, normalized, next_weight, next_bias, next_eps = args
    tensors, options = first[: -len(Options._fields)], Options(*first[-len(Options._fields) :])
    made = _steps(False, normalized, tensors, options)
    for tensor in (made.attended, made.branch, made.normalized2, made.total, *made.projected):
        scratch(tensor)
    if normalized is None:
        scratch(made.normalized)
    if next_eps is None:
        return _sum(made.mlp, made.total, made.mlp, tensors[12])
    scratch(made.mlp)
    return add_layer_norm_forward(made.total, made.mlp, next_weight, next_bias, next_eps, tensors[12], False)[:2]


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


def block(tensors: list[Any], options: Options) -> Tensor | None:
    """The output in training for ``block_forward``'s tensors; None where one Function does not serve it: no gradient is wanted,
    or what ``_serves`` says."""
    x = tensors[0]
    if torch.is_autocast_enabled("cuda" if x.is_cuda else x.device.type) or forward_ad._current_level >= 0:
        return None
    seen, recipe = None, False
    if x.is_cuda and nothing_between() and _recipes.undisturbed():
        seen = _recipes.signature_of(block_forward, (*tensors, *options), torch.are_deterministic_algorithms_enabled())
        recipe = seen is not None and _recipes.find(seen.key)
    if not recipe and not (wants_grad(*tensors) and _serves(tensors, options)):
        return None

    def call(args: tuple) -> tuple:
        return block_forward(*args) if seen is None else _recipes.follow(seen, recipe, block_forward, args)

    return apply(Block, *tensors, options, call)


def infer(tensors: list[Any], options: Options, normalized: Tensor | None, following: tuple | None) -> Any:
    """What ``block_inference`` returns, ``following`` being weight, bias and eps of the norm to end with; None where no recipe
    does it, which is all that this is for: a block of ``SMALL`` tensors, whose calls take the GPU less time than the CPU."""
    x = tensors[0]
    if x.numel() > SMALL or torch.is_autocast_enabled("cuda") or forward_ad._current_level >= 0:
        return None
    if not x.is_cuda or not nothing_between() or not _recipes.undisturbed():
        return None
    args = (*tensors, *options, normalized, *(following or (None, None, None)))
    seen = _recipes.signature_of(block_inference, args)
    recipe = None if seen is None else _recipes.find(seen.key)
    if seen is None or recipe is None:
        return None
    if recipe is False and (seen.training or not _serves(tensors, options, normalized)):
        return _recipes.keep(seen.key, None)
    return _recipes.follow(seen, recipe, block_inference, args)


def _serves(tensors: list[Any], options: Options, *more: Tensor | None) -> bool:
    """Whether tensors are PyTorch's own and of one dtype, there is something to compute, no dispatch mode or transform has a say,
    and no rule gives attention or the MLP to the vendor."""
    present = [t for t in (*tensors, *more) if t is not None]
    x, qkv, fc1_weight = tensors[0], tensors[FIXED::2], tensors[8]
    if not untransformed() or not plain(*present) or any(t.dtype != x.dtype or t.device != x.device for t in present):
        return False
    if x.dim() != 3 or x.numel() == 0 or any(weight.dim() != 2 for weight in (tensors[3], fc1_weight, tensors[10], *qkv)):
        return False
    head_dim = qkv[0].shape[0] // (options.heads if len(qkv) == 3 else 3 * options.heads)
    probe = x.new_empty(1).expand(x.shape[0], options.heads, x.shape[1], head_dim)  # for its shape
    if dispatch.attention(probe, probe, probe, None, None, False, options.scale, *present) != "kernel":
        return False
    return dispatch.linear(x, fc1_weight, tensors[9], options.activation) == "kernel"
