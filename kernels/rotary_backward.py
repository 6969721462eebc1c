"""Gradients of the norm of queries and keys and of their rotary positions: ``rotary``'s equations, backward.

    dy: (a, b) → (a·cos_a + b·sin_b, b·cos_b − a·sin_a)       the rotation transposed
    dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),  g = dy · weight        (no mean(g) under "rms")
    dweight = Σ dy · x̂,  dbias = Σ dy

Shapes as in ``rotary``: gradients [B, H, N, D] and [B, Hk, N, D], last stride 1, of any other strides; results laid out
[B, N, H, D]. The inputs are what is kept; the statistics are computed again. Queries and keys share a launch. Weight gradients
leave as partial sums [programs, D] in float32, added up by ``reduce``: no atomics, the same bits every time. Without a norm
nothing but the tables is kept, and backward is ``rotary``'s own kernel, transposed.
Reference: ``fastvit.reference.qk_norm_rope``. Limits: D ≤ 256.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch, target_of
from ._plans import planned
from ._tuning import config
from .rotary import _load_pair, _load_parameter, _load_tables, _normalize, _shapes, _store_pair, _strides


@triton.jit
def _backward_tiles(
    dy,  # pointer [B, heads, N, D], and its strides: batch, head, row
    x,  # likewise
    weight_ptr,  # [D] or None
    dx_ptr,  # [B, N, heads, D]
    dweight_ptr,  # [programs, D] or None
    dbias_ptr,  # [programs, D] or None
    program,
    tiles_per_program,
    heads,
    cos_ptr,
    sin_ptr,
    table_strides,  # of cos: batch, row; of sin: batch, row
    batches,
    tokens,
    prefix,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program's tiles (block of tokens × group of heads) of the queries, or of the keys."""
    dy_ptr, stride_dy_batch, stride_dy_head, stride_dy_row = dy
    x_ptr, stride_x_batch, stride_x_head, stride_x_row = x
    groups = tl.cdiv(heads, GROUP)
    blocks = tl.cdiv(tokens, BLOCK_ROWS)
    first = program * tiles_per_program
    last = tl.minimum(first + tiles_per_program, batches * blocks * groups)
    dweight_a = tl.zeros([BLOCK_ROWS, BLOCK], dtype=tl.float32)
    dweight_b = tl.zeros([BLOCK_ROWS, BLOCK], dtype=tl.float32)
    dbias_a = tl.zeros([BLOCK_ROWS, BLOCK], dtype=tl.float32)
    dbias_b = tl.zeros([BLOCK_ROWS, BLOCK], dtype=tl.float32)
    for tile in range(first, last):
        group, place = tile % groups, tile // groups
        batch = tl.cast(place // blocks, tl.int64)
        token = tl.cast(place % blocks, tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        valid = token < tokens
        cos_a, cos_b, sin_a, sin_b = 1.0, 1.0, 0.0, 0.0
        if cos_ptr is not None:
            tables = (cos_ptr, sin_ptr, batch, token, tokens, prefix)
            cos_a, cos_b, sin_a, sin_b = _load_tables(*tables, *table_strides, DIM, BLOCK, INTERLEAVED)
        for number in range(group * GROUP, tl.minimum((group + 1) * GROUP, heads)):
            head = tl.cast(number, tl.int64)
            dy_head_ptr = dy_ptr + batch * stride_dy_batch + head * stride_dy_head
            x_head_ptr = x_ptr + batch * stride_x_batch + head * stride_x_head
            dx_head_ptr = dx_ptr + (batch * tokens * heads + head) * DIM
            a, b = _load_pair(dy_head_ptr, token, valid, stride_dy_row, 0.0, DIM, BLOCK, INTERLEAVED)
            if cos_ptr is not None:
                a, b = a * cos_a + b * sin_b, b * cos_b - a * sin_a
            x_a, x_b = _load_pair(x_head_ptr, token, valid, stride_x_row, 0.0, DIM, BLOCK, INTERLEAVED)
            x_a, x_b, rstd = _normalize(x_a, x_b, valid, eps, DIM, BLOCK, NORM)
            if dweight_ptr is not None:
                dweight_a += a * x_a
                dweight_b += b * x_b
            if dbias_ptr is not None:
                dbias_a += a
                dbias_b += b
            if weight_ptr is not None:
                weight_a, weight_b = _load_parameter(weight_ptr, DIM, BLOCK, INTERLEAVED)
                a, b = a * weight_a, b * weight_b
            projection = (tl.sum(a * x_a + b * x_b, axis=1) / DIM)[:, None]
            dx_a, dx_b = a - x_a * projection, b - x_b * projection
            if NORM == "layer":
                mean = (tl.sum(a + b, axis=1) / DIM)[:, None]
                dx_a, dx_b = dx_a - mean, dx_b - mean
            _store_pair(dx_head_ptr, dx_a * rstd, dx_b * rstd, token, valid, heads * DIM, DIM, BLOCK, INTERLEAVED)
    row = program + tl.arange(0, 1).to(tl.int64)
    if dweight_ptr is not None:
        total_a, total_b = tl.sum(dweight_a, axis=0)[None, :], tl.sum(dweight_b, axis=0)[None, :]
        _store_pair(dweight_ptr, total_a, total_b, row, row >= 0, DIM, DIM, BLOCK, INTERLEAVED)
    if dbias_ptr is not None:
        total_a, total_b = tl.sum(dbias_a, axis=0)[None, :], tl.sum(dbias_b, axis=0)[None, :]
        _store_pair(dbias_ptr, total_a, total_b, row, row >= 0, DIM, DIM, BLOCK, INTERLEAVED)


@triton.jit
def _qk_norm_rope_backward(
    dquery_out_ptr,  # [B, H, N, D]: the upstream gradients
    dkey_out_ptr,  # [B, Hk, N, D]
    query_ptr,  # [B, H, N, D]
    key_ptr,  # [B, Hk, N, D]
    cos_ptr,  # [1 or B, T, D] or None
    sin_ptr,  # [1 or B, T, D] or None
    query_weight_ptr,  # [D] or None
    key_weight_ptr,  # [D] or None
    dquery_ptr,  # [B, N, H, D]
    dkey_ptr,  # [B, N, Hk, D]
    dquery_weight_ptr,  # [query programs, D] or None
    dquery_bias_ptr,  # [query programs, D] or None
    dkey_weight_ptr,  # [key programs, D] or None
    dkey_bias_ptr,  # [key programs, D] or None
    batches,
    heads,
    key_heads,
    tokens,
    prefix,
    query_programs,
    query_tiles_per_program,
    key_tiles_per_program,
    stride_dquery_out_batch,
    stride_dquery_out_head,
    stride_dquery_out_row,
    stride_dkey_out_batch,
    stride_dkey_out_head,
    stride_dkey_out_row,
    stride_query_batch,
    stride_query_head,
    stride_query_row,
    stride_key_batch,
    stride_key_head,
    stride_key_row,
    stride_cos_batch,
    stride_cos_row,
    stride_sin_batch,
    stride_sin_row,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0)
    query = (query_ptr, stride_query_batch, stride_query_head, stride_query_row)
    key = (key_ptr, stride_key_batch, stride_key_head, stride_key_row)
    dquery_out = (dquery_out_ptr, stride_dquery_out_batch, stride_dquery_out_head, stride_dquery_out_row)
    dkey_out = (dkey_out_ptr, stride_dkey_out_batch, stride_dkey_out_head, stride_dkey_out_row)
    to_query = (query_weight_ptr, dquery_ptr, dquery_weight_ptr, dquery_bias_ptr)
    to_key = (key_weight_ptr, dkey_ptr, dkey_weight_ptr, dkey_bias_ptr)
    table_strides = (stride_cos_batch, stride_cos_row, stride_sin_batch, stride_sin_row)
    shared = (cos_ptr, sin_ptr, table_strides, batches, tokens, prefix, eps)
    if program < query_programs:
        query_share = (program, query_tiles_per_program, heads)
        _backward_tiles(dquery_out, query, *to_query, *query_share, *shared, DIM, BLOCK, NORM, INTERLEAVED, BLOCK_ROWS, GROUP)
    else:
        key_share = (program - query_programs, key_tiles_per_program, key_heads)
        _backward_tiles(dkey_out, key, *to_key, *key_share, *shared, DIM, BLOCK, NORM, INTERLEAVED, BLOCK_ROWS, GROUP)


def backward_programs(x: torch.Tensor) -> int:
    """How many programs share x [B, H, N, D] in the backward pass, each leaving a partial sum of the weight gradients."""
    batch, heads, tokens, dim = x.shape
    row = config("qk_norm_rope_backward", target_of(x), dim=dim)
    return min(batch * triton.cdiv(tokens, row["BLOCK_ROWS"]) * triton.cdiv(heads, row["GROUP"]), row["PROGRAMS"])


@planned
def launch_qk_norm_rope_backward(
    dquery_out: torch.Tensor,
    dkey_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    norm: str,
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
    dquery: torch.Tensor,
    dkey: torch.Tensor,
    dquery_weight: torch.Tensor | None,
    dquery_bias: torch.Tensor | None,
    dkey_weight: torch.Tensor | None,
    dkey_bias: torch.Tensor | None,
) -> None:
    """Fills dquery [B, N, H, D] and dkey [B, N, Hk, D], contiguous, and the partial sums [``backward_programs``, D] float32."""
    batch, heads, tokens, dim = query.shape
    row = config("qk_norm_rope_backward", target_of(query), dim=dim)
    blocks = batch * triton.cdiv(tokens, row["BLOCK_ROWS"])
    query_programs, key_programs = backward_programs(query), backward_programs(key)
    query_tiles, key_tiles = (blocks * triton.cdiv(count, row["GROUP"]) for count in (heads, key.shape[1]))
    tensors = dict(dquery_out=dquery_out, dkey_out=dkey_out, query=query, key=key, cos=cos, sin=sin, dquery=dquery, dkey=dkey)
    tensors |= dict(query_weight=query_weight, dquery_weight=dquery_weight, dquery_bias=dquery_bias)
    tensors |= dict(key_weight=key_weight, dkey_weight=dkey_weight, dkey_bias=dkey_bias)
    launch(
        "qk_norm_rope_backward",
        _qk_norm_rope_backward,
        (query_programs + key_programs,),
        query,
        row,
        **{f"{name}_ptr": tensor for name, tensor in tensors.items()},
        batches=batch,
        **_shapes(query, key, cos),
        query_programs=query_programs,
        query_tiles_per_program=triton.cdiv(query_tiles, max(query_programs, 1)),
        key_tiles_per_program=triton.cdiv(key_tiles, max(key_programs, 1)),
        **_strides(dquery_out, "dquery_out"),
        **_strides(dkey_out, "dkey_out"),
        **_strides(query, "query"),
        **_strides(key, "key"),
        **_strides(cos, "cos"),
        **_strides(sin, "sin"),
        eps=eps,
        NORM=norm,
        INTERLEAVED=interleaved,
    )
