"""Column sums, deterministic: the second stage of every weight gradient, and both stages of a bias gradient.

out[s, c] = Σ x[r, c] over the rows r of strip s, in float32 and in a fixed order. Reference: ``x.sum(0)``.
Shapes: x [rows, channels] of any floating-point dtype, rows of any stride; out [strips, channels] contiguous.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch, target_of
from ._plans import planned
from ._tuning import config


@triton.jit
def _column_sum(
    x_ptr,  # [rows, channels]
    out_ptr,  # [strips, channels]
    rows,
    channels,
    rows_per_strip,
    stride_x_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    strip = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    first = strip * rows_per_strip
    last = tl.minimum(first + rows_per_strip, rows)
    total = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        mask = (row < last)[:, None] & inside[None, :]
        total += tl.load(x_ptr + row[:, None] * stride_x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    out = tl.sum(total, axis=0)
    tl.store(out_ptr + strip * channels + column, out.to(out_ptr.dtype.element_ty), mask=inside)


def strips_for(rows: int, x: torch.Tensor) -> int:
    """How many strips the first of two stages cuts ``rows`` into."""
    return min(triton.cdiv(rows, 256), config("column_sum", target_of(x), rows=rows)["MAX_STRIPS"])


@planned
def launch_column_sum(x: torch.Tensor, out: torch.Tensor) -> None:
    """Fills out [strips, channels] from x [rows, channels], whose last stride is 1."""
    rows, channels = x.shape
    strips = out.shape[0]
    row = config("column_sum", target_of(x), rows=rows)
    launch(
        "column_sum",
        _column_sum,
        (strips, triton.cdiv(channels, row["BLOCK_C"])),
        x,
        row,
        x_ptr=x,
        out_ptr=out,
        rows=rows,
        channels=channels,
        rows_per_strip=triton.cdiv(rows, strips),
        stride_x_row=x.stride(0),
    )
