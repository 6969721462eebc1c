"""Layer norm over the channels of a token, alone or after a residual addition, forward and backward (Ba et al. 2016).

    total = residual + layer_scale · branch                      (add_layer_norm only)
    y     = (total − mean) · rstd · weight + bias                mean, rstd = 1/sqrt(var + eps) over the channels
    dx    = rstd · (g − mean(g) − x̂ · mean(g · x̂)) + d_total     g = dy · weight,  x̂ = (x − mean) · rstd
    d_branch = layer_scale · dx,  dweight = Σ dy · x̂,  dbias = Σ dy,  d_layer_scale = Σ dx · branch   (sums over rows)

Shapes: residual, branch, y, total, and their gradients [rows, channels], last stride 1; weight, bias, layer_scale
[channels]; mean, rstd [rows] float32, saved for the backward pass. Each tensor is read once and written once; a row lives
in registers, in those of one warp where they suffice, whose sums need no barrier. So channels ≤ MAX_CHANNELS, in backward
MAX_CHANNELS_BACKWARD (``layer_norm_wide`` takes over from there).
In backward a program walks over rows, one or more a warp, and each warp keeps running sums of the weight gradients; they
leave as partial sums [programs, channels] in float32, added up by ``reduce``: no atomics, the same bits every time.
Reference: ``fastvit.reference.layer_norm`` and ``add_layer_norm``.
"""

import math

import torch
import triton
import triton.language as tl

from ._launch import as_matrix, launch, row_stride, target_of
from ._plans import planned
from ._tuning import config

MAX_CHANNELS = 16384
MAX_CHANNELS_BACKWARD = 8192  # its three running sums share the registers with the row


@triton.jit
def _counted_in(ALIGN: tl.constexpr, count):
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
def _gather(
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
            branch *= tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        rounded = (x + branch).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row[:, None] * channels + column[None, :], rounded, mask=stored)
        x = rounded.to(tl.float32)
    return x


@triton.jit
def _centre(x, mean, inside, MASKED: tl.constexpr):
    x -= mean[:, None]
    return tl.where(inside[None, :], x, 0.0) if MASKED else x


@triton.jit
def _emit(centred, rstd, weight_ptr, bias_ptr, y_ptr, row, column, inside, stored, channels):
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * channels + column[None, :], y.to(y_ptr.dtype.element_ty), mask=stored)


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
):
    channels = _counted_in(ALIGN, channels)
    stride_x_row = _counted_in(ALIGN, stride_x_row)
    stride_branch_row = _counted_in(ALIGN, stride_branch_row)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = row < rows
    row = tl.minimum(row, rows - 1)  # reads the last row again instead of a mask on every load; its results are not stored
    MASKED: tl.constexpr = TAIL == 0 and not EVEN
    column = tl.arange(0, BLOCK_C)
    inside = column < channels if MASKED else column >= 0
    stored = valid[:, None] & inside[None, :]
    # fmt: off
    x = _gather(x_ptr, branch_ptr, scale_ptr, total_ptr, row, column, inside, stored, channels,
                stride_x_row, stride_branch_row, MASKED)
    mean = tl.sum(x, axis=1)
    if TAIL:
        tail_column = BLOCK_C + tl.arange(0, TAIL)
        tail_inside = tail_column >= 0 if EVEN else tail_column < channels
        tail_stored = valid[:, None] & tail_inside[None, :]
        tail = _gather(x_ptr, branch_ptr, scale_ptr, total_ptr, row, tail_column, tail_inside, tail_stored, channels,
                       stride_x_row, stride_branch_row, not EVEN)
        mean += tl.sum(tail, axis=1)
    # fmt: on
    mean /= channels
    x = _centre(x, mean, inside, MASKED)
    squares = tl.sum(x * x, axis=1)
    if TAIL:
        tail = _centre(tail, mean, tail_inside, not EVEN)
        squares += tl.sum(tail * tail, axis=1)
    rstd = 1.0 / tl.sqrt_rn(squares / channels + eps)
    _emit(x, rstd, weight_ptr, bias_ptr, y_ptr, row, column, inside, stored, channels)
    if TAIL:
        _emit(tail, rstd, weight_ptr, bias_ptr, y_ptr, row, tail_column, tail_inside, tail_stored, channels)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=valid)
        tl.store(rstd_ptr + row, rstd, mask=valid)


