"""Image attention, forward: softmax(scale·QKᵀ + rel_h + rel_w)·V in windows of the image, in one pass over a window's keys.

    s[n, m] = scale·q_n·k_m + rel_h[n, row of m] + rel_w[n, column of m]       out_n = Σ_m softmax(s)[n, m]·v_m

Shapes: qkv [B, Hi, Wi, 3·H·D] of any strides with the last one 1, pad [3·H·D] (what every padded key and value is; None for
zeros), rel_h [B, H, Hi·Wi, h] and rel_w [B, H, Hi·Wi, w] or None, out [B, Hi, Wi, H·D] and lse [B, H, Hi·Wi] float32, all
contiguous. For small windows the tables come in place of rel_h and rel_w, which the kernel makes of them: one launch less.
lse, m + log2(l), is saved for backward. Windows (h, w) of any size, the whole image among them; head dims
1 … 256 in two pieces.
Online softmax after Dao 2023, FlashAttention-2, algorithm 1; the attention is that of Kirillov et al. 2023, Segment
Anything, appendix A. Reference: ``fastvit.reference.image_attention``.
"""

import torch
import triton
import triton.language as tl

from ._attention import softmax_step
from ._launch import launch
from ._plans import planned
from .image_attention import (
    key_tile,
    load_keys,
    load_rows,
    queries_of,
    relative_from_products,
    relative_tile,
    row_for,
    store_rows,
    table_products,
    tile_arguments,
    window_arguments,
    window_corner,
    windows_of,
)
from .image_attention_global import launch_global
from .image_attention_global import serves as serves_global
from .image_attention_window import launch_window, serves


