"""Layer norm over the channels of a token, alone or after a residual addition, forward (Ba et al. 2016).

    total = residual + layer_scale · branch                      (add_layer_norm only)
    y     = (total − mean) · rstd · weight + bias                mean, rstd = 1/sqrt(var + eps) over the channels

Shapes: residual, branch, y, total [rows, channels], last stride 1; weight, bias, layer_scale [channels]; mean, rstd [rows]
float32, saved for ``layer_norm_backward``. Each tensor is read once and written once; a row lives in registers, in those of
one warp where they suffice, whose sums need no barrier. So channels ≤ MAX_CHANNELS (``layer_norm_wide`` takes over from there).
Reference: ``fastvit.reference.layer_norm`` and ``add_layer_norm``.
"""

import math

import torch
import triton
import triton.language as tl

from ._launch import as_matrix, launch, row_stride, target_of
from ._pdl import prefetch_vector, wait
from ._plans import planned
from ._tuning import config

MAX_CHANNELS = 16384


@triton.jit
def counted_in(ALIGN: tl.constexpr, count):
    """``count``, a multiple of ALIGN, in a form that lets the compiler know: it learns by itself of multiples of 16 alone."""
    return count // ALIGN * ALIGN


@triton.jit
def load_piece(ptr, row, column, stride_row, inside, MASKED: tl.constexpr):
    ptrs = ptr + row[:, None] * stride_row + column[None, :]
    if MASKED:
        return tl.load(ptrs, mask=inside[None, :], other=0.0).to(tl.float32)
    else:
        return tl.load(ptrs).to(tl.float32)


@triton.jit
def load_parameter(ptr, row, column, inside):
    """Once a row (+ row * 0): each lane loads what its columns need, which one load for all rows would have to be shuffled to."""
    return tl.load(ptr + column[None, :] + row[:, None] * 0, mask=inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def gather(
    x_ptr,
    branch_ptr,
    scale_ptr,
    total_ptr,
    row,
    column,
    inside,
    stored,
    channels,
    stride_x_row,
    stride_branch_row,
    MASKED: tl.constexpr,
):
    """One piece of the rows: the input, or the sum as it is rounded and stored."""
    x = load_piece(x_ptr, row, column, stride_x_row, inside, MASKED)
    if branch_ptr is not None:
        branch = load_piece(branch_ptr, row, column, stride_branch_row, inside, MASKED)
        if scale_ptr is not None:
            branch *= load_parameter(scale_ptr, row, column, inside)
        rounded = (x + branch).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row[:, None] * channels + column[None, :], rounded, mask=stored)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def centre(x, mean, inside, MASKED: tl.constexpr):
    x -= mean[:, None]
    return tl.where(inside[None, :], x, 0.0) if MASKED else x


@triton.jit
def affine(centred, rstd, weight_ptr, bias_ptr, row, column, inside):
    """One piece of the rows, normalized; 0 where there is no column."""
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= load_parameter(weight_ptr, row, column, inside)
    if bias_ptr is not None:
        y += load_parameter(bias_ptr, row, column, inside)
    return y


@triton.jit
def prefetch_parameters(scale_ptr, weight_ptr, bias_ptr, channels, BLOCK_C: tl.constexpr, TAIL: tl.constexpr):
    LENGTH: tl.constexpr = 2 * BLOCK_C if TAIL else BLOCK_C
    prefetch_vector(scale_ptr, 0, channels, LENGTH)
    prefetch_vector(weight_ptr, 0, channels, LENGTH)
    prefetch_vector(bias_ptr, 0, channels, LENGTH)


