"""Rounding to 8 bits, in the pass that makes the values: after a LayerNorm, a residual sum and its LayerNorm, a GLU, or alone.

    total  = residual + layer_scale · branch                     where there is a branch
    y      = LayerNorm(total)                                    where NORM, else y = x
    scale  = max(amax, 1e-30) / L,  values = round(y · L / max(amax, 1e-30)),  amax = max |y| over the row

The values' dtype is the format: e4m3 with L = 448, or int8 with L = 127. After a GLU, y = activation(gate) · value and amax is
over each 128 columns of a row, as the next product wants them.
Shapes: x, branch, total, values, gate, value [rows, channels], last stride 1; weight, bias, layer_scale [channels]; scale [rows],
or [ceil(channels / 128), rows], float32. x is read once and 1 byte an element written, where a LayerNorm writes 2 and a pass of
its own would read them again. A row lives in registers, so channels ≤ ``layer_norm.MAX_CHANNELS`` (any after a GLU). Forward
only. y is rounded once, from float32.
Reference: ``fastvit.reference_quantized.quantize``, after ``fastvit.reference.layer_norm``, ``add_layer_norm`` or ``glu``.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch, target_of
from ._plans import planned
from ._tuning import config
from .glu import _activate

SCALE_BLOCK = 128


@triton.jit
def to_8_bits(x, axis: tl.constexpr, FORMAT: tl.constexpr):
    """float32 tile → (its values in FORMAT, float8e4nv or int8; scale), one scale for what lies along ``axis``, the last.

    A NaN stays one in e4m3, which leaves it out of the maximum, and an infinity becomes one; in int8 either makes the scale NaN.
    """
    if tl.int8 == FORMAT:
        # Magnitudes compare as integers as they do as numbers, NaN above infinity. 0x0DA24260 is 1e-30.
        bits = tl.maximum(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis), 0x0DA24260)
        amax = bits.to(tl.float32, bitcast=True)
        # 1.5 · 2²³ leaves no room for a fraction: the sum is rounded to an integer, which lies in its last bits.
        shifted = tl.fma(x, tl.expand_dims(tl.div_rn(127.0, amax), axis).broadcast_to(x.shape), 12582912.0)
        return shifted.to(tl.int32, bitcast=True).to(tl.int8), tl.div_rn(amax, 127.0) + (amax - amax)
    else:
        amax = tl.maximum(tl.max(tl.abs(x), axis=axis), 1e-30)
        values = x * tl.expand_dims(tl.div_rn(448.0, amax), axis)
        return values.to(FORMAT), tl.div_rn(amax, 448.0)


@triton.jit
def _quantize(
    x_ptr,  # [rows, channels]: the input, or the residual
    branch_ptr,  # [rows, channels] or None
    layer_scale_ptr,  # [channels] or None
    weight_ptr,  # [channels] or None
    bias_ptr,  # [channels] or None
    values_ptr,  # [rows, channels] e4m3 or int8
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
    values, scale = to_8_bits(x, 1, values_ptr.dtype.element_ty)
    tl.store(values_ptr + row[:, None] * channels + column[None, :], values, mask=mask)
    tl.store(scale_ptr + row, scale, mask=row < rows)


@triton.jit
def _quantize_glu(
    gate_ptr,  # [rows, channels]
    value_ptr,  # [rows, channels]
    values_ptr,  # [rows, channels] e4m3 or int8
    scale_ptr,  # [blocks of channels, rows]
    rows,
    channels,
    stride_gate_row,
    stride_value_row,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    block = tl.program_id(0) % blocks
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (row < rows)[:, None] & (column < channels)[None, :]
    gate = tl.load(gate_ptr + row[:, None] * stride_gate_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + row[:, None] * stride_value_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    values, scale = to_8_bits(_activate(gate, ACTIVATION, False) * value, 1, values_ptr.dtype.element_ty)
    tl.store(values_ptr + row[:, None] * channels + column[None, :], values, mask=mask)
    tl.store(scale_ptr + block.to(tl.int64) * rows + row, scale, mask=row < rows)


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


@planned
def launch_quantize_glu(
    gate: torch.Tensor, value: torch.Tensor, activation: str, values: torch.Tensor, scale: torch.Tensor
) -> None:
    """Fills values and scale. gate and value have last stride 1, the others are contiguous."""
    rows, channels = gate.shape
    row = config("quantize_glu", target_of(gate))
    launch(
        "quantize_glu",
        _quantize_glu,
        (triton.cdiv(rows, row["BLOCK_ROWS"]) * scale.shape[0],),
        gate,
        row,
        gate_ptr=gate,
        value_ptr=value,
        values_ptr=values,
        scale_ptr=scale,
        rows=rows,
        channels=channels,
        stride_gate_row=gate.stride(0),
        stride_value_row=value.stride(0),
        ACTIVATION=activation,
        BLOCK_C=SCALE_BLOCK,
    )
