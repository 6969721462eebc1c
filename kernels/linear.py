"""Matrix product with everything that belongs beside it in the epilogue.

    out = epilogue(A · Bᵀ + bias)
    forward   activate(·), and optionally the value before activation (pre), which backward needs
    backward  (A · Bᵀ) · activate'(pre), and optionally activate(pre) recomputed beside it: with A = dout and B = W2ᵀ that is
              an MLP's hidden gradient and its hidden layer in one pass, so that only ``pre`` has to be kept

Shapes: A [M, K], B [N, K], out and pre [M, N], bias [N]; strides are free, so a transposed operand is only a swap of strides
(dx = dy · W, dW = dyᵀ · x). float16, bfloat16 and float32, summed in float32; float32 products are exact (no TF32)
unless PyTorch itself allows TF32. Products of few tiles and many steps are ``linear_split``'s, those whose programs stay for more
than one tile ``linear_persistent``'s.
Reference: ``fastvit.reference.linear``, ``mlp``.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import as_matrix, input_precision, launch, row_stride, target_of
from ._linear import finish, place, products
from ._math import activation_derivative
from ._pdl import prefetch_rows, prefetch_vector
from ._plans import planned
from ._tuning import config
from .linear_persistent import _linear_persistent, programs_of


@triton.jit
def _linear(
    a_ptr,  # [M, K]
    b_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    pre_ptr,  # [M, N] or None: written in forward, read in backward
    out_ptr,  # [M, N]
    hidden_ptr,  # [M, N] or None: activate(pre), backward only
    sums_ptr,  # [tiles of M, N] or None: of out, over a tile's rows, in float32; backward only
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
    PDL: tl.constexpr,
):
    tile_m, tile_n = place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_k = 0
    last_k = K
    if SPLIT:
        split = tl.program_id(1)
        first_k = split * depth
        last_k = tl.minimum(first_k + depth, K)
        tl.assume(first_k < last_k)  # a loop that might not run would keep its products from overlapping
        out_ptr += split.to(tl.int64) * M * N
    if sums_ptr is not None:
        sums_ptr += tile_m.to(tl.int64) * N
    if PDL:
        if not B_TRANSPOSED:
            prefetch_rows(b_ptr, tl.minimum(n, N - 1), stride_b_n, first_k, last_k, tile_m, tl.cdiv(M, BLOCK_M))
        prefetch_vector(bias_ptr, tile_n * BLOCK_N, N, BLOCK_N)
    # fmt: off
    acc = products(a_ptr, b_ptr, m, n, M, N, K, first_k, last_k, stride_a_m, stride_a_k, stride_b_n, stride_b_k,
                   A_TRANSPOSED, B_TRANSPOSED, EVEN_K, INPUT_PRECISION, BLOCK_K, PDL)
    finish(acc, m, tile_n.to(tl.int64) * BLOCK_N, bias_ptr, pre_ptr, out_ptr, hidden_ptr, M, N, stride_pre_m, stride_out_m,
           ACTIVATION, BACKWARD, EXACT, HALVINGS, sums_ptr)
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
    sums: torch.Tensor | None = None,
) -> None:
    """Fills out [M, N] (and pre or hidden, and sums [``linear_split.row_tiles``, N] float32) from a [M, K] and b [N, K]; out, pre
    and hidden have last stride 1. All but b may be contiguous with more dimensions instead."""
    op, row = row_for(a, b, backward)
    arguments = operands(a, b, row) | {
        "bias_ptr": bias,
        "pre_ptr": pre,
        "out_ptr": out,
        "stride_pre_m": row_stride(pre),
        "stride_out_m": row_stride(out),
        "ACTIVATION": activation or "none",
    }
    count = tiles(a, b, row)
    if not backward and (programs := programs_of(a, b, count, row)):
        known = {name: value for name, value in arguments.items() if name in _linear_persistent.arg_names}
        launch(op, _linear_persistent, (programs,), a, row, **known)
    else:
        alone = {"hidden_ptr": hidden, "sums_ptr": sums, "depth": a.shape[-1], "SPLIT": False, "BACKWARD": backward}
        launch(op, _linear, (count,), a, row, **arguments, **alone)


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