@triton.jit
def _layer_norm_forward(
    x_ptr,  # [rows, channels]: the input, or the residual
    branch_ptr,  # [rows, channels] or None
    scale_ptr,  # [channels] or None: LayerScale
    weight_ptr,  # [channels] or None
    bias_ptr,  # [channels] or None
    y_ptr,  # [rows, channels]
    total_ptr,  # [rows, channels] or None
    mean_ptr,  # [rows] or None
    rstd_ptr,  # [rows], with the mean
    rows,
    channels,
    stride_x_row,
    stride_branch_row,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TAIL: tl.constexpr,  # of the row, a second piece; 0 for none
    EVEN: tl.constexpr,  # the pieces are as long as the row
    ALIGN: tl.constexpr,  # divides channels and strides
    PDL: tl.constexpr,
):
    channels = counted_in(ALIGN, channels)
    stride_x_row = counted_in(ALIGN, stride_x_row)
    stride_branch_row = counted_in(ALIGN, stride_branch_row)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)  # reads the last row again instead of a mask on every load; its results are not stored
    MASKED: tl.constexpr = TAIL == 0 and not EVEN
    column = tl.arange(0, BLOCK_C)
    inside = column < channels if MASKED else column >= 0
    stored = valid[:, None] & inside[None, :]
    if PDL:
        prefetch_parameters(scale_ptr, weight_ptr, bias_ptr, channels, BLOCK_C, TAIL)
        wait()
    # fmt: off
    x = gather(x_ptr, branch_ptr, scale_ptr, total_ptr, row, column, inside, stored, channels,
                stride_x_row, stride_branch_row, MASKED)
    mean = tl.sum(x, axis=1)
    if TAIL:
        tail_column = BLOCK_C + tl.arange(0, TAIL)
        tail_inside = tail_column >= 0 if EVEN else tail_column < channels
        tail_stored = valid[:, None] & tail_inside[None, :]
        tail = gather(x_ptr, branch_ptr, scale_ptr, total_ptr, row, tail_column, tail_inside, tail_stored, channels,
                       stride_x_row, stride_branch_row, not EVEN)
        mean += tl.sum(tail, axis=1)
    # fmt: on
    mean /= channels
    x = centre(x, mean, inside, MASKED)
    squares = tl.sum(x * x, axis=1)
    if TAIL:
        tail = centre(tail, mean, tail_inside, not EVEN)
        squares += tl.sum(tail * tail, axis=1)
    rstd = 1.0 / tl.sqrt_rn(squares / channels + eps)
    y = affine(x, rstd, weight_ptr, bias_ptr, row, column, inside)
    tl.store(y_ptr + row[:, None] * channels + column[None, :], y.to(y_ptr.dtype.element_ty), mask=stored)
    if TAIL:
        y_tail = affine(tail, rstd, weight_ptr, bias_ptr, row, tail_column, tail_inside)
        tl.store(y_ptr + row[:, None] * channels + tail_column[None, :], y_tail.to(y_ptr.dtype.element_ty), mask=tail_stored)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=valid)
        tl.store(rstd_ptr + row, rstd, mask=valid)


def pieces(channels: int) -> dict[str, int | bool]:
    """A row as one power of two, or as two where those leave fewer lanes idle: 768 = 512 + 256, 1280 = 1024 + 256."""
    block = max(16, triton.next_power_of_2(channels))
    rest = channels - block // 2
    tail = max(16, triton.next_power_of_2(rest))
    if tail >= block // 2:
        return {"BLOCK_C": block, "TAIL": 0, "EVEN": block == channels}
    return {"BLOCK_C": block // 2, "TAIL": tail, "EVEN": tail == rest}


def align_of(*counts: int) -> int:
    """8 where that divides all of them and 16 does not, else 1."""
    common = math.gcd(*counts)
    return 8 if common % 8 == 0 and common % 16 else 1


@planned
def launch_layer_norm_forward(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
    total: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
) -> None:
    """Fills y, total, and mean and rstd unless None. Matrices are [rows, channels] with last stride 1, or contiguous
    [..., channels]; y and total are contiguous."""
    rows, channels, stride = as_matrix(x)
    row = config("layer_norm_forward", target_of(x), channels=channels)
    launch(
        "layer_norm_forward",
        _layer_norm_forward,
        (triton.cdiv(rows, row["BLOCK_ROWS"]),),
        x,
        row,
        x_ptr=x,
        branch_ptr=branch,
        scale_ptr=scale,
        weight_ptr=weight,
        bias_ptr=bias,
        y_ptr=y,
        total_ptr=total,
        mean_ptr=mean,
        rstd_ptr=rstd,
        rows=rows,
        channels=channels,
        stride_x_row=stride,
        stride_branch_row=row_stride(branch),
        eps=eps,
        ALIGN=align_of(channels, stride, row_stride(branch)),
        **pieces(channels),
    )
