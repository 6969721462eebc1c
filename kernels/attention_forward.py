"""Attention, forward: softmax(scale·QKᵀ + bias)·V in one pass over the keys (Dao 2023, FlashAttention-2, algorithm 1).

    m' = max(m, max_j s_j)     l' = l·2^(m−m') + Σ_j 2^(s_j−m')     acc' = acc·2^(m−m') + Σ_j 2^(s_j−m')·v_j     out = acc / l

Shapes: q [B, H, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv], out [B, H, N, Dv], any strides with the last one 1; lse [B, H, N]
float32 is saved for backward: m + log2(l), natural under an additive mask, +inf for a row with nothing to attend
to, whose output is zero. Mask [1|B, 1|H, 1|N, 1|M] through broadcast strides. Relative positions rel_h [B, H, N, Kh] and
rel_w [B, H, N, Kw]: one key row a step, so that rel_w is one tile held in registers and rel_h one value a query.
Head dims 1 … 256 in two pieces (``_attention.split_head_dim``). Reference: ``fastvit.reference.attention``.
"""

import torch
import triton
import triton.language as tl

from ._attention import eights, load_mask, load_tile, softmax_step, store_tile
from ._attention_arguments import forward_arguments, row_for
from ._launch import launch
from ._pdl import wait_with
from ._plans import planned
from .attention_short import launch_attention_short, serves

L2_BYTES = 2**24  # of keys and values that stay in the cache: a part of any that serves so many programs


