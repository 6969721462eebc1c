"""Attention over few keys, forward: one program holds all keys and values of a head and meets each query tile once.

    base = max_j s_j      weights = 2^(s_j − base)      out = Σ_j weights·v_j / Σ_j weights      lse = base + log2 Σ_j weights

No running maximum, no rescaling, no loop over keys: the scores of a query tile are pieces of FIRST, SECOND and THIRD columns,
powers of two that together hold the keys (197 of 128 + 64 + 16). K and V are read once a program, whose loop goes over the
query tiles ``part``, ``part + parts``, … of its head; there is one part where heads are enough to keep a GPU busy.
Shapes as in ``attention_forward``; no masks, no relative positions, not causal. lse is what backward expects of that
kernel. Limits: head dims 16, 32, 48, 64, 80, 96, 128 …, which fill their pieces; SHORT_KEYS in the rows of
``attention_forward``, as many keys as fit the registers.
Reference: ``fastvit.reference.attention``.
"""

import torch
import triton
import triton.language as tl

from ._attention import MIN_DOT, load_tile, split_head_dim, store_tile
from ._attention_arguments import forward_arguments
from ._launch import launch, target_of
from ._pdl import wait_with
from ._tuning import config


def pieces(keys: int) -> tuple[int, int, int]:
    """(FIRST, SECOND, THIRD): powers of two from 16 on, falling, 0 where not needed; their sum holds ``keys``."""
    left = max(MIN_DOT, triton.cdiv(keys, MIN_DOT) * MIN_DOT)
    found: list[int] = []
    while left > 0 and len(found) < 2:
        found.append(1 << (left.bit_length() - 1))
        left -= found[-1]
    if left > 0:
        found.append(triton.next_power_of_2(left))
        if found[2] == found[1]:
            found[1:] = [2 * found[1]]
        if found[1] == found[0]:
            found = [2 * found[0]]
    first, second, third, *_ = [*found, 0, 0]
    return first, second, third


