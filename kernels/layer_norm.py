"""Layer norm over the channels of a token, alone or after a residual addition, forward and backward (Ba et al. 2016).

    total = residual + layer_scale · branch                      (add_layer_norm only)
    y     = (total − mean) · rstd · weight + bias                mean, rstd = 1/sqrt(var + eps) over the channels
    dx    = rstd · (g − mean(g) − x̂ · mean(g · x̂)) + d_total     g = dy · weight,  x̂ = (x − mean) · rstd
    d_branch = layer_scale · dx,  dweight = Σ dy · x̂,  dbias = Σ dy,  d_layer_scale = Σ dx · branch   (sums over rows)

Shapes: residual, branch, y, total, and their gradients [rows, channels], last stride 1; weight, bias, layer_scale
[channels]; mean, rstd [rows] float32, saved for the backward pass. Each tensor is read once and written once; a row lives
in registers, in forward up to 2048 channels in those of one warp, whose sums need no barrier. So channels ≤ MAX_CHANNELS, in
backward MAX_CHANNELS_BACKWARD (``layer_norm_wide`` takes over from there).
Weight gradients leave as partial sums [programs, channels] in float32, added up by ``reduce``: no atomics, the same bits
every time.
Reference: ``fastvit.reference.layer_norm`` and ``add_layer_norm``.
"""

import torch
import triton
import triton.language as tl

from ._launch import as_matrix, launch, row_stride, target_of
from ._plans import planned
from ._tuning import config

MAX_CHANNELS = 16384
MAX_CHANNELS_BACKWARD = 8192  # its three running sums share the registers with the row


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
):
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
def _layer_norm_backward(
    dy_ptr,  # [rows, channels]
    dtotal_ptr,  # [rows, channels] or None: the gradient that reaches the sum directly
    x_ptr,  # [rows, channels]: what was normalized
    branch_ptr,  # [rows, channels] or None: needed for d_layer_scale only
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
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    inside = column < channels
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
    dscale = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        valid = row < last
        mask = valid[:, None] & inside[None, :]
        mean = tl.load(mean_ptr + row, mask=valid, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)[:, None]
        x = tl.load(x_ptr + row[:, None] * stride_x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * stride_dy_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        normalized = (x - mean) * rstd  # where the mask is not, whatever it is, dy is 0
        if dweight_ptr is not None:
            dweight += dy * normalized
        if dbias_ptr is not None:
            dbias += dy
        g = dy
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        g_mean = (tl.sum(g, axis=1) / channels)[:, None]
        projection = (tl.sum(g * normalized, axis=1) / channels)[:, None]
        dx = rstd * (g - g_mean - normalized * projection)
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + row[:, None] * stride_dtotal_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row[:, None] * channels + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dscale_ptr is not None:
            branch = tl.load(branch_ptr + row[:, None] * stride_branch_row + column[None, :], mask=mask, other=0.0)
            dscale += dx * branch.to(tl.float32)
        if dbranch_ptr is not None:
            if scale_ptr is not None:
                dx *= tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            tl.store(dbranch_ptr + row[:, None] * channels + column[None, :], dx.to(dbranch_ptr.dtype.element_ty), mask=mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * channels + column, tl.sum(dweight, axis=0), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * channels + column, tl.sum(dbias, axis=0), mask=inside)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + program * channels + column, tl.sum(dscale, axis=0), mask=inside)


def pieces(channels: int) -> dict[str, int | bool]:
    """A row as one power of two, or as two where those leave fewer lanes idle: 768 = 512 + 256, 1280 = 1024 + 256."""
    block = max(16, triton.next_power_of_2(channels))
    rest = channels - block // 2
    tail = max(16, triton.next_power_of_2(rest))
    if tail >= block // 2:
        return {"BLOCK_C": block, "TAIL": 0, "EVEN": block == channels}
    return {"BLOCK_C": block // 2, "TAIL": tail, "EVEN": tail == rest}


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
        **pieces(channels),
    )


def backward_programs(x: torch.Tensor) -> int:
    """How many partial sums the backward pass leaves for each weight gradient."""
    rows, channels = x.shape
    row = config("layer_norm_backward", target_of(x), channels=channels)
    return min(triton.cdiv(rows, row["BLOCK_ROWS"]), row["PROGRAMS"])


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
    """Fills dx, dbranch, and the partial sums dweight, dbias, dscale [``backward_programs(x)``, channels] float32."""
    rows, channels = x.shape
    row = config("layer_norm_backward", target_of(x), channels=channels)
    programs = backward_programs(x)
    launch(
        "layer_norm_backward",
        _layer_norm_backward,
        (programs,),
        x,
        row,
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
        stride_dy_row=dy.stride(0),
        stride_dtotal_row=0 if dtotal is None else dtotal.stride(0),
        stride_x_row=x.stride(0),
        stride_branch_row=0 if branch is None else branch.stride(0),
        BLOCK_C=max(16, triton.next_power_of_2(channels)),
    )
