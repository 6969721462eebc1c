"""Layer norm and add + layer norm on the Triton kernels: raw operators, shape functions and autograd Functions.

Implementations take None for what is left out and return None for gradients that nobody asked for.
"""

import math

import torch
from torch import Tensor

from ._common import (
    Operator,
    apply,
    as_rows,
    contiguous,
    define,
    direct,
    distinct,
    kernels,
    matrix,
    run_backward,
    scratch,
    wants_grad,
)
from .sums import ColumnSums, summing


def _total_dtype(residual: Tensor, branch: Tensor) -> torch.dtype:
    return residual.dtype if residual.dtype == branch.dtype else torch.promote_types(residual.dtype, branch.dtype)


def _forward(x: Tensor, branch: Tensor | None, scale, weight, bias, eps: float, total: Tensor | None, y: Tensor, save: bool):
    """Token statistics of (..., C) into ``y``; returns (mean, rstd), each None unless they are to be saved."""
    channels = x.shape[-1]
    wide = channels > kernels.layer_norm.MAX_CHANNELS
    mean = rstd = None
    if save or wide:
        mean, rstd = (x.new_empty(x.numel() // channels, dtype=torch.float32) for _ in range(2))
    run = kernels.layer_norm_wide.launch_wide_forward if wide else kernels.layer_norm.launch_layer_norm_forward
    run(x, branch, contiguous(scale), contiguous(weight), contiguous(bias), eps, y, total, mean, rstd)
    return mean, rstd


def _backward(dy, dtotal, x, branch, scale, weight, bias_like, mean, rstd, dx, dbranch, wants: tuple[bool, ...], sums) -> tuple:
    """Token-statistics backward over rows; returns (dweight, dbias, dscale), each None where not wanted."""
    rows, channels = x.shape
    wide = channels > kernels.layer_norm_backward.MAX_CHANNELS_BACKWARD
    strips = kernels.reduce.strips_for(rows, x) if wide else kernels.layer_norm_backward.backward_programs(x, wants[2])
    partials = [scratch(x.new_empty(strips, channels, dtype=torch.float32)) if want else None for want in wants]
    run = kernels.layer_norm_wide.launch_wide_backward if wide else kernels.layer_norm_backward.launch_layer_norm_backward
    weight_, scale_ = contiguous(weight), contiguous(scale)
    if rows:
        run(dy, dtotal, x, branch if wants[2] else None, scale_, weight_, mean, rstd, dx, dbranch, *partials)
    return tuple(map(sums.of_partials, partials, (weight, bias_like, scale)))


# --- layer_norm ---------------------------------------------------------------------------------------------------------


def layer_norm_forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    statistics: str,
    save: bool = True,
    dtype: torch.dtype | None = None,
):
    """Returns (y, mean, rstd), y of ``dtype``, for token statistics alone, or of the input's."""
    if statistics == "image":
        return _image_forward(input, weight, bias, eps)
    y = input.new_empty(input.shape, dtype=dtype)
    return y, *_forward(matrix(input), None, None, weight, bias, eps, None, y, save)


def _image_forward(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    x = input if input.stride(-1) == 1 else input.contiguous()
    y = input.new_empty(input.shape)
    mean, rstd = (input.new_empty(input.shape[0], dtype=torch.float32) for _ in range(2))
    if input.numel():
        scratch = [
            input.new_empty(input.shape[0], kernels.layer_norm_image.image_strips(x), dtype=torch.float32) for _ in range(2)
        ]
        kernels.layer_norm_image.launch_image_forward(x, contiguous(weight), contiguous(bias), eps, y, mean, rstd, *scratch)
    return y, mean, rstd


@summing
def layer_norm_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    statistics: str,
    *,
    sums: ColumnSums,
):
    """Returns (dinput, dweight, dbias)."""
    dx = input.new_empty(input.shape)
    if statistics == "image":
        dweight, dbias = _image_backward(grad, input, weight, bias, mean, rstd, dx, sums)
    else:
        x = as_rows(input)
        wants = (weight is not None, bias is not None, False)
        given = (as_rows(grad), None, x, None, None, weight, bias, mean, rstd, dx.view(x.shape), None, wants)
        dweight, dbias, _ = _backward(*given, sums)
    return dx, dweight, dbias


def _image_backward(grad, input, weight, bias, mean, rstd, dx, sums) -> tuple:
    x, dy = (t if t.stride(-1) == 1 else t.contiguous() for t in (input, grad))
    images, channels = x.shape[0], x.shape[2]
    strips = kernels.layer_norm_image.image_strips(x)
    count = images * strips if x.numel() else 0
    partials = [None if p is None else x.new_empty(count, channels, dtype=torch.float32) for p in (weight, bias)]
    if count:
        scratch = [x.new_empty(images, strips, dtype=torch.float32) for _ in range(2)]
        kernels.layer_norm_image.launch_image_backward(dy, x, contiguous(weight), mean, rstd, dx, *partials, *scratch)
    return tuple(map(sums.of_partials, partials, (weight, bias)))


def _fake_layer_norm_forward(input, weight, bias, eps, statistics):
    count = input.shape[0] if statistics == "image" else math.prod(input.shape[:-1])
    return input.new_empty(input.shape), *(input.new_empty(count, dtype=torch.float32) for _ in range(2))


def _fake_layer_norm_backward(grad, input, weight, bias, mean, rstd, statistics):
    params = (input.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return input.new_empty(input.shape), *params


call_layer_norm_forward = define(
    "layer_norm_forward(Tensor input, Tensor? weight, Tensor? bias, float eps, str statistics) -> (Tensor, Tensor, Tensor)",
    layer_norm_forward,
    _fake_layer_norm_forward,
)
call_layer_norm_backward = define(
    "layer_norm_backward(Tensor grad, Tensor input, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, str statistics)"
    " -> (Tensor, Tensor, Tensor)",
    layer_norm_backward,
    _fake_layer_norm_backward,
)


class LayerNorm(Operator):
    """(input, weight, bias, eps, statistics) → (y, mean, rstd); mean and rstd carry no gradient."""

    @staticmethod
    def forward(input, weight, bias, eps, statistics):
        return call_layer_norm_forward(input, weight, bias, eps, statistics)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, _, ctx.statistics = inputs
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.save_for_backward(input, weight, bias, output[1], output[2])

    @staticmethod
    def backward(ctx, grad, _mean, _rstd):
        if grad is None:
            return (None,) * 5
        input, weight, bias, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = run_backward(call_layer_norm_backward, grad, input, weight, bias, mean, rstd, ctx.statistics)
        return dx, None if weight is None else dweight, None if bias is None else dbias, None, None


def layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: str) -> Tensor:
    if wants_grad(input, weight, bias):
        return apply(LayerNorm, *distinct(input, weight, bias), eps, statistics)[0]
    if direct(input, weight, bias):
        return layer_norm_forward(input, weight, bias, eps, statistics, save=False)[0]
    return call_layer_norm_forward(input, weight, bias, eps, statistics)[0]


# --- add_layer_norm -----------------------------------------------------------------------------------------------------


def add_layer_norm_forward(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer_scale: Tensor | None,
    save: bool = True,
    dtype: torch.dtype | None = None,
):
    """Returns (normalized, total, mean, rstd), normalized of ``dtype`` or of the total's."""
    total = residual.new_empty(residual.shape, dtype=_total_dtype(residual, branch))
    y = residual.new_empty(residual.shape, dtype=dtype or total.dtype)
    return y, total, *_forward(matrix(residual), matrix(branch), layer_scale, weight, bias, eps, total, y, save)


@summing
def add_layer_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    branch: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    residual_dtype: torch.dtype,
    branch_dtype: torch.dtype,
    *,
    sums: ColumnSums,
):
    """Returns (dresidual, dbranch, dweight, dbias, dlayer_scale); dbranch is None where it equals dresidual.

    ``branch`` is needed for dlayer_scale only.
    """
    x = as_rows(total)
    dx = total.new_empty(total.shape, dtype=residual_dtype)
    separate = layer_scale is not None or branch_dtype != residual_dtype
    dbranch = total.new_empty(total.shape, dtype=branch_dtype) if separate else None
    dweight, dbias, dscale = _backward(
        as_rows(grad),
        None if grad_total is None else as_rows(grad_total),
        x,
        None if branch is None else as_rows(branch),
        layer_scale,
        weight,
        bias,
        mean,
        rstd,
        dx.view(x.shape),
        None if dbranch is None else dbranch.view(x.shape),
        (weight is not None, bias is not None, layer_scale is not None),
        sums,
    )
    return dx, dbranch, dweight, dbias, dscale


