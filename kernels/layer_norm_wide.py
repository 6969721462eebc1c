"""Layer norm of rows too wide for registers (more than ``layer_norm.MAX_CHANNELS`` channels), forward and backward.

The equations and shapes of ``layer_norm``, walked in column blocks: statistics in one pass (blocks merged by Chan, Golub &
LeVeque 1979), results in a second, so each row is read twice. Weight gradients get a kernel of their own over (strip of
rows, column block), their partial sums added up by ``reduce``.
Reference: ``fastvit.reference.layer_norm`` and ``add_layer_norm``.
"""

import torch
import triton
import triton.language as tl

from ._launch import as_matrix, launch, row_stride, target_of
from ._plans import planned
from ._tuning import config


@triton.jit
def _wide_forward(
    x_ptr,  # [rows, channels]
    branch_ptr,  # [rows, channels] or None
    scale_ptr,  # [channels] or None
    weight_ptr,  # [channels] or None
    bias_ptr,  # [channels] or None
    y_ptr,  # [rows, channels]
    total_ptr,  # [rows, channels] or None
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    channels,
    stride_x_row,
    stride_branch_row,
    eps,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mean = 0.0
    squares = 0.0
    for start in range(0, channels, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = column < channels
        x = tl.load(x_ptr + row * stride_x_row + column, mask=inside, other=0.0).to(tl.float32)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + row * stride_branch_row + column, mask=inside, other=0.0).to(tl.float32)
            if scale_ptr is not None:
                branch *= tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
            rounded = (x + branch).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * channels + column, rounded, mask=inside)
            x = rounded.to(tl.float32)
        count = tl.minimum(BLOCK_C, channels - start).to(tl.float32)
        block_mean = tl.sum(x, axis=0) / count
        centred = tl.where(inside, x - block_mean, 0.0)
        delta = block_mean - mean
        share = count / (start + count)
        mean += delta * share
        squares += tl.sum(centred * centred, axis=0) + delta * delta * start * share
    rstd = 1.0 / tl.sqrt_rn(squares / channels + eps)
    for start in range(0, channels, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = column < channels
        x = tl.load(x_ptr + row * stride_x_row + column, mask=inside, other=0.0).to(tl.float32)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + row * stride_branch_row + column, mask=inside, other=0.0).to(tl.float32)
            if scale_ptr is not None:
                branch *= tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
            x = (x + branch).to(total_ptr.dtype.element_ty).to(tl.float32)
        y = (x - mean) * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * channels + column, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _wide_backward_input(
    dy_ptr,  # [rows, channels]
    dtotal_ptr,  # [rows, channels] or None
    x_ptr,  # [rows, channels]
    scale_ptr,  # [channels] or None
    weight_ptr,  # [channels] or None
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    dx_ptr,  # [rows, channels]
    dbranch_ptr,  # [rows, channels] or None
    channels,
    stride_dy_row,
    stride_dtotal_row,
    stride_x_row,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    g_total = tl.zeros([BLOCK_C], dtype=tl.float32)
    projection = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, channels, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = column < channels
        x = tl.load(x_ptr + row * stride_x_row + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + row * stride_dy_row + column, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        g_total += g
        projection += g * (x - mean) * rstd
    g_mean = tl.sum(g_total, axis=0) / channels
    projection_mean = tl.sum(projection, axis=0) / channels
    for start in range(0, channels, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        inside = column < channels
        x = tl.load(x_ptr + row * stride_x_row + column, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + row * stride_dy_row + column, mask=inside, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            g *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        dx = rstd * (g - g_mean - (x - mean) * rstd * projection_mean)
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + row * stride_dtotal_row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * channels + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if dbranch_ptr is not None:
            if scale_ptr is not None:
                dx *= tl.load(scale_ptr + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(dbranch_ptr + row * channels + column, dx.to(dbranch_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _wide_backward_weight(
    dy_ptr,  # [rows, channels]
    dx_ptr,  # [rows, channels]: the finished gradient of the sum
    x_ptr,  # [rows, channels]
    branch_ptr,  # [rows, channels] or None
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    dweight_ptr,  # [strips, channels] or None
    dbias_ptr,  # [strips, channels] or None
    dscale_ptr,  # [strips, channels] or None
    rows,
    channels,
    rows_per_strip,
    stride_dy_row,
    stride_x_row,
    stride_branch_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    strip = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    first = strip * rows_per_strip
    last = tl.minimum(first + rows_per_strip, rows)
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
    dscale = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        valid = row < last
        mask = valid[:, None] & inside[None, :]
        dy = tl.load(dy_ptr + row[:, None] * stride_dy_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
        dbias += dy
        if dweight_ptr is not None:
            mean = tl.load(mean_ptr + row, mask=valid, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)[:, None]
            x = tl.load(x_ptr + row[:, None] * stride_x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
            dweight += dy * (x - mean) * rstd
        if dscale_ptr is not None:
            dx = tl.load(dx_ptr + row[:, None] * channels + column[None, :], mask=mask, other=0.0).to(tl.float32)
            branch = tl.load(branch_ptr + row[:, None] * stride_branch_row + column[None, :], mask=mask, other=0.0)
            dscale += dx * branch.to(tl.float32)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + strip * channels + column, tl.sum(dweight, axis=0), mask=inside)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + strip * channels + column, tl.sum(dbias, axis=0), mask=inside)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + strip * channels + column, tl.sum(dscale, axis=0), mask=inside)


@planned
def launch_wide_forward(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
    total: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """As ``launch_layer_norm_forward``, for any number of channels; mean and rstd are always filled."""
    rows, channels, stride = as_matrix(x)
    launch(
        "layer_norm_wide",
        _wide_forward,
        (rows,),
        x,
        config("layer_norm_wide", target_of(x)),
        x_ptr=x,
        branch_ptr=branch,
        scale_ptr=scale,
        weight_ptr=weight,
        bias_ptr=bias,
        y_ptr=y,
        total_ptr=total,
        mean_ptr=mean,
        rstd_ptr=rstd,
        channels=channels,
        stride_x_row=stride,
        stride_branch_row=row_stride(branch),
        eps=eps,
    )


@planned
def launch_wide_backward(
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
    """As ``launch_layer_norm_backward``; the partial sums have any number of strips."""
    rows, channels = x.shape
    launch(
        "layer_norm_wide",
        _wide_backward_input,
        (rows,),
        x,
        config("layer_norm_wide", target_of(x)),
        dy_ptr=dy,
        dtotal_ptr=dtotal,
        x_ptr=x,
        scale_ptr=scale,
        weight_ptr=weight,
        mean_ptr=mean,
        rstd_ptr=rstd,
        dx_ptr=dx,
        dbranch_ptr=dbranch,
        channels=channels,
        stride_dy_row=dy.stride(0),
        stride_dtotal_row=0 if dtotal is None else dtotal.stride(0),
        stride_x_row=x.stride(0),
    )
    partial = dweight if dweight is not None else dbias if dbias is not None else dscale
    if partial is None:
        return
    row = config("layer_norm_wide_weight", target_of(x))
    launch(
        "layer_norm_wide_weight",
        _wide_backward_weight,
        (partial.shape[0], triton.cdiv(channels, row["BLOCK_C"])),
        x,
        row,
        dy_ptr=dy,
        dx_ptr=dx,
        x_ptr=x,
        branch_ptr=branch,
        mean_ptr=mean,
        rstd_ptr=rstd,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        dscale_ptr=dscale,
        rows=rows,
        channels=channels,
        rows_per_strip=triton.cdiv(rows, partial.shape[0]),
        stride_dy_row=dy.stride(0),
        stride_x_row=x.stride(0),
        stride_branch_row=0 if branch is None else branch.stride(0),
    )
