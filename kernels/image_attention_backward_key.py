"""Image attention, backward for keys, values and the padding (Dao 2023, FlashAttention-2, algorithm 2, its dK and dV half).

    P = 2^(S − lse)       dV = Pᵀ·dout       dS = P ∘ (dout·Vᵀ − delta)       dK = scale · dSᵀ·Q

One program holds a tile of a window's keys, those beyond the image too, and walks the window's queries, so every sum has one
owner and one order: no atomics. Scores are kept transposed, [keys, queries]. What padded keys and values collect leaves as one
partial sum a program, dpad [B · windows · tiles, 2, H, D] float32, to be added up over its first dimension.
Shapes as in ``image_attention_backward_query``; of dqkv, dk and dv are written.
"""

import torch
import triton
import triton.language as tl

from ._attention_backward import copies_of, load_statistics
from ._launch import launch
from ._plans import planned
from .image_attention import (
    key_tile,
    load_keys,
    load_rows,
    query_arguments,
    query_tokens,
    relative_tile,
    row_for,
    store_rows,
    window_arguments,
    window_corner,
    windows_of,
)


@triton.jit
def _image_attention_backward_key(
    qkv_ptr,  # [B, Hi, Wi, 3, H, D]
    pad_ptr,  # [3, H, D] or None
    rel_h_ptr,  # [B, H, Hi·Wi, h] or None
    rel_w_ptr,  # [B, H, Hi·Wi, w] or None
    dout_ptr,  # [B, Hi, Wi, H, D]
    lse_ptr,  # [B, H, Hi·Wi]
    delta_ptr,  # [B, H, Hi·Wi]
    dqkv_ptr,  # [B, Hi, Wi, 3, H, D]
    dpad_ptr,  # [B · windows · tiles, 2, H, D] or None
    heads,
    height,
    width,
    window_h,
    window_w,
    windows,
    windows_across,
    tiles,
    tiles_across,
    stride_batch,
    stride_y,
    stride_x,
    scale,
    HAS_REL: tl.constexpr,
    PAD: tl.constexpr,
    WANTS_PAD: tl.constexpr,
    LINEAR: tl.constexpr,
    EVEN_QUERIES: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    COPIES: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    KEY_ROWS: tl.constexpr = BLOCK_N // KEY_COLUMNS
    program = tl.program_id(0)
    tile = program % tiles
    head = ((program // tiles) % heads).to(tl.int64)
    window = (program // tiles // heads) % windows
    batch = (program // tiles // heads // windows).to(tl.int64)
    top, left, rows, columns = window_corner(window, windows_across, window_h, window_w, height, width)
    key_row, key_column = (tile // tiles_across) * KEY_ROWS, (tile % tiles_across) * KEY_COLUMNS
    if not WANTS_PAD:
        if (key_row >= rows) | (key_column >= columns):
            return
    offset, exists, real = key_tile(
        key_row, key_column, top, left, window_h, window_w, height, width, stride_y, stride_x, BLOCK_N, KEY_COLUMNS
    )
    channels = heads * DIM
    tokens = height * width
    qkv_ptr += batch * stride_batch + head * DIM
    pad_k_ptr, pad_v_ptr = pad_ptr, pad_ptr
    if pad_ptr is not None:
        pad_k_ptr, pad_v_ptr = pad_ptr + channels + head * DIM, pad_ptr + 2 * channels + head * DIM
    k = load_keys(qkv_ptr + channels, pad_k_ptr, offset, exists, real, 0, MAIN, DIM, PAD, False)
    v = load_keys(qkv_ptr + 2 * channels, pad_v_ptr, offset, exists, real, 0, MAIN, DIM, PAD, False)
    k_tail, v_tail = k, v
    if TAIL > 0:
        k_tail = load_keys(qkv_ptr + channels, pad_k_ptr, offset, exists, real, MAIN, TAIL, DIM, PAD, False)
        v_tail = load_keys(qkv_ptr + 2 * channels, pad_v_ptr, offset, exists, real, MAIN, TAIL, DIM, PAD, False)
    dk = tl.zeros([BLOCK_N, MAIN], dtype=tl.float32)
    dk_tail = tl.zeros([BLOCK_N, TAIL if TAIL > 0 else 16], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, MAIN], dtype=tl.float32)
    dv_tail = tl.zeros([BLOCK_N, TAIL if TAIL > 0 else 16], dtype=tl.float32)

    tl.assume(rows * columns > 0)  # why that is told: ``attention_forward``
    for start in range(0, rows * columns, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        inside = place < rows * columns
        query_offset, token = query_tokens(place, top, left, columns, width, stride_y, stride_x, LINEAR)
        index = (batch * heads + head) * tokens + token
        query_rows = qkv_ptr + query_offset
        dout_rows = dout_ptr + (batch * tokens + token) * channels + head * DIM
        q = load_rows(query_rows, inside, 0, MAIN, DIM, not EVEN_QUERIES)
        scores = tl.dot(k, tl.trans(q), input_precision=INPUT_PRECISION)
        q_tail = q
        if TAIL > 0:
            q_tail = load_rows(query_rows, inside, MAIN, TAIL, DIM, not EVEN_QUERIES)
            scores = tl.dot(k_tail, tl.trans(q_tail), scores, input_precision=INPUT_PRECISION)
        scores *= scale * 1.4426950408889634
        # Queries beyond the end add nothing, being zero like their dout; keys that the window has not are never stored.
        lse, delta = load_statistics(lse_ptr, delta_ptr, index, inside, COPIES, BLOCK_M, not EVEN_QUERIES)
        if HAS_REL:
            rel_w = tl.trans(relative_tile(rel_w_ptr + index * window_w, key_column, window_w, inside, KEY_COLUMNS))
            if KEY_ROWS == 1:
                lse -= tl.load(rel_h_ptr + index * window_h + key_row, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
                scores += rel_w
            else:
                rel_h = tl.trans(relative_tile(rel_h_ptr + index * window_h, key_row, window_h, inside, KEY_ROWS))
                scores += (rel_h[:, None, :] + rel_w[None, :, :]).reshape(BLOCK_N, BLOCK_M)
        weights = tl.exp2(scores - lse[None, :])
        dout = load_rows(dout_rows, inside, 0, MAIN, DIM, not EVEN_QUERIES)
        rounded = weights.to(dout.dtype)
        dv = tl.dot(rounded, dout, dv, input_precision=INPUT_PRECISION)
        dweights = tl.dot(v, tl.trans(dout), input_precision=INPUT_PRECISION)
        if TAIL > 0:
            dout_tail = load_rows(dout_rows, inside, MAIN, TAIL, DIM, not EVEN_QUERIES)
            dv_tail = tl.dot(rounded, dout_tail, dv_tail, input_precision=INPUT_PRECISION)
            dweights = tl.dot(v_tail, tl.trans(dout_tail), dweights, input_precision=INPUT_PRECISION)
        dscores = (weights * (dweights - delta[None, :])).to(q.dtype)
        dk = tl.dot(dscores, q, dk, input_precision=INPUT_PRECISION)
        if TAIL > 0:
            dk_tail = tl.dot(dscores, q_tail, dk_tail, input_precision=INPUT_PRECISION)

    dk *= scale
    dk_tail *= scale
    lane = tl.arange(0, BLOCK_N)
    token = (top + key_row + lane // KEY_COLUMNS).to(tl.int64) * width + left + key_column + lane % KEY_COLUMNS
    dk_rows = dqkv_ptr + (batch * tokens + token) * 3 * channels + channels + head * DIM
    dv_rows = dk_rows + channels
    store_rows(dk_rows, dk, real, 0, MAIN, DIM)
    store_rows(dv_rows, dv, real, 0, MAIN, DIM)
    if TAIL > 0:
        store_rows(dk_rows, dk_tail, real, MAIN, TAIL, DIM)
        store_rows(dv_rows, dv_tail, real, MAIN, TAIL, DIM)
    if WANTS_PAD:
        padded = (exists & (real == 0))[:, None]
        dpad_ptr += ((batch * windows + window) * tiles + tile) * 2 * channels + head * DIM
        column = tl.arange(0, MAIN)
        tl.store(dpad_ptr + column, tl.sum(tl.where(padded, dk, 0.0), axis=0), mask=column < DIM)
        tl.store(dpad_ptr + channels + column, tl.sum(tl.where(padded, dv, 0.0), axis=0), mask=column < DIM)
        if TAIL > 0:
            column = MAIN + tl.arange(0, TAIL)
            tl.store(dpad_ptr + column, tl.sum(tl.where(padded, dk_tail, 0.0), axis=0), mask=column < DIM)
            tl.store(dpad_ptr + channels + column, tl.sum(tl.where(padded, dv_tail, 0.0), axis=0), mask=column < DIM)


def _tiles(tile: dict[str, int], window: tuple[int, int]) -> tuple[int, int]:
    """How many tiles of keys a window has down and across."""
    return triton.cdiv(window[0], tile["BLOCK_N"] // tile["KEY_COLUMNS"]), triton.cdiv(window[1], tile["KEY_COLUMNS"])


def pad_parts(qkv: torch.Tensor, heads: int, window: tuple[int, int]) -> int:
    """The partial sums of dpad: its first dimension."""
    tiles, windows = _tiles(row_for("image_attention_backward_key", qkv, heads, window)[1], window), windows_of(qkv, window)
    return qkv.shape[0] * windows[0] * windows[1] * tiles[0] * tiles[1]


@planned
def launch_image_attention_backward_key(
    qkv: torch.Tensor,
    pad: torch.Tensor | None,
    rel_h: torch.Tensor | None,
    rel_w: torch.Tensor | None,
    heads: int,
    window: tuple[int, int],
    scale: float,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dqkv: torch.Tensor,
    dpad: torch.Tensor | None,
) -> None:
    """Fills the dk and dv of dqkv and, unless it is None, dpad [``pad_parts``, 2, H, D]."""
    row, tile = row_for("image_attention_backward_key", qkv, heads, window)
    down, across = windows_of(qkv, window)
    tiles_down, tiles_across = _tiles(tile, window)
    launch(
        "image_attention_backward_key",
        _image_attention_backward_key,
        (qkv.shape[0] * down * across * heads * tiles_down * tiles_across,),
        qkv,
        row,
        rel_h_ptr=rel_h,
        rel_w_ptr=rel_w,
        dout_ptr=dout,
        lse_ptr=lse,
        delta_ptr=delta,
        dqkv_ptr=dqkv,
        dpad_ptr=dpad,
        windows=down * across,
        windows_across=across,
        tiles=tiles_down * tiles_across,
        tiles_across=tiles_across,
        scale=scale,
        HAS_REL=rel_h is not None,
        COPIES=copies_of(qkv, row),
        WANTS_PAD=dpad is not None,
        **tile,
        **query_arguments(qkv, window, row["BLOCK_M"]),
        **window_arguments(qkv, heads, window, pad),
    )
