"""A pre-norm transformer block, its operators' implementations called one after another: in training as one autograd Function.

    z' = z + s1·MHA(LN(z))        z'' = z' + s2·MLP(LN(z'))        (Dosovitskiy et al. 2021, eqs. 2 and 3; LayerScale s1, s2)

Saved is what the operators' own Functions save, and gradients come from their backward passes. Left out are a copy and a sum
that autograd would make: the gradients of query, key and value are written side by side, as their projection's backward reads
them, and the gradient that goes past a branch is added in the norm's kernel. Whether a call is served depends on nothing that
may change before a checkpoint computes it again, a profiler or a function mode for one; a dispatch mode, which has to see
operators, and compiled autograd, which cannot trace the Function, must be in force both times or neither.
In inference a small block is one recipe, whose sums and norms may be made by
what finishes the products before them (``linear_norm``).
Under autocast, in training, z, sums and norms' parameters are float32 and products are computed in autocast's dtype, as by the
operators; norms write that dtype at once, backward has the weights as forward cast them (``_casts``), and gradients of float32
weights are float32 as they are summed up. Stochastic depth multiplies a branch's samples by what it is given.
Shapes: z (B, N, C), or images (B, Hi, Wi, C) that attend in windows or as a whole, with relative positions or without (see
``image_attention``), in training; qkv is one projection (3·C, C) or, of sequences, three. Else all of one dtype and device; no
mask, no dropout.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _checks
from . import _casts, _recipes, dispatch
from ._common import Operator, apply, fill, run_backward, scratch, wants_grad
from ._state import compiled_autograd, nothing_between, plain, untransformed
from .attention import attention_forward
from .block_backward import FIXED, block_backward, heads_of, rows_of, size_of
from .image_attention import image_attention_forward
from .layer_norm import add_layer_norm_forward, layer_norm_forward
from .linear import linear_forward, mlp_forward
from .linear_norm import linear_add_norm_forward

SMALL = 2**22  # elements of z: 100 µs of a GPU's time and more beyond that (at 768 channels and 790 TFLOP/s)


class Options(NamedTuple):
    heads: int
    eps1: float
    eps2: float
    scale: float  # of the scores
    activation: str
    window: int | None = None  # of images: tokens a side, 0 for the whole image


class _Steps(NamedTuple):
    """What a block comes to in training on its way to the last sum."""

    normalized: Tensor
    mean1: Tensor
    rstd1: Tensor
    attended: Tensor
    lse: Tensor
    branch: Tensor
    normalized2: Tensor
    total: Tensor
    mean2: Tensor
    rstd2: Tensor
    pre: Tensor
    mlp: Tensor
    projected: list[Tensor]


def _attend(save: bool, normalized: Tensor | None, tensors: Sequence[Any], options: Options) -> tuple[Any, ...]:
    """LN(z), its mean and rstd, what attention gives, its lse, and what was projected; statistics and lse None unless ``save``.
    ``normalized``: LN(z) where it is there already."""
    x, norm1_weight, norm1_bias, out_weight = tensors[:4]
    _checks.check_layer_norm(x, norm1_weight, norm1_bias, options.eps1, "token")
    mean1 = rstd1 = None
    if normalized is None:
        normalized, mean1, rstd1 = layer_norm_forward(x, norm1_weight, norm1_bias, options.eps1, "token", save, out_weight.dtype)
    projected = []
    for weight, bias in zip(tensors[FIXED::2], tensors[FIXED + 1 :: 2], strict=True):
        _checks.check_linear(normalized, weight, bias, None)
        projected.append(linear_forward(normalized, weight, bias, None, False)[0])
    if options.window is None:
        query, key, value = heads_of(projected, options.heads)
        _checks.check_attention(query, key, value, None, None, None, False, options.scale)
        attended, lse = attention_forward(query, key, value, None, None, None, False, options.scale, save)
    else:
        (qkv,), (rel_h, rel_w), pad = projected, tensors[13:FIXED], _pad_of(tensors, options)
        _checks.check_image_attention(qkv, options.heads, rel_h, rel_w, options.window, pad, options.scale)
        size = size_of(x, options.window)
        attended, lse = image_attention_forward(qkv, rel_h, rel_w, pad, options.heads, size, options.scale, save)
    return normalized, mean1, rstd1, attended, lse, projected


def _pad_of(tensors: Sequence[Any], options: Options) -> Tensor | None:
    """What padded tokens of windows hold: the projection of zeros."""
    return tensors[FIXED + 1] if options.window else None


def _steps(tensors: Sequence[Any], options: Options, mask1: Tensor | None) -> _Steps:
    """``mask1``: see ``block_forward``."""
    x, out_weight, out_bias, scale1, norm2_weight, norm2_bias = tensors[0], *tensors[3:8]
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale2 = tensors[8:13]
    eps2, activation, dtype = options.eps2, options.activation, out_weight.dtype
    normalized, mean1, rstd1, attended, lse, projected = _attend(True, None, tensors, options)
    rows = rows_of(attended, options.window)
    _checks.check_linear(rows, out_weight, out_bias, None)
    branch = linear_forward(rows, out_weight, out_bias, None, False)[0]
    if mask1 is not None:
        fill(branch, torch.mul, branch, mask1)
    _checks.check_add_layer_norm(x, branch, norm2_weight, norm2_bias, eps2, scale1)
    normalized2, total, mean2, rstd2 = add_layer_norm_forward(x, branch, norm2_weight, norm2_bias, eps2, scale1, True, dtype)
    _checks.check_mlp(normalized2, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    mlp, pre = mlp_forward(normalized2, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, True)
    _checks.check_add_layer_norm(total, mlp, None, None, eps2, scale2)
    return _Steps(normalized, mean1, rstd1, attended, lse, branch, normalized2, total, mean2, rstd2, pre, mlp, projected)


def _sum(out: Tensor, total: Tensor, mlp: Tensor, scale2: Tensor | None, mask2: Tensor | None) -> Tensor:
    if scale2 is not None and mask2 is not None:
        fill(mlp, torch.mul, mlp, mask2)
    factor = mask2 if scale2 is None else scale2
    fill(out, torch.add, total, mlp) if factor is None else fill(out, torch.addcmul, total, mlp, factor)
    return out


def block_forward(*args: Any) -> tuple:
    """(z, norm1's weight and bias, attention's projection's, s1, norm2's, fc1's, fc2's, s2, tables of relative positions or
    None, those of qkv; ``Options``; for each branch None or a mask (B, 1, 1), which it is multiplied by) → (z'', what
    ``block_backward`` asks for: branch and mlp under LayerScale alone)."""
    *first, mask1, mask2 = args
    tensors, options = first[: -len(Options._fields)], Options(*first[-len(Options._fields) :])
    scale1, scale2 = tensors[5], tensors[12]
    made = _steps(tensors, options, mask1)
    if scale1 is None:
        scratch(made.branch)
    kept = scale2 is not None or made.mlp.dtype != made.total.dtype  # or written over
    if kept and scale2 is None:
        scratch(made.mlp)
    out = _sum(made.total.new_empty(made.total.shape) if kept else made.mlp, made.total, made.mlp, scale2, mask2)
    made = made._replace(branch=None if scale1 is None else made.branch, mlp=None if scale2 is None else made.mlp)  # type: ignore[arg-type]
    return out, *made[:-1], *made.projected


def block_inference(*args: Any) -> Any:
    """(``block_forward``'s, then LN(z) or None, and weight, bias and eps of a norm, eps None for no norm) → z'', or with a norm
    (LN(z''), z'')."""
    *first, normalized, next_weight, next_bias, next_eps = args
    tensors, options = first[: -len(Options._fields)], Options(*first[-len(Options._fields) :])
    x, out_weight, out_bias, scale1, *norm2 = tensors[0], *tensors[3:8]
    fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale2 = tensors[8:13]
    first, *_, attended, _, projected = _attend(False, normalized, tensors, options)
    normalized2, total = _end(rows_of(attended, None), out_weight, out_bias, x, scale1, *norm2, options.eps2)
    _checks.check_mlp(normalized2, fc1_weight, fc1_bias, fc2_weight, fc2_bias, options.activation)
    hidden = linear_forward(normalized2, fc1_weight, fc1_bias, options.activation, False)[0]
    for tensor in (attended, normalized2, total, hidden, *projected):
        scratch(tensor)
    if normalized is None:
        scratch(first)
    out = _end(hidden, fc2_weight, fc2_bias, total, scale2, next_weight, next_bias, next_eps)
    return out[1] if next_eps is None else out


def _end(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, scale: Tensor | None, *norm: Any) -> Any:
    """``linear_add_norm_forward`` of arguments that it has checked."""
    norm_weight, norm_bias, eps = norm
    _checks.check_linear(x, weight, bias, None)
    branch = x.new_empty(1).expand(*x.shape[:-1], weight.shape[0])  # for its shape
    _checks.check_add_layer_norm(residual, branch, norm_weight, norm_bias, eps or 0.0, scale)
    return linear_add_norm_forward(x, weight, bias, residual, scale, norm_weight, norm_bias, eps)


def _call_backward(*args: Any) -> tuple:
    return _recipes.call(block_backward, block_backward, args)


class Block(Operator):
    """``block_forward``'s tensors as they want gradients, then its options as one tuple, then what runs it, which returns its
    tensors and masks as it took them and what it made → out."""

    @staticmethod
    def forward(ctx, *args):
        *tensors, ctx.options, run = args
        used, masks, (out, *kept) = run()
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[3].dtype
        parameters = *used[1:4], *used[5:9], used[10], *used[12:FIXED], _pad_of(used, ctx.options)
        ctx.save_for_backward(used[0], *parameters, *masks, *kept, *used[FIXED::2])
        return out

    @staticmethod
    def backward(ctx, grad):
        wants = list(ctx.needs_input_grad[:-2])
        if grad is None:
            return (None,) * (len(wants) + 2)
        heads, _, _, scale, *others = ctx.options
        grad = grad.resolve_neg()  # read as it lies in memory
        saved = ctx.saved_tensors
        grads = run_backward(_call_backward, grad, *saved[:15], wants, heads, scale, *others, ctx.dtype, *saved[15:])
        return *(g if want else None for g, want in zip(grads, wants, strict=True)), None, None


def block(tensors: list[Any], options: Options, drop_paths: Sequence[Any] = (None, None)) -> Tensor | None:
    """The output in training for ``block_forward``'s tensors; None where one Function does not serve it: no gradient is wanted,
    or what ``_serves`` says. ``drop_paths``: of each branch None, or what multiplies each of its samples (B, 1, 1) by a number
    and is called with ones, once and only where the output comes of it."""
    x = tensors[0]
    if forward_ad._current_level >= 0 or compiled_autograd():
        return None
    device = "cuda" if x.is_cuda else x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    dropping = [drop_path is not None for drop_path in drop_paths]
    seen, recipe = None, False
    if x.is_cuda and nothing_between() and _recipes.undisturbed():
        deterministic = torch.are_deterministic_algorithms_enabled()
        seen = _recipes.signature_of(block_forward, (*tensors, *options, *dropping), deterministic, dtype)
        recipe = seen is not None and _recipes.find(seen.key)
    if not recipe and not (wants_grad(*tensors) and _serves(tensors, options, autocast=dtype)):
        return None

    def run() -> tuple:
        used = tensors
        masks: list[Tensor | None] = [None, None]
        if dtype is not None:
            used = _casts.lowered(tensors, _linears(tensors), dtype)
        if any(dropping):
            masks = [_mask(x, *branch, dtype) for branch in zip(drop_paths, (tensors[5], tensors[12]), strict=True)]
        args = (*used, *options, *masks)
        if seen is None:
            return used, masks, block_forward(*args)
        taken = seen
        if dtype is not None or any(dropping):
            given = [arg for arg in args if isinstance(arg, Tensor)]
            taken = seen._replace(tensors=given, pointers=[t.data_ptr() for t in given])
        return used, masks, _recipes.follow(taken, recipe, block_forward, args)

    return apply(Block, *tensors, options, run)


def _mask(x: Tensor, drop_path: Any, scale: Tensor | None, autocast: torch.dtype | None) -> Tensor | None:
    """Drawn in the dtype that the branch has where the operators meet it, hence the same numbers."""
    if drop_path is None:
        return None
    return drop_path(x.new_ones(x.shape[0], *[1] * (x.dim() - 1), dtype=autocast if scale is None else None))


def _linears(tensors: list[Any]) -> list[int]:
    """The places of what autocast casts."""
    return [3, 4, 8, 9, 10, 11, *range(13, len(tensors))]


def infer(tensors: list[Any], options: Options, normalized: Tensor | None, following: tuple | None) -> Any:
    """What ``block_inference`` returns, ``following`` being weight, bias and eps of the norm to end with; None where no recipe
    does it, which is all that this is for: a block of ``SMALL`` tensors, whose calls take the GPU less time than the CPU. Who
    collects decisions is told those of the recipe."""
    x = tensors[0]
    if x.numel() > SMALL or torch.is_autocast_enabled("cuda") or forward_ad._current_level >= 0:
        return None
    if not x.is_cuda or not nothing_between():
        return None
    args = (*tensors, *options, normalized, *(following or (None, None, None)))
    if not _recipes.undisturbed():
        return block_inference(*args) if dispatch.collecting() and _serves(tensors, options, normalized) else None
    seen = _recipes.signature_of(block_inference, args)
    recipe = None if seen is None else _recipes.find(seen.key)
    if seen is None or recipe is None:
        return None
    if recipe is False and (seen.training or not _serves(tensors, options, normalized)):
        return _recipes.keep(seen.key, None)
    return _recipes.follow(seen, recipe, block_inference, args)


def _serves(tensors: list[Any], options: Options, *more: Tensor | None, autocast: torch.dtype | None = None) -> bool:
    """Whether tensors are PyTorch's own and of one dtype (under autocast z and norms' of float32, linears' of that or
    autocast's), there is something to compute, no dispatch mode or transform has a say, and no rule gives attention or the MLP
    to the vendor."""
    present = [t for t in (*tensors, *more) if t is not None]
    x, qkv, fc1_weight = tensors[0], tensors[FIXED::2], tensors[8]
    if not untransformed() or not plain(*present) or any(t.device != x.device for t in present):
        return False
    if autocast is None:
        if any(t.dtype != x.dtype for t in present):
            return False
    else:
        places = _linears(tensors)
        norms = [t for place, t in enumerate(tensors) if t is not None and place not in places]
        kinds = {tensors[place].dtype for place in places if tensors[place] is not None}
        if any(t.dtype != torch.float32 for t in norms) or kinds not in ({torch.float32}, {autocast}):
            return False
        if autocast not in (torch.bfloat16, torch.float16):
            return False
    window, matrices = options.window, (tensors[3], fc1_weight, tensors[10], *qkv)
    if x.dim() != (3 if window is None else 4) or x.numel() == 0 or any(weight.dim() != 2 for weight in matrices):
        return False
    if window is not None and any(
        table is not None and len(table) != 2 * side - 1
        for table, side in zip(tensors[13:FIXED], size_of(x, window), strict=True)
    ):
        return False  # to be interpolated
    head_dim = qkv[0].shape[0] // (options.heads if len(qkv) == 3 else 3 * options.heads)
    probe = x.new_empty(1, dtype=autocast)  # for its dtype and shapes
    heads = probe.expand(x.shape[0], options.heads, x.shape[1], head_dim)
    if window is None and dispatch.attention(heads, heads, heads, None, None, False, options.scale, *present) != "kernel":
        return False
    return dispatch.linear(probe.expand(x.shape), fc1_weight, tensors[9], options.activation) == "kernel"