@triton.jit
def _fold(start, LENGTH: tl.constexpr, PART: tl.constexpr):
    """Columns from ``start`` on as [parts, 1, part]: warps are given rows before parts, so that a row stays in one warp."""
    WIDTH: tl.constexpr = min(PART, LENGTH)
    return start + tl.arange(0, LENGTH // WIDTH)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def _normalized(x_ptr, dy_ptr, weight_ptr, mean, rstd, row, column, inside, valid, stride_x_row, stride_dy_row):
    """(x̂, dy, g) of one piece of the rows; dy is 0 where there is no row or column, whatever x̂ is there.

    Each warp loads the weight for its own rows (+ row * 0): a shared copy would have to be exchanged behind a barrier.
    """
    x = tl.load(x_ptr + row * stride_x_row + column, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dy_row + column, mask=valid & inside, other=0.0).to(tl.float32)
    g = dy
    if weight_ptr is not None:
        g *= tl.load(weight_ptr + column + row * 0, mask=inside, other=0.0).to(tl.float32)
    return (x - mean) * rstd, dy, g


@triton.jit
def _dx(
    normalized,
    g,
    g_mean,
    projection,
    rstd,
    dtotal_ptr,
    branch_ptr,
    scale_ptr,
    dx_ptr,
    dbranch_ptr,
    dscale,
    row,
    column,
    inside,
    valid,
    channels,
    stride_dtotal_row,
    stride_branch_row,
):
    """Stores one piece of the gradients of the rows; returns the running sum for d_layer_scale."""
    stored = valid & inside
    dx = g * rstd - (normalized * projection + g_mean)
    if dtotal_ptr is not None:
        dx += tl.load(dtotal_ptr + row * stride_dtotal_row + column, mask=stored, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * channels + column, dx.to(dx_ptr.dtype.element_ty), mask=stored)
    if branch_ptr is not None:
        dscale += dx * tl.load(branch_ptr + row * stride_branch_row + column, mask=stored, other=0.0).to(tl.float32)
    if dbranch_ptr is not None:
        if scale_ptr is not None:
            dx *= tl.load(scale_ptr + column + row * 0, mask=inside, other=0.0).to(tl.float32)
        tl.store(dbranch_ptr + row * channels + column, dx.to(dbranch_ptr.dtype.element_ty), mask=stored)
    return dscale


@triton.jit
def _leave(partial_ptr, sums, column, inside, program, channels):
    """Stores the sum over a program's rows of one piece as its row of the partial sums."""
    if partial_ptr is not None:
        tl.store(partial_ptr + program * channels + column, tl.sum(sums, axis=1, keep_dims=True), mask=inside)


@triton.jit
def _layer_norm_backward(
    dy_ptr,  # [rows, channels]
    dtotal_ptr,  # [rows, channels] or None: the gradient that reaches the sum directly
    x_ptr,  # [rows, channels]: what was normalized
    branch_ptr,  # [rows, channels] or None: with dscale
    scale_ptr,  # [channels] or None
    weight_ptr,  # [channels] or None
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    dx_ptr,  # [rows, channels]
    dbranch_ptr,  # [rows, channels] or None: where it differs from dx
    dweight_ptr,  # [programs, channels] or None
    dbias_ptr,  # [programs, channels] or None
    dscale_ptr,  # [programs, channels] or None
    rows,
    channels,
    rows_per_program,
    stride_dy_row,
    stride_dtotal_row,
    stride_x_row,
    stride_branch_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TAIL: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    PART: tl.constexpr,  # columns side by side, 8 a lane: the warps of a row; a longer row has several parts
):
    channels = _counted_in(ALIGN, channels)
    stride_dy_row = _counted_in(ALIGN, stride_dy_row)
    stride_dtotal_row = _counted_in(ALIGN, stride_dtotal_row)
    stride_x_row = _counted_in(ALIGN, stride_x_row)
    stride_branch_row = _counted_in(ALIGN, stride_branch_row)
    program = tl.program_id(0).to(tl.int64)
    column = _fold(0, BLOCK_C, PART)
    MASKED: tl.constexpr = TAIL == 0 and not EVEN
    inside = column < channels if MASKED else column >= 0
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    dweight = tl.zeros([column.shape[0], BLOCK_ROWS, column.shape[2]], dtype=tl.float32)
    dbias = tl.zeros_like(dweight)
    dscale = tl.zeros_like(dweight)
    if TAIL:
        tail_column = _fold(BLOCK_C, TAIL, PART)
        tail_inside = tail_column >= 0 if EVEN else tail_column < channels
        tail_dweight = tl.zeros([tail_column.shape[0], BLOCK_ROWS, tail_column.shape[2]], dtype=tl.float32)
        tail_dbias = tl.zeros_like(tail_dweight)
        tail_dscale = tl.zeros_like(tail_dweight)
    # fmt: off
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)[None, :, None]
        valid = row < last
        row = tl.minimum(row, last - 1)  # as in forward
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        normalized, dy, g = _normalized(x_ptr, dy_ptr, weight_ptr, mean, rstd, row, column, inside, valid,
                                        stride_x_row, stride_dy_row)
        dweight += dy * normalized
        dbias += dy
        g_sum = tl.sum(g, axis=0)
        projection = tl.sum(g * normalized, axis=0)
        if TAIL:
            tail_normalized, dy, tail_g = _normalized(x_ptr, dy_ptr, weight_ptr, mean, rstd, row, tail_column, tail_inside, valid,
                                                      stride_x_row, stride_dy_row)
            tail_dweight += dy * tail_normalized
            tail_dbias += dy
            tail_g_sum = tl.sum(tail_g, axis=0)
            tail_projection = tl.sum(tail_g * tail_normalized, axis=0)
            if TAIL >= PART:
                g_sum += tail_g_sum
                projection += tail_projection
        g_sum = tl.sum(g_sum, axis=1)
        projection = tl.sum(projection, axis=1)
        if TAIL and TAIL < PART:
            g_sum += tl.sum(tail_g_sum, axis=1)
            projection += tl.sum(tail_projection, axis=1)
        g_mean = g_sum[None, :, None] * (rstd / channels)
        projection = projection[None, :, None] * (rstd / channels)
        dscale = _dx(normalized, g, g_mean, projection, rstd, dtotal_ptr, branch_ptr, scale_ptr, dx_ptr, dbranch_ptr, dscale,
                     row, column, inside, valid, channels, stride_dtotal_row, stride_branch_row)
        if TAIL:
            tail_dscale = _dx(tail_normalized, tail_g, g_mean, projection, rstd, dtotal_ptr, branch_ptr, scale_ptr, dx_ptr,
                              dbranch_ptr, tail_dscale, row, tail_column, tail_inside, valid, channels,
                              stride_dtotal_row, stride_branch_row)
    # fmt: on
    _leave(dweight_ptr, dweight, column, inside, program, channels)
    _leave(dbias_ptr, dbias, column, inside, program, channels)
    _leave(dscale_ptr, dscale, column, inside, program, channels)
    if TAIL:
        _leave(dweight_ptr, tail_dweight, tail_column, tail_inside, program, channels)
        _leave(dbias_ptr, tail_dbias, tail_column, tail_inside, program, channels)
        _leave(dscale_ptr, tail_dscale, tail_column, tail_inside, program, channels)


