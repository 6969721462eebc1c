"""Attention, backward for the queries and the relative positions (Dao 2023, FlashAttention-2, algorithm 2, its dQ half).

    delta = Σ_d out·dout       P = e^(S − lse)       dS = P ∘ (dout·Vᵀ − delta)       dQ = scale · dS·K
    drel_h[n, y] = Σ_x dS[n, y·Kw + x]               drel_w[n, x] = Σ_y dS[n, y·Kw + x]

One program holds a block of queries and walks the keys, so every sum has one owner and one order: no atomics. Under relative
positions it walks one key row at a time; drel_w stays in registers, drel_h is stored a row at a time (in as many columns as
a key row has blocks, added up by the caller). Shapes as in ``attention_forward``; delta [B, H, N] float32.
"""

import torch
import triton
import triton.language as tl

from ._attention import eights, store_tile
from ._attention_arguments import all_eights, common_arguments, row_for
from ._attention_backward import add_products, load_rows_of, products_of, recomputed_weights, row_products
from ._launch import launch
from ._plans import planned


@triton.jit
def _query_step(
    dq,  # [BLOCK_M, MAIN]
    dq_tail,  # [BLOCK_M, TAIL or 16]
    tile,  # (q, q_tail, dout, dout_tail) of the queries
    lse,  # [BLOCK_M], less rel_h
    delta,  # [BLOCK_M]
    k_ptr,
    v_ptr,
    mask_ptr,
    rel,  # [BLOCK_M, BLOCK_N]: rel_w; read only if HAS_REL
    row,
    start,
    key_end,
    queries,
    strides,  # of k's rows, v's rows, the mask's rows and columns
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
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One block of keys: (dq, dq_tail) with its share added, and its dS."""
    q, q_tail, dout, dout_tail = tile
    stride_k_row, stride_v_row, stride_mask_row, stride_mask_column = strides
    column = start + tl.arange(0, BLOCK_N).to(tl.int64)
    k, k_tail = load_rows_of(k_ptr, column, key_end, stride_k_row, DIM, MAIN, TAIL, BOUNDED)
    weights = recomputed_weights(
        products_of(q, q_tail, k, k_tail, TAIL, INPUT_PRECISION),
        rel,
        lse[:, None],
        row[:, None],
        column[None, :],
        queries,
        key_end,
        scale,
        mask_ptr,
        stride_mask_row,
        stride_mask_column,
        MASK,
        WIDE_MASK,
        HAS_REL,
        CAUSAL,
        BOUNDED,
    )
    v, v_tail = load_rows_of(v_ptr, column, key_end, stride_v_row, VALUE_DIM, VALUE_MAIN, VALUE_TAIL, BOUNDED)
    dscores = weights * (products_of(dout, dout_tail, v, v_tail, VALUE_TAIL, INPUT_PRECISION) - delta[:, None])
    dq, dq_tail = add_products(dq, dq_tail, dscores.to(k.dtype), k, k_tail, TAIL, INPUT_PRECISION)
    return dq, dq_tail, dscores


@triton.jit
def _attention_backward_query(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, Hk, M, D]
    v_ptr,  # [B, Hk, M, Dv]
    mask_ptr,  # [1|B, 1|H, 1|N, 1|M] or None
    rel_h_ptr,  # [B, H, N, Kh] or None
    rel_w_ptr,  # [B, H, N, Kw] or None
    out_ptr,  # [B, H, N, Dv]
    dout_ptr,  # [B, H, N, Dv]
    lse_ptr,  # [B, H, N]
    delta_ptr,  # [B, H, N]: written
    dq_ptr,  # [B, H, N, D]
    drel_h_ptr,  # [B, H, N, Kh, blocks of a key row] or None
    drel_w_ptr,  # [B, H, N, Kw] or None
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
    stride_dout_batch,
    stride_dout_head,
    stride_dout_row,
    stride_dq_batch,
    stride_dq_head,
    stride_dq_row,
    scale,
    MASK: tl.constexpr,
    WIDE_MASK: tl.constexpr,
    HAS_REL: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,  # a row of keys is whole blocks
    CAUSAL: tl.constexpr,
    EIGHTS: tl.constexpr,  # ``all_eights`` of q, k, v, out, dout and dq
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
    tiles = tl.cdiv(queries, BLOCK_M)
    first = (tl.program_id(0) % tiles) * BLOCK_M
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    if EIGHTS:
        stride_q_batch, stride_q_head, stride_q_row = eights(stride_q_batch), eights(stride_q_head), eights(stride_q_row)
        stride_k_batch, stride_k_head, stride_k_row = eights(stride_k_batch), eights(stride_k_head), eights(stride_k_row)
        stride_v_batch, stride_v_head, stride_v_row = eights(stride_v_batch), eights(stride_v_head), eights(stride_v_row)
        stride_out_batch, stride_out_head, stride_out_row = (
            eights(stride_out_batch),
            eights(stride_out_head),
            eights(stride_out_row),
        )
        stride_dout_batch, stride_dout_head, stride_dout_row = (
            eights(stride_dout_batch),
            eights(stride_dout_head),
            eights(stride_dout_row),
        )
        stride_dq_batch, stride_dq_head, stride_dq_row = eights(stride_dq_batch), eights(stride_dq_head), eights(stride_dq_row)
    row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    inside = row < queries
    q_ptr += batch * stride_q_batch + head * stride_q_head
    k_ptr += batch * stride_k_batch + (head // groups) * stride_k_head
    v_ptr += batch * stride_v_batch + (head // groups) * stride_v_head
    out_ptr += batch * stride_out_batch + head * stride_out_head
    dout_ptr += batch * stride_dout_batch + head * stride_dout_head
    dq_ptr += batch * stride_dq_batch + head * stride_dq_head
    if MASK != "none":
        mask_ptr += batch * stride_mask_batch + head * stride_mask_head

    q, q_tail = load_rows_of(q_ptr, row, queries, stride_q_row, DIM, MAIN, TAIL, True)
    dout, dout_tail = load_rows_of(dout_ptr, row, queries, stride_dout_row, VALUE_DIM, VALUE_MAIN, VALUE_TAIL, True)
    out, out_tail = load_rows_of(out_ptr, row, queries, stride_out_row, VALUE_DIM, VALUE_MAIN, VALUE_TAIL, True)
    delta = row_products(out, out_tail, dout, dout_tail, VALUE_TAIL)
    index = batch_head * queries + row
    tl.store(delta_ptr + index, delta, mask=inside)
    lse = tl.load(lse_ptr + index, mask=inside, other=float("inf"))
    dq = tl.zeros([BLOCK_M, MAIN], dtype=tl.float32)
    dq_tail = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 16], dtype=tl.float32)
    tile = (q, q_tail, dout, dout_tail)
    strides = (stride_k_row, stride_v_row, stride_mask_row, stride_mask_column)

    if HAS_REL:
        unit = 1.0 if MASK == "additive" else 1.4426950408889634
        blocks = tl.cdiv(key_columns, BLOCK_N)
        tl.assume((key_rows > 0) & (key_columns > 0))
        for left in range(0, key_columns, BLOCK_N):
            place = left + tl.arange(0, BLOCK_N)
            present = inside[:, None] & (place < key_columns)[None, :]
            w_offset = index[:, None] * key_columns + place[None, :]
            rel_w = tl.load(rel_w_ptr + w_offset, mask=present, other=0.0).to(tl.float32) * unit
            drel_w = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for key_row in range(0, key_rows):
                rel_h = tl.load(rel_h_ptr + index * key_rows + key_row, mask=inside, other=0.0).to(tl.float32) * unit
                dq, dq_tail, dscores = _query_step(
                    dq,
                    dq_tail,
                    tile,
                    lse - rel_h,
                    delta,
                    k_ptr,
                    v_ptr,
                    mask_ptr,
                    rel_w,
                    row,
                    key_row * key_columns + left,
                    (key_row + 1) * key_columns,
                    queries,
                    strides,
                    scale,
                    MASK,
                    WIDE_MASK,
                    True,
                    CAUSAL,
                    not EVEN_COLUMNS,
                    DIM,
                    MAIN,
                    TAIL,
                    VALUE_DIM,
                    VALUE_MAIN,
                    VALUE_TAIL,
                    BLOCK_N,
                    INPUT_PRECISION,
                )
                drel_w += dscores
                h_offset = (index * key_rows + key_row) * blocks + left // BLOCK_N
                tl.store(drel_h_ptr + h_offset, tl.sum(dscores, axis=1), mask=inside)
            tl.store(drel_w_ptr + w_offset, drel_w.to(drel_w_ptr.dtype.element_ty), mask=present)
    else:
        # The last keys first, with bounds and, when causal, the diagonal; then the body, which needs none. Why that is told:
        # ``attention_forward``.
        whole = (keys - 1) // BLOCK_N * BLOCK_N
        end = keys
        if CAUSAL:
            whole = tl.minimum(whole, first // BLOCK_N * BLOCK_N)
            end = tl.minimum(keys, first + BLOCK_M)
        tl.assume(whole < end)
        for part in tl.static_range(2):
            # Addresses kept across the loop would cost the registers of a second program.
            for start in tl.range(0 if part else whole, whole if part else end, BLOCK_N, disable_licm=True):
                dq, dq_tail, _ = _query_step(
                    dq,
                    dq_tail,
                    tile,
                    lse,
                    delta,
                    k_ptr,
                    v_ptr,
                    mask_ptr,
                    lse,
                    row,
                    start,
                    keys,
                    queries,
                    strides,
                    scale,
                    MASK,
                    WIDE_MASK,
                    False,
                    CAUSAL and part == 0,
                    part == 0,
                    DIM,
                    MAIN,
                    TAIL,
                    VALUE_DIM,
                    VALUE_MAIN,
                    VALUE_TAIL,
                    BLOCK_N,
                    INPUT_PRECISION,
                )
    store_tile(dq_ptr, dq * scale, row, queries, stride_dq_row, 0, MAIN, DIM)
    if TAIL > 0:
        store_tile(dq_ptr, dq_tail * scale, row, queries, stride_dq_row, MAIN, TAIL, DIM)


def rel_blocks(q: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, rel_w: torch.Tensor, is_causal: bool) -> int:
    """In how many blocks a row of keys is walked: the last dimension of drel_h."""
    row = row_for("attention_backward_query", q, v, mask, rel_w, causal=is_causal)
    return triton.cdiv(rel_w.shape[3], row["BLOCK_N"])


@planned
def launch_attention_backward_query(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    rel_h: torch.Tensor | None,
    rel_w: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    drel_h: torch.Tensor | None,
    drel_w: torch.Tensor | None,
) -> None:
    """Fills delta, dq, drel_h [B, H, N, Kh, ``rel_blocks``] float32 and drel_w [B, H, N, Kw]."""
    row = row_for("attention_backward_query", q, v, mask, rel_w, causal=is_causal)
    strides = {
        f"stride_{name}_{axis}": tensor.stride(dim)
        for name, tensor in (("out", out), ("dout", dout), ("dq", dq))
        for dim, axis in enumerate(("batch", "head", "row"))
    }
    launch(
        "attention_backward_query",
        _attention_backward_query,
        (q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], row["BLOCK_M"]),),
        q,
        row,
        rel_h_ptr=rel_h,
        rel_w_ptr=rel_w,
        out_ptr=out,
        dout_ptr=dout,
        lse_ptr=lse,
        delta_ptr=delta,
        dq_ptr=dq,
        drel_h_ptr=drel_h,
        drel_w_ptr=drel_w,
        CAUSAL=is_causal,
        EIGHTS=all_eights(q, k, v, out, dout, dq),
        EVEN_COLUMNS=rel_w is not None and rel_w.shape[3] % row["BLOCK_N"] == 0,
        **strides,
        **common_arguments(q, k, v, mask, rel_h, scale),
    )