@triton.jit
def _attend(
    acc,  # [BLOCK_M, VALUE_MAIN]
    acc_tail,  # [BLOCK_M, VALUE_TAIL or 16]
    peak,  # [BLOCK_M]: the running maximum
    total,  # [BLOCK_M]: the running sum, in PARTS where that is not 0
    q,  # [BLOCK_M, MAIN]
    q_tail,  # [BLOCK_M, TAIL] or q
    k_ptr,  # [keys, DIM] of this head
    v_ptr,  # [keys, VALUE_DIM] of this head
    mask_ptr,  # of this head, or of its queries [BLOCK_M, 1]
    rel_w,  # [BLOCK_M, BLOCK_N] in the units of the scores, or None
    rel_h,  # [BLOCK_M] in the units of the scores, or None
    row,  # [BLOCK_M] query indices
    start,
    key_end,
    stride_k_row,
    stride_v_row,
    stride_mask_column,
    factor,  # |scale| in the units of the scores
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One block of keys: the update of (acc, acc_tail, peak, total)."""
    # What a step adds to an address is one number, so that the offsets within a tile stay from step to step.
    begin = tl.cast(start, tl.int64)
    column = tl.arange(0, BLOCK_N).to(tl.int64)
    k_ptr += begin * stride_k_row
    v_ptr += begin * stride_v_row
    if MASK != "none":
        mask_ptr += begin * stride_mask_column
    exists = (tl.arange(0, BLOCK_N) < key_end - start)[None, :] if BOUNDED else None
    EXACT: tl.constexpr = q.dtype == tl.float32 and INPUT_PRECISION == "ieee"  # products that leave no registers for the mask
    if MASK != "none" and not EXACT:
        mask = load_mask(mask_ptr, column[None, :], exists, stride_mask_column, MASK)
    k = load_tile(k_ptr, column, key_end - start, stride_k_row, 0, MAIN, DIM, BOUNDED)
    products = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
    if TAIL > 0:
        k_tail = load_tile(k_ptr, column, key_end - start, stride_k_row, MAIN, TAIL, DIM, BOUNDED)
        products = tl.dot(q_tail, tl.trans(k_tail), products, input_precision=INPUT_PRECISION)
    if NEGATIVE_SCALE:
        products = -products
    if MASK == "additive" or rel_w is not None:
        products *= factor
        factor = 1.0
    if rel_w is not None:
        products += rel_w
    if MASK != "none":
        if EXACT:
            mask = load_mask(mask_ptr, column[None, :], exists, stride_mask_column, MASK)
        products += mask
    if BOUNDED or CAUSAL:
        last = key_end - 1 - start
        if CAUSAL:
            last = tl.minimum(row.to(tl.int32) - start, last)[:, None]
        products = tl.where(tl.arange(0, BLOCK_N)[None, :] <= last, products, float("-inf"))
    weights, shrink, peak, total = softmax_step(products, factor, rel_h, peak, total, MASK, PARTS)
    v = load_tile(v_ptr, column, key_end - start, stride_v_row, 0, VALUE_MAIN, VALUE_DIM, BOUNDED)
    rounded = weights.to(v.dtype)
    acc = tl.dot(rounded, v, acc * shrink[:, None], input_precision=INPUT_PRECISION)
    if VALUE_TAIL > 0:
        v_tail = load_tile(v_ptr, column, key_end - start, stride_v_row, VALUE_MAIN, VALUE_TAIL, VALUE_DIM, BOUNDED)
        acc_tail = tl.dot(rounded, v_tail, acc_tail * shrink[:, None], input_precision=INPUT_PRECISION)
    return acc, acc_tail, peak, total


@triton.jit
def _attention_forward(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, Hk, M, D]
    v_ptr,  # [B, Hk, M, Dv]
    mask_ptr,  # [1|B, 1|H, 1|N, 1|M] or None
    rel_h_ptr,  # [B, H, N, Kh] or None
    rel_w_ptr,  # [B, H, N, Kw] or None
    out_ptr,  # [B, H, N, Dv]
    lse_ptr,  # [B, H, N] or None
    heads,
    groups,
    queries,
    keys,
    key_rows,
    key_columns,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_k_batch,
    stride_k_head,
    stride_k_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_mask_batch,
    stride_mask_head,
    stride_mask_row,
    stride_mask_column,
    stride_out_batch,
    stride_out_head,
    stride_out_row,
    scale,
    together,  # heads whose keys and values the L2 cache holds; read if CAUSAL
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    HAS_REL: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EIGHTS: tl.constexpr,  # the strides of q, k and v are multiples of 8, not all of 16
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    SPLIT: tl.constexpr,  # by the second program index: out is [splits, B, H, N, Dv] and lse [splits, B, H, N], contiguous
    INPUT_PRECISION: tl.constexpr,
    PARTS: tl.constexpr = 0,  # of the sum of a row's weights, which lanes need not add up at every step
    PDL: tl.constexpr = False,
):
    tiles = tl.cdiv(queries, BLOCK_M)
    tile, batch_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if CAUSAL:  # the most work first: the last queries of ``together`` heads, then those before them
        group = tl.program_id(0) // (tiles * together) * together
        place, size = tl.program_id(0) - group * tiles, tl.minimum(together, tl.num_programs(0) // tiles - group)
        tile, batch_head = tiles - 1 - place // size, group + place % size
    first, batch_head = tile * BLOCK_M, batch_head.to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    if EIGHTS:
        stride_q_batch, stride_q_head, stride_q_row = eights(stride_q_batch), eights(stride_q_head), eights(stride_q_row)
        stride_k_batch, stride_k_head, stride_k_row = eights(stride_k_batch), eights(stride_k_head), eights(stride_k_row)
        stride_v_batch, stride_v_head, stride_v_row = eights(stride_v_batch), eights(stride_v_head), eights(stride_v_row)
    row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    q_ptr += batch * stride_q_batch + head * stride_q_head
    k_ptr += batch * stride_k_batch + (head // groups) * stride_k_head
    v_ptr += batch * stride_v_batch + (head // groups) * stride_v_head
    if MASK != "none":
        mask_ptr += batch * stride_mask_batch + head * stride_mask_head
        if MASK_ROWS:
            mask_ptr += tl.minimum(row, queries - 1)[:, None] * stride_mask_row

    if PDL:
        wait_with(q_ptr, k_ptr, v_ptr)
    q = load_tile(q_ptr, row, queries, stride_q_row, 0, MAIN, DIM, True)
    q_tail = q
    if TAIL > 0:
        q_tail = load_tile(q_ptr, row, queries, stride_q_row, MAIN, TAIL, DIM, True)
    acc = tl.zeros([BLOCK_M, VALUE_MAIN], dtype=tl.float32)
    acc_tail = tl.zeros([BLOCK_M, VALUE_TAIL if VALUE_TAIL > 0 else 16], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M, PARTS] if PARTS > 0 else [BLOCK_M], dtype=tl.float32)

    # A positive factor commutes with the maximum; a tiny one in place of 0 keeps 0·(−inf) out.
    factor = tl.maximum(tl.abs(scale), 1e-37)
    if MASK != "additive":
        factor *= 1.4426950408889634

    if HAS_REL:
        unit = 1.0 if MASK == "additive" else 1.4426950408889634
        rel_h_ptr += (batch_head * queries + row) * key_rows
        rel_w_ptr += (batch_head * queries + row) * key_columns
        inside = row < queries
        tl.assume((key_rows > 0) & (key_columns > 0))  # see below
        for left in range(0, key_columns, BLOCK_N):
            place = left + tl.arange(0, BLOCK_N)
            present = inside[:, None] & (place < key_columns)[None, :]
            rel_w = tl.load(rel_w_ptr[:, None] + place[None, :], mask=present, other=0.0).to(tl.float32) * unit
            for key_row in range(0, key_rows):
                rel_h = tl.load(rel_h_ptr + key_row, mask=inside, other=0.0).to(tl.float32) * unit
                acc, acc_tail, peak, total = _attend(
                    acc,
                    acc_tail,
                    peak,
                    total,
                    q,
                    q_tail,
                    k_ptr,
                    v_ptr,
                    mask_ptr,
                    rel_w,
                    rel_h,
                    row,
                    key_row * key_columns + left,
                    (key_row + 1) * key_columns,
                    stride_k_row,
                    stride_v_row,
                    stride_mask_column,
                    factor,
                    MASK,
                    CAUSAL,
                    not EVEN_COLUMNS,
                    DIM,
                    MAIN,
                    TAIL,
                    VALUE_DIM,
                    VALUE_MAIN,
                    VALUE_TAIL,
                    BLOCK_N,
                    NEGATIVE_SCALE,
                    PARTS,
                    INPUT_PRECISION,
                )
    else:
        begin = 0
        end = keys
        if SPLIT:
            share = tl.cdiv(tl.cdiv(keys, BLOCK_N), tl.num_programs(1)) * BLOCK_N
            begin = tl.program_id(1) * share
            end = tl.minimum(keys, begin + share)
        # The last keys first, with bounds and, when causal, the diagonal; then the body, which needs none. A loop that might not
        # run at all would have the zeros of its sums meet what it leaves in flight: ptxas then waits after every wgmma.
        body_end = begin + ((end - begin - 1) // BLOCK_N) * BLOCK_N
        if CAUSAL:
            body_end = tl.minimum(body_end, (first // BLOCK_N) * BLOCK_N)
            end = tl.minimum(keys, first + BLOCK_M)
        tl.assume(body_end < end)
        for part in tl.static_range(2):
            for start in range(begin if part else body_end, body_end if part else end, BLOCK_N):
                acc, acc_tail, peak, total = _attend(
                    acc,
                    acc_tail,
                    peak,
                    total,
                    q,
                    q_tail,
                    k_ptr,
                    v_ptr,
                    mask_ptr,
                    None,
                    None,
                    row,
                    start,
                    keys,
                    stride_k_row,
                    stride_v_row,
                    stride_mask_column,
                    factor,
                    MASK,
                    CAUSAL and part == 0,
                    part == 0,
                    DIM,
                    MAIN,
                    TAIL,
                    VALUE_DIM,
                    VALUE_MAIN,
                    VALUE_TAIL,
                    BLOCK_N,
                    NEGATIVE_SCALE,
                    PARTS,
                    INPUT_PRECISION,
                )

    if SPLIT:
        rows = (tl.num_programs(0) // tiles).to(tl.int64) * queries
        out_ptr += tl.program_id(1) * rows * VALUE_DIM
        lse_ptr += tl.program_id(1) * rows
    if PARTS > 0:
        total = tl.sum(total, axis=1)
    empty = total == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    log_total = tl.log2(tl.where(empty, 1.0, total))
    if MASK == "additive":
        log_total *= 0.6931471805599453
    lse = tl.where(empty, float("inf"), peak + log_total)
    # From the tile's first query on: 64-bit rows kept since the beginning would be spilled.
    lane = tl.arange(0, BLOCK_M)
    left = queries - first
    if lse_ptr is not None:
        tl.store(lse_ptr + batch_head * queries + first + lane, lse, mask=lane < left)
    out_ptr += batch * stride_out_batch + head * stride_out_head + first.to(tl.int64) * stride_out_row
    lane = lane.to(tl.int64)
    store_tile(out_ptr, acc * inverse[:, None], lane, left, stride_out_row, 0, VALUE_MAIN, VALUE_DIM)
    if VALUE_TAIL > 0:
        store_tile(out_ptr, acc_tail * inverse[:, None], lane, left, stride_out_row, VALUE_MAIN, VALUE_TAIL, VALUE_DIM)


def fitted(row: dict[str, int], heads: int, queries: int) -> dict[str, int]:
    """``row``, with half the queries and warps a program where the busiest of its MULTIPROCESSORS then has a fifth fewer queries:
    176 programs of 128 on 132 of them are two on some, 352 of 64 at most three."""

    def busiest(block: int) -> int:
        return triton.cdiv(heads * triton.cdiv(queries, block), row["MULTIPROCESSORS"]) * block

    whole, half = row["BLOCK_M"], row["BLOCK_M"] // 2
    if row.get("MULTIPROCESSORS") and row["num_warps"] == 8 and busiest(half) <= 0.8 * busiest(whole):
        return row | {"BLOCK_M": half, "num_warps": 4}
    return row


@planned
def launch_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    rel_h: torch.Tensor | None,
    rel_w: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fills out, and lse unless None; every last stride is 1, rel_h, rel_w, lse are contiguous, the mask has four dimensions."""
    row = row_for("attention_forward", q, v, mask, rel_w)
    if not is_causal and rel_h is None and k.shape[2] <= row.get("SHORT_KEYS", 0) and serves(q, v, mask):
        launch_attention_short(q, k, v, scale, out, lse)
        return
    row = fitted(row, q.shape[0] * q.shape[1], q.shape[2])
    tiles = triton.cdiv(q.shape[2], row["BLOCK_M"])
    together = max(1, L2_BYTES // (k.shape[2] * (k.shape[3] + v.shape[3]) * k.element_size())) if is_causal else 1
    launch(
        "attention_forward",
        _attention_forward,
        (q.shape[0] * q.shape[1] * tiles,),
        q,
        row,
        rel_h_ptr=rel_h,
        rel_w_ptr=rel_w,
        out_ptr=out,
        lse_ptr=lse,
        stride_out_batch=out.stride(0),
        stride_out_head=out.stride(1),
        stride_out_row=out.stride(2),
        together=min(together, 2**30 // max(1, tiles)),  # the kernel multiplies the two in 32 bits
        CAUSAL=is_causal,
        SPLIT=False,
        EVEN_COLUMNS=rel_w is not None and rel_w.shape[3] % row["BLOCK_N"] == 0,
        **forward_arguments(_attention_forward, q, k, v, mask, rel_h, scale),
    )