@triton.jit
def _load_piece(
    ptr,
    start,
    end,
    stride_row,
    ROWS: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    DIM: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Rows start … start + ROWS: (columns of MAIN, columns of TAIL, or of MAIN again)."""
    row = start + tl.arange(0, ROWS).to(tl.int64)
    main = load_tile(ptr, row, end, stride_row, 0, MAIN, DIM, BOUNDED)
    tail = main
    if TAIL > 0:
        tail = load_tile(ptr, row, end, stride_row, MAIN, TAIL, DIM, BOUNDED)
    return main, tail


@triton.jit
def _products(q, q_tail, k, k_tail, TAIL: tl.constexpr, NEGATIVE_SCALE: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    products = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION)
    if TAIL > 0:
        products = tl.dot(q_tail, tl.trans(k_tail), products, input_precision=INPUT_PRECISION)
    return -products if NEGATIVE_SCALE else products


@triton.jit
def _add_values(acc, acc_tail, weights, v, v_tail, VALUE_TAIL: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    rounded = weights.to(v.dtype)
    acc = tl.dot(rounded, v, acc, input_precision=INPUT_PRECISION)
    if VALUE_TAIL > 0:
        acc_tail = tl.dot(rounded, v_tail, acc_tail, input_precision=INPUT_PRECISION)
    return acc, acc_tail


@triton.jit
def _attention_short(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, Hk, M, D]
    v_ptr,  # [B, Hk, M, Dv]
    out_ptr,  # [B, H, N, Dv]
    lse_ptr,  # [B, H, N] or None
    heads,
    groups,
    queries,
    keys,
    parts,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_k_batch,
    stride_k_head,
    stride_k_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_out_batch,
    stride_out_head,
    stride_out_row,
    scale,
    NEGATIVE_SCALE: tl.constexpr,
    EVEN: tl.constexpr,  # the last piece is full
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    part = tl.program_id(0) % parts
    batch_head = (tl.program_id(0) // parts).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    q_ptr += batch * stride_q_batch + head * stride_q_head
    k_ptr += batch * stride_k_batch + (head // groups) * stride_k_head
    v_ptr += batch * stride_v_batch + (head // groups) * stride_v_head
    out_ptr += batch * stride_out_batch + head * stride_out_head
    if lse_ptr is not None:
        lse_ptr += batch_head * queries
    factor = tl.maximum(tl.abs(scale), 1e-37) * 1.4426950408889634

    if PDL:
        wait_with(q_ptr, k_ptr, v_ptr)
    LAST: tl.constexpr = 1 if SECOND == 0 else (2 if THIRD == 0 else 3)
    k0, k0_tail = _load_piece(k_ptr, 0, keys, stride_k_row, FIRST, MAIN, TAIL, DIM, LAST == 1 and not EVEN)
    v0, v0_tail = _load_piece(v_ptr, 0, keys, stride_v_row, FIRST, VALUE_MAIN, VALUE_TAIL, VALUE_DIM, LAST == 1 and not EVEN)
    if LAST > 1:
        k1, k1_tail = _load_piece(k_ptr, FIRST, keys, stride_k_row, SECOND, MAIN, TAIL, DIM, LAST == 2 and not EVEN)
        v1, v1_tail = _load_piece(
            v_ptr, FIRST, keys, stride_v_row, SECOND, VALUE_MAIN, VALUE_TAIL, VALUE_DIM, LAST == 2 and not EVEN
        )
    if LAST > 2:
        k2, k2_tail = _load_piece(k_ptr, FIRST + SECOND, keys, stride_k_row, THIRD, MAIN, TAIL, DIM, not EVEN)
        v2, v2_tail = _load_piece(v_ptr, FIRST + SECOND, keys, stride_v_row, THIRD, VALUE_MAIN, VALUE_TAIL, VALUE_DIM, not EVEN)

    for first in range(part * BLOCK_M, queries, parts * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M).to(tl.int64)
        q, q_tail = _load_piece(q_ptr, first, queries, stride_q_row, BLOCK_M, MAIN, TAIL, DIM, True)
        s0 = _products(q, q_tail, k0, k0_tail, TAIL, NEGATIVE_SCALE, INPUT_PRECISION)
        if LAST == 1 and not EVEN:
            s0 = tl.where((tl.arange(0, FIRST) < keys)[None, :], s0, float("-inf"))
        high = tl.max(s0, axis=1)
        if LAST > 1:
            s1 = _products(q, q_tail, k1, k1_tail, TAIL, NEGATIVE_SCALE, INPUT_PRECISION)
            if LAST == 2 and not EVEN:
                s1 = tl.where((FIRST + tl.arange(0, SECOND) < keys)[None, :], s1, float("-inf"))
            high = tl.maximum(high, tl.max(s1, axis=1))
        if LAST > 2:
            s2 = _products(q, q_tail, k2, k2_tail, TAIL, NEGATIVE_SCALE, INPUT_PRECISION)
            if not EVEN:
                s2 = tl.where((FIRST + SECOND + tl.arange(0, THIRD) < keys)[None, :], s2, float("-inf"))
            high = tl.maximum(high, tl.max(s2, axis=1))
        base = high * factor
        acc = tl.zeros([BLOCK_M, VALUE_MAIN], dtype=tl.float32)
        acc_tail = tl.zeros([BLOCK_M, VALUE_TAIL if VALUE_TAIL > 0 else 16], dtype=tl.float32)
        w0 = tl.exp2(s0 * factor - base[:, None])
        total = tl.sum(w0, axis=1)
        acc, acc_tail = _add_values(acc, acc_tail, w0, v0, v0_tail, VALUE_TAIL, INPUT_PRECISION)
        if LAST > 1:
            w1 = tl.exp2(s1 * factor - base[:, None])
            total += tl.sum(w1, axis=1)
            acc, acc_tail = _add_values(acc, acc_tail, w1, v1, v1_tail, VALUE_TAIL, INPUT_PRECISION)
        if LAST > 2:
            w2 = tl.exp2(s2 * factor - base[:, None])
            total += tl.sum(w2, axis=1)
            acc, acc_tail = _add_values(acc, acc_tail, w2, v2, v2_tail, VALUE_TAIL, INPUT_PRECISION)
        if lse_ptr is not None:
            tl.store(lse_ptr + row, base + tl.log2(total), mask=row < queries)
        inverse = (1.0 / total)[:, None]
        store_tile(out_ptr, acc * inverse, row, queries, stride_out_row, 0, VALUE_MAIN, VALUE_DIM)
        if VALUE_TAIL > 0:
            store_tile(out_ptr, acc_tail * inverse, row, queries, stride_out_row, VALUE_MAIN, VALUE_TAIL, VALUE_DIM)


def serves(q: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """No mask, and head dims that need no padding: masked columns cost three times the instructions, and spills."""
    return mask is None and all(sum(split_head_dim(t.shape[3], t.element_size())) == t.shape[3] for t in (q, v))


def launch_attention_short(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, out: torch.Tensor, lse: torch.Tensor | None
) -> None:
    """Fills out, and lse unless None."""
    row = config("attention_short", target_of(q), head_dim=max(q.shape[3], v.shape[3]))
    first, second, third = pieces(k.shape[2])
    batch_heads, tiles = q.shape[0] * q.shape[1], triton.cdiv(q.shape[2], row["BLOCK_M"])
    parts = min(tiles, max(1, row["MIN_PROGRAMS"] // max(1, batch_heads)))
    launch(
        "attention_short",
        _attention_short,
        (batch_heads * parts,),
        q,
        row,
        out_ptr=out,
        lse_ptr=lse,
        parts=parts,
        stride_out_batch=out.stride(0),
        stride_out_head=out.stride(1),
        stride_out_row=out.stride(2),
        EVEN=first + second + third == k.shape[2],
        FIRST=first,
        SECOND=second,
        THIRD=third,
        **forward_arguments(_attention_short, q, k, v, None, None, scale),
    )
