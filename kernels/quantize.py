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
from ._pdl import wait
from ._plans import planned
from ._tuning import config
from .glu import _activate
from .layer_norm import affine, align_of, centre, counted_in, gather, pieces, prefetch_parameters

SCALE_BLOCK = 128


@triton.jit
def magnitude(x, axis: tl.constexpr, FORMAT: tl.constexpr):
    """max |x| along ``axis``; for int8 its bits, which compare as integers as magnitudes do as numbers, NaN above infinity."""
    if tl.int8 == FORMAT:
        return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=axis)
    else:
        return tl.max(tl.abs(x), axis=axis)


@triton.jit
def scale_of(largest, FORMAT: tl.constexpr):
    """(amax / L, L / amax) of a ``magnitude``, float32."""
    if tl.int8 == FORMAT:
        amax = tl.maximum(largest, 0x0DA24260).to(tl.float32, bitcast=True)  # 1e-30
        return tl.div_rn(amax, 127.0) + (amax - amax), tl.div_rn(127.0, amax)
    else:
        amax = tl.maximum(largest, 1e-30)
        return tl.div_rn(amax, 448.0), tl.div_rn(448.0, amax)


@triton.jit
def rounded(x, inverse, axis: tl.constexpr, FORMAT: tl.constexpr):
    """x · inverse in FORMAT, ``inverse`` without ``axis``."""
    inverse = tl.expand_dims(inverse, axis)
    if tl.int8 == FORMAT:
        # 1.5 · 2²³ leaves no room for a fraction: the sum is rounded to an integer, which lies in its last bits.
        return tl.fma(x, inverse.broadcast_to(x.shape), 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        return (x * inverse).to(FORMAT)


@triton.jit
def to_8_bits(x, axis: tl.constexpr, FORMAT: tl.constexpr):
    """float32 tile → (its values in FORMAT, float8e4nv or int8; scale), one scale for what lies along ``axis``, the last.

    A NaN stays one in e4m3, which leaves it out of the maximum, and an infinity becomes one; in int8 either makes the scale NaN.
    """
    scale, inverse = scale_of(magnitude(x, axis, FORMAT), FORMAT)
    return rounded(x, inverse, axis, FORMAT), scale


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
    TAIL: tl.constexpr,  # these three as in ``layer_norm``
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    PDL: tl.constexpr,
):
    FORMAT: tl.constexpr = values_ptr.dtype.element_ty
    MASKED: tl.constexpr = TAIL == 0 and not EVEN
    channels = counted_in(ALIGN, channels)
    stride_x_row = counted_in(ALIGN, stride_x_row)
    stride_branch_row = counted_in(ALIGN, stride_branch_row)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)  # instead of a mask on every load, as in ``layer_norm``
    column = tl.arange(0, BLOCK_C)
    inside = column < channels if MASKED else column >= 0
    stored = valid[:, None] & inside[None, :]
    if PDL:
        prefetch_parameters(layer_scale_ptr, weight_ptr, bias_ptr, channels, BLOCK_C, TAIL)
        wait()
    # fmt: off
    x = gather(x_ptr, branch_ptr, layer_scale_ptr, total_ptr, row, column, inside, stored, channels,
               stride_x_row, stride_branch_row, MASKED)
    if TAIL:
        tail_column = BLOCK_C + tl.arange(0, TAIL)
        tail_inside = tail_column >= 0 if EVEN else tail_column < channels
        tail_stored = valid[:, None] & tail_inside[None, :]
        tail = gather(x_ptr, branch_ptr, layer_scale_ptr, total_ptr, row, tail_column, tail_inside, tail_stored, channels,
                      stride_x_row, stride_branch_row, not EVEN)
    # fmt: on
    if NORM:
        mean = tl.sum(x, axis=1)
        if TAIL:
            mean += tl.sum(tail, axis=1)
        mean /= channels
        x = centre(x, mean, inside, MASKED)
        squares = tl.sum(x * x, axis=1)
        if TAIL:
            tail = centre(tail, mean, tail_inside, not EVEN)
            squares += tl.sum(tail * tail, axis=1)
        rstd = 1.0 / tl.sqrt_rn(squares / channels + eps)
        x = affine(x, rstd, weight_ptr, bias_ptr, row, column, inside)
        if TAIL:
            tail = affine(tail, rstd, weight_ptr, bias_ptr, row, tail_column, tail_inside)
    largest = magnitude(x, 1, FORMAT)
    if TAIL:
        largest = tl.maximum(largest, magnitude(tail, 1, FORMAT))
    scale, inverse = scale_of(largest, FORMAT)
    tl.store(scale_ptr + row, scale, mask=valid)
    # As many values side by side as were loaded so: left to itself the compiler stores 16, and shuffles them together.
    ADJACENT: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    offset = tl.max_contiguous(row[:, None] * channels + column[None, :], (1, ADJACENT))
    tl.store(values_ptr + offset, rounded(x, inverse, 1, FORMAT), mask=stored)
    if TAIL:
        offset = tl.max_contiguous(row[:, None] * channels + tail_column[None, :], (1, ADJACENT))
        tl.store(values_ptr + offset, rounded(tail, inverse, 1, FORMAT), mask=tail_stored)


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
        ALIGN=align_of(channels, x.stride(0), 0 if branch is None else branch.stride(0)),
        **pieces(channels),
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
