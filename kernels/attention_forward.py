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

from ._attention import MIN_DOT, load_tile, masked_scores, softmax_step, split_head_dim, store_tile
from ._launch import input_precision, launch, target_of
from ._plans import planned
from ._tuning import config
from .attention_short import launch_attention_short, serves


@triton.jit
def _attend(
    acc,  # [BLOCK_M, VALUE_MAIN]
    acc_tail,  # [BLOCK_M, VALUE_TAIL or 16]
    peak,  # [BLOCK_M]: the running maximum
    total,  # [BLOCK_M]: the running sum
    q,  # [BLOCK_M, MAIN]
    q_tail,  # [BLOCK_M, TAIL] or q
    k_ptr,  # [keys, DIM] of this head
    v_ptr,  # [keys, VALUE_DIM] of this head
    mask_ptr,  # of this head
    rel_w,  # [BLOCK_M, BLOCK_N] in the units of the scores, or None
    rel_h,  # [BLOCK_M] in the units of the scores, or None
    row,  # [BLOCK_M] query indices
    start,
    key_end,
    queries,
    stride_k_row,
    stride_v_row,
    stride_mask_row,
    stride_mask_column,
    factor,  # |scale| in the units of the scores
    MASK: tl.constexpr,
    WIDE_MASK: tl.constexpr,
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
    INPUT_PRECISION: tl.constexpr,
):
    """One block of keys: the update of (acc, acc_tail, peak, total)."""
    column = start + tl.arange(0, BLOCK_N).to(tl.int64)
    k = load_tile(k_ptr, column, key_end, stride_k_row, 0, MAIN, DIM, BOUNDED)
    products = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
    if TAIL > 0:
        k_tail = load_tile(k_ptr, column, key_end, stride_k_row, MAIN, TAIL, DIM, BOUNDED)
        products = tl.dot(q_tail, tl.trans(k_tail), products, input_precision=INPUT_PRECISION)
    if NEGATIVE_SCALE:
        products = -products
    if MASK == "additive" or rel_w is not None:
        products *= factor
        factor = 1.0
    if rel_w is not None:
        products += rel_w
    scores = masked_scores(
        products,
        row[:, None],
        column[None, :],
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
    weights, shrink, peak, total = softmax_step(scores, factor, rel_h, peak, total, MASK)
    v = load_tile(v_ptr, column, key_end, stride_v_row, 0, VALUE_MAIN, VALUE_DIM, BOUNDED)
    rounded = weights.to(v.dtype)
    acc = tl.dot(rounded, v, acc * shrink[:, None], input_precision=INPUT_PRECISION)
    if VALUE_TAIL > 0:
        v_tail = load_tile(v_ptr, column, key_end, stride_v_row, VALUE_MAIN, VALUE_TAIL, VALUE_DIM, BOUNDED)
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
    MASK: tl.constexpr,
    WIDE_MASK: tl.constexpr,
    HAS_REL: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
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
):
    tiles = tl.cdiv(queries, BLOCK_M)
    first = (tl.program_id(0) % tiles) * BLOCK_M
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    q_ptr += batch * stride_q_batch + head * stride_q_head
    k_ptr += batch * stride_k_batch + (head // groups) * stride_k_head
    v_ptr += batch * stride_v_batch + (head // groups) * stride_v_head
    if MASK != "none":
        mask_ptr += batch * stride_mask_batch + head * stride_mask_head

    q = load_tile(q_ptr, row, queries, stride_q_row, 0, MAIN, DIM, True)
    q_tail = q
    if TAIL > 0:
        q_tail = load_tile(q_ptr, row, queries, stride_q_row, MAIN, TAIL, DIM, True)
    acc = tl.zeros([BLOCK_M, VALUE_MAIN], dtype=tl.float32)
    acc_tail = tl.zeros([BLOCK_M, VALUE_TAIL if VALUE_TAIL > 0 else 16], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    # A positive factor commutes with the maximum; a tiny one in place of 0 keeps 0·(−inf) out.
    factor = tl.maximum(tl.abs(scale), 1e-37)
    if MASK != "additive":
        factor *= 1.4426950408889634

    if HAS_REL:
        unit = 1.0 if MASK == "additive" else 1.4426950408889634
        rel_h_ptr += (batch_head * queries + row) * key_rows
        rel_w_ptr += (batch_head * queries + row) * key_columns
        inside = row < queries
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
                    queries,
                    stride_k_row,
                    stride_v_row,
                    stride_mask_row,
                    stride_mask_column,
                    factor,
                    MASK,
                    WIDE_MASK,
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
                    INPUT_PRECISION,
                )
    else:
        # The body needs no bounds; the tail carries the last keys and, when causal, the diagonal.
        begin = 0
        end = keys
        if SPLIT:
            share = tl.cdiv(tl.cdiv(keys, BLOCK_N), tl.num_programs(1)) * BLOCK_N
            begin = tl.program_id(1) * share
            end = tl.minimum(keys, begin + share)
        body_end = begin + ((end - begin) // BLOCK_N) * BLOCK_N
        if CAUSAL:
            body_end = tl.minimum(body_end, (first // BLOCK_N) * BLOCK_N)
            end = tl.minimum(keys, first + BLOCK_M)
        for start in range(begin, body_end, BLOCK_N):
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
                queries,
                stride_k_row,
                stride_v_row,
                stride_mask_row,
                stride_mask_column,
                factor,
                MASK,
                WIDE_MASK,
                False,
                False,
                DIM,
                MAIN,
                TAIL,
                VALUE_DIM,
                VALUE_MAIN,
                VALUE_TAIL,
                BLOCK_N,
                NEGATIVE_SCALE,
                INPUT_PRECISION,
            )
        for start in range(body_end, end, BLOCK_N):
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
                queries,
                stride_k_row,
                stride_v_row,
                stride_mask_row,
                stride_mask_column,
                factor,
                MASK,
                WIDE_MASK,
                CAUSAL,
                True,
                DIM,
                MAIN,
                TAIL,
                VALUE_DIM,
                VALUE_MAIN,
                VALUE_TAIL,
                BLOCK_N,
                NEGATIVE_SCALE,
                INPUT_PRECISION,
            )

    if SPLIT:
        rows = (tl.num_programs(0) // tiles).to(tl.int64) * queries
        out_ptr += tl.program_id(1) * rows * VALUE_DIM
        lse_ptr += tl.program_id(1) * rows
    empty = total == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, total)
    log_total = tl.log2(tl.where(empty, 1.0, total))
    if MASK == "additive":
        log_total *= 0.6931471805599453
    lse = tl.where(empty, float("inf"), peak + log_total)
    if lse_ptr is not None:
        tl.store(lse_ptr + batch_head * queries + row, lse, mask=row < queries)
    out_ptr += batch * stride_out_batch + head * stride_out_head
    store_tile(out_ptr, acc * inverse[:, None], row, queries, stride_out_row, 0, VALUE_MAIN, VALUE_DIM)
    if VALUE_TAIL > 0:
        store_tile(out_ptr, acc_tail * inverse[:, None], row, queries, stride_out_row, VALUE_MAIN, VALUE_TAIL, VALUE_DIM)


def mask_kind(mask: torch.Tensor | None) -> str:
    if mask is None:
        return "none"
    return "bool" if mask.dtype == torch.uint8 else "additive"


def mask_arguments(mask: torch.Tensor | None) -> dict:
    """Pointer and broadcast strides of a four-dimensional mask, a boolean one seen as bytes."""
    names = ("stride_mask_batch", "stride_mask_head", "stride_mask_row", "stride_mask_column")
    if mask is None:
        return {"mask_ptr": None, "WIDE_MASK": False, **dict.fromkeys(names, 0)}
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    span = sum(size * stride for size, stride in zip(mask.shape[2:], strides[2:], strict=True))
    return {"mask_ptr": mask, "WIDE_MASK": span >= 2**31, **dict(zip(names, strides, strict=True))}


def common_arguments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, rel_h: torch.Tensor | None, scale: float
) -> dict:
    """The arguments that every attention kernel takes alike."""
    names = ("batch", "head", "row")
    strides = {
        f"stride_{letter}_{name}": tensor.stride(dim)
        for letter, tensor in (("q", q), ("k", k), ("v", v))
        for dim, name in enumerate(names)
    }
    main, tail = split_head_dim(q.shape[3], q.element_size())
    value_main, value_tail = split_head_dim(v.shape[3], v.element_size())
    key_rows = 0 if rel_h is None else rel_h.shape[3]
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "heads": q.shape[1],
        "groups": q.shape[1] // k.shape[1],
        "queries": q.shape[2],
        "keys": k.shape[2],
        "key_rows": key_rows,
        "key_columns": k.shape[2] // key_rows if key_rows else 0,
        "scale": scale,
        "MASK": mask_kind(mask),
        "HAS_REL": rel_h is not None,
        "DIM": q.shape[3],
        "MAIN": main,
        "TAIL": tail,
        "VALUE_DIM": v.shape[3],
        "VALUE_MAIN": value_main,
        "VALUE_TAIL": value_tail,
        "INPUT_PRECISION": input_precision(q.dtype),
        **strides,
        **mask_arguments(mask),
    }


def row_for(
    op: str,
    q: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    rel_w: torch.Tensor | None,
    one_key_row_a_step: bool = True,
) -> dict[str, int]:
    """The tuning-table row; its key block is no wider than a row of keys where one row of keys is a step."""
    row = config(
        op,
        target_of(q),
        element_size=q.element_size(),
        head_dim=max(q.shape[3], v.shape[3]),
        queries=q.shape[2],
        bias=int(mask is not None or rel_w is not None),
    )
    if rel_w is None or not one_key_row_a_step:
        return row
    return row | {"BLOCK_N": min(row["BLOCK_N"], max(MIN_DOT, triton.next_power_of_2(rel_w.shape[3])))}


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
    arguments = common_arguments(q, k, v, mask, rel_h, scale)
    if not is_causal and rel_h is None and serves(arguments) and k.shape[2] <= row.get("SHORT_KEYS", 0):
        launch_attention_short(arguments, q, out, lse)
        return
    launch(
        "attention_forward",
        _attention_forward,
        (q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], row["BLOCK_M"]),),
        q,
        row,
        rel_h_ptr=rel_h,
        rel_w_ptr=rel_w,
        out_ptr=out,
        lse_ptr=lse,
        stride_out_batch=out.stride(0),
        stride_out_head=out.stride(1),
        stride_out_row=out.stride(2),
        CAUSAL=is_causal,
        NEGATIVE_SCALE=scale < 0,
        SPLIT=False,
        EVEN_COLUMNS=rel_w is not None and rel_w.shape[3] % row["BLOCK_N"] == 0,
        **arguments,
    )
