"""Attention, backward for an additive mask: dS summed over every dimension the mask was broadcast along.

    dmask[b', h', n', m'] = Σ dS[b, h, n, m] over what broadcasts onto it       dS = P ∘ (dout·Vᵀ − delta)

One program owns one tile of the mask and recomputes the scores of all batches and heads (and, for a mask of one row or one
column, all queries or keys) that share it: no N×M tensor, no atomics, one order of summation. Shapes as in
``attention_forward``; dmask has the mask's shape and is contiguous.
"""

import torch
import triton
import triton.language as tl

from ._attention import gather_rel
from ._attention_arguments import common_arguments, row_for
from ._attention_backward import load_rows_of, products_of, recomputed_weights
from ._launch import launch
from ._plans import planned


@triton.jit
def _attention_backward_mask(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, Hk, M, D]
    v_ptr,  # [B, Hk, M, Dv]
    mask_ptr,  # [1|B, 1|H, 1|N, 1|M]
    rel_h_ptr,  # [B, H, N, Kh] or None
    rel_w_ptr,  # [B, H, N, Kw] or None
    dout_ptr,  # [B, H, N, Dv]
    lse_ptr,  # [B, H, N]
    delta_ptr,  # [B, H, N]
    dmask_ptr,  # the mask's shape
    batches,
    heads,
    groups,
    queries,
    keys,
    key_rows,
    key_columns,
    mask_heads,
    mask_rows,
    mask_columns,
    batch_step,  # 1 where all batches share the mask, otherwise the number of batches
    head_step,  # likewise
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
    stride_dout_batch,
    stride_dout_head,
    stride_dout_row,
    scale,
    MASK: tl.constexpr,
    WIDE_MASK: tl.constexpr,
    HAS_REL: tl.constexpr,
    CAUSAL: tl.constexpr,
    ONE_ROW: tl.constexpr,
    ONE_COLUMN: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    tiles_n = tl.cdiv(mask_columns, BLOCK_N)
    tiles = tiles_n * tl.cdiv(mask_rows, BLOCK_M)
    tile = tl.program_id(0) % tiles
    mask_index = (tl.program_id(0) // tiles).to(tl.int64)
    first_row = (tile // tiles_n) * BLOCK_M
    first_column = (tile % tiles_n) * BLOCK_N
    row_end = queries if ONE_ROW else tl.minimum(first_row + BLOCK_M, queries)
    column_end = keys if ONE_COLUMN else tl.minimum(first_column + BLOCK_N, keys)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for batch_index in range(mask_index // mask_heads, batches, batch_step):
        for head_index in range(mask_index % mask_heads, heads, head_step):
            batch, head = tl.full([], batch_index, tl.int64), tl.full([], head_index, tl.int64)
            key_head = head // groups
            index = (batch * heads + head) * queries
            head_q_ptr = q_ptr + batch * stride_q_batch + head * stride_q_head
            head_k_ptr = k_ptr + batch * stride_k_batch + key_head * stride_k_head
            head_v_ptr = v_ptr + batch * stride_v_batch + key_head * stride_v_head
            head_dout_ptr = dout_ptr + batch * stride_dout_batch + head * stride_dout_head
            head_mask_ptr = mask_ptr + batch * stride_mask_batch + head * stride_mask_head
            for start_row in range(first_row, row_end, BLOCK_M):
                row = start_row + tl.arange(0, BLOCK_M).to(tl.int64)
                inside = row < queries
                q, q_tail = load_rows_of(head_q_ptr, row, queries, stride_q_row, DIM, MAIN, TAIL, True)
                dout, dout_tail = load_rows_of(
                    head_dout_ptr, row, queries, stride_dout_row, VALUE_DIM, VALUE_MAIN, VALUE_TAIL, True
                )
                lse = tl.load(lse_ptr + index + row, mask=inside, other=float("inf"))
                delta = tl.load(delta_ptr + index + row, mask=inside, other=0.0)
                for start_column in range(first_column, column_end, BLOCK_N):
                    column = start_column + tl.arange(0, BLOCK_N).to(tl.int64)
                    k, k_tail = load_rows_of(head_k_ptr, column, keys, stride_k_row, DIM, MAIN, TAIL, True)
                    v, v_tail = load_rows_of(head_v_ptr, column, keys, stride_v_row, VALUE_DIM, VALUE_MAIN, VALUE_TAIL, True)
                    products = products_of(q, q_tail, k, k_tail, TAIL, INPUT_PRECISION)
                    dweights = products_of(dout, dout_tail, v, v_tail, VALUE_TAIL, INPUT_PRECISION)
                    rel = products
                    if HAS_REL:
                        exists = inside[:, None] & (column < keys)[None, :]
                        query = index + row
                        rel = gather_rel(
                            rel_h_ptr, rel_w_ptr, query[:, None], column[None, :], key_rows, key_columns, exists, MASK
                        )
                    weights = recomputed_weights(
                        products,
                        rel,
                        lse[:, None],
                        row[:, None],
                        column[None, :],
                        queries,
                        keys,
                        scale,
                        head_mask_ptr,
                        stride_mask_row,
                        stride_mask_column,
                        MASK,
                        WIDE_MASK,
                        HAS_REL,
                        CAUSAL,
                        True,
                    )
                    acc += weights * (dweights - delta[:, None])
    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_M)
    column = first_column.to(tl.int64) + tl.arange(0, BLOCK_N)
    dmask_ptr += mask_index * mask_rows * mask_columns
    if ONE_ROW:
        acc = tl.sum(acc, axis=0, keep_dims=True)
        row = tl.zeros([1], dtype=tl.int64)
    if ONE_COLUMN:
        acc = tl.sum(acc, axis=1, keep_dims=True)
        column = tl.zeros([1], dtype=tl.int64)
    stored = (row < mask_rows)[:, None] & (column < mask_columns)[None, :]
    offsets = row[:, None] * mask_columns + column[None, :]
    tl.store(dmask_ptr + offsets, acc.to(dmask_ptr.dtype.element_ty), mask=stored)


@planned
def launch_attention_backward_mask(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    rel_h: torch.Tensor | None,
    rel_w: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dmask: torch.Tensor,
) -> None:
    """Fills dmask."""
    row = row_for("attention_backward_mask", q, v, mask, rel_w, one_key_row_a_step=False)
    mask_batches, mask_heads, mask_rows, mask_columns = mask.shape
    tiles = triton.cdiv(mask_rows, row["BLOCK_M"]) * triton.cdiv(mask_columns, row["BLOCK_N"])
    launch(
        "attention_backward_mask",
        _attention_backward_mask,
        (mask_batches * mask_heads * tiles,),
        q,
        row,
        rel_h_ptr=rel_h,
        rel_w_ptr=rel_w,
        dout_ptr=dout,
        lse_ptr=lse,
        delta_ptr=delta,
        dmask_ptr=dmask,
        batches=q.shape[0],
        mask_heads=mask_heads,
        batch_step=1 if mask_batches == 1 else q.shape[0],
        head_step=1 if mask_heads == 1 else q.shape[1],
        mask_rows=mask_rows,
        mask_columns=mask_columns,
        stride_dout_batch=dout.stride(0),
        stride_dout_head=dout.stride(1),
        stride_dout_row=dout.stride(2),
        CAUSAL=is_causal,
        ONE_ROW=mask_rows == 1,
        ONE_COLUMN=mask_columns == 1,
        **common_arguments(q, k, v, mask, rel_h, scale),
    )