def _fake_add_forward(residual, branch, weight, bias, eps, layer_scale):
    dtype = _total_dtype(residual, branch)
    count = math.prod(residual.shape[:-1])
    wide = (residual.new_empty(residual.shape, dtype=dtype) for _ in range(2))
    return *wide, *(residual.new_empty(count, dtype=torch.float32) for _ in range(2))


def _fake_add_backward(grad, grad_total, branch, total, weight, bias, layer_scale, mean, rstd, residual_dtype, branch_dtype):
    separate = layer_scale is not None or branch_dtype != residual_dtype
    dbranch = total.new_empty(total.shape, dtype=branch_dtype) if separate else total.new_empty(0)
    params = (total.new_empty(0) if p is None else p.new_empty(p.shape) for p in (weight, bias, layer_scale))
    return total.new_empty(total.shape, dtype=residual_dtype), dbranch, *params


call_add_layer_norm_forward = define(
    "add_layer_norm_forward(Tensor residual, Tensor branch, Tensor? weight, Tensor? bias, float eps, Tensor? layer_scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    add_layer_norm_forward,
    _fake_add_forward,
)
call_add_layer_norm_backward = define(
    "add_layer_norm_backward(Tensor grad, Tensor? grad_total, Tensor? branch, Tensor total, Tensor? weight, Tensor? bias,"
    " Tensor? layer_scale, Tensor mean, Tensor rstd, ScalarType residual_dtype, ScalarType branch_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    add_layer_norm_backward,
    _fake_add_backward,
)


