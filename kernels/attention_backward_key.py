"""Attention, backward for keys and values (Dao 2023, FlashAttention-2, algorithm 2, its dK and dV half).

    P = e^(S − lse)       dV = Pᵀ·dout       dS = P ∘ (dout·Vᵀ − delta)       dK = scale · dSᵀ·Q

One program holds a block of keys and walks the queries of every head that shares it, so every sum has one owner and one
order: no atomics. Scores are kept transposed, [keys, queries], so that both products read them as they are.
Shapes as in ``attention_forward``; delta [B, H, N] float32.
"""

import torch
import triton
import triton.language as tl

from ._attention import eights, gather_rel, store_tile
from ._attention_arguments import all_eights, common_arguments, row_for
from ._attention_backward import add_products, copies_of, load_rows_of, load_statistics, products_of, recomputed_weights
from ._launch import launch
from ._plans import planned


@triton.jit
def _key_step(
    sums,  # (dk, dk_tail, dv, dv_tail): [BLOCK_N, MAIN], [BLOCK_N, TAIL or 16], and of the values' widths
    tile,  # (k, k_tail, v, v_tail) of the keys
    q_ptr,  # of a head
    dout_ptr,
    mask_ptr,
    rel_h_ptr,
    rel_w_ptr,
    lse_ptr,
    delta_ptr,
    head_index,  # of the head's first query among those of all heads
    start,
    column,
    queries,
    keys,
    key_rows,
    key_columns,
    strides,  # of q's rows, dout's rows, the mask's rows and columns
    scale,
    MASK: tl.constexpr,
    WIDE_MASK: tl.constexpr,
    HAS_REL: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOUNDED: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COPIES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """``sums`` with the share of one block of queries added."""
    dk, dk_tail, dv, dv_tail = sums
    k, k_tail, v, v_tail = tile
    stride_q_row, stride_dout_row, stride_mask_row, stride_mask_column = strides
    row = start + tl.arange(0, BLOCK_M).to(tl.int64)
    inside = row < queries
    q, q_tail = load_rows_of(q_ptr, row, queries, stride_q_row, DIM, MAIN, TAIL, BOUNDED)
    products = products_of(k, k_tail, q, q_tail, TAIL, INPUT_PRECISION)
    rel = products
    if HAS_REL:
        exists = inside[None, :] & (column < keys)[:, None]
        query = head_index + row
        rel = gather_rel(rel_h_ptr, rel_w_ptr, query[None, :], column[:, None], key_rows, key_columns, exists, MASK)
    # Queries beyond the end add nothing, being zero like their dout; keys beyond it are never stored.
    lse, delta = load_statistics(lse_ptr, delta_ptr, head_index + row, inside, COPIES, BLOCK_M, BOUNDED)
    weights = recomputed_weights(
        products,
        rel,
        lse[None, :],
        row[None, :],
        column[:, None],
        queries,
        keys,
        scale,
        mask_ptr,
        stride_mask_row,
        stride_mask_column,
        MASK,
        WIDE_MASK,
        HAS_REL,
        CAUSAL,
        False,
    )
    dout, dout_tail = load_rows_of(dout_ptr, row, queries, stride_dout_row, VALUE_DIM, VALUE_MAIN, VALUE_TAIL, BOUNDED)
    dv, dv_tail = add_products(dv, dv_tail, weights.to(dout.dtype), dout, dout_tail, VALUE_TAIL, INPUT_PRECISION)
    dweights = products_of(v, v_tail, dout, dout_tail, VALUE_TAIL, INPUT_PRECISION)
    dscores = (weights * (dweights - delta[None, :])).to(q.dtype)
    dk, dk_tail = add_products(dk, dk_tail, dscores, q, q_tail, TAIL, INPUT_PRECISION)
    return dk, dk_tail, dv, dv_tail


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
    EIGHTS: tl.constexpr,  # ``all_eights`` of q, k, v, dout, dk and dv
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COPIES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(keys, BLOCK_N)
    first = (tl.program_id(0) % tiles) * BLOCK_N
    key_heads = heads // groups
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, key_head = batch_head // key_heads, batch_head % key_heads
    if EIGHTS:
        stride_q_batch, stride_q_head, stride_q_row = eights(stride_q_batch), eights(stride_q_head), eights(stride_q_row)
        stride_k_batch, stride_k_head, stride_k_row = eights(stride_k_batch), eights(stride_k_head), eights(stride_k_row)
        stride_v_batch, stride_v_head, stride_v_row = eights(stride_v_batch), eights(stride_v_head), eights(stride_v_row)
        stride_dout_batch, stride_dout_head, stride_dout_row = (
            eights(stride_dout_batch),
            eights(stride_dout_head),
            eights(stride_dout_row),
        )
        stride_dk_batch, stride_dk_head, stride_dk_row = eights(stride_dk_batch), eights(stride_dk_head), eights(stride_dk_row)
        stride_dv_batch, stride_dv_head, stride_dv_row = eights(stride_dv_batch), eights(stride_dv_head), eights(stride_dv_row)
    column = first.to(tl.int64) + tl.arange(0, BLOCK_N)
    k_ptr += batch * stride_k_batch + key_head * stride_k_head
    v_ptr += batch * stride_v_batch + key_head * stride_v_head
    dk_ptr += batch * stride_dk_batch + key_head * stride_dk_head
    dv_ptr += batch * stride_dv_batch + key_head * stride_dv_head

    k, k_tail = load_rows_of(k_ptr, column, keys, stride_k_row, DIM, MAIN, TAIL, True)
    v, v_tail = load_rows_of(v_ptr, column, keys, stride_v_row, VALUE_DIM, VALUE_MAIN, VALUE_TAIL, True)
    dk = tl.zeros([BLOCK_N, MAIN], dtype=tl.float32)
    dk_tail = tl.zeros([BLOCK_N, TAIL if TAIL > 0 else 16], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, VALUE_MAIN], dtype=tl.float32)
    dv_tail = tl.zeros([BLOCK_N, VALUE_TAIL if VALUE_TAIL > 0 else 16], dtype=tl.float32)
    tile = (k, k_tail, v, v_tail)
    strides = (stride_q_row, stride_dout_row, stride_mask_row, stride_mask_column)

    # The last queries first, then a body that needs no bounds; why that is told: ``attention_forward``.
    begin = 0
    if CAUSAL:
        begin = tl.minimum(first, queries - 1) // BLOCK_M * BLOCK_M
    whole = (queries - 1) // BLOCK_M * BLOCK_M
    tl.assume((groups > 0) & (whole < queries))
    for member in range(0, groups):
        head = key_head * groups + member
        head_mask_ptr = mask_ptr
        if MASK != "none":
            head_mask_ptr = mask_ptr + batch * stride_mask_batch + head * stride_mask_head
        for part in tl.static_range(2):
            for start in range(begin if part else whole, whole if part else queries, BLOCK_M):
                dk, dk_tail, dv, dv_tail = _key_step(
                    (dk, dk_tail, dv, dv_tail),
                    tile,
                    q_ptr + batch * stride_q_batch + head * stride_q_head,
                    dout_ptr + batch * stride_dout_batch + head * stride_dout_head,
                    head_mask_ptr,
                    rel_h_ptr,
                    rel_w_ptr,
                    lse_ptr,
                    delta_ptr,
                    (batch * heads + head) * queries,
                    start,
                    column,
                    queries,
                    keys,
                    key_rows,
                    key_columns,
                    strides,
                    scale,
                    MASK,
                    WIDE_MASK,
                    HAS_REL,
                    CAUSAL,
                    part == 0,
                    DIM,
                    MAIN,
                    TAIL,
                    VALUE_DIM,
                    VALUE_MAIN,
                    VALUE_TAIL,
                    BLOCK_M,
                    COPIES,
                    INPUT_PRECISION,
                )

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
        EIGHTS=all_eights(q, k, v, dout, dk, dv),
        COPIES=copies_of(q, row),
        **strides,
        **common_arguments(q, k, v, mask, rel_h, scale),
    )
