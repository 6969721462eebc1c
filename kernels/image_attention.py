"""What the image attention kernels share: where a window's queries and keys lie on the image, and what their scores are.

A window is never cut out: query r of window (wy, wx) lies at (wy·h + r // columns, wx·w + r % columns), rows and columns
counting only what the image has of it, so that padded queries do not exist. Keys come in tiles of KEY_ROWS × KEY_COLUMNS,
a whole row of a narrow window in each of several rows of a tile, so that relative positions are two thin tiles, added where
the scores are. A key beyond the image is the one vector that all padded keys equal: its address is chosen, so that the tile
is loaded like any other. The whole image is one window.
"""

import torch
import triton
import triton.language as tl

from ._attention import MIN_DOT, split_head_dim
from ._launch import input_precision, target_of
from ._tuning import config


@triton.jit
def window_corner(window, windows_across, window_h, window_w, height, width):
    """(top, left, rows, columns): the window's first token and how much of it the image has."""
    top = (window // windows_across) * window_h
    left = (window % windows_across) * window_w
    return top, left, tl.minimum(window_h, height - top), tl.minimum(window_w, width - left)


@triton.jit
def key_tile(
    row,  # of the window, the tile's first
    column,
    top,
    left,
    window_h,
    window_w,
    height,
    width,
    stride_y,
    stride_x,
    BLOCK_N: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
):
    """(token offsets, whether the window has the key, whether the image has it), each [BLOCK_N]."""
    lane = tl.arange(0, BLOCK_N)
    key_row = row + lane // KEY_COLUMNS
    key_column = column + lane % KEY_COLUMNS
    exists = (key_row < window_h) & (key_column < window_w)
    y, x = top + key_row, left + key_column
    real = exists & (y < height) & (x < width)
    return y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x, exists, real


@triton.jit
def query_tokens(place, top, left, columns, width, stride_y, stride_x, LINEAR: tl.constexpr):
    """(offsets in qkv, indices among the image's tokens) of a window's queries; LINEAR: it is the image, of one stride."""
    if LINEAR:
        token = place.to(tl.int64)
        return token * stride_x, token
    else:
        down = (place.to(tl.uint32) // columns.to(tl.uint32)).to(tl.int32)  # half the instructions of a signed division
        y, x = top + down, left + place - down * columns
        return y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x, (y * width + x).to(tl.int64)


@triton.jit
def load_rows(rows, mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr):
    """Columns FIRST … FIRST + WIDTH at the addresses ``rows``; zeros beyond DIM and, if MASKED, where ``mask`` is not."""
    column = FIRST + tl.arange(0, WIDTH)
    ptrs = rows[:, None] + column[None, :]
    if FIRST + WIDTH > DIM:
        inside = (column < DIM)[None, :]
        if MASKED:
            inside = inside & mask[:, None]
        return tl.load(ptrs, mask=inside, other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=mask[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_rows(rows, tile, mask, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Stores ``tile`` to the same place, in the pointer's dtype."""
    column = FIRST + tl.arange(0, WIDTH)
    inside = mask[:, None] & (column < DIM)[None, :]
    tl.store(rows[:, None] + column[None, :], tile.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def load_keys(
    ptr,  # keys or values of this head, at token 0 of the image
    pad_ptr,  # what every padded one is, or None
    offset,
    exists,
    real,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A tile of ``key_tile``'s keys or values, zeros where the window has none; PAD is one of ``pad_kind``."""
    if PAD == "address":
        return load_rows(tl.where(real, ptr + offset, pad_ptr), exists, FIRST, WIDTH, DIM, not EVEN)
    elif PAD == "value":
        column = FIRST + tl.arange(0, WIDTH)
        pad = tl.load(pad_ptr + column, mask=column < DIM, other=0.0)
        pad = tl.where(exists[:, None], pad[None, :], 0.0).to(pad.dtype)
        return tl.where(real[:, None], load_rows(ptr + offset, real, FIRST, WIDTH, DIM, True), pad)
    elif PAD == "zeros":
        return load_rows(ptr + offset, real, FIRST, WIDTH, DIM, True)
    else:
        return load_rows(ptr + offset, exists, FIRST, WIDTH, DIM, not EVEN)


@triton.jit
def relative_tile(rel_rows, first, size, inside, COUNT: tl.constexpr):
    """COUNT relative positions of each query from ``first`` on, in units of log2, zeros from ``size`` on: [BLOCK_M, COUNT]."""
    position = first + tl.arange(0, COUNT)
    present = inside[:, None] & (position < size)[None, :]
    return tl.load(rel_rows[:, None] + position[None, :], mask=present, other=0.0).to(tl.float32) * 1.4426950408889634


@triton.jit
def table_products(
    q,
    q_tail,
    table_ptr,  # [2 · size − 1, D]
    size,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    TABLE: tl.constexpr,  # at least 2 · size − 1
    ROUNDED: tl.constexpr,  # to q's dtype, as backward reads them: of others its weights would not add up to 1
    INPUT_PRECISION: tl.constexpr,
):
    """Each query with the whole table, its rows in reverse, in units of log2: [BLOCK_M, TABLE]."""
    place = tl.arange(0, TABLE)
    rows, inside = table_ptr + (2 * size - 2 - place) * DIM, place < 2 * size - 1
    products = tl.dot(q, tl.trans(load_rows(rows, inside, 0, MAIN, DIM, True)), input_precision=INPUT_PRECISION)
    if TAIL > 0:
        tail = load_rows(rows, inside, MAIN, TAIL, DIM, True)
        products = tl.dot(q_tail, tl.trans(tail), products, input_precision=INPUT_PRECISION)
    if ROUNDED:
        products = products.to(q.dtype).to(tl.float32)
    return products * 1.4426950408889634


@triton.jit
def relative_from_products(products, position, first, size, TABLE: tl.constexpr, COUNT: tl.constexpr):
    """What ``relative_tile`` loads, gathered from ``table_products`` for queries at ``position`` in their window."""
    place = size - 1 - position[:, None] + first + tl.arange(0, COUNT)[None, :]
    return tl.gather(products, tl.minimum(tl.maximum(place, 0), TABLE - 1), axis=1)


def pad_kind(qkv: torch.Tensor, window: tuple[int, int], pad: torch.Tensor | None) -> str:
    """How padded keys are read: "none" (there are none), "zeros", by "address", or by "value" after the load.

    Triton's AMD compiler takes no choice between two pointers; elsewhere it leaves the loads asynchronous.
    """
    if qkv.shape[1] % window[0] == 0 and qkv.shape[2] % window[1] == 0:
        return "none"
    if pad is None:
        return "zeros"
    return "value" if target_of(qkv).startswith("gfx") else "address"


def window_arguments(qkv: torch.Tensor, heads: int, window: tuple[int, int], pad: torch.Tensor | None) -> dict:
    """The arguments that every image attention kernel takes alike; the last stride of qkv is 1, pad is contiguous."""
    _, height, width, channels = qkv.shape
    dim = channels // (3 * heads)
    main, tail = split_head_dim(dim, qkv.element_size())
    kind = pad_kind(qkv, window, pad)
    return {
        "qkv_ptr": qkv,
        "pad_ptr": pad if kind in ("address", "value") else None,
        "heads": heads,
        "height": height,
        "width": width,
        "window_h": window[0],
        "window_w": window[1],
        "stride_batch": qkv.stride(0),
        "stride_y": qkv.stride(1),
        "stride_x": qkv.stride(2),
        "PAD": kind,
        "DIM": dim,
        "MAIN": main,
        "TAIL": tail,
        "INPUT_PRECISION": input_precision(qkv.dtype),
    }


def windows_of(qkv: torch.Tensor, window: tuple[int, int]) -> tuple[int, int]:
    """How many windows the image has down and across."""
    return triton.cdiv(qkv.shape[1], window[0]), triton.cdiv(qkv.shape[2], window[1])


def queries_of(qkv: torch.Tensor, window: tuple[int, int]) -> int:
    """The most queries that one window has on the image."""
    return min(qkv.shape[1], window[0]) * min(qkv.shape[2], window[1])


def query_arguments(qkv: torch.Tensor, window: tuple[int, int], block: int) -> dict:
    """LINEAR of ``query_tokens``, and EVEN_QUERIES: every window has whole blocks of queries."""
    _, height, width, _ = qkv.shape
    linear = window[0] >= height and window[1] >= width and qkv.stride(1) == width * qkv.stride(2)
    whole = height % window[0] == 0 and width % window[1] == 0
    even = queries_of(qkv, window) % block == 0 and (whole or linear)
    return {"LINEAR": linear, "EVEN_QUERIES": even}


def row_for(op: str, qkv: torch.Tensor, heads: int, window: tuple[int, int]) -> tuple[dict[str, int], dict[str, int]]:
    """The tuning-table row, and the tile of keys made of it: no larger than a window, KEY_COLUMNS of its BLOCK_N in a row."""
    row = config(
        op,
        target_of(qkv),
        element_size=qkv.element_size(),
        head_dim=qkv.shape[3] // (3 * heads),
        keys=window[0] * window[1],
        columns=window[1],
    )
    columns = triton.next_power_of_2(window[1])
    block = min(row["BLOCK_N"], max(MIN_DOT, columns * triton.next_power_of_2(window[0])))
    return row, {"BLOCK_N": block, "KEY_COLUMNS": min(block, columns)}


def tile_arguments(tile: dict[str, int], window: tuple[int, int]) -> dict:
    """How a window's keys are walked: ``tile`` and what follows from it for kernels that hold queries."""
    rows = tile["BLOCK_N"] // tile["KEY_COLUMNS"]
    even = window[1] % tile["KEY_COLUMNS"] == 0 and window[0] % rows == 0
    return tile | {"EVEN": even, "PASSES": triton.cdiv(window[1], tile["KEY_COLUMNS"])}
