"""Column sums, deterministic: the second stage of every weight gradient, and both stages of a bias gradient.

out[s, c] = Σ x[r, c] over the rows r of strip s, in float32 and in a fixed order. Reference: ``x.sum(0)``.
Shapes: x [rows, channels] of any floating-point dtype, rows of any stride; out [strips, channels] contiguous. One launch sums up
to MATRICES matrices, each of rows and channels of its own, of two dtypes at most, into as many strips of one dtype: those of one
backward pass, a whole block's included. The first may be a product of two, out[s, c] = Σ x[r, c] · factor[r, c], as the gradient
of LayerScale is.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch, target_of
from ._plans import planned
from ._tuning import config

MATRICES = 12  # what a block with LayerScale and three projections has to sum up
ROWS = [f"rows{number}" for number in range(MATRICES)]  # change with the batch; nothing is gained by knowing their factors


@triton.jit
def _total(
    x_ptr,
    factor_ptr,
    product,
    first,
    last,
    column,
    inside,
    stride,
    stride_factor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sums of x, or where it is a ``product`` of x · factor, over the rows from ``first`` to ``last``."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        mask = (row < last)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if factor_ptr is not None:
            factor = factor_ptr + row[:, None] * stride_factor + column[None, :]
            x *= tl.load(factor, mask=mask & product, other=1.0).to(tl.float32)
        total += x
    return tl.sum(total, axis=0)


# fmt: off
@triton.jit
def _or_next(block, x_ptr, other_ptr, other, out_ptr, rows, channels, stride, first, end, next_x_ptr, next_out_ptr, next_rows,
             next_channels, next_stride, BLOCK_C: tl.constexpr):
    """The matrix given, or the next one if ``block`` is not before ``end``, the first of its blocks, and where they end.
    ``other``: it has not the first one's dtype, and is ``other_ptr``, which has the same until there is such a matrix."""
    if next_x_ptr is not None:
        beyond = block >= end
        if next_x_ptr.dtype == x_ptr.dtype:
            x_ptr = tl.where(beyond, next_x_ptr, x_ptr)
        elif other_ptr.dtype == x_ptr.dtype:
            other_ptr = next_x_ptr
        else:
            other_ptr = tl.where(beyond, next_x_ptr, other_ptr)
        other = tl.where(beyond, next_x_ptr.dtype != x_ptr.dtype, other)
        out_ptr = tl.where(beyond, next_out_ptr, out_ptr)
        rows = tl.where(beyond, next_rows, rows)
        channels = tl.where(beyond, next_channels, channels)
        stride = tl.where(beyond, next_stride, stride)
        first = tl.where(beyond, end, first)
        end += tl.cdiv(next_channels, BLOCK_C)
    return x_ptr, other_ptr, other, out_ptr, rows, channels, stride, first, end


