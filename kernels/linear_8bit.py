"""Matrix product of 8-bit operands, e4m3 or int8; undone scales, bias, activation and residual in its epilogue.

    y   = activation(Σ_blocks (A_block · B_blockᵀ) · a_scale_block · b_scale + bias)
    out = y, or residual + y, or y rounded to the operands' dtype with a scale for every 128 columns of a row or a given one

Shapes: A [M, K] and B [N, K] of one dtype, last stride 1; a_scale [M] a row, [1] for all, or [ceil(K / 128), M] a block of 128
columns of a row; b_scale [N]; bias [N]; residual and out [M, N], last stride 1; out_scale [ceil(N / 128), M], written, or [1],
given: what it was for A one layer further. Scales are float32. A LayerScale γ is γ · b_scale and γ · bias.

Tensor cores sum e4m3 products with 13 bits of fraction on sm_90 and sm_89, on sm_100 and sm_120 with float32's (Xie et al.
2025). PROMOTE adds every BLOCK_K products to a float32 sum outside of them; a block's scale needs that addition anyway. It takes
twice the registers, so rows ask for it where K is beyond 2048; up to there sums cost far less than rounding (docs/fp8.md).
int8 products are summed in int32, exactly up to K = 133 144, and never promoted.
An epilogue sees 128 columns of a row, not the row: hence scales a block, or one known beforehand, which e4m3 bears.
Reference: ``fastvit.reference_quantized.linear``.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch, target_of
from ._math import activate
from ._pdl import prefetch_rows, prefetch_vector, wait
from ._plans import planned
from ._tuning import config
from .quantize import to_8_bits

OPS = {torch.float8_e4m3fn: "linear_fp8", torch.int8: "linear_int8"}


@triton.jit
def _of_columns(ptr, n, N, WIDE: tl.constexpr):
    """What lies at columns n. Wide loads are fewer instructions, narrow ones fewer registers."""
    return tl.load(ptr + n, mask=n < N, other=0.0) if WIDE else tl.load(ptr + tl.minimum(n, N - 1))


@triton.jit
def _finish(
    acc,
    m,
    first_n,
    tile_n,
    b_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    out_scale_ptr,
    out_factor,
    M,
    N,
    stride_residual_m,
    ACTIVATION: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """The epilogue of a tile, its rows ``m``, its columns from ``first_n`` on; the pointers are ``_linear_8bit``'s. Each halving
    takes the columns in two parts, one after the other: fewer registers, so that two programs share a multiprocessor."""
    columns: tl.constexpr = acc.shape[1]
    if HALVINGS > 0:
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, columns // 2)), (0, 2, 1)))
        # fmt: off
        _finish(left, m, first_n, tile_n, b_scale_ptr, bias_ptr, residual_ptr, out_ptr, out_scale_ptr, out_factor,
                M, N, stride_residual_m, ACTIVATION, OUT_SCALE, HALVINGS - 1)
        _finish(right, m, first_n + columns // 2, tile_n, b_scale_ptr, bias_ptr, residual_ptr, out_ptr, out_scale_ptr, out_factor,
                M, N, stride_residual_m, ACTIVATION, OUT_SCALE, HALVINGS - 1)
        # fmt: on
    else:
        n = first_n + tl.arange(0, columns)
        inside = (m < M)[:, None] & (n < N)[None, :]
        acc *= _of_columns(b_scale_ptr, n, N, OUT_SCALE != "block")[None, :]
        if bias_ptr is not None:
            acc += _of_columns(bias_ptr, n, N, OUT_SCALE != "block").to(tl.float32)[None, :]
        acc = activate(acc, ACTIVATION, False)
        if residual_ptr is not None:
            acc += tl.load(residual_ptr + m[:, None] * stride_residual_m + n[None, :], mask=inside, other=0.0).to(tl.float32)
        if OUT_SCALE == "given":
            acc *= out_factor
        if OUT_SCALE == "block":
            tl.static_assert(columns == 128, "a tile is as wide as what shares a scale")
            values, out_scale = to_8_bits(tl.where((n < N)[None, :], acc, 0.0), 1, out_ptr.dtype.element_ty)
            tl.store(out_scale_ptr + tile_n.to(tl.int64) * M + m, out_scale, mask=m < M)
            tl.store(out_ptr + m[:, None] * N + n[None, :], values, mask=inside)
        else:
            tl.store(out_ptr + m[:, None] * N + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _linear_8bit(
    a_ptr,  # [M, K] e4m3 or int8
    b_ptr,  # [N, K], as A
    a_scale_ptr,  # [M], [1], or [blocks of K, M]
    b_scale_ptr,  # [N]
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    out_ptr,  # [M, N]
    out_scale_ptr,  # [blocks of N, M], [1] or None: with one, out is as A
    M,
    N,
    K,
    stride_a_m,
    stride_b_n,
    stride_residual_m,
    ACTIVATION: tl.constexpr,
    SCALES: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    PROMOTE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVINGS: tl.constexpr,
    PDL: tl.constexpr,
):
    tl.static_assert(SCALES != "block" or 128 % BLOCK_K == 0, "a step over K stays within a scale")
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (program % (GROUP_M * tiles_n)) % group_rows
    tile_n = (program % (GROUP_M * tiles_n)) // group_rows

    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the edge read the last row instead: no mask in the loop, and their results are never stored.
    a_row, b_row = tl.minimum(m, M - 1), tl.minimum(n, N - 1)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + a_row[:, None] * stride_a_m + k[None, :]
    b_ptrs = b_ptr + b_row[None, :] * stride_b_n + k[:, None]
    INTEGERS: tl.constexpr = a_ptr.dtype.element_ty == tl.int8
    ZERO: tl.constexpr = 0 if INTEGERS else 0.0
    SUM: tl.constexpr = tl.int32 if INTEGERS and SCALES != "block" else tl.float32
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=SUM)
    if PDL:
        prefetch_rows(b_ptr, b_row, stride_b_n, 0, K, tile_m, tiles_m)
        prefetch_vector(b_scale_ptr, tile_n * BLOCK_N, N, BLOCK_N)
        prefetch_vector(bias_ptr, tile_n * BLOCK_N, N, BLOCK_N)
        wait()
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(k < K - start)[None, :], other=ZERO)
            b = tl.load(b_ptrs, mask=(k < K - start)[:, None], other=ZERO)
        if SCALES == "block":
            scale = tl.load(a_scale_ptr + tl.full([], start // 128, tl.int64) * M + a_row)
            if INTEGERS:
                # Sums of a block are below 2²². Begun at the bits of 1.5 · 2²³, they are a float32's bits: nothing is converted.
                begin = tl.full([BLOCK_M, BLOCK_N], 0x4B400000, tl.int32)
                products = tl.dot(a, b, begin, out_dtype=tl.int32).to(tl.float32, bitcast=True) - 12582912.0
            else:
                products = tl.dot(a, b)
            acc += products * scale[:, None]
        elif PROMOTE and not INTEGERS:
            acc += tl.dot(a, b, max_num_imprecise_acc=BLOCK_K)  # a bound, or the compiler would join sum and product
        else:
            acc = tl.dot(a, b, acc, out_dtype=SUM)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K

    if SCALES == "row":
        acc = acc.to(tl.float32) * tl.load(a_scale_ptr + a_row)[:, None]
    elif SCALES == "all":
        acc = acc.to(tl.float32) * tl.load(a_scale_ptr)
    out_factor = tl.div_rn(1.0, tl.load(out_scale_ptr)) if OUT_SCALE == "given" else 1.0
    # fmt: off
    _finish(acc, m, tile_n.to(tl.int64) * BLOCK_N, tile_n, b_scale_ptr, bias_ptr, residual_ptr, out_ptr, out_scale_ptr,
            out_factor, M, N, stride_residual_m, ACTIVATION, OUT_SCALE, HALVINGS)
    # fmt: on


@planned
def launch_linear_8bit(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
) -> None:
    """Fills out [M, N] (and out_scale [blocks, M]) from a [M, K] and b [N, K]. What one number scales, all, a row or a block
    of it, is what a_scale's and out_scale's shapes say.

    a, b and residual have last stride 1, the others are contiguous. K ≥ 1.
    """
    (m, k), n = a.shape, b.shape[0]
    op = OPS[a.dtype] if out_scale is None else f"{OPS[a.dtype]}_quantized"
    blocks, out_blocks = a_scale.dim() == 2, out_scale is not None and out_scale.dim() == 2
    row = config(op, target_of(a), rows=m, width=k, blocks=int(blocks))
    launch(
        op,
        _linear_8bit,
        (triton.cdiv(m, row["BLOCK_M"]) * triton.cdiv(n, row["BLOCK_N"]),),
        a,
        row,
        a_ptr=a,
        b_ptr=b,
        a_scale_ptr=a_scale,
        b_scale_ptr=b_scale,
        bias_ptr=bias,
        residual_ptr=residual,
        out_ptr=out,
        out_scale_ptr=out_scale,
        M=m,
        N=n,
        K=k,
        stride_a_m=a.stride(0),
        stride_b_n=b.stride(0),
        stride_residual_m=0 if residual is None else residual.stride(0),
        ACTIVATION=activation or "none",
        SCALES="block" if blocks else "all" if a_scale.numel() == 1 else "row",
        OUT_SCALE="none" if out_scale is None else "block" if out_blocks else "given",
        PROMOTE=row.get("PROMOTE", 0),
        HALVINGS=0 if out_blocks else row.get("HALVINGS", 0),
        EVEN_K=k % row["BLOCK_K"] == 0,
    )