class AddLayerNorm(Operator):
    """(residual, branch, weight, bias, eps, layer_scale) → (normalized, total, mean, rstd)."""

    @staticmethod
    def forward(residual, branch, weight, bias, eps, layer_scale):
        return call_add_layer_norm_forward(residual, branch, weight, bias, eps, layer_scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        residual, branch, weight, bias, _, layer_scale = inputs
        _, total, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.dtypes = residual.dtype, branch.dtype
        ctx.save_for_backward(branch if layer_scale is not None else None, total, weight, bias, layer_scale, mean, rstd)

    @staticmethod
    def backward(ctx, grad, grad_total, _mean, _rstd):
        branch, total, weight, bias, layer_scale, mean, rstd = ctx.saved_tensors
        if grad is None:
            grad = torch.zeros_like(total)
        dresidual, dbranch, dweight, dbias, dscale = run_backward(
            call_add_layer_norm_backward,
            grad,
            grad_total,
            branch,
            total,
            weight,
            bias,
            layer_scale,
            mean,
            rstd,
            *ctx.dtypes,
        )
        separate = layer_scale is not None or ctx.dtypes[0] != ctx.dtypes[1]
        return (
            dresidual,
            dbranch if separate else dresidual,
            None if weight is None else dweight,
            None if bias is None else dbias,
            None,
            None if layer_scale is None else dscale,
        )


def add_layer_norm(
    residual: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, layer_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    if wants_grad(residual, branch, weight, bias, layer_scale):
        residual_, branch_, weight_, bias_, scale_ = distinct(residual, branch, weight, bias, layer_scale)
        return apply(AddLayerNorm, residual_, branch_, weight_, bias_, eps, scale_)[:2]
    if direct(residual, branch, weight, bias, layer_scale):
        return add_layer_norm_forward(residual, branch, weight, bias, eps, layer_scale, save=False)[:2]
    return call_add_layer_norm_forward(residual, branch, weight, bias, eps, layer_scale)[:2]
