"""Matrix product with everything that belongs beside it in the epilogue.

    out = epilogue(A · Bᵀ + bias)
    forward   activate(·), and optionally the value before activation (pre), which backward needs
    backward  (A · Bᵀ) · activate'(pre), and optionally activate(pre) recomputed beside it: with A = dout and B = W2ᵀ that is
              an MLP's hidden gradient and its hidden layer in one pass, so that only ``pre`` has to be kept

Shapes: A [M, K], B [N, K], out and pre [M, N], bias [N]; strides are free, so a transposed operand is only a swap of strides
(dx = dy · W, dW = dyᵀ · x). float16, bfloat16 and float32, summed in float32; float32 products are exact (no TF32)
unless PyTorch itself allows TF32. Programs walk the output in groups of GROUP_M rows of tiles so that B stays in L2. Products of
few tiles and many steps are ``linear_split``'s.
Reference: ``fastvit.reference.linear``, ``mlp``.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import as_matrix, input_precision, launch, row_stride, target_of
from ._math import activate, activation_derivative
from ._plans import planned
from ._tuning import config


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
):
    """The epilogue of a tile, its rows ``m``, its columns from ``first_n`` on; the pointers are ``_linear``'s. Each halving takes
    the columns in two parts, one after the other: fewer registers, so that two programs share a multiprocessor."""
    columns: tl.constexpr = acc.shape[1]
    if HALVINGS > 0:
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, columns // 2)), (0, 2, 1)))
        # fmt: off
        finish(left, m, first_n, bias_ptr, pre_ptr, out_ptr, hidden_ptr, M, N, stride_pre_m, stride_out_m,
               ACTIVATION, BACKWARD, EXACT, HALVINGS - 1)
        finish(right, m, first_n + columns // 2, bias_ptr, pre_ptr, out_ptr, hidden_ptr, M, N, stride_pre_m, stride_out_m,
               ACTIVATION, BACKWARD, EXACT, HALVINGS - 1)
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
        else:
            if pre_ptr is not None:
                tl.store(pre_ptrs, acc.to(pre_ptr.dtype.element_ty), mask=inside)
            acc = activate(acc, ACTIVATION, EXACT)
        tl.store(out_ptr + m[:, None] * stride_out_m + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _linear(
    a_ptr,  # [M, K]
    b_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    pre_ptr,  # [M, N] or None: written in forward, read in backward
    out_ptr,  # [M, N]
    hidden_ptr,  # [M, N] or None: activate(pre), backward only
    M,
    N,
    K,
    depth,  # of K that a split takes, a multiple of BLOCK_K
    stride_a_m,
    stride_a_k,
    stride_b_n,
    stride_b_k,
    stride_pre_m,
    stride_out_m,
    SPLIT: tl.constexpr,  # out is [splits, M, N], of products alone
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXACT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    tile_m = group * GROUP_M + (program % (GROUP_M * tiles_n)) % group_rows
    tile_n = (program % (GROUP_M * tiles_n)) // group_rows

    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the edge read the last row instead: no mask in the loop, and their results are never stored. A transposed
    # operand is masked, since clamping would hide from the compiler that its rows are adjacent in memory.
    a_row = m if A_TRANSPOSED else tl.minimum(m, M - 1)
    b_row = n if B_TRANSPOSED else tl.minimum(n, N - 1)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    a_ptrs = a_ptr + a_row[:, None] * stride_a_m + k[None, :] * stride_a_k
    b_ptrs = b_ptr + b_row[None, :] * stride_b_n + k[:, None] * stride_b_k
    first_k = 0
    last_k = K
    if SPLIT:
        split = tl.program_id(1)
        first_k = split * depth
        last_k = tl.minimum(first_k + depth, K)
        out_ptr += split.to(tl.int64) * M * N
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(first_k, last_k, BLOCK_K):
        offset = tl.cast(start, tl.int64)
        a = load_operand(a_ptrs + offset * stride_a_k, (m < M)[:, None], (k < K - start)[None, :], A_TRANSPOSED, EVEN_K)
        b = load_operand(b_ptrs + offset * stride_b_k, (n < N)[None, :], (k < K - start)[:, None], B_TRANSPOSED, EVEN_K)
        acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)

    # fmt: off
    finish(acc, m, tile_n.to(tl.int64) * BLOCK_N, bias_ptr, pre_ptr, out_ptr, hidden_ptr, M, N, stride_pre_m, stride_out_m,
           ACTIVATION, BACKWARD, EXACT, HALVINGS)
    # fmt: on


@triton.jit
def _activation_backward(
    dy_ptr,  # [size]
    pre_ptr,  # [size]
    dpre_ptr,  # [size]
    size,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    pre = tl.load(pre_ptr + index, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + index, mask=inside, other=0.0).to(tl.float32)
    dpre = dy * activation_derivative(pre, ACTIVATION, EXACT)
    tl.store(dpre_ptr + index, dpre.to(dpre_ptr.dtype.element_ty), mask=inside)


@planned
def launch_linear(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    pre: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    activation: str | None = None,
    backward: bool = False,
) -> None:
    """Fills out [M, N] (and pre or hidden) from a [M, K] and b [N, K]; out, pre, hidden have last stride 1. All but b may be
    contiguous with more dimensions instead."""
    op, row = row_for(a, b, backward)
    launch(
        op,
        _linear,
        (tiles(a, b, row),),
        a,
        row,
        bias_ptr=bias,
        pre_ptr=pre,
        out_ptr=out,
        hidden_ptr=hidden,
        depth=a.shape[-1],
        stride_pre_m=row_stride(pre),
        stride_out_m=row_stride(out),
        SPLIT=False,
        ACTIVATION=activation or "none",
        BACKWARD=backward,
        **operands(a, b, row),
    )


def row_of(target: str, backward: bool, element_size: int, rows: int, columns: int, depth: int) -> tuple[str, dict[str, int]]:
    """The operator that a product [rows, columns] over ``depth`` is looked up as, and its launch config."""
    op = "linear_backward" if backward else "linear"
    return op, config(op, target, element_size=element_size, rows=rows, columns=columns, depth=depth)


def row_for(a: torch.Tensor, b: torch.Tensor, backward: bool) -> tuple[str, dict[str, int]]:
    """``row_of`` a · bᵀ."""
    rows, depth, _ = as_matrix(a)
    return row_of(target_of(a), backward, a.element_size(), rows, b.shape[0], depth)


def tiles(a: torch.Tensor, b: torch.Tensor, row: dict[str, int]) -> int:
    """How many tiles a · bᵀ has."""
    return triton.cdiv(as_matrix(a)[0], row["BLOCK_M"]) * triton.cdiv(b.shape[0], row["BLOCK_N"])


def operands(a: torch.Tensor, b: torch.Tensor, row: dict[str, int]) -> dict[str, Any]:
    """The arguments of ``_linear`` that describe a · bᵀ."""
    (m, k, stride_a_m), stride_a_k = as_matrix(a), a.stride(-1)
    return {
        "a_ptr": a,
        "b_ptr": b,
        "M": m,
        "N": b.shape[0],
        "K": k,
        "stride_a_m": stride_a_m,
        "stride_a_k": stride_a_k,
        "stride_b_n": b.stride(0),
        "stride_b_k": b.stride(1),
        "A_TRANSPOSED": stride_a_k != 1,
        "B_TRANSPOSED": b.stride(1) != 1,
        "EVEN_K": k % row["BLOCK_K"] == 0,
        "HALVINGS": row.get("HALVINGS", 0),
        "EXACT": a.dtype == torch.float32,
        "INPUT_PRECISION": input_precision(a.dtype),
    }


@planned
def launch_activation_backward(dy: torch.Tensor, pre: torch.Tensor, dpre: torch.Tensor, activation: str) -> None:
    """dpre = dy · activate'(pre), all contiguous and of one shape."""
    row = config("activation_backward", target_of(dy))
    launch(
        "activation_backward",
        _activation_backward,
        (triton.cdiv(dy.numel(), row["BLOCK"]),),
        dy,
        row,
        dy_ptr=dy,
        pre_ptr=pre,
        dpre_ptr=dpre,
        size=dy.numel(),
        ACTIVATION=activation,
        EXACT=dy.dtype == torch.float32,
    )
