"""What the passes of attention backward share: the weights, from the scores and what forward saved of them."""

import torch
import triton
import triton.language as tl

from ._attention import load_tile, masked_scores, power
from ._launch import target_of


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
    if not WIDE_MASK:  # 64-bit indices would take twice the registers and comparisons
        row, column = row.to(tl.int32), column.to(tl.int32)
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


@triton.jit
def load_statistics(
    lse_ptr,  # float32
    delta_ptr,  # float32
    index,  # [ROWS]: of the queries
    inside,  # [ROWS]: which of them exist; read only if BOUNDED
    COPIES: tl.constexpr,  # ``copies_of``
    ROWS: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """(lse, delta) of a block of queries, [ROWS] each, zeros where there are none.

    One load of [ROWS, 2 · COPIES], the two in turns: the compiler makes a load of fewer values than a program has threads anew
    in the layout of the products, where every lane reads all of its columns and takes all the steps to their addresses.
    """
    if COPIES == 0:
        if BOUNDED:
            return tl.load(lse_ptr + index, mask=inside, other=0.0), tl.load(delta_ptr + index, mask=inside, other=0.0)
        else:
            return tl.load(lse_ptr + index), tl.load(delta_ptr + index)
    else:
        tl.static_assert(COPIES <= 32)
        is_lse = (tl.arange(0, 2 * COPIES) % 2 == 0)[None, :]
        ptrs = tl.where(is_lse, lse_ptr, delta_ptr) + index[:, None]
        if BOUNDED:
            both = tl.load(ptrs, mask=inside[:, None], other=0.0)
        else:
            both = tl.load(ptrs)
        lse, delta = tl.split(both.reshape(ROWS, COPIES, 2))
        for step in tl.static_range(1, 6):
            if COPIES >> step > 0:
                lse, _ = tl.split(lse.reshape(ROWS, COPIES >> step, 2))
                delta, _ = tl.split(delta.reshape(ROWS, COPIES >> step, 2))
        return lse.reshape(ROWS), delta.reshape(ROWS)


def copies_of(tensor: torch.Tensor, row: dict[str, int]) -> int:
    """How often ``load_statistics`` is to read each value: until every thread has one to read; 0 for two plain loads.

    Those are for tiles of few keys, which gain nothing, and for AMD's compiler, which takes no choice between two pointers.
    """
    if row["BLOCK_N"] < 64 or target_of(tensor).startswith("gfx"):
        return 0
    return max(1, 32 * row["num_warps"] // (2 * row["BLOCK_M"]))
