"""Attention on the Triton kernels: raw operators, shape functions and the autograd Function.

Results lie in memory as (B, N, H, D) and are returned as (B, H, N, D), so that ``transpose(1, 2).flatten(2)`` costs
nothing; inputs are read through their own strides, packed qkv included. Backward keeps q, k, v, the output and one float32
a row (lse), never a score.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import (
    Operator,
    apply,
    contiguous,
    define,
    direct,
    distinct,
    kernels,
    run_backward,
    scratch,
    wants_grad,
    with_unit_stride,
)


def _new_heads(like: Tensor, batch: int, heads: int, rows: int, dim: int) -> Tensor:
    """(batch, heads, rows, dim), laid out (batch, rows, heads, dim); no view, which would refuse to be written over."""
    return like.new_empty_strided((batch, heads, rows, dim), (rows * heads * dim, dim, heads * dim, 1))


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as the kernels read it; any other as it is."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    is_causal: bool,
    scale: float,
    save: bool = True,
):
    """Returns (out, lse), lse only to ``save``; attn_mask has four dimensions, each of full size or 1."""
    batch, heads, queries, _ = query.shape
    out = _new_heads(query, batch, heads, queries, value.shape[3])
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32) if save else None
    q, k, v, mask = with_unit_stride(query), with_unit_stride(key), with_unit_stride(value), _as_bytes(attn_mask)
    rel = contiguous(rel_h), contiguous(rel_w)
    splits = kernels.attention_split.splits_of(q, k, v, mask, rel_h, is_causal)
    if splits > 1:
        partial = scratch(query.new_empty(splits, batch, heads, queries, value.shape[3], dtype=torch.float32))
        partial_lse = scratch(query.new_empty(splits, batch, heads, queries, dtype=torch.float32))
        kernels.attention_split.launch_attention_split(q, k, v, mask, scale, partial, partial_lse, out, lse)
    else:
        kernels.attention_forward.launch_attention_forward(q, k, v, mask, *rel, is_causal, scale, out, lse)
    return out, lse


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    wants_mask: bool,
    into: Sequence[Tensor] | None = None,
):
    """Returns (dquery, dkey, dvalue, dattn_mask, drel_h, drel_w), the last three None where not wanted; ``into``: where to write
    the first three, each with last stride 1."""
    batch, heads, queries, dim = query.shape
    key_heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    q, k, v, out, dout = (with_unit_stride(t) for t in (query, key, value, out, grad))
    rel_h, rel_w = contiguous(rel_h), contiguous(rel_w)
    inputs = (q, k, v, _as_bytes(attn_mask), rel_h, rel_w, is_causal, scale)
    sizes = ((heads, queries, dim), (key_heads, keys, dim), (key_heads, keys, value_dim))
    dq, dk, dv = [_new_heads(query, batch, *size) for size in sizes] if into is None else into
    drel_h = drel_w = dmask = None
    if batch * heads == 0:
        likes = (attn_mask if wants_mask else None, rel_h, rel_w)
        return dq, dk.zero_(), dv.zero_(), *(None if t is None else torch.zeros_like(t) for t in likes)
    if kernels.attention_backward_short.serves(q, k, v, attn_mask, rel_h, is_causal, out, dout, dq, dk, dv):
        kernels.attention_backward_short.launch_attention_backward_short(q, k, v, scale, out, dout, lse, dq, dk, dv)
        return dq, dk, dv, None, None, None
    delta = scratch(torch.empty_like(lse))
    if rel_h is None or rel_w is None:
        kernels.attention_backward_query.launch_attention_backward_query(*inputs, out, dout, lse, delta, dq, None, None)
    else:
        blocks = kernels.attention_backward_query.rel_blocks(q, v, attn_mask, rel_w, is_causal)
        rows = rel_h.new_empty(*rel_h.shape, blocks, dtype=torch.float32)
        drel_w = rel_w.new_empty(rel_w.shape)
        kernels.attention_backward_query.launch_attention_backward_query(*inputs, out, dout, lse, delta, dq, rows, drel_w)
        drel_h = rows.sum(-1).to(rel_h.dtype)
    kernels.attention_backward_key.launch_attention_backward_key(*inputs, dout, lse, delta, dk, dv)
    if wants_mask and attn_mask is not None:
        dmask = attn_mask.new_empty(attn_mask.shape)
        kernels.attention_backward_mask.launch_attention_backward_mask(*inputs, dout, lse, delta, dmask)
    return dq, dk, dv, dmask, drel_h, drel_w


def _fake_forward(query, key, value, attn_mask, rel_h, rel_w, is_causal, scale):
    batch, heads, queries, _ = query.shape
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    return _new_heads(query, batch, heads, queries, value.shape[3]), lse


def _fake_backward(grad, query, key, value, attn_mask, rel_h, rel_w, out, lse, is_causal, scale, wants_mask):
    heads = (_new_heads(t, *t.shape) for t in (query, key, value))
    others = (attn_mask if wants_mask else None, rel_h, rel_w)
    return *heads, *(query.new_empty(0) if t is None else t.new_empty(t.shape) for t in others)


call_attention_forward = define(
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? rel_h, Tensor? rel_w,"
    " bool is_causal, float scale) -> (Tensor, Tensor)",
    attention_forward,
    _fake_forward,
)
call_attention_backward = define(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? rel_h, Tensor? rel_w,"
    " Tensor out, Tensor lse, bool is_causal, float scale, bool wants_mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    attention_backward,
    _fake_backward,
)


class Attention(Operator):
    """(query, key, value, attn_mask, rel_h, rel_w, is_causal, scale) → (out, lse); lse carries no gradient."""

    @staticmethod
    def forward(query, key, value, attn_mask, rel_h, rel_w, is_causal, scale):
        return call_attention_forward(query, key, value, attn_mask, rel_h, rel_w, is_causal, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, attn_mask, rel_h, rel_w, ctx.is_causal, ctx.scale = inputs
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(query, key, value, attn_mask, rel_h, rel_w, *output)

    @staticmethod
    def backward(ctx, grad, _lse):
        if grad is None:
            return (None,) * 8
        wants = ctx.needs_input_grad
        saved = ctx.saved_tensors
        grads = run_backward(call_attention_backward, grad, *saved, ctx.is_causal, ctx.scale, wants[3])
        return *(g if want else None for g, want in zip(grads, wants[:6], strict=True)), None, None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
) -> Tensor:
    if attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
    if wants_grad(query, key, value, attn_mask, rel_h, rel_w):
        return apply(Attention, *distinct(query, key, value, attn_mask, rel_h, rel_w), is_causal, scale)[0]
    if direct(query, key, value, attn_mask, rel_h, rel_w):
        return attention_forward(query, key, value, attn_mask, rel_h, rel_w, is_causal, scale, save=False)[0]
    return call_attention_forward(query, key, value, attn_mask, rel_h, rel_w, is_causal, scale)[0]
