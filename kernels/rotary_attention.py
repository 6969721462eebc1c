"""Attention that normalizes and rotates queries and keys as it loads them, forward (Su et al. 2021; Dao 2023).

    out = softmax(scale · y(q)·y(k)ᵀ)·v,  y = rotation ∘ norm as in ``rotary``, rounded to the inputs' dtype as there

Shapes: q [B, H, N, D], k [B, Hk, N, D], v [B, Hk, N, Dv], out [B, H, N, Dv], any strides with the last one 1; cos, sin
[1 or B, T, D], T ≤ N, last stride 1, for the last T tokens; weights and biases [D]. A row is two tiles, the first and the
second members of its pairs, each padded to a power of two from 16 on, and q·k the sum of two products: pairs may be laid
out as they like as long as both sides agree. Norm and rotation are float32, products float32 sums of the inputs' dtype.

Every program prepares its own queries once and all keys anew, where ``rotary`` writes them once: less memory traffic for
more arithmetic, which pays while tokens are few. MAX_TOKENS in the tuning table says how many.
No masks, nothing kept for backward. Limits: D and Dv from 1 to 256, even D where it is rotated.
Reference: ``fastvit.reference.rotary_attention``.
"""

import torch
import triton
import triton.language as tl

from ._attention import MIN_DOT, load_tile, softmax_step, split_head_dim, store_tile
from ._launch import input_precision, launch, target_of
from ._plans import planned
from ._tuning import config
from .rotary import _load_pair, _load_parameter, _load_tables, _normalize, _strides


