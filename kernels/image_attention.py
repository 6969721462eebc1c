"""What the image attention kernels share: where a window's queries and keys lie on the image, and what their scores are.

A window is never cut out: query r of window (wy, wx) lies at (wy·h + r // columns, wx·w + r % columns), rows and columns
counting only what the image has of it, so that padded queries do not exist. Keys come in tiles of KEY_ROWS × KEY_COLUMNS,
a whole row of a narrow window in each of several rows of a tile, so that relative positions are two thin tiles, added where
the scores are. A key beyond the image is read from the one vector that all padded keys equal, by choosing the address. The
whole image is one window.
"""

import torch
import triton
import triton.language as tl

from ._attention import MIN_DOT, split_head_dim
from ._launch import target_of
from ._tuning import config
from .linear import input_precision


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
def key_rows_at(ptr, pad_ptr, offset, exists, real, PADDED: tl.constexpr, HAS_PAD: tl.constexpr):
    """(addresses, mask) of a tile's keys or values, ``ptr`` and ``pad_ptr`` advanced to their channels."""
    if PADDED and HAS_PAD:
        return tl.where(real, ptr + offset, pad_ptr), exists
    elif PADDED:
        return ptr + offset, real
    else:
        return ptr + offset, exists


@triton.jit
def relative_tile(rel_rows, first, size, inside, COUNT: tl.constexpr):
    """COUNT relative positions of each query from ``first`` on, in units of log2, zeros from ``size`` on: [BLOCK_M, COUNT]."""
    position = first + tl.arange(0, COUNT)
    present = inside[:, None] & (position < size)[None, :]
    return tl.load(rel_rows[:, None] + position[None, :], mask=present, other=0.0).to(tl.float32) * 1.4426950408889634


def window_arguments(qkv: torch.Tensor, heads: int, window: tuple[int, int], pad: torch.Tensor | None) -> dict:
    """The arguments that every image attention kernel takes alike; the last stride of qkv is 1, pad is contiguous."""
    _, height, width, channels = qkv.shape
    dim = channels // (3 * heads)
    main, tail = split_head_dim(dim)
    return {
        "qkv_ptr": qkv,
        "pad_ptr": pad,
        "heads": heads,
        "height": height,
        "width": width,
        "window_h": window[0],
        "window_w": window[1],
        "stride_batch": qkv.stride(0),
        "stride_y": qkv.stride(1),
        "stride_x": qkv.stride(2),
        "PADDED": bool(height % window[0] or width % window[1]),
        "HAS_PAD": pad is not None,
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


def row_for(op: str, qkv: torch.Tensor, heads: int, window: tuple[int, int]) -> dict[str, int]:
    """The tuning-table row, its key block no larger than a window, and the columns of a tile of keys (KEY_COLUMNS)."""
    row = config(
        op,
        target_of(qkv),
        element_size=qkv.element_size(),
        head_dim=qkv.shape[3] // (3 * heads),
        keys=window[0] * window[1],
    )
    columns = triton.next_power_of_2(window[1])
    block = min(row["BLOCK_N"], max(MIN_DOT, columns * triton.next_power_of_2(window[0])))
    return row | {"BLOCK_N": block, "KEY_COLUMNS": min(block, columns)}
