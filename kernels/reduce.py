"""Column sums, deterministic: the second stage of every weight gradient, and both stages of a bias gradient.

out[s, c] = Σ x[r, c] over the rows r of strip s, in float32 and in a fixed order. Reference: ``x.sum(0)``.
Shapes: x [rows, channels] of any floating-point dtype, rows of any stride; out [strips, channels] contiguous. One launch sums up
to MATRICES matrices, each of rows and channels of its own, all into as many strips: those of one backward pass.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch, target_of
from ._plans import planned
from ._tuning import config

MATRICES = 4


@triton.jit
def _strip_sum(x_ptr, out_ptr, rows, channels, stride_x_row, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    strip = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    rows_per_strip = tl.cdiv(rows, tl.num_programs(0))
    first = strip * rows_per_strip
    last = tl.minimum(first + rows_per_strip, rows)
    total = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        mask = (row < last)[:, None] & inside[None, :]
        total += tl.load(x_ptr + row[:, None] * stride_x_row + column[None, :], mask=mask, other=0.0).to(tl.float32)
    out = tl.sum(total, axis=0)
    tl.store(out_ptr + strip * channels + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _column_sums(
    x0_ptr,  # [rows, channels]; the other matrices likewise, or None
    x1_ptr,
    x2_ptr,
    x3_ptr,
    out0_ptr,  # [strips, channels]
    out1_ptr,
    out2_ptr,
    out3_ptr,
    rows0,
    rows1,
    rows2,
    rows3,
    channels0,
    channels1,
    channels2,
    channels3,
    stride_x0_row,
    stride_x1_row,
    stride_x2_row,
    stride_x3_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    matrix = tl.program_id(2)
    if matrix == 0:
        _strip_sum(x0_ptr, out0_ptr, rows0, channels0, stride_x0_row, BLOCK_ROWS, BLOCK_C)
    if x1_ptr is not None:
        if matrix == 1:
            _strip_sum(x1_ptr, out1_ptr, rows1, channels1, stride_x1_row, BLOCK_ROWS, BLOCK_C)
    if x2_ptr is not None:
        if matrix == 2:
            _strip_sum(x2_ptr, out2_ptr, rows2, channels2, stride_x2_row, BLOCK_ROWS, BLOCK_C)
    if x3_ptr is not None:
        if matrix == 3:
            _strip_sum(x3_ptr, out3_ptr, rows3, channels3, stride_x3_row, BLOCK_ROWS, BLOCK_C)


def strips_for(rows: int, x: torch.Tensor) -> int:
    """How many strips the first of two stages cuts ``rows`` into."""
    return min(triton.cdiv(rows, 256), config("column_sum", target_of(x), rows=rows)["MAX_STRIPS"])


@planned
def launch_column_sums(*tensors: torch.Tensor) -> None:
    """Fills the second half of ``tensors`` from the first half: out [strips, channels], or [channels] for one strip, contiguous,
    from x [rows, channels], whose last stride is 1. At most MATRICES of either, all with as many strips."""
    count = len(tensors) // 2
    if count > MATRICES:
        raise ValueError(f"{count} matrices to be summed up in one launch; expected at most {MATRICES}")
    row = config("column_sum", target_of(tensors[0]), rows=max(x.shape[0] for x in tensors[:count]))
    arguments: dict[str, torch.Tensor | int | None] = {}
    for number in range(MATRICES):
        x, out = (tensors[number], tensors[count + number]) if number < count else (None, None)
        arguments |= {
            f"x{number}_ptr": x,
            f"out{number}_ptr": out,
            f"rows{number}": 0 if x is None else x.shape[0],
            f"channels{number}": 0 if x is None else x.shape[1],
            f"stride_x{number}_row": 0 if x is None else x.stride(0),
        }
    out, columns = tensors[count], max(x.shape[1] for x in tensors[:count])
    grid = (out.shape[0] if out.dim() == 2 else 1, triton.cdiv(columns, row["BLOCK_C"]), count)
    launch("column_sum", _column_sums, grid, tensors[0], row, **arguments)
