"""Image attention, backward for the queries and their relative positions (Dao 2023, FlashAttention-2, algorithm 2, dQ half).

    P = 2^(S − lse)       dS = P ∘ (dout·Vᵀ − delta)       dQ = scale · dS·K       delta = Σ_d out·dout
    drel_h[n, y] = Σ_x dS[n, (y, x)]               drel_w[n, x] = Σ_y dS[n, (y, x)]

One program holds a block of a window's queries and walks the window's keys, so every sum has one owner and one order: no
atomics. drel_w stays in registers until a pass over the key rows ends; drel_h leaves with each tile, in as many parts as
there are passes. What goes through the tables to dQ is added by ``image_attention_positions``. Shapes as in
``image_attention_forward``; dout like out; delta like lse; dqkv [B, Hi, Wi, 3·H·D] contiguous, of which dq is written.
"""

import torch
import triton
import triton.language as tl

from ._attention_backward import row_products
from ._launch import launch
from ._plans import planned
from .image_attention import (
    key_tile,
    load_keys,
    load_rows,
    queries_of,
    query_arguments,
    query_tokens,
    relative_tile,
    row_for,
    store_rows,
    tile_arguments,
    window_arguments,
    window_corner,
    windows_of,
)


@triton.jit
def _image_attention_backward_query(
    qkv_ptr,  # [B, Hi, Wi, 3, H, D]
    pad_ptr,  # [3, H, D] or None
    rel_h_ptr,  # [B, H, Hi·Wi, h] or None
    rel_w_ptr,  # [B, H, Hi·Wi, w] or None
    out_ptr,  # [B, Hi, Wi, H, D]
    dout_ptr,  # [B, Hi, Wi, H, D]
    lse_ptr,  # [B, H, Hi·Wi]
    delta_ptr,  # [B, H, Hi·Wi]: written
    dqkv_ptr,  # [B, Hi, Wi, 3, H, D]
    drel_h_ptr,  # [PASSES, B, H, Hi·Wi, h] or None
    drel_w_ptr,  # [B, H, Hi·Wi, w] or None
    heads,
    height,
    width,
    window_h,
    window_w,
    windows,
    windows_across,
    tiles,
    stride_batch,
    stride_y,
    stride_x,
    stride_pass,  # of drel_h
    scale,
    HAS_REL: tl.constexpr,
    PAD: tl.constexpr,
    EVEN: tl.constexpr,
    PASSES: tl.constexpr,
    LINEAR: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    KEY_ROWS: tl.constexpr = BLOCK_N // KEY_COLUMNS
    program = tl.program_id(0)
    first = (program % tiles) * BLOCK_M
    head = ((program // tiles) % heads).to(tl.int64)
    window = (program // tiles // heads) % windows
    batch = (program // tiles // heads // windows).to(tl.int64)
    top, left, rows, columns = window_corner(window, windows_across, window_h, window_w, height, width)
    if first >= rows * columns:
        return
    place = first + tl.arange(0, BLOCK_M)
    inside = place < rows * columns
    channels = heads * DIM
    tokens = height * width
    query_offset, token = query_tokens(place, top, left, columns, width, stride_y, stride_x, LINEAR)
    index = (batch * heads + head) * tokens + token
    token += batch * tokens
    qkv_ptr += batch * stride_batch + head * DIM
    if pad_ptr is not None:
        pad_ptr += head * DIM
    query_rows = qkv_ptr + query_offset
    dout_rows = dout_ptr + token * channels + head * DIM
    out_rows = out_ptr + token * channels + head * DIM
    q = load_rows(query_rows, inside, 0, MAIN, DIM, True)
    dout = load_rows(dout_rows, inside, 0, MAIN, DIM, True)
    out = load_rows(out_rows, inside, 0, MAIN, DIM, True)
    q_tail, dout_tail, out_tail = q, dout, out
    if TAIL > 0:
        q_tail = load_rows(query_rows, inside, MAIN, TAIL, DIM, True)
        dout_tail = load_rows(dout_rows, inside, MAIN, TAIL, DIM, True)
        out_tail = load_rows(out_rows, inside, MAIN, TAIL, DIM, True)
    lse = tl.load(lse_ptr + index, mask=inside, other=float("inf"))
    delta = row_products(out, out_tail, dout, dout_tail, TAIL)
    tl.store(delta_ptr + index, delta, mask=inside)
    dq = tl.zeros([BLOCK_M, MAIN], dtype=tl.float32)
    dq_tail = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 16], dtype=tl.float32)
    rel_h_rows, rel_w_rows = rel_h_ptr, rel_w_ptr
    if HAS_REL:
        rel_h_rows, rel_w_rows = rel_h_ptr + index * window_h, rel_w_ptr + index * window_w

    tl.assume(window_h > 0)  # why that is told: ``attention_forward``
    for across in range(0, PASSES):
        key_column = across * KEY_COLUMNS
        if HAS_REL:
            rel_w = relative_tile(rel_w_rows, key_column, window_w, inside, KEY_COLUMNS)
            drel_h_rows = drel_h_ptr + across * stride_pass + index * window_h
            drel = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for key_row in range(0, window_h, KEY_ROWS):
            offset, exists, real = key_tile(
                key_row, key_column, top, left, window_h, window_w, height, width, stride_y, stride_x, BLOCK_N, KEY_COLUMNS
            )
            pad_k_ptr, pad_v_ptr = pad_ptr, pad_ptr
            if pad_ptr is not None:
                pad_k_ptr, pad_v_ptr = pad_ptr + channels, pad_ptr + 2 * channels
            k = load_keys(qkv_ptr + channels, pad_k_ptr, offset, exists, real, 0, MAIN, DIM, PAD, EVEN)
            scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
            k_tail = k
            if TAIL > 0:
                k_tail = load_keys(qkv_ptr + channels, pad_k_ptr, offset, exists, real, MAIN, TAIL, DIM, PAD, EVEN)
                scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=INPUT_PRECISION)
            scores *= scale * 1.4426950408889634
            shift = lse
            if HAS_REL:
                if KEY_ROWS == 1:
                    scores += rel_w
                    shift = lse - tl.load(rel_h_rows + key_row, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
                else:
                    rel_h = relative_tile(rel_h_rows, key_row, window_h, inside, KEY_ROWS)
                    scores += (rel_h[:, :, None] + rel_w[:, None, :]).reshape(BLOCK_M, BLOCK_N)
            scores -= shift[:, None]
            if not EVEN:
                scores = tl.where(exists[None, :], scores, float("-inf"))
            weights = tl.exp2(scores)
            v = load_keys(qkv_ptr + 2 * channels, pad_v_ptr, offset, exists, real, 0, MAIN, DIM, PAD, EVEN)
            dweights = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
            if TAIL > 0:
                v_tail = load_keys(qkv_ptr + 2 * channels, pad_v_ptr, offset, exists, real, MAIN, TAIL, DIM, PAD, EVEN)
                dweights = tl.dot(dout_tail, tl.trans(v_tail), dweights, input_precision=INPUT_PRECISION)
            dscores = weights * (dweights - delta[:, None])
            rounded = dscores.to(k.dtype)
            dq = tl.dot(rounded, k, dq, input_precision=INPUT_PRECISION)
            if TAIL > 0:
                dq_tail = tl.dot(rounded, k_tail, dq_tail, input_precision=INPUT_PRECISION)
            if HAS_REL:
                drel += dscores
                if KEY_ROWS == 1:
                    drel_h = tl.sum(dscores, axis=1)
                    tl.store(drel_h_rows + key_row, drel_h.to(drel_h_ptr.dtype.element_ty), mask=inside)
                else:
                    drel_h = tl.sum(dscores.reshape(BLOCK_M, KEY_ROWS, KEY_COLUMNS), axis=2)
                    down = key_row + tl.arange(0, KEY_ROWS)
                    present = inside[:, None] & (down < window_h)[None, :]
                    tl.store(drel_h_rows[:, None] + down[None, :], drel_h.to(drel_h_ptr.dtype.element_ty), mask=present)
        if HAS_REL:
            drel_w = tl.sum(drel.reshape(BLOCK_M, KEY_ROWS, KEY_COLUMNS), axis=1)
            lane = key_column + tl.arange(0, KEY_COLUMNS)
            there = inside[:, None] & (lane < window_w)[None, :]
            drel_w_ptrs = drel_w_ptr + index[:, None] * window_w + lane[None, :]
            tl.store(drel_w_ptrs, drel_w.to(drel_w_ptr.dtype.element_ty), mask=there)

    dq_rows = dqkv_ptr + token * 3 * channels + head * DIM
    store_rows(dq_rows, dq * scale, inside, 0, MAIN, DIM)
    if TAIL > 0:
        store_rows(dq_rows, dq_tail * scale, inside, MAIN, TAIL, DIM)


def passes_of(qkv: torch.Tensor, heads: int, window: tuple[int, int]) -> int:
    """In how many passes a window's keys are walked, each a tile wide: the parts of drel_h."""
    return triton.cdiv(window[1], row_for("image_attention_backward_query", qkv, heads, window)[1]["KEY_COLUMNS"])


@planned
def launch_image_attention_backward_query(
    qkv: torch.Tensor,
    pad: torch.Tensor | None,
    rel_h: torch.Tensor | None,
    rel_w: torch.Tensor | None,
    heads: int,
    window: tuple[int, int],
    scale: float,
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dqkv: torch.Tensor,
    drel_h: torch.Tensor | None,
    drel_w: torch.Tensor | None,
) -> None:
    """Fills delta, the dq of dqkv, drel_h [``passes_of``, B, H, Hi·Wi, h] and drel_w."""
    row, tile = row_for("image_attention_backward_query", qkv, heads, window)
    down, across = windows_of(qkv, window)
    tiles = triton.cdiv(queries_of(qkv, window), row["BLOCK_M"])
    launch(
        "image_attention_backward_query",
        _image_attention_backward_query,
        (qkv.shape[0] * down * across * heads * tiles,),
        qkv,
        row,
        rel_h_ptr=rel_h,
        rel_w_ptr=rel_w,
        out_ptr=out,
        dout_ptr=dout,
        lse_ptr=lse,
        delta_ptr=delta,
        dqkv_ptr=dqkv,
        drel_h_ptr=drel_h,
        drel_w_ptr=drel_w,
        windows=down * across,
        windows_across=across,
        tiles=tiles,
        stride_pass=0 if drel_h is None else drel_h.stride(0),
        scale=scale,
        HAS_REL=rel_h is not None,
        LINEAR=query_arguments(qkv, window, row["BLOCK_M"])["LINEAR"],
        **tile_arguments(tile, window),
        **window_arguments(qkv, heads, window, pad),
    )
