"""Gated linear units, the pointwise part, forward and backward (Shazeer 2020).

    out    = activation(gate) · value
    dgate  = dout · value · activation'(gate)
    dvalue = dout · activation(gate)

Shapes: gate, value, dout [rows, channels], last stride 1, rows of any stride (the halves of a packed [rows, 2 · channels]
are read in place); out, dgate, dvalue contiguous. float32 between one read and one rounding; backward keeps gate and value.
Activations: silu (x·σ(x)), sigmoid, and those of ``_math.activate``; float32 keeps the exact erf.
Reference: ``fastvit.reference.glu``.
"""

import torch
import triton
import triton.language as tl

from ._launch import as_matrix, launch, row_stride, target_of
from ._math import activate, activation_derivative, sigmoid
from ._plans import planned
from ._tuning import config


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    if ACTIVATION == "silu":
        return x * sigmoid(x)
    elif ACTIVATION == "sigmoid":
        return sigmoid(x)
    else:
        return activate(x, ACTIVATION, EXACT)


@triton.jit
def _derivative(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    if ACTIVATION == "silu":
        gate = sigmoid(x)
        return gate + x * gate * (1.0 - gate)
    elif ACTIVATION == "sigmoid":
        gate = sigmoid(x)
        return gate * (1.0 - gate)
    else:
        return activation_derivative(x, ACTIVATION, EXACT)


@triton.jit
def _tile(rows, channels, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's rows (int64), columns and mask; neighbouring programs share rows."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    row = (program // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    return row[:, None], column[None, :], (row < rows)[:, None] & (column < channels)[None, :]


@triton.jit
def _glu_forward(
    gate_ptr,  # [rows, channels]
    value_ptr,  # [rows, channels]
    out_ptr,  # [rows, channels]
    rows,
    channels,
    stride_gate_row,
    stride_value_row,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, column, mask = _tile(rows, channels, BLOCK_ROWS, BLOCK_C)
    gate = tl.load(gate_ptr + row * stride_gate_row + column, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + row * stride_value_row + column, mask=mask, other=0.0).to(tl.float32)
    out = _activate(gate, ACTIVATION, EXACT) * value
    tl.store(out_ptr + row * channels + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_backward(
    dout_ptr,  # [rows, channels]
    gate_ptr,  # [rows, channels]
    value_ptr,  # [rows, channels]
    dgate_ptr,  # [rows, channels]
    dvalue_ptr,  # [rows, channels]
    rows,
    channels,
    stride_dout_row,
    stride_gate_row,
    stride_value_row,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, column, mask = _tile(rows, channels, BLOCK_ROWS, BLOCK_C)
    dout = tl.load(dout_ptr + row * stride_dout_row + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate_row + column, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + row * stride_value_row + column, mask=mask, other=0.0).to(tl.float32)
    dgate = dout * value * _derivative(gate, ACTIVATION, EXACT)
    dvalue = dout * _activate(gate, ACTIVATION, EXACT)
    tl.store(dgate_ptr + row * channels + column, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dvalue_ptr + row * channels + column, dvalue.to(dvalue_ptr.dtype.element_ty), mask=mask)


def _grid(rows: int, channels: int, row: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, row["BLOCK_ROWS"]) * triton.cdiv(channels, row["BLOCK_C"]),)


@planned
def launch_glu_forward(gate: torch.Tensor, value: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    """Fills out, contiguous; gate and value are [rows, channels] with last stride 1, or contiguous [..., channels]."""
    rows, channels, stride = as_matrix(gate)
    row = config("glu", target_of(gate))
    launch(
        "glu",
        _glu_forward,
        _grid(rows, channels, row),
        gate,
        row,
        gate_ptr=gate,
        value_ptr=value,
        out_ptr=out,
        rows=rows,
        channels=channels,
        stride_gate_row=stride,
        stride_value_row=row_stride(value),
        ACTIVATION=activation,
        EXACT=gate.dtype == torch.float32,
    )


@planned
def launch_glu_backward(
    dout: torch.Tensor, gate: torch.Tensor, value: torch.Tensor, activation: str, dgate: torch.Tensor, dvalue: torch.Tensor
) -> None:
    """Fills dgate and dvalue [rows, channels], contiguous; the others have last stride 1."""
    rows, channels = gate.shape
    row = config("glu_backward", target_of(gate))
    launch(
        "glu_backward",
        _glu_backward,
        _grid(rows, channels, row),
        gate,
        row,
        dout_ptr=dout,
        gate_ptr=gate,
        value_ptr=value,
        dgate_ptr=dgate,
        dvalue_ptr=dvalue,
        rows=rows,
        channels=channels,
        stride_dout_row=dout.stride(0),
        stride_gate_row=gate.stride(0),
        stride_value_row=value.stride(0),
        ACTIVATION=activation,
        EXACT=gate.dtype == torch.float32,
    )
