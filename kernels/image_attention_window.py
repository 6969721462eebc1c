"""Image attention in small windows, forward: one program holds all keys and values of a window and head.

    s[n, m] = q_n·k_m + (rel_h[n, row of m] + rel_w[n, column of m]) / scale      out_n = Σ_m softmax(scale·s)[n, m]·v_m

Keys and values are read once a program, in pieces of BLOCK_N places, a row of the window being KEY_COLUMNS of them (14 × 14:
224 places, 64 + 64 + 64 + 32); the program's loop goes over the query tiles ``part``, ``part + parts``, … of its window, each
some of its rows. The positions are what the products start from, −inf where the window has no key: the tables are multiplied with
the queries and gathered in registers. The weights' sum is a product with ones, whose registers are fewer than a sum's.
Shapes as in ``image_attention_forward``, the tables [2h − 1, D] and [2w − 1, D] in place of rel_h and rel_w. Limits: windows
of 16 by 16 at most, and what ``serves`` says. Reference: ``fastvit.reference.image_attention``.
"""

import torch
import triton
import triton.language as tl

from ._attention import MIN_DOT, split_head_dim
from ._launch import launch, target_of
from ._tuning import config
from .image_attention import load_rows, store_rows, window_arguments, window_corner, windows_of

TABLE = 32  # rows of a table, of which a window's side of 16 has 31


@triton.jit
def _load(rows, pad_ptr, exists, real, DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr):
    """(columns of MAIN, columns of TAIL, or of MAIN again) at the addresses ``rows``, or at ``pad_ptr`` where not ``real``."""
    if pad_ptr is not None:
        rows = tl.where(real, rows, pad_ptr)
    main = load_rows(rows, exists, 0, MAIN, DIM, MASKED)
    tail = main
    if TAIL > 0:
        tail = load_rows(rows, exists, MAIN, TAIL, DIM, MASKED)
    return main, tail


