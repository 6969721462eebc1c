"""Decomposed relative positions of image attention: what the tables add to the scores, and its gradient for the queries.

    rel_h[n, k] = q_n·R_h[y_n − k + h − 1]                      rel_w[n, k] = q_n·R_w[x_n − k + w − 1]
    dq_n += Σ_k drel_h[n, k]·R_h[y_n − k + h − 1] + Σ_k drel_w[n, k]·R_w[x_n − k + w − 1]

(y_n, x_n) is the query's place in its window of (h, w) tokens, the whole image among them. Queries of one image row share
their rows of R_h, those of one image column their rows of R_w, so each line of the image is a plain matrix product, with as
many lines as the image has rows and columns. Shapes: qkv [B, Hi, Wi, 3·H·D] with last stride 1, tables [2h − 1, D] and
[2w − 1, D], rel_h [B, H, Hi·Wi, h] and rel_w [B, H, Hi·Wi, w] contiguous. Li et al. 2021, MViTv2, equation 4.
Reference: ``fastvit.reference.relative_position_table``.
"""

import torch
import triton
import triton.language as tl

from ._attention import MIN_DOT
from ._launch import launch, target_of
from ._plans import planned
from ._tuning import config
from .image_attention import load_rows, store_rows, window_arguments


@triton.jit
def _line(
    qkv_ptr,  # at query 0 of the line, its head
    table_ptr,  # [2 · size − 1, D]
    rel_ptr,  # at query 0 of the line; in backward drel
    dq_ptr,  # at query 0 of the line, its head, or None
    first,
    queries,
    position,  # of the line in its window
    size,  # of the window along the axis
    stride_q,
    stride_rel,
    stride_dq,
    BACKWARD: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """A block of queries of one line of the image, against every key position along the axis."""
    row = first + tl.arange(0, BLOCK_M).to(tl.int64)
    inside = row < queries
    rel_rows = rel_ptr + row * stride_rel
    q_rows = qkv_ptr + row * stride_q
    if BACKWARD:
        q_rows = dq_ptr + row * stride_dq
    # In backward, what the attention kernel left of dq.
    q = load_rows(q_rows, inside, 0, MAIN, DIM, True)
    q_tail = q
    if TAIL > 0:
        q_tail = load_rows(q_rows, inside, MAIN, TAIL, DIM, True)
    dq = q.to(tl.float32)
    dq_tail = q_tail.to(tl.float32)
    for start in range(0, size, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        present = key < size
        there = inside[:, None] & present[None, :]
        table_rows = table_ptr + (position - key + size - 1) * DIM
        table = load_rows(table_rows, present, 0, MAIN, DIM, True)
        if BACKWARD:
            drel = tl.load(rel_rows[:, None] + key[None, :], mask=there, other=0.0).to(table.dtype)
            dq = tl.dot(drel, table, dq, input_precision=INPUT_PRECISION)
            if TAIL > 0:
                table_tail = load_rows(table_rows, present, MAIN, TAIL, DIM, True)
                dq_tail = tl.dot(drel, table_tail, dq_tail, input_precision=INPUT_PRECISION)
        else:
            rel = tl.dot(q, tl.trans(table), input_precision=INPUT_PRECISION)
            if TAIL > 0:
                table_tail = load_rows(table_rows, present, MAIN, TAIL, DIM, True)
                rel = tl.dot(q_tail, tl.trans(table_tail), rel, input_precision=INPUT_PRECISION)
            tl.store(rel_rows[:, None] + key[None, :], rel.to(rel_ptr.dtype.element_ty), mask=there)
    if BACKWARD:
        store_rows(q_rows, dq, inside, 0, MAIN, DIM)
        if TAIL > 0:
            store_rows(q_rows, dq_tail, inside, MAIN, TAIL, DIM)


@triton.jit
def _image_attention_positions(
    qkv_ptr,  # [B, Hi, Wi, 3, H, D]
    table_h_ptr,  # [2h − 1, D]
    table_w_ptr,  # [2w − 1, D]
    rel_h_ptr,  # [B, H, Hi·Wi, h]; in backward drel_h
    rel_w_ptr,  # [B, H, Hi·Wi, w]; in backward drel_w
    dqkv_ptr,  # [B, Hi, Wi, 3, H, D] contiguous: dq is added to; or None
    heads,
    height,
    width,
    window_h,
    window_w,
    lines,
    tiles,
    axis,  # the axis of the first program along dimension 1: 0 for rows of the image, 1 for its columns
    stride_batch,
    stride_y,
    stride_x,
    BACKWARD: tl.constexpr,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    first = (program % tiles) * BLOCK_M
    line = ((program // tiles) % lines).to(tl.int64)
    head = ((program // tiles // lines) % heads).to(tl.int64)
    batch = (program // tiles // lines // heads).to(tl.int64)
    channels = heads * DIM
    tokens = height * width
    qkv_ptr += batch * stride_batch + head * DIM
    index = (batch * heads + head) * tokens
    dq_ptr = dqkv_ptr
    if BACKWARD:
        dq_ptr = dqkv_ptr + batch * tokens * 3 * channels + head * DIM
    if tl.program_id(1) + axis == 0:
        if line < height and first < width:
            if BACKWARD:
                dq_ptr += line * width * 3 * channels
            _line(
                qkv_ptr + line * stride_y,
                table_h_ptr,
                rel_h_ptr + (index + line * width) * window_h,
                dq_ptr,
                first,
                width,
                line % window_h,
                window_h,
                stride_x,
                window_h,
                3 * channels,
                BACKWARD,
                DIM,
                MAIN,
                TAIL,
                BLOCK_M,
                BLOCK_K,
                INPUT_PRECISION,
            )
    else:
        if line < width and first < height:
            if BACKWARD:
                dq_ptr += line * 3 * channels
            _line(
                qkv_ptr + line * stride_x,
                table_w_ptr,
                rel_w_ptr + (index + line) * window_w,
                dq_ptr,
                first,
                height,
                line % window_w,
                window_w,
                stride_y,
                width * window_w,
                width * 3 * channels,
                BACKWARD,
                DIM,
                MAIN,
                TAIL,
                BLOCK_M,
                BLOCK_K,
                INPUT_PRECISION,
            )


def _launch(qkv, tables, heads, window, rel_h, rel_w, dqkv, axis, axes) -> None:
    batch, height, width, channels = qkv.shape
    op = "image_attention_positions" + ("" if dqkv is None else "_backward")
    row = config(
        op, target_of(qkv), element_size=qkv.element_size(), head_dim=channels // (3 * heads), keys=window[0] * window[1]
    )
    lines = max(height, width)
    tiles = triton.cdiv(lines, row["BLOCK_M"])
    block = min(row["BLOCK_K"], max(MIN_DOT, triton.next_power_of_2(max(window))))
    arguments = window_arguments(qkv, heads, window, None)
    for name in ("pad_ptr", "PAD"):
        del arguments[name]
    launch(
        op,
        _image_attention_positions,
        (batch * heads * lines * tiles, axes),
        qkv,
        row,
        table_h_ptr=tables[0],
        table_w_ptr=tables[1],
        rel_h_ptr=rel_h,
        rel_w_ptr=rel_w,
        dqkv_ptr=dqkv,
        BLOCK_K=block,
        lines=lines,
        tiles=tiles,
        axis=axis,
        BACKWARD=dqkv is not None,
        **arguments,
    )


@planned
def launch_positions(
    qkv: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
    heads: int,
    window: tuple[int, int],
    rel_h: torch.Tensor,
    rel_w: torch.Tensor,
) -> None:
    """Fills rel_h and rel_w."""
    _launch(qkv, (table_h, table_w), heads, window, rel_h, rel_w, None, 0, 2)


@planned
def launch_positions_backward(
    qkv: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
    heads: int,
    window: tuple[int, int],
    drel_h: torch.Tensor,
    drel_w: torch.Tensor,
    dqkv: torch.Tensor,
) -> None:
    """Adds what goes through the relative positions to the dq in dqkv, one axis after the other."""
    for axis in (0, 1):
        _launch(qkv, (table_h, table_w), heads, window, drel_h, drel_w, dqkv, axis, 1)