@triton.jit(do_not_specialize=ROWS)
def _column_sums(
    factor_ptr,  # [rows, channels], of the first matrix, of any dtype; or None
    stride_factor,
    # [rows, channels] each; None beyond the last
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr, x8_ptr, x9_ptr, x10_ptr, x11_ptr,
    # [strips, channels] each
    out0_ptr, out1_ptr, out2_ptr, out3_ptr, out4_ptr, out5_ptr, out6_ptr, out7_ptr, out8_ptr, out9_ptr, out10_ptr, out11_ptr,
    rows0, rows1, rows2, rows3, rows4, rows5, rows6, rows7, rows8, rows9, rows10, rows11,
    channels0, channels1, channels2, channels3, channels4, channels5, channels6, channels7, channels8, channels9, channels10,
    channels11,
    stride0, stride1, stride2, stride3, stride4, stride5, stride6, stride7, stride8, stride9, stride10, stride11,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(1)  # of columns, those of all matrices one after the other
    product = block < tl.cdiv(channels0, BLOCK_C)
    mine = x0_ptr, x0_ptr, False, out0_ptr, rows0, channels0, stride0, 0, tl.cdiv(channels0, BLOCK_C)
    mine = _or_next(block, *mine, x1_ptr, out1_ptr, rows1, channels1, stride1, BLOCK_C)
    mine = _or_next(block, *mine, x2_ptr, out2_ptr, rows2, channels2, stride2, BLOCK_C)
    mine = _or_next(block, *mine, x3_ptr, out3_ptr, rows3, channels3, stride3, BLOCK_C)
    mine = _or_next(block, *mine, x4_ptr, out4_ptr, rows4, channels4, stride4, BLOCK_C)
    mine = _or_next(block, *mine, x5_ptr, out5_ptr, rows5, channels5, stride5, BLOCK_C)
    mine = _or_next(block, *mine, x6_ptr, out6_ptr, rows6, channels6, stride6, BLOCK_C)
    mine = _or_next(block, *mine, x7_ptr, out7_ptr, rows7, channels7, stride7, BLOCK_C)
    mine = _or_next(block, *mine, x8_ptr, out8_ptr, rows8, channels8, stride8, BLOCK_C)
    mine = _or_next(block, *mine, x9_ptr, out9_ptr, rows9, channels9, stride9, BLOCK_C)
    mine = _or_next(block, *mine, x10_ptr, out10_ptr, rows10, channels10, stride10, BLOCK_C)
    mine = _or_next(block, *mine, x11_ptr, out11_ptr, rows11, channels11, stride11, BLOCK_C)
    x_ptr, other_ptr, other, out_ptr, rows, channels, stride, first, _ = mine
    strip = tl.program_id(0).to(tl.int64)
    column = (block - first) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < channels
    rows_per_strip = tl.cdiv(rows, tl.num_programs(0))
    begin = strip * rows_per_strip
    last = tl.minimum(begin + rows_per_strip, rows)
    if other_ptr.dtype == x_ptr.dtype:
        out = _total(x_ptr, factor_ptr, product, begin, last, column, inside, stride, stride_factor, BLOCK_ROWS, BLOCK_C)
    elif other:
        out = _total(other_ptr, None, False, begin, last, column, inside, stride, 0, BLOCK_ROWS, BLOCK_C)
    else:
        out = _total(x_ptr, factor_ptr, product, begin, last, column, inside, stride, stride_factor, BLOCK_ROWS, BLOCK_C)
    tl.store(out_ptr + strip * channels + column, out.to(out_ptr.dtype.element_ty), mask=inside)
# fmt: on


def strips_for(rows: int, x: torch.Tensor) -> int:
    """How many strips the first of two stages cuts ``rows`` into."""
    return min(triton.cdiv(rows, 256), config("column_sum", target_of(x), rows=rows)["MAX_STRIPS"])


@planned
def launch_column_sums(*tensors: torch.Tensor) -> None:
    """Fills the second half of ``tensors`` from the first half: out [strips, channels], or [channels] for one strip, contiguous,
    from x [rows, channels], whose last stride is 1. At most MATRICES of either, x of at most two dtypes, out all of one dtype and
    with as many strips."""
    _launch(None, tensors)


@planned
def launch_product_sums(factor: torch.Tensor, *tensors: torch.Tensor) -> None:
    """As ``launch_column_sums``, of the first matrix times ``factor`` [rows, channels], whose last stride is 1."""
    _launch(factor, tensors)


def _launch(factor: torch.Tensor | None, tensors: tuple[torch.Tensor, ...]) -> None:
    count = len(tensors) // 2
    if count > MATRICES:
        raise ValueError(f"{count} matrices to be summed up in one launch; expected at most {MATRICES}")
    matrices, results = tensors[:count], tensors[count:]
    dtypes = {x.dtype for x in matrices}
    if len(dtypes) > 2:
        raise TypeError(f"matrices of {len(dtypes)} dtypes to be summed up in one launch; expected at most 2")
    row = config("column_sum", target_of(matrices[0]), rows=max(x.shape[0] for x in matrices))
    arguments: dict[str, torch.Tensor | int | None] = {"factor_ptr": factor}
    arguments["stride_factor"] = None if factor is None else factor.stride(0)
    for number in range(MATRICES):
        x, out = (matrices[number], results[number]) if number < count else (None, None)
        arguments |= {
            f"x{number}_ptr": x,
            f"out{number}_ptr": out,
            f"rows{number}": None if x is None else x.shape[0],
            f"channels{number}": None if x is None else x.shape[1],
            f"stride{number}": None if x is None else x.stride(0),
        }
    strips = results[0].shape[0] if results[0].dim() == 2 else 1
    grid = (strips, sum(triton.cdiv(x.shape[1], row["BLOCK_C"]) for x in matrices))
    launch("column_sum", _column_sums, grid, matrices[0], row, **arguments)
