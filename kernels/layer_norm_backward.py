"""Gradients of layer norm over the channels of a token, alone or after a residual addition: ``layer_norm``'s, backward.

    dx    = rstd · (g − mean(g) − x̂ · mean(g · x̂)) + d_total     g = dy · weight,  x̂ = (x − mean) · rstd
    d_branch = layer_scale · dx,  dweight = Σ dy · x̂,  dbias = Σ dy,  d_layer_scale = Σ dx · branch   (sums over rows)

Shapes as in ``layer_norm``: x and gradients of it [rows, channels], last stride 1; mean, rstd [rows] float32. A program
walks over rows, one or more a warp, and each warp keeps running sums of the weight gradients; they leave as partial sums
[programs, channels] in float32, added up by ``reduce``: no atomics, the same bits every time. Channels ≤
MAX_CHANNELS_BACKWARD (``layer_norm_wide`` takes over from there).
Reference: ``fastvit.reference.layer_norm`` and ``add_layer_norm``.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch, target_of
from ._plans import planned
from ._tuning import config
from .layer_norm import align_of, counted_in, pieces

MAX_CHANNELS_BACKWARD = 8192  # its three running sums share the registers with the row


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
    channels = counted_in(ALIGN, channels)
    stride_dy_row = counted_in(ALIGN, stride_dy_row)
    stride_dtotal_row = counted_in(ALIGN, stride_dtotal_row)
    stride_x_row = counted_in(ALIGN, stride_x_row)
    stride_branch_row = counted_in(ALIGN, stride_branch_row)
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


def _backward_config(x: torch.Tensor, scaled: bool) -> dict[str, int]:
    channels = x.shape[1]
    if channels > 256 and channels % 16:  # with masks and narrow loads a row wants the registers of one twice as wide
        channels *= 2
    return config("layer_norm_backward", target_of(x), channels=channels, sums=3 if scaled else 2)


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
        ALIGN=align_of(channels, *strides),
        **pieces(channels),
    )
