"""Attention over few tokens, backward in one pass: one program holds all queries of a head and meets each block of keys once.

    delta = Σ_d out·dout       P = e^(S − lse)       dS = P ∘ (dout·Vᵀ − delta)
    dQ = scale · dS·K          dK = scale · dSᵀ·Q    dV = Pᵀ·dout                 (Dao 2023, FlashAttention-2, algorithm 2)

Five products where two passes take seven, and every tensor is read once. q and dout of all queries stay in shared memory and dQ
in registers, in pieces: one of FIRST rows, then some of BLOCK_M (197 queries are 16 + 3 · 64). The loop goes over the keys,
BLOCK_N at a time, whose dK and dV are finished when a step is; those are kept transposed, [D, keys], as the tensor cores want
products of 64 rows. Every sum has one owner and one order: no atomics.
Shapes as in ``attention_forward``; no masks, no relative positions, not causal, no grouped queries. Limits: head dims that are
powers of two, and what ``serves`` says. Reference: ``fastvit.reference.attention``.
"""

import torch
import triton
import triton.language as tl

from ._attention import MIN_DOT, load_tile, store_tile
from ._attention_arguments import common_arguments, row_for
from ._launch import launch, target_of
from ._plans import planned
from ._tuning import config


@triton.jit
def _load_piece(
    q_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    first,
    queries,
    strides,  # of q's rows, out's rows, dout's rows
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """(q, dout, lse, delta) of the queries from ``first`` on, and zeros for their dq."""
    row = first + tl.arange(0, ROWS)
    q = load_tile(q_ptr, row, queries, strides[0], 0, DIM, DIM, BOUNDED)
    out = load_tile(out_ptr, row, queries, strides[1], 0, VALUE_DIM, VALUE_DIM, BOUNDED)
    dout = load_tile(dout_ptr, row, queries, strides[2], 0, VALUE_DIM, VALUE_DIM, BOUNDED)
    # Queries beyond the end have lse = +inf and so weight 0.
    lse = tl.load(lse_ptr + row, mask=row < queries, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), axis=1)
    return (q, dout, lse, delta), tl.zeros([ROWS, DIM], dtype=tl.float32)


@triton.jit
def _step(
    dq,  # [ROWS, DIM]
    dk,  # [DIM, BLOCK_N]
    dv,  # [VALUE_DIM, BLOCK_N]
    piece,  # (q, dout, lse, delta)
    k,
    v,
    scale,
    EVEN: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """(dq, dk, dv) with what one piece of queries and one block of keys add to them."""
    q, dout, lse, delta = piece
    scores = tl.dot(q, tl.trans(k), input_precision=INPUT_PRECISION) * (scale * 1.4426950408889634) - lse[:, None]
    if not EVEN:
        # Keys beyond the end are zeros, and so is what they add to dq if only their weights are no infinity.
        scores = tl.minimum(scores, 0.0, propagate_nan=tl.PropagateNan.ALL)
    weights = tl.exp2(scores)
    # dV before dout·Vᵀ: the weights are rounded, and their registers free, before the next product takes some.
    dv = tl.dot(tl.trans(dout), weights.to(dout.dtype), dv, input_precision=INPUT_PRECISION)
    dweights = tl.dot(dout, tl.trans(v), input_precision=INPUT_PRECISION)
    dscores = (weights * (dweights - delta[:, None])).to(q.dtype)
    dk = tl.dot(tl.trans(q), dscores, dk, input_precision=INPUT_PRECISION)
    dq = tl.dot(dscores, k, dq, input_precision=INPUT_PRECISION)
    return dq, dk, dv


@triton.jit
def _attention_backward_short(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, H, M, D]
    v_ptr,  # [B, H, M, Dv]
    out_ptr,  # [B, H, N, Dv]
    dout_ptr,  # [B, H, N, Dv]
    lse_ptr,  # [B, H, N]
    dq_ptr,  # [B, H, N, D]
    dk_ptr,  # [B, H, M, D]
    dv_ptr,  # [B, H, M, Dv]
    heads,
    queries,
    keys,
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
    stride_dout_batch,
    stride_dout_head,
    stride_dout_row,
    stride_dq_batch,
    stride_dq_head,
    stride_dq_row,
    stride_dk_batch,
    stride_dk_head,
    stride_dk_row,
    stride_dv_batch,
    stride_dv_head,
    stride_dv_row,
    scale,
    EVEN: tl.constexpr,  # the last block of keys is full
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    # From a head's first row on 32-bit offsets, which ``serves`` sees to.
    q_ptr += batch * stride_q_batch + head * stride_q_head
    k_ptr += batch * stride_k_batch + head * stride_k_head
    v_ptr += batch * stride_v_batch + head * stride_v_head
    out_ptr += batch * stride_out_batch + head * stride_out_head
    dout_ptr += batch * stride_dout_batch + head * stride_dout_head
    dq_ptr += batch * stride_dq_batch + head * stride_dq_head
    dk_ptr += batch * stride_dk_batch + head * stride_dk_head
    dv_ptr += batch * stride_dv_batch + head * stride_dv_head
    lse_ptr += batch_head * queries
    strides = (stride_q_row, stride_out_row, stride_dout_row)

    pieces = ()
    dqs = ()
    for piece in tl.static_range(PIECES):
        loaded, dq = _load_piece(
            q_ptr,
            out_ptr,
            dout_ptr,
            lse_ptr,
            FIRST + (piece - 1) * BLOCK_M if piece > 0 else 0,
            queries,
            strides,
            BLOCK_M if piece > 0 else FIRST,
            DIM,
            VALUE_DIM,
            piece == PIECES - 1,
        )
        pieces = pieces + (loaded,)  # type: ignore  # noqa: RUF005
        dqs = dqs + (dq,)  # type: ignore  # noqa: RUF005

    # One loop, with bounds: a second would have the addresses of the same operands, and the two share them in registers.
    tl.assume(keys > 0)
    for start in tl.range(0, keys, BLOCK_N, disable_licm=True):
        column = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, column, keys, stride_k_row, 0, DIM, DIM, not EVEN)
        v = load_tile(v_ptr, column, keys, stride_v_row, 0, VALUE_DIM, VALUE_DIM, not EVEN)
        dk = tl.zeros([DIM, BLOCK_N], dtype=tl.float32)
        dv = tl.zeros([VALUE_DIM, BLOCK_N], dtype=tl.float32)
        sums = ()
        for piece in tl.static_range(PIECES):
            dq, dk, dv = _step(dqs[piece], dk, dv, pieces[piece], k, v, scale, EVEN, INPUT_PRECISION)
            sums = sums + (dq,)  # type: ignore  # noqa: RUF005
        dqs = sums
        store_tile(dk_ptr, tl.trans(dk * scale), column, keys, stride_dk_row, 0, DIM, DIM)
        store_tile(dv_ptr, tl.trans(dv), column, keys, stride_dv_row, 0, VALUE_DIM, VALUE_DIM)

    for piece in tl.static_range(PIECES):
        first = FIRST + (piece - 1) * BLOCK_M if piece > 0 else 0
        row = first + tl.arange(0, BLOCK_M if piece > 0 else FIRST)
        store_tile(dq_ptr, dqs[piece] * scale, row, queries, stride_dq_row, 0, DIM, DIM)


