"""Matrix product of few tiles, the residual sum and the LayerNorm that follow it: K is split among programs, one kernel ends it.

    total = residual + layer_scale · (Σ_s A_s · B_sᵀ + bias)        A_s, B_s: the columns of split s
    y     = (total − mean) · rstd · weight + beta                   as ``layer_norm``; not made where only the sum is wanted

The programs of ``linear`` leave float32 sums of their parts of K. The kernel that adds them up, in a fixed order, owns whole
rows, so the norm is no launch and no pass of its own, and the product is rounded once, within the total. Forward only. Shapes:
A [M, K], B [N, K] of one dtype, strides free; residual [M, N], last stride 1; vectors [N]; N ≤ MAX_CHANNELS.
Reference: ``fastvit.reference.linear`` and ``add_layer_norm``.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ._launch import as_matrix, launch, row_stride, target_of
from ._pdl import prefetch_share, wait
from ._plans import planned
from ._tuning import config, tuning
from .layer_norm import align_of, counted_in
from .linear import row_of
from .linear_split import MAX_SCRATCH, launch_parts

MAX_CHANNELS = 4096
MAX_PARTS = 8  # whose sums are all on their way to a program's registers at once
SHARED = 2  # times as long that a multiprocessor waits for its bytes from L2 when all draw at once


@triton.jit
def load_vector(ptr, column, inside):
    return tl.load(ptr + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _add_up_norm(
    partial_ptr,  # [PARTS, rows, channels] float32
    product_bias_ptr,  # [channels] or None
    residual_ptr,  # [rows, channels]
    scale_ptr,  # [channels] or None: LayerScale
    weight_ptr,  # [channels] or None
    bias_ptr,  # [channels] or None
    y_ptr,  # [rows, channels], or None for the sum alone
    total_ptr,  # [rows, channels]
    rows,
    channels,
    stride_residual_row,
    eps,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # a power of two that holds a row
    ALIGN: tl.constexpr,  # divides channels and strides
    PDL: tl.constexpr,
):
    """One row a program. All loads come before the first barrier, so that a row waits for memory once."""
    channels = counted_in(ALIGN, channels)
    stride_residual_row = counted_in(ALIGN, stride_residual_row)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    inside = column < channels
    if PDL:
        prefetch_share(product_bias_ptr, tl.program_id(0), channels)
        prefetch_share(scale_ptr, tl.program_id(0), channels)
        prefetch_share(weight_ptr, tl.program_id(0), channels)
        prefetch_share(bias_ptr, tl.program_id(0), channels)
        wait()
    residual = load_vector(residual_ptr + row * stride_residual_row, column, inside)
    partial_ptr += row * channels
    branch = load_vector(partial_ptr, column, inside)
    for part in tl.static_range(1, PARTS):
        branch += load_vector(partial_ptr + tl.full([], part, tl.int64) * rows * channels, column, inside)
    if weight_ptr is not None:
        weight = load_vector(weight_ptr, column, inside)
    if bias_ptr is not None:
        bias = load_vector(bias_ptr, column, inside)
    if product_bias_ptr is not None:
        branch += load_vector(product_bias_ptr, column, inside)
    if scale_ptr is not None:
        branch *= load_vector(scale_ptr, column, inside)
    rounded = (residual + branch).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * channels + column, rounded, mask=inside)
    if y_ptr is not None:
        total = rounded.to(tl.float32)
        mean = tl.sum(total, axis=0) / channels
        centred = tl.where(inside, total - mean, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=0) / channels + eps)
        y = centred * rstd
        if weight_ptr is not None:
            y *= weight
        if bias_ptr is not None:
            y += bias
        tl.store(y_ptr + row * channels + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def parts_of(a: torch.Tensor, b: torch.Tensor) -> int:
    """Into how many parts K is split for a [M, K] · b [N, K]ᵀ; 1 where ``linear`` and then ``layer_norm`` are as fast."""
    rows, depth, _ = as_matrix(a)
    find = _parts_of.__wrapped__ if tuning() else _parts_of
    return find(target_of(a), a.element_size(), rows, b.shape[0], depth)


@lru_cache(maxsize=4096)
def _parts_of(target: str, element_size: int, rows: int, columns: int, depth: int) -> int:
    """Counted in bytes that a multiprocessor moves from and to L2: the operands of its programs' steps and the sums they leave;
    then the sums that its rows' programs read. No launch is counted: there are two kernels either way."""
    if not rows or columns > MAX_CHANNELS:
        return 1
    processors = config("linear_split", target)["PROGRAMS"]
    row = config("linear_split_norm", target, element_size=element_size, rows=rows, columns=columns, depth=depth)
    _, whole = row_of(target, False, element_size, rows, columns, depth)

    def spread(programs: int, size: float) -> float:
        """The bytes of the busiest multiprocessor, or what all take together."""
        return size * max(triton.cdiv(programs, processors), SHARED * programs / processors)

    def time(row: dict[str, int], steps: int, parts: int, size: int) -> float:
        block_m, block_n = row["BLOCK_M"], row["BLOCK_N"]
        tiles = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)
        moved = steps * (block_m + block_n) * row["BLOCK_K"] * element_size + block_m * block_n * size
        return spread(tiles * parts, moved) + spread(rows, columns * parts * size)

    steps = triton.cdiv(depth, row["BLOCK_K"])
    most = min(MAX_PARTS, steps, MAX_SCRATCH // (4 * rows * columns))
    found = {triton.cdiv(steps, triton.cdiv(steps, parts)) for parts in range(2, most + 1)}
    times = {parts: time(row, triton.cdiv(steps, parts), parts, 4) for parts in sorted(found)}
    alone = time(whole, triton.cdiv(depth, whole["BLOCK_K"]), 1, element_size)
    return min(times, key=times.__getitem__) if times and min(times.values()) < alone else 1


@planned
def launch_linear_split_norm(
    a: torch.Tensor,
    b: torch.Tensor,
    product_bias: torch.Tensor | None,
    residual: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    y: torch.Tensor | None,
    total: torch.Tensor,
    partial: torch.Tensor,
) -> None:
    """Fills total and, unless None, y, both contiguous [M, N]; partial [parts, M, N], contiguous float32, is scratch. a,
    residual, y and total may be contiguous with more dimensions instead; the vectors are contiguous."""
    parts, rows, channels = partial.shape
    shape = {"element_size": a.element_size(), "rows": rows, "columns": channels, "depth": a.shape[-1]}
    launch_parts("linear_split_norm", config("linear_split_norm", target_of(a), **shape), a, b, partial)
    adding = config("split_norm", target_of(a), channels=channels)
    stride = row_stride(residual)
    launch(
        "split_norm",
        _add_up_norm,
        (rows,),
        a,
        adding,
        partial_ptr=partial,
        product_bias_ptr=product_bias,
        residual_ptr=residual,
        scale_ptr=scale,
        weight_ptr=weight,
        bias_ptr=bias,
        y_ptr=y,
        total_ptr=total,
        rows=rows,
        channels=channels,
        stride_residual_row=stride,
        eps=eps,
        PARTS=parts,
        BLOCK_C=max(16, triton.next_power_of_2(channels)),
        ALIGN=align_of(channels, stride),
    )
