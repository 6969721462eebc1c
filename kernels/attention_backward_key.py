"""Attention, backward for keys and values (Dao 2023, FlashAttention-2, algorithm 2, its dK and dV half).

    P = e^(S − lse)       dV = Pᵀ·dout       dS = P ∘ (dout·Vᵀ − delta)       dK = scale · dSᵀ·Q

One program holds a block of keys and walks the queries of every head that shares it, so every sum has one owner and one
order: no atomics. Scores are kept transposed, [keys, queries], so that both products read them as they are.
Shapes as in ``attention_forward``; delta [B, H, N] float32.
"""

import torch
import triton
import triton.language as tl

from ._attention import biased_scores, gather_rel, load_tile, power, store_tile
from ._attention_arguments import common_arguments, row_for
from ._launch import launch
from ._plans import planned


@triton.jit
def _attention_backward_key(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, Hk, M, D]
    v_ptr,  # [B, Hk, M, Dv]
    mask_ptr,  # [1|B, 1|H, 1|N, 1|M] or None
    rel_h_ptr,  # [B, H, N, Kh] or None
    rel_w_ptr,  # [B, H, N, Kw] or None
    dout_ptr,  # [B, H, N, Dv]
    lse_ptr,  # [B, H, N]
    delta_ptr,  # [B, H, N]
    dk_ptr,  # [B, Hk, M, D]
    dv_ptr,  # [B, Hk, M, Dv]
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
    stride_dout_batch,
    stride_dout_head,
    stride_dout_row,
    stride_dk_batch,
    stride_dk_head,
    stride_dk_row,
    stride_dv_batch,
    stride_dv_head,
    stride_dv_row,
    scale,
    MASK: tl.constexpr,
    WIDE_MASK: tl.constexpr,
    HAS_REL: tl.constexpr,
    CAUSAL: tl.constexpr,
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
    tiles = tl.cdiv(keys, BLOCK_N)
    first = (tl.program_id(0) % tiles) * BLOCK_N
    key_heads = heads // groups
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, key_head = batch_head // key_heads, batch_head % key_heads
    column = first.to(tl.int64) + tl.arange(0, BLOCK_N)
    k_ptr += batch * stride_k_batch + key_head * stride_k_head
    v_ptr += batch * stride_v_batch + key_head * stride_v_head
    dk_ptr += batch * stride_dk_batch + key_head * stride_dk_head
    dv_ptr += batch * stride_dv_batch + key_head * stride_dv_head

    k = load_tile(k_ptr, column, keys, stride_k_row, 0, MAIN, DIM, True)
    k_tail = k
    if TAIL > 0:
        k_tail = load_tile(k_ptr, column, keys, stride_k_row, MAIN, TAIL, DIM, True)
    v = load_tile(v_ptr, column, keys, stride_v_row, 0, VALUE_MAIN, VALUE_DIM, True)
    v_tail = v
    if VALUE_TAIL > 0:
        v_tail = load_tile(v_ptr, column, keys, stride_v_row, VALUE_MAIN, VALUE_TAIL, VALUE_DIM, True)
    dk = tl.zeros([BLOCK_N, MAIN], dtype=tl.float32)
    dk_tail = tl.zeros([BLOCK_N, TAIL if TAIL > 0 else 16], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, VALUE_MAIN], dtype=tl.float32)
    dv_tail = tl.zeros([BLOCK_N, VALUE_TAIL if VALUE_TAIL > 0 else 16], dtype=tl.float32)

    begin = 0
    if CAUSAL:
        begin = (first // BLOCK_M) * BLOCK_M
    for member in range(0, groups):
        head = key_head * groups + member
        head_index = (batch * heads + head) * queries
        head_q_ptr = q_ptr + batch * stride_q_batch + head * stride_q_head
        head_dout_ptr = dout_ptr + batch * stride_dout_batch + head * stride_dout_head
        head_mask_ptr = mask_ptr
        if MASK != "none":
            head_mask_ptr = mask_ptr + batch * stride_mask_batch + head * stride_mask_head
        for start in range(begin, queries, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M).to(tl.int64)
            inside = row < queries
            q = load_tile(head_q_ptr, row, queries, stride_q_row, 0, MAIN, DIM, True)
            products = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)
            q_tail = q
            if TAIL > 0:
                q_tail = load_tile(head_q_ptr, row, queries, stride_q_row, MAIN, TAIL, DIM, True)
                products = tl.dot(k_tail, tl.trans(q_tail), products, input_precision=INPUT_PRECISION)
            rel = products
            if HAS_REL:
                exists = inside[None, :] & (column < keys)[:, None]
                query = head_index + row
                rel = gather_rel(rel_h_ptr, rel_w_ptr, query[None, :], column[:, None], key_rows, key_columns, exists, MASK)
            scores = biased_scores(
                products,
                rel,
                row[None, :],
                column[:, None],
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
                False,
            )
            # Queries beyond the end have lse = +inf and so weight 0; keys beyond it are never stored.
            lse = tl.load(lse_ptr + head_index + row, mask=inside, other=float("inf"))
            delta = tl.load(delta_ptr + head_index + row, mask=inside, other=0.0)
            weights = power(scores - lse[None, :], MASK)
            dout = load_tile(head_dout_ptr, row, queries, stride_dout_row, 0, VALUE_MAIN, VALUE_DIM, True)
            rounded = weights.to(dout.dtype)
            dv = tl.dot(rounded, dout, dv, input_precision=INPUT_PRECISION)
            dweights = tl.dot(v, tl.trans(dout), input_precision=INPUT_PRECISION)
            if VALUE_TAIL > 0:
                dout_tail = load_tile(head_dout_ptr, row, queries, stride_dout_row, VALUE_MAIN, VALUE_TAIL, VALUE_DIM, True)
                dv_tail = tl.dot(rounded, dout_tail, dv_tail, input_precision=INPUT_PRECISION)
                dweights = tl.dot(v_tail, tl.trans(dout_tail), dweights, input_precision=INPUT_PRECISION)
            dscores = (weights * (dweights - delta[None, :])).to(q.dtype)
            dk = tl.dot(dscores, q, dk, input_precision=INPUT_PRECISION)
            if TAIL > 0:
                dk_tail = tl.dot(dscores, q_tail, dk_tail, input_precision=INPUT_PRECISION)

    store_tile(dk_ptr, dk * scale, column, keys, stride_dk_row, 0, MAIN, DIM)
    store_tile(dv_ptr, dv, column, keys, stride_dv_row, 0, VALUE_MAIN, VALUE_DIM)
    if TAIL > 0:
        store_tile(dk_ptr, dk_tail * scale, column, keys, stride_dk_row, MAIN, TAIL, DIM)
    if VALUE_TAIL > 0:
        store_tile(dv_ptr, dv_tail, column, keys, stride_dv_row, VALUE_MAIN, VALUE_TAIL, VALUE_DIM)


@planned
def launch_attention_backward_key(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    rel_h: torch.Tensor | None,
    rel_w: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """Fills dk and dv."""
    row = row_for("attention_backward_key", q, v, mask, rel_w, one_key_row_a_step=False)
    strides = {
        f"stride_{name}_{axis}": tensor.stride(dim)
        for name, tensor in (("dout", dout), ("dk", dk), ("dv", dv))
        for dim, axis in enumerate(("batch", "head", "row"))
    }
    launch(
        "attention_backward_key",
        _attention_backward_key,
        (k.shape[0] * k.shape[1] * triton.cdiv(k.shape[2], row["BLOCK_N"]),),
        q,
        row,
        rel_h_ptr=rel_h,
        rel_w_ptr=rel_w,
        dout_ptr=dout,
        lse_ptr=lse,
        delta_ptr=delta,
        dk_ptr=dk,
        dv_ptr=dv,
        CAUSAL=is_causal,
        **strides,
        **common_arguments(q, k, v, mask, rel_h, scale),
    )
