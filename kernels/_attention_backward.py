"""What the passes of attention backward share: the weights, from the scores and what forward saved of them."""

import triton
import triton.language as tl

from ._attention import load_tile, masked_scores, power


@triton.jit
def recomputed_weights(
    products,  # q·k, any orientation
    rel,  # relative positions in the units of the scores, broadcastable; read only if HAS_REL
    lse,  # of the queries, less what of their positions ``rel`` leaves out, broadcastable
    row,
    column,
    queries,
    key_end,
    scale,
    mask_ptr,
    stride_mask_row,
    stride_mask_column,
    MASK: tl.constexpr,
    WIDE_MASK: tl.constexpr,
    HAS_REL: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """e^(scale·q·k + bias − lse), 0 where nothing is attended to.

    Masks that hide come after the subtraction, so that it and the scale are one instruction. What an additive one adds may be
    finfo.min, which is to meet the scores first.
    """
    scores = products * (scale if MASK == "additive" else scale * 1.4426950408889634)
    if HAS_REL:
        scores += rel
    if MASK != "additive":
        scores -= lse
    scores = masked_scores(
        scores,
        row,
        column,
        queries,
        key_end,
        mask_ptr,
        stride_mask_row,
        stride_mask_column,
        MASK,
        WIDE_MASK,
        CAUSAL,
        BOUNDED,
    )
    if MASK == "additive":
        scores -= lse
    return power(scores, MASK)


@triton.jit
def load_rows_of(ptr, row, end, stride_row, DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BOUNDED: tl.constexpr):
    """(columns of MAIN, columns of TAIL, or of MAIN again) of the rows ``row`` (int64)."""
    main = load_tile(ptr, row, end, stride_row, 0, MAIN, DIM, BOUNDED)
    tail = main
    if TAIL > 0:
        tail = load_tile(ptr, row, end, stride_row, MAIN, TAIL, DIM, BOUNDED)
    return main, tail


@triton.jit
def products_of(a, a_tail, b, b_tail, TAIL: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """a·bᵀ over both pieces of the head dim."""
    products = tl.dot(a, tl.trans(b), input_precision=INPUT_PRECISION)
    if TAIL > 0:
        products = tl.dot(a_tail, tl.trans(b_tail), products, input_precision=INPUT_PRECISION)
    return products


@triton.jit
def add_products(acc, acc_tail, a, b, b_tail, TAIL: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """(acc, acc_tail) + a·b, a product for each piece of the head dim."""
    acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION)
    if TAIL > 0:
        acc_tail = tl.dot(a, b_tail, acc_tail, input_precision=INPUT_PRECISION)
    return acc, acc_tail


@triton.jit
def row_products(a, a_tail, b, b_tail, TAIL: tl.constexpr):
    """Σ_d a·b of each row, in float32."""
    sums = tl.sum(a.to(tl.float32) * b.to(tl.float32), axis=1)
    if TAIL > 0:
        sums += tl.sum(a_tail.to(tl.float32) * b_tail.to(tl.float32), axis=1)
    return sums
