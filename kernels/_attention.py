"""What the attention kernels share: head dimensions in two pieces, tile loads, and scores with every kind of bias.

A head dim that is not a power of two is cut into MAIN + TAIL where that is cheaper than padding (80 = 64 + 16, 96 = 64 + 32);
two dots of those widths then replace one. Scores are kept in units of log2, the scale folded in, except under an
additive mask: its values may be finfo.min, which a factor of log2(e) would turn into −inf, so those stay natural.
"""

import triton
import triton.language as tl

MIN_DOT = 16  # the narrowest operand of tl.dot


def split_head_dim(dim: int, element_size: int = 2) -> tuple[int, int]:
    """(MAIN, TAIL): powers of two, at least 16 each, that hold ``dim``; TAIL is 0 where one piece is as cheap.

    float32 beyond 192 is two halves: exact products hold rows of their operands in registers, which 256 would not fit.
    """
    whole = max(MIN_DOT, triton.next_power_of_2(dim))
    main = whole // 2
    if dim <= main or main < MIN_DOT:
        return whole, 0
    tail = max(MIN_DOT, triton.next_power_of_2(dim - main))
    return (main, tail) if tail < main or (element_size == 4 and tail == 128) else (whole, 0)


@triton.jit
def eights(stride):
    """The same multiple of 8, seen as one: Triton itself looks for multiples of 16, which 72 channels a head are not."""
    return stride // 8 * 8


@triton.jit
def load_tile(ptr, row, row_end, stride_row, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, BOUNDED: tl.constexpr):
    """Columns FIRST … FIRST + WIDTH of the rows ``row`` (int64); zeros beyond DIM and, if BOUNDED, from ``row_end`` on."""
    column = FIRST + tl.arange(0, WIDTH)
    ptrs = ptr + row[:, None] * stride_row + column[None, :]
    if FIRST + WIDTH > DIM:
        mask = (column < DIM)[None, :]
        if BOUNDED:
            mask = mask & (row < row_end)[:, None]
        return tl.load(ptrs, mask=mask, other=0.0)
    elif BOUNDED:
        return tl.load(ptrs, mask=(row < row_end)[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(ptr, tile, row, row_end, stride_row, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Stores ``tile`` to the same place, in the pointer's dtype."""
    column = FIRST + tl.arange(0, WIDTH)
    mask = (row < row_end)[:, None] & (column < DIM)[None, :]
    tl.store(ptr + row[:, None] * stride_row + column[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_mask(
    mask_ptr,  # of one head, or of its queries, broadcastable to the scores
    column,  # key indices (int64), broadcastable to the scores
    exists,  # which of these keys exist, broadcastable to the mask, or None for all of them
    stride_mask_column,
    MASK: tl.constexpr,
):
    """What the mask adds to the scores, float32. Load it before the products: their layout is then the one it is brought to."""
    ptrs = mask_ptr + column * stride_mask_column
    if exists is None:
        mask = tl.load(ptrs)
    else:
        mask = tl.load(ptrs, mask=exists, other=0)
    if MASK == "bool":
        # 0 becomes the bits of −inf and every other byte those of 0, without a comparison: there are few predicate registers.
        return ((mask.to(tl.int32) - 1) & -0x800000).to(tl.float32, bitcast=True)
    else:
        return mask.to(tl.float32)


@triton.jit
def masked_scores(
    scores,  # any orientation, log2 units or any other that a positive factor makes log2 units of; natural under an additive mask
    row,  # query indices, broadcastable to the scores
    column,  # key indices, broadcastable to the scores
    queries,
    key_end,  # keys from here on do not exist
    mask_ptr,
    stride_mask_row,
    stride_mask_column,
    MASK: tl.constexpr,
    WIDE_MASK: tl.constexpr,  # one head's part of the mask spans 2³¹ elements or more
    CAUSAL: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """scores + mask, −inf where nothing is attended to."""
    if MASK != "none":
        # 32-bit offsets wherever they reach: 64-bit ones for a whole tile of scores would not fit the registers.
        if WIDE_MASK:
            offsets = row * stride_mask_row + column * stride_mask_column
        else:
            offsets = row.to(tl.int32) * stride_mask_row + column.to(tl.int32) * stride_mask_column
        exists = (row < queries) & (column < key_end)
        if MASK == "additive":
            scores += tl.load(mask_ptr + offsets, mask=exists, other=float("-inf")).to(tl.float32)
        else:
            scores = tl.where(tl.load(mask_ptr + offsets, mask=exists, other=0) != 0, scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(column <= row, scores, float("-inf"))
    if BOUNDED:
        scores = tl.where(column < key_end, scores, float("-inf"))
    return scores


@triton.jit
def softmax_step(
    scores,  # [BLOCK_M, BLOCK_N], −inf where nothing is attended to
    factor,  # > 0: makes log2 units of them; not read under an additive mask
    lift,  # [BLOCK_M]: what every score of a row is short of, in units of the peak, or None
    peak,  # [BLOCK_M]: the running maximum, in log2 units, or natural under an additive mask
    total,  # [BLOCK_M]: the running sum, or [BLOCK_M, PARTS]: what adds up to it
    MASK: tl.constexpr,
    PARTS: tl.constexpr = 0,
):
    """(weights, shrink, peak, total): e to the scores over the new peak; what was summed before is to be multiplied by shrink.

    The factor waits until after the maximum, which a positive one commutes with: one multiplication a score less, as the
    other is part of the subtraction.
    """
    high = tl.max(scores, axis=1)
    if MASK != "additive":
        high *= factor
    if lift is not None:
        high += lift
    new_peak = tl.maximum(peak, high)
    # A row that has met no key yet stays at −inf; 0 in its place keeps −inf − (−inf) out of the exponent.
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASK != "none" else new_peak
    shift = base - lift if lift is not None else base
    if MASK == "additive":
        weights = power(scores - shift[:, None], MASK)
    else:
        weights = tl.exp2(scores * factor - shift[:, None])
    shrink = power(peak - base, MASK)
    if PARTS > 0:
        parts = tl.reshape(weights, (weights.shape[0], weights.shape[1] // PARTS, PARTS))
        total = total * shrink[:, None] + tl.sum(parts, axis=1)
    else:
        total = total * shrink + tl.sum(weights, axis=1)
    return weights, shrink, new_peak, total


@triton.jit
def power(scores, MASK: tl.constexpr):
    """e to the scores, whichever units they are in."""
    if MASK == "additive":
        return tl.exp2(scores * 1.4426950408889634)
    else:
        return tl.exp2(scores)


@triton.jit
def gather_rel(
    rel_h_ptr,  # [B, H, N, Kh]
    rel_w_ptr,  # [B, H, N, Kw]
    query,  # (batch · H + head) · N + query index, broadcastable to the scores
    column,  # key indices, broadcastable to the scores
    key_rows,
    key_columns,
    exists,
    MASK: tl.constexpr,
):
    """rel_h[n, m // Kw] + rel_w[n, m % Kw] for any tile of scores, in their units."""
    unit = 1.0 if MASK == "additive" else 1.4426950408889634
    height = tl.load(rel_h_ptr + query * key_rows + column // key_columns, mask=exists, other=0.0).to(tl.float32)
    width = tl.load(rel_w_ptr + query * key_columns + column % key_columns, mask=exists, other=0.0).to(tl.float32)
    return (height + width) * unit