def pieces_of(queries: int, block: int) -> tuple[int, int]:
    """(FIRST, PIECES): rows of the first piece, a power of two from 16 to ``block``, and how many pieces there are."""
    rest = queries % block
    first = max(MIN_DOT, triton.next_power_of_2(rest)) if rest else block
    return first, 1 + triton.cdiv(max(0, queries - first), block)


def serves(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    rel_h: torch.Tensor | None,
    is_causal: bool,
    *others: torch.Tensor,
) -> bool:
    """Tokens as few as fit the registers, heads that keep a GPU busy, and rows that are 32-bit offsets apart in a head of any
    tensor, ``others`` being what else the kernel reads and writes."""
    if mask is not None or rel_h is not None or is_causal or q.shape[1] != k.shape[1]:
        return False
    tokens = max(q.shape[2], k.shape[2])
    if tokens > row_for("attention_backward_query", q, v, None, None).get("SHORT_KEYS", 0):
        return False
    filled = all(t.shape[3] == max(MIN_DOT, triton.next_power_of_2(t.shape[3])) for t in (q, v))
    row = config("attention_backward_short", target_of(q))
    near = (tokens + max(row["BLOCK_M"], row["BLOCK_N"])) * max(t.stride(2) for t in (q, k, v, *others)) < 2**31
    return filled and near and q.shape[0] * q.shape[1] >= row["MIN_PROGRAMS"]


@planned
def launch_attention_backward_short(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """Fills dq, dk and dv."""
    row = config("attention_backward_short", target_of(q))
    first, pieces = pieces_of(q.shape[2], row["BLOCK_M"])
    strides = {
        f"stride_{name}_{axis}": tensor.stride(dim)
        for name, tensor in (("out", out), ("dout", dout), ("dq", dq), ("dk", dk), ("dv", dv))
        for dim, axis in enumerate(("batch", "head", "row"))
    }
    common = common_arguments(q, k, v, None, None, scale)
    launch(
        "attention_backward_short",
        _attention_backward_short,
        (q.shape[0] * q.shape[1],),
        q,
        row,
        out_ptr=out,
        dout_ptr=dout,
        lse_ptr=lse,
        dq_ptr=dq,
        dk_ptr=dk,
        dv_ptr=dv,
        EVEN=k.shape[2] % row["BLOCK_N"] == 0,
        FIRST=first,
        PIECES=pieces,
        **strides,
        **{name: value for name, value in common.items() if name in _attention_backward_short.arg_names},
    )
