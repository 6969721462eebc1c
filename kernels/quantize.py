"""Rounding to FP8 (e4m3), in the pass that makes the values: after a LayerNorm, after a residual sum and its LayerNorm, or alone.

    total  = residual + layer_scale · branch                     where there is a branch
    y      = LayerNorm(total)                                    where NORM, else y = x
    scale  = max(amax, 1e-30) / 448,  values = e4m3(y · 448 / max(amax, 1e-30)),  amax = max |y| over the row

Shapes: x, branch, total, values [rows, channels], last stride 1; weight, bias, layer_scale [channels]; scale [rows] float32.
x is read once and 1 byte an element written, where a LayerNorm writes 2 and a pass of its own would read them again. A row
lives in registers, so channels ≤ ``layer_norm.MAX_CHANNELS``. Forward only. y is rounded once, from float32.
Reference: ``fastvit.reference_fp8.quantize``, after ``fastvit.reference.layer_norm`` or ``add_layer_norm``.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch, target_of
from ._plans import planned
from ._tuning import config


@triton.jit
def to_e4m3(x, axis: tl.constexpr):
    """float32 tile → (e4m3 tile, scale), one scale for what lies along ``axis``, the last.

    A NaN is left out of the maximum and stays NaN; an infinity makes the scale infinite and itself NaN.
    """
    amax = tl.maximum(tl.max(tl.abs(x), axis=axis), 1e-30)
    values = x * tl.expand_dims(tl.div_rn(448.0, amax), axis)
    return values.to(tl.float8e4nv), tl.div_rn(amax, 448.0)


@triton.jit
def _quantize(
    x_ptr,  # [rows, channels]: the input, or the residual
    branch_ptr,  # [rows, channels] or None
    layer_scale_ptr,  # [channels] or None
    weight_ptr,  # [channels] or None
    bias_ptr,  # [channels] or None
    values_ptr,  # [rows, channels] e4m3
    scale_ptr,  # [rows]
    total_ptr,  # [rows, channels] or None: with a branch
    rows,
    channels,
    stride_x_row,
    stride_branch_row,
    eps,
    NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_C)
    inside = column < channels
    mask = (row < rows)[:, None] & inside[None, :]
    x = tl.load(x_ptr + row[:, None] * stride_x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + row[:, None] * stride_branch_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if layer_scale_ptr is not None:
            branch *= tl.load(layer_scale_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        rounded = (x + branch).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row[:, None] * channels + column[None, :], rounded, mask=mask)
        x = rounded.to(tl.float32)
    if NORM:
        mean = tl.sum(x, axis=1) / channels
        centred = tl.where(mask, x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / channels + eps)
        x = centred * rstd[:, None]
        if weight_ptr is not None:
            x *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if bias_ptr is not None:
            x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    values, scale = to_e4m3(x, 1)
    tl.store(values_ptr + row[:, None] * channels + column[None, :], values, mask=mask)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@planned
def launch_quantize(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    norm: bool,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    values: torch.Tensor,
    scale: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    """Fills values, scale and total. x and branch have last stride 1, the others are contiguous."""
    rows, channels = x.shape
    row = config("quantize", target_of(x), channels=channels)
    launch(
        "quantize",
        _quantize,
        (triton.cdiv(rows, row["BLOCK_ROWS"]),),
        x,
        row,
        x_ptr=x,
        branch_ptr=branch,
        layer_scale_ptr=layer_scale,
        weight_ptr=weight,
        bias_ptr=bias,
        values_ptr=values,
        scale_ptr=scale,
        total_ptr=total,
        rows=rows,
        channels=channels,
        stride_x_row=x.stride(0),
        stride_branch_row=0 if branch is None else branch.stride(0),
        eps=eps,
        NORM=norm,
        BLOCK_C=max(16, triton.next_power_of_2(channels)),
    )