def pieces(channels: int) -> dict[str, int | bool]:
    """A row as one power of two, or as two where those leave fewer lanes idle: 768 = 512 + 256, 1280 = 1024 + 256."""
    block = max(16, triton.next_power_of_2(channels))
    rest = channels - block // 2
    tail = max(16, triton.next_power_of_2(rest))
    if tail >= block // 2:
        return {"BLOCK_C": block, "TAIL": 0, "EVEN": block == channels}
    return {"BLOCK_C": block // 2, "TAIL": tail, "EVEN": tail == rest}


def _align(*counts: int) -> int:
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
        ALIGN=_align(channels, stride, row_stride(branch)),
        **pieces(channels),
    )


def _backward_config(x: torch.Tensor, scaled: bool) -> dict[str, int]:
    return config("layer_norm_backward", target_of(x), channels=x.shape[1], sums=3 if scaled else 2)


def backward_programs(x: torch.Tensor, scaled: bool) -> int:
    """How many partial sums the backward pass leaves for each weight gradient; ``scaled``: d_layer_scale is one of them."""
    row = _backward_config(x, scaled)
    return min(triton.cdiv(x.shape[0], row["BLOCK_ROWS"]), row["PROGRAMS"])


@planned
def launch_layer_norm_backward(
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    x: torch.Tensor,
    branch: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor,
    dbranch: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    dscale: torch.Tensor | None,
) -> None:
    """Fills dx, dbranch, and the partial sums dweight, dbias, dscale [``backward_programs(…)``, channels] float32."""
    rows, channels = x.shape
    programs = backward_programs(x, dscale is not None)
    strides = [0 if matrix is None else matrix.stride(0) for matrix in (dy, dtotal, x, branch)]
    launch(
        "layer_norm_backward",
        _layer_norm_backward,
        (programs,),
        x,
        _backward_config(x, dscale is not None),
        dy_ptr=dy,
        dtotal_ptr=dtotal,
        x_ptr=x,
        branch_ptr=branch,
        scale_ptr=scale,
        weight_ptr=weight,
        mean_ptr=mean,
        rstd_ptr=rstd,
        dx_ptr=dx,
        dbranch_ptr=dbranch,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        dscale_ptr=dscale,
        rows=rows,
        channels=channels,
        rows_per_program=triton.cdiv(rows, max(programs, 1)),
        stride_dy_row=strides[0],
        stride_dtotal_row=strides[1],
        stride_x_row=strides[2],
        stride_branch_row=strides[3],
        ALIGN=_align(channels, *strides),
        **pieces(channels),
    )
