"""What the kernels of matrix products are made of: the tile that is a program's, its sum over K, and the epilogue.

Shared by ``linear`` (one program a tile), ``linear_persistent`` (a program takes tile after tile) and ``linear_split`` (K among
programs), so that one tile size gives the same bits in all of them. Shapes and dtypes: ``linear``.
"""

import triton
import triton.language as tl

from ._math import activate, activation_derivative
from ._pdl import wait


@triton.jit
def place(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column, in tiles, of the tile that is ``program``'s: by groups of GROUP_M rows of tiles, so that B stays in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (program % (GROUP_M * tiles_n)) % group_rows
    tile_n = (program % (GROUP_M * tiles_n)) // group_rows
    return tile_m, tile_n


@triton.jit
def load_operand(ptrs, row_inside, k_inside, TRANSPOSED: tl.constexpr, EVEN_K: tl.constexpr):
    if TRANSPOSED:
        if EVEN_K:
            return tl.load(ptrs, mask=row_inside, other=0.0)
        else:
            return tl.load(ptrs, mask=row_inside & k_inside, other=0.0)
    elif EVEN_K:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=k_inside, other=0.0)


@triton.jit
def products(
    a_ptr,
    b_ptr,
    m,
    n,
    M,
    N,
    K,
    first_k,
    last_k,
    stride_a_m,
    stride_a_k,
    stride_b_n,
    stride_b_k,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """A · Bᵀ of the rows ``m`` and columns ``n`` (int64) of a tile, summed over [first_k, last_k) in float32. PDL: waits for the
    kernels ahead when its addresses are made."""
    # Rows beyond the edge read the last row instead: no mask in the loop, and their results are never stored. A transposed
    # operand is masked, since clamping would hide from the compiler that its rows are adjacent in memory.
    a_row = m if A_TRANSPOSED else tl.minimum(m, M - 1)
    b_row = n if B_TRANSPOSED else tl.minimum(n, N - 1)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    a_ptrs = a_ptr + a_row[:, None] * stride_a_m + k[None, :] * stride_a_k
    b_ptrs = b_ptr + b_row[None, :] * stride_b_n + k[:, None] * stride_b_k
    acc = tl.zeros([m.shape[0], n.shape[0]], dtype=tl.float32)
    if PDL:
        wait()
    for start in range(first_k, last_k, BLOCK_K):
        offset = tl.cast(start, tl.int64)
        a = load_operand(a_ptrs + offset * stride_a_k, (m < M)[:, None], (k < K - start)[None, :], A_TRANSPOSED, EVEN_K)
        b = load_operand(b_ptrs + offset * stride_b_k, (n < N)[None, :], (k < K - start)[:, None], B_TRANSPOSED, EVEN_K)
        acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
    return acc


@triton.jit
def finish(
    acc,
    m,
    first_n,
    bias_ptr,
    pre_ptr,
    out_ptr,
    hidden_ptr,
    M,
    N,
    stride_pre_m,
    stride_out_m,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    EXACT: tl.constexpr,
    HALVINGS: tl.constexpr,
    sums_ptr=None,
):
    """The epilogue of a tile, its rows ``m``, its columns from ``first_n`` on; the pointers are ``_linear``'s, ``sums_ptr`` to
    this tile's row. Each halving takes the columns in two parts, one after the other: fewer registers, so that two programs
    share a multiprocessor."""
    columns: tl.constexpr = acc.shape[1]
    if HALVINGS > 0:
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, columns // 2)), (0, 2, 1)))
        # fmt: off
        finish(left, m, first_n, bias_ptr, pre_ptr, out_ptr, hidden_ptr, M, N, stride_pre_m, stride_out_m,
               ACTIVATION, BACKWARD, EXACT, HALVINGS - 1, sums_ptr)
        finish(right, m, first_n + columns // 2, bias_ptr, pre_ptr, out_ptr, hidden_ptr, M, N, stride_pre_m, stride_out_m,
               ACTIVATION, BACKWARD, EXACT, HALVINGS - 1, sums_ptr)
        # fmt: on
    else:
        n = first_n + tl.arange(0, columns)
        inside = (m < M)[:, None] & (n < N)[None, :]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        pre_ptrs = pre_ptr + m[:, None] * stride_pre_m + n[None, :] if pre_ptr is not None else None
        if BACKWARD:
            pre = tl.load(pre_ptrs, mask=inside, other=0.0).to(tl.float32)
            if hidden_ptr is not None:
                hidden = activate(pre, ACTIVATION, EXACT)
                tl.store(hidden_ptr + m[:, None] * N + n[None, :], hidden.to(hidden_ptr.dtype.element_ty), mask=inside)
            acc *= activation_derivative(pre, ACTIVATION, EXACT)
            if sums_ptr is not None:
                tl.store(sums_ptr + n, tl.sum(tl.where((m < M)[:, None], acc, 0.0), axis=0), mask=n < N)
        else:
            if pre_ptr is not None:
                tl.store(pre_ptrs, acc.to(pre_ptr.dtype.element_ty), mask=inside)
            acc = activate(acc, ACTIVATION, EXACT)
        tl.store(out_ptr + m[:, None] * stride_out_m + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