@triton.jit
def _image_attention_forward(
    qkv_ptr,  # [B, Hi, Wi, 3, H, D]
    pad_ptr,  # [3, H, D] or None
    rel_h_ptr,  # [B, H, Hi·Wi, h], with TABLE the table [2h − 1, D], or None
    rel_w_ptr,  # [B, H, Hi·Wi, w], with TABLE the table [2w − 1, D], or None
    out_ptr,  # [B, Hi, Wi, H, D]
    lse_ptr,  # [B, H, Hi·Wi] or None
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
    scale,
    HAS_REL: tl.constexpr,
    PAD: tl.constexpr,
    EVEN: tl.constexpr,
    PASSES: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    TABLE: tl.constexpr,
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
    y, x = (top + place // columns).to(tl.int64), (left + place % columns).to(tl.int64)
    token = y * width + x
    channels = heads * DIM
    qkv_ptr += batch * stride_batch + head * DIM
    if pad_ptr is not None:
        pad_ptr += head * DIM
    query_rows = qkv_ptr + y * stride_y + x * stride_x
    q = load_rows(query_rows, inside, 0, MAIN, DIM, True)
    q_tail = q
    if TAIL > 0:
        q_tail = load_rows(query_rows, inside, MAIN, TAIL, DIM, True)
    acc = tl.zeros([BLOCK_M, MAIN], dtype=tl.float32)
    acc_tail = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 16], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    tokens = height * width
    index = (batch * heads + head) * tokens + token
    rel_h_rows, rel_w_rows = rel_h_ptr, rel_w_ptr
    SAVED: tl.constexpr = lse_ptr is not None
    if HAS_REL and TABLE > 0:
        products_h = table_products(q, q_tail, rel_h_ptr, window_h, DIM, MAIN, TAIL, TABLE, SAVED, INPUT_PRECISION)
        products_w = table_products(q, q_tail, rel_w_ptr, window_w, DIM, MAIN, TAIL, TABLE, SAVED, INPUT_PRECISION)
    elif HAS_REL:
        rel_h_rows, rel_w_rows = rel_h_ptr + index * window_h, rel_w_ptr + index * window_w

    # One pass wherever a row of keys fits a tile: rel_w is then loaded once, and the compiler sees a single loop.
    for across in range(0, PASSES):
        key_column = across * KEY_COLUMNS
        if HAS_REL and TABLE > 0:
            rel_w = relative_from_products(products_w, place % columns, key_column, window_w, TABLE, KEY_COLUMNS)
        elif HAS_REL:
            rel_w = relative_tile(rel_w_rows, key_column, window_w, inside, KEY_COLUMNS)
        for key_row in range(0, window_h, KEY_ROWS):
            offset, exists, real = key_tile(
                key_row, key_column, top, left, window_h, window_w, height, width, stride_y, stride_x, BLOCK_N, KEY_COLUMNS
            )
            pad_k_ptr, pad_v_ptr = pad_ptr, pad_ptr
            if pad_ptr is not None:
                pad_k_ptr, pad_v_ptr = pad_ptr + channels, pad_ptr + 2 * channels
            k = load_keys(qkv_ptr + channels, pad_k_ptr, offset, exists, real, 0, MAIN, DIM, PAD, EVEN)
            scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
            if TAIL > 0:
                k_tail = load_keys(qkv_ptr + channels, pad_k_ptr, offset, exists, real, MAIN, TAIL, DIM, PAD, EVEN)
                scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=INPUT_PRECISION)
            scores *= scale * 1.4426950408889634
            lift = None
            if HAS_REL and TABLE > 0:
                rel_h = relative_from_products(products_h, place // columns, key_row, window_h, TABLE, KEY_ROWS)
                scores += (rel_h[:, :, None] + rel_w[:, None, :]).reshape(BLOCK_M, BLOCK_N)
            elif HAS_REL:
                if KEY_ROWS == 1:
                    rel_h = tl.load(rel_h_rows + key_row, mask=inside, other=0.0).to(tl.float32) * 1.4426950408889634
                    scores += rel_w
                    lift = rel_h
                else:
                    rel_h = relative_tile(rel_h_rows, key_row, window_h, inside, KEY_ROWS)
                    scores += (rel_h[:, :, None] + rel_w[:, None, :]).reshape(BLOCK_M, BLOCK_N)
            if not EVEN:
                scores = tl.where(exists[None, :], scores, float("-inf"))
            # A tile begins with a key that exists, so the running maximum is finite from the first one on.
            weights, shrink, peak, total = softmax_step(scores, 1.0, lift, peak, total, "none")
            v = load_keys(qkv_ptr + 2 * channels, pad_v_ptr, offset, exists, real, 0, MAIN, DIM, PAD, EVEN)
            rounded = weights.to(v.dtype)
            acc = tl.dot(rounded, v, acc * shrink[:, None], input_precision=INPUT_PRECISION)
            if TAIL > 0:
                v_tail = load_keys(qkv_ptr + 2 * channels, pad_v_ptr, offset, exists, real, MAIN, TAIL, DIM, PAD, EVEN)
                acc_tail = tl.dot(rounded, v_tail, acc_tail * shrink[:, None], input_precision=INPUT_PRECISION)

    if lse_ptr is not None:
        tl.store(lse_ptr + index, peak + tl.log2(total), mask=inside)
    inverse = (1.0 / total)[:, None]
    out_rows = out_ptr + (batch * tokens + token) * channels + head * DIM
    store_rows(out_rows, acc * inverse, inside, 0, MAIN, DIM)
    if TAIL > 0:
        store_rows(out_rows, acc_tail * inverse, inside, MAIN, TAIL, DIM)


def table_size(qkv: torch.Tensor, heads: int, window: tuple[int, int]) -> int:
    """TABLE: the rows of a table that the kernel multiplies with itself, or 0 where it wants rel_h and rel_w instead."""
    size = row_for("image_attention_forward", qkv, heads, window)[0].get("TABLE", 0)
    return size if 2 * max(window) - 1 <= size else 0


@planned
def launch_image_attention_forward(
    qkv: torch.Tensor,
    pad: torch.Tensor | None,
    rel_h: torch.Tensor | None,
    rel_w: torch.Tensor | None,
    heads: int,
    window: tuple[int, int],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fills out, and lse unless None; rel_h and rel_w are the tables where there is a ``table_size``."""
    row, tile = row_for("image_attention_forward", qkv, heads, window)
    if rel_h is not None and rel_w is not None:
        tables = table_size(qkv, heads, window) > 0
        if tables and row.get("ONE_PASS") and serves(qkv, heads, window, scale):
            launch_window(qkv, pad, rel_h, rel_w, heads, window, scale, out, lse)
            return
        if not tables and row.get("PAIRS") and serves_global(qkv, heads, window, scale):
            launch_global(qkv, rel_h, rel_w, heads, scale, out, lse)
            return
    down, across = windows_of(qkv, window)
    tiles = triton.cdiv(queries_of(qkv, window), row["BLOCK_M"])
    launch(
        "image_attention_forward",
        _image_attention_forward,
        (qkv.shape[0] * down * across * heads * tiles,),
        qkv,
        row,
        rel_h_ptr=rel_h,
        rel_w_ptr=rel_w,
        out_ptr=out,
        lse_ptr=lse,
        windows=down * across,
        windows_across=across,
        tiles=tiles,
        scale=scale,
        TABLE=table_size(qkv, heads, window),
        HAS_REL=rel_h is not None,
        **tile_arguments(tile, window),
        **window_arguments(qkv, heads, window, pad),
    )