@triton.jit
def _load_prepared(
    x_ptr,  # [N, D]: one head
    weight_ptr,  # [D] or None
    bias_ptr,  # [D] or None
    cos_ptr,  # [1 or B, T, D] or None
    sin_ptr,  # [1 or B, T, D] or None
    batch,
    token,
    tokens,
    prefix,
    stride_row,
    stride_cos_batch,
    stride_cos_row,
    stride_sin_batch,
    stride_sin_row,
    eps,
    NORM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The rows ``token`` normalized and rotated: two tiles [rows, BLOCK] in the dtype that they are stored in."""
    valid = token < tokens
    a, b = _load_pair(x_ptr, token, valid, stride_row, 0.0, DIM, BLOCK, INTERLEAVED)
    if NORM != "none":
        a, b, _ = _normalize(a, b, valid, eps, DIM, BLOCK, NORM)
        if weight_ptr is not None:
            weight_a, weight_b = _load_parameter(weight_ptr, DIM, BLOCK, INTERLEAVED)
            a, b = a * weight_a, b * weight_b
        if bias_ptr is not None:
            bias_a, bias_b = _load_parameter(bias_ptr, DIM, BLOCK, INTERLEAVED)
            a, b = a + bias_a, b + bias_b
    if cos_ptr is not None:
        cos_a, cos_b, sin_a, sin_b = _load_tables(
            cos_ptr,
            sin_ptr,
            batch,
            token,
            tokens,
            prefix,
            stride_cos_batch,
            stride_cos_row,
            stride_sin_batch,
            stride_sin_row,
            DIM,
            BLOCK,
            INTERLEAVED,
        )
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    return a.to(x_ptr.dtype.element_ty), b.to(x_ptr.dtype.element_ty)


@triton.jit
def _attend(
    acc,  # [BLOCK_M, VALUE_MAIN]
    acc_tail,  # [BLOCK_M, VALUE_TAIL or 16]
    peak,  # [BLOCK_M]: the running maximum
    total,  # [BLOCK_M]: the running sum
    q_a,  # [BLOCK_M, BLOCK]
    q_b,  # [BLOCK_M, BLOCK]
    k_a,  # [BLOCK_N, BLOCK]
    k_b,  # [BLOCK_N, BLOCK]
    v_ptr,  # [N, VALUE_DIM] of this head
    column,  # [BLOCK_N] key indices
    tokens,
    stride_v_row,
    factor,  # |scale| in log2 units
    BOUNDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One block of keys: the update of (acc, acc_tail, peak, total)."""
    products = tl.dot(q_a, tl.trans(k_a), input_precision=INPUT_PRECISION)
    products = tl.dot(q_b, tl.trans(k_b), products, input_precision=INPUT_PRECISION)
    if NEGATIVE_SCALE:
        products = -products
    if BOUNDED:
        products = tl.where((column < tokens)[None, :], products, float("-inf"))
    weights, shrink, peak, total = softmax_step(products, factor, None, peak, total, "none")
    v = load_tile(v_ptr, column, tokens, stride_v_row, 0, VALUE_MAIN, VALUE_DIM, BOUNDED)
    rounded = weights.to(v.dtype)
    acc = tl.dot(rounded, v, acc * shrink[:, None], input_precision=INPUT_PRECISION)
    if VALUE_TAIL > 0:
        v_tail = load_tile(v_ptr, column, tokens, stride_v_row, VALUE_MAIN, VALUE_TAIL, VALUE_DIM, BOUNDED)
        acc_tail = tl.dot(rounded, v_tail, acc_tail * shrink[:, None], input_precision=INPUT_PRECISION)
    return acc, acc_tail, peak, total


@triton.jit
def _rotary_attention(
    q_ptr,  # [B, H, N, D]
    k_ptr,  # [B, Hk, N, D]
    v_ptr,  # [B, Hk, N, Dv]
    cos_ptr,  # [1 or B, T, D] or None
    sin_ptr,  # [1 or B, T, D] or None
    query_weight_ptr,  # [D] or None
    query_bias_ptr,  # [D] or None
    key_weight_ptr,  # [D] or None
    key_bias_ptr,  # [D] or None
    out_ptr,  # [B, H, N, Dv]
    heads,
    groups,
    tokens,
    prefix,  # tokens before the first that is rotated
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_k_batch,
    stride_k_head,
    stride_k_row,
    stride_v_batch,
    stride_v_head,
    stride_v_row,
    stride_cos_batch,
    stride_cos_row,
    stride_sin_batch,
    stride_sin_row,
    stride_out_batch,
    stride_out_head,
    stride_out_row,
    scale,
    eps,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_MAIN: tl.constexpr,
    VALUE_TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(tokens, BLOCK_M)
    first = (tl.program_id(0) % tiles) * BLOCK_M
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    row = first.to(tl.int64) + tl.arange(0, BLOCK_M)
    q_ptr += batch * stride_q_batch + head * stride_q_head
    k_ptr += batch * stride_k_batch + (head // groups) * stride_k_head
    v_ptr += batch * stride_v_batch + (head // groups) * stride_v_head

    q_a, q_b = _load_prepared(
        q_ptr,
        query_weight_ptr,
        query_bias_ptr,
        cos_ptr,
        sin_ptr,
        batch,
        row,
        tokens,
        prefix,
        stride_q_row,
        stride_cos_batch,
        stride_cos_row,
        stride_sin_batch,
        stride_sin_row,
        eps,
        NORM,
        DIM,
        BLOCK,
        INTERLEAVED,
    )
    acc = tl.zeros([BLOCK_M, VALUE_MAIN], dtype=tl.float32)
    acc_tail = tl.zeros([BLOCK_M, VALUE_TAIL if VALUE_TAIL > 0 else 16], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    # The last keys first, then a body that needs no bounds on its scores; why that is told: ``attention_forward``.
    factor = tl.maximum(tl.abs(scale), 1e-37) * 1.4426950408889634
    body_end = ((tokens - 1) // BLOCK_N) * BLOCK_N
    tl.assume(body_end < tokens)
    for part in tl.static_range(2):
        for start in range(0 if part else body_end, body_end if part else tokens, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N).to(tl.int64)
            k_a, k_b = _load_prepared(
                k_ptr,
                key_weight_ptr,
                key_bias_ptr,
                cos_ptr,
                sin_ptr,
                batch,
                column,
                tokens,
                prefix,
                stride_k_row,
                stride_cos_batch,
                stride_cos_row,
                stride_sin_batch,
                stride_sin_row,
                eps,
                NORM,
                DIM,
                BLOCK,
                INTERLEAVED,
            )
            acc, acc_tail, peak, total = _attend(
                acc,
                acc_tail,
                peak,
                total,
                q_a,
                q_b,
                k_a,
                k_b,
                v_ptr,
                column,
                tokens,
                stride_v_row,
                factor,
                part == 0,
                VALUE_DIM,
                VALUE_MAIN,
                VALUE_TAIL,
                NEGATIVE_SCALE,
                INPUT_PRECISION,
            )

    inverse = (1.0 / total)[:, None]
    out_ptr += batch * stride_out_batch + head * stride_out_head
    store_tile(out_ptr, acc * inverse, row, tokens, stride_out_row, 0, VALUE_MAIN, VALUE_DIM)
    if VALUE_TAIL > 0:
        store_tile(out_ptr, acc_tail * inverse, row, tokens, stride_out_row, VALUE_MAIN, VALUE_TAIL, VALUE_DIM)


def _row(query: torch.Tensor, value: torch.Tensor, norm: str | None) -> dict[str, int]:
    dim = max(query.shape[3], value.shape[3])
    normalized = int(norm is not None)
    return config("rotary_attention", target_of(query), element_size=query.element_size(), head_dim=dim, norm=normalized)


def max_tokens(query: torch.Tensor, value: torch.Tensor, norm: str | None) -> int:
    """The longest sequence that this kernel is meant for, by the tuning table."""
    return _row(query, value, norm)["MAX_TOKENS"]


@planned
def launch_rotary_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    norm: str | None,
    query_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    eps: float,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Fills out; the last stride of every tensor is 1, parameters are contiguous."""
    batch, heads, tokens, dim = query.shape
    row = _row(query, value, norm)
    value_main, value_tail = split_head_dim(value.shape[3])
    launch(
        "rotary_attention",
        _rotary_attention,
        (batch * heads * triton.cdiv(tokens, row["BLOCK_M"]),),
        query,
        row,
        q_ptr=query,
        k_ptr=key,
        v_ptr=value,
        cos_ptr=cos,
        sin_ptr=sin,
        query_weight_ptr=query_weight,
        query_bias_ptr=query_bias,
        key_weight_ptr=key_weight,
        key_bias_ptr=key_bias,
        out_ptr=out,
        heads=heads,
        groups=heads // key.shape[1],
        tokens=tokens,
        prefix=0 if cos is None else tokens - cos.shape[1],
        **_strides(query, "q"),
        **_strides(key, "k"),
        **_strides(value, "v"),
        **_strides(cos, "cos"),
        **_strides(sin, "sin"),
        **_strides(out, "out"),
        scale=scale,
        NEGATIVE_SCALE=scale < 0,
        eps=eps,
        NORM=norm or "none",
        INTERLEAVED=interleaved and cos is not None,
        DIM=dim,
        BLOCK=max(MIN_DOT, triton.next_power_of_2(triton.cdiv(dim, 2))),
        VALUE_DIM=value.shape[3],
        VALUE_MAIN=value_main,
        VALUE_TAIL=value_tail,
        INPUT_PRECISION=input_precision(query.dtype),
    )