@triton.jit
def _load_piece(
    k_ptr,  # at the window's first token, its head
    channels,  # from a key to its value
    pad_k_ptr,
    pad_v_ptr,
    start,
    rows,
    columns,
    window_h,
    window_w,
    stride_y,
    stride_x,
    PLACES: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    PAD: tl.constexpr,
    EVEN: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Keys and values at the PLACES from ``start`` on, each as ``_load`` gives them."""
    place = start + tl.arange(0, PLACES)
    row, column = place // KEY_COLUMNS, place % KEY_COLUMNS
    exists = (row < window_h) & (column < window_w)
    real = (row < rows) & (column < columns)
    if PAD == "zeros":
        exists = real
    MASKED: tl.constexpr = PAD == "zeros" or not EVEN
    key_rows = k_ptr + row * stride_y + column * stride_x
    k, k_tail = _load(key_rows, pad_k_ptr, exists, real, DIM, MAIN, TAIL, MASKED)
    v, v_tail = _load(key_rows + channels, pad_v_ptr, exists, real, DIM, MAIN, TAIL, MASKED)
    return k, k_tail, v, v_tail


@triton.jit
def _load_table(ptr, size, DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, TABLE: tl.constexpr):
    """A table of relative positions, its rows in reverse."""
    place = tl.arange(0, TABLE)
    inside = place < 2 * size - 1
    return _load(ptr + (2 * size - 2 - place) * DIM, None, inside, inside, DIM, MAIN, TAIL, True)


@triton.jit
def _products(q, q_tail, k, k_tail, start, TAIL: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """start + q·kᵀ."""
    products = tl.dot(q, tl.trans(k), start, input_precision=INPUT_PRECISION)
    if TAIL > 0:
        products = tl.dot(q_tail, tl.trans(k_tail), products, input_precision=INPUT_PRECISION)
    return products


@triton.jit
def _positions(
    q,
    q_tail,
    table,
    table_tail,
    position,
    size,
    factor,
    COUNT: tl.constexpr,
    ROUNDED: tl.constexpr,  # as in ``table_products``
    TAIL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """factor · relative positions of queries at ``position``, −inf from ``size`` on: [BLOCK_M, COUNT]."""
    start = tl.zeros([q.shape[0], table.shape[0]], dtype=tl.float32)
    products = _products(q, q_tail, table, table_tail, start, TAIL, INPUT_PRECISION)
    if ROUNDED:
        products = products.to(q.dtype).to(tl.float32)
    products *= factor
    key = tl.arange(0, COUNT)
    # Queries beyond the window wrap around the table, and are never stored.
    place = ((size - 1 - position)[:, None] + key[None, :]) & (table.shape[0] - 1)
    return tl.where((key < size)[None, :], tl.gather(products, place, axis=1), float("-inf"))


@triton.jit
def _halves(tile):
    """[rows, columns] → two of [rows, columns / 2]."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _parts(tile, PIECES: tl.constexpr):
    """The columns of ``tile`` in one, two, or (for three or four pieces) four parts."""
    if PIECES == 1:
        return (tile,)
    else:
        left, right = _halves(tile)
        if PIECES == 2:
            return left, right
        else:
            first, second = _halves(left)
            third, fourth = _halves(right)
            return first, second, third, fourth


@triton.jit
def _image_attention_window(
    qkv_ptr,  # [B, Hi, Wi, 3, H, D]
    pad_ptr,  # [3, H, D] or None
    table_h_ptr,  # [2h − 1, D]
    table_w_ptr,  # [2w − 1, D]
    out_ptr,  # [B, Hi, Wi, H, D]
    lse_ptr,  # [B, H, Hi·Wi] or None
    heads,
    height,
    width,
    window_h,
    window_w,
    windows,
    windows_across,
    parts,
    stride_batch,
    stride_y,
    stride_x,
    scale,
    PAD: tl.constexpr,
    EVEN: tl.constexpr,  # the places are the window's own, no more
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LAST: tl.constexpr,  # places of the last piece
    PIECES: tl.constexpr,  # at most 4
    KEY_COLUMNS: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    TABLE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    part = program % parts
    head = ((program // parts) % heads).to(tl.int64)
    window = (program // parts // heads) % windows
    batch = (program // parts // heads // windows).to(tl.int64)
    top, left, rows, columns = window_corner(window, windows_across, window_h, window_w, height, width)
    channels = heads * DIM
    corner = batch * height * width + top.to(tl.int64) * width + left
    # At the window's first token; from here on 32-bit offsets, which ``serves`` sees to.
    qkv_ptr += batch * stride_batch + top.to(tl.int64) * stride_y + left.to(tl.int64) * stride_x + head * DIM
    out_ptr += corner * channels + head * DIM
    if lse_ptr is not None:
        lse_ptr += batch * (heads - 1) * height * width + head * height * width + corner
    pad_k_ptr, pad_v_ptr = pad_ptr, pad_ptr
    if pad_ptr is not None:
        pad_k_ptr, pad_v_ptr = pad_ptr + channels + head * DIM, pad_ptr + 2 * channels + head * DIM

    loaded = ()
    for piece in tl.static_range(PIECES):
        loaded = loaded + (  # type: ignore  # noqa: RUF005
            _load_piece(
                qkv_ptr + channels,
                channels,
                pad_k_ptr,
                pad_v_ptr,
                piece * BLOCK_N,
                rows,
                columns,
                window_h,
                window_w,
                stride_y,
                stride_x,
                LAST if piece == PIECES - 1 else BLOCK_N,
                KEY_COLUMNS,
                PAD,
                EVEN,
                DIM,
                MAIN,
                TAIL,
            ),
        )
    table_h, table_h_tail = _load_table(table_h_ptr, window_h, DIM, MAIN, TAIL, TABLE)
    table_w, table_w_tail = _load_table(table_w_ptr, window_w, DIM, MAIN, TAIL, TABLE)
    factor = scale * 1.4426950408889634
    unscale = 1.0 / scale

    SAVED: tl.constexpr = lse_ptr is not None
    QUERY_ROWS: tl.constexpr = BLOCK_M // KEY_COLUMNS
    # Addresses kept across the loop would cost the registers of a second program.
    for first in tl.range(part * QUERY_ROWS, rows, parts * QUERY_ROWS, disable_licm=True):
        lane = tl.arange(0, BLOCK_M)
        row, column = first + lane // KEY_COLUMNS, lane % KEY_COLUMNS
        inside = (row < rows) & (column < columns)
        query_rows = qkv_ptr + row * stride_y + column * stride_x
        q, q_tail = _load(query_rows, None, inside, inside, DIM, MAIN, TAIL, True)
        # fmt: off
        rel_w = _positions(q, q_tail, table_w, table_w_tail, column, window_w, unscale, KEY_COLUMNS, SAVED, TAIL, INPUT_PRECISION)
        rel_h = _positions(q, q_tail, table_h, table_h_tail, row, window_h, unscale, KEY_ROWS, SAVED, TAIL, INPUT_PRECISION)
        # fmt: on
        rels = _parts(rel_h, PIECES)
        acc = tl.zeros([BLOCK_M, MAIN], dtype=tl.float32)
        acc_tail = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 16], dtype=tl.float32)
        sums = tl.zeros([BLOCK_M, 16], dtype=tl.float32)
        peak = tl.zeros([BLOCK_M], dtype=tl.float32)
        for piece in tl.static_range(PIECES):
            k, k_tail, v, v_tail = loaded[piece]  # type: ignore
            rel = rels[piece]
            if rel.shape[1] * KEY_COLUMNS > k.shape[0]:
                rel, _ = _halves(rel)
            if rel.shape[1] * KEY_COLUMNS > k.shape[0]:
                rel, _ = _halves(rel)
            rel = rel[:, :, None] + rel_w[:, None, :]
            scores = _products(q, q_tail, k, k_tail, rel.reshape(BLOCK_M, k.shape[0]), TAIL, INPUT_PRECISION)
            # Every piece begins with a key that exists.
            high = tl.max(scores, axis=1) * factor
            if piece > 0:
                high = tl.maximum(high, peak)
                shrink = tl.exp2(peak - high)[:, None]
                acc *= shrink
                acc_tail *= shrink
                sums *= shrink
            peak = high
            weights = tl.exp2(scores * factor - peak[:, None]).to(v.dtype)
            acc = tl.dot(weights, v, acc, input_precision=INPUT_PRECISION)
            if TAIL > 0:
                acc_tail = tl.dot(weights, v_tail, acc_tail, input_precision=INPUT_PRECISION)
            sums = tl.dot(weights, tl.full([k.shape[0], 16], 1.0, v.dtype), sums, input_precision=INPUT_PRECISION)
        total = tl.max(sums, axis=1)
        token = row * width + column
        if lse_ptr is not None:
            tl.store(lse_ptr + token, peak + tl.log2(total), mask=inside)
        inverse = (1.0 / total)[:, None]
        out_rows = out_ptr + token * channels
        store_rows(out_rows, acc * inverse, inside, 0, MAIN, DIM)
        if TAIL > 0:
            store_rows(out_rows, acc_tail * inverse, inside, MAIN, TAIL, DIM)


def serves(qkv: torch.Tensor, heads: int, window: tuple[int, int], scale: float) -> bool:
    """A head dim without padding, a scale to divide by, and a window whose tokens are 32-bit offsets apart."""
    _, _, width, channels = qkv.shape
    apart = window[0] * max(qkv.stride(1), width * channels) + window[1] * qkv.stride(2) + channels
    filled = channels // (3 * heads) == sum(split_head_dim(channels // (3 * heads), qkv.element_size()))
    return filled and scale > 1e-6 and apart < 2**31 and not target_of(qkv).startswith("gfx")


def launch_window(
    qkv: torch.Tensor,
    pad: torch.Tensor | None,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
    heads: int,
    window: tuple[int, int],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fills out, and lse unless None."""
    row = config("image_attention_window", target_of(qkv))
    down, across = windows_of(qkv, window)
    columns = triton.next_power_of_2(window[1])
    places = window[0] * columns
    count = triton.cdiv(places, row["BLOCK_N"])
    last = max(MIN_DOT, triton.next_power_of_2(places - (count - 1) * row["BLOCK_N"]))
    programs = qkv.shape[0] * down * across * heads
    tiles = triton.cdiv(min(qkv.shape[1], window[0]), row["BLOCK_M"] // columns)
    parts = min(tiles, max(1, row["MIN_PROGRAMS"] // max(1, programs)))
    launch(
        "image_attention_window",
        _image_attention_window,
        (programs * parts,),
        qkv,
        row,
        table_h_ptr=table_h,
        table_w_ptr=table_w,
        out_ptr=out,
        lse_ptr=lse,
        windows=down * across,
        windows_across=across,
        parts=parts,
        scale=scale,
        EVEN=(count - 1) * row["BLOCK_N"] + last == window[0] * window[1],
        LAST=last,
        PIECES=count,
        KEY_COLUMNS=columns,
        KEY_ROWS=max(triton.next_power_of_2(window[0]), MIN_DOT // columns),
        TABLE=TABLE,
        **window_arguments(qkv, heads, window, pad),
    )
