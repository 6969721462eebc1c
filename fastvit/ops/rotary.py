"""Query and key norms with rotary positions on the Triton kernels: raw operators, shape functions and autograd Function.

Implementations take None for what is left out and return None for gradients of parameters that are None. Tables are
(1 or B, T, D). What backward keeps: without a norm the tables alone, since a rotation's gradient is the rotation the other
way round; with one the inputs, from which the statistics are computed again.
"""

import torch
from torch import Tensor

from ._common import Operator, apply, contiguous, define, distinct, kernels, run_backward, scratch, wants_grad, with_unit_stride
from .sums import sum_partials


def _like_a_projection(x: Tensor) -> Tensor:
    """An empty tensor of the shape of x (B, H, N, D), in memory (B, N, H, D), as attention reads a projection's result."""
    _, heads, tokens, dim = x.shape
    return x.new_empty_strided(x.shape, (tokens * heads * dim, dim, heads * dim, 1))


def _unit_stride(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else with_unit_stride(tensor)


def qk_norm_rope_forward(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    norm: str | None,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    eps: float,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """Returns (query, key) normalized and rotated; ``transposed``, which no norm goes with, rotates the other way."""
    out = _like_a_projection(query), _like_a_projection(key)
    params = [contiguous(p) for p in (query_weight, query_bias, key_weight, key_bias)]
    query, key = with_unit_stride(query), with_unit_stride(key)
    tables = _unit_stride(cos), _unit_stride(sin)
    kernels.rotary.launch_qk_norm_rope(query, key, *tables, interleaved, norm, *params, eps, transposed, *out)
    return out


def qk_norm_rope_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    query: Tensor,
    key: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    norm: str,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    eps: float,
):
    """Returns (dquery, dkey, dquery_weight, dquery_bias, dkey_weight, dkey_bias)."""
    dquery, dkey = _like_a_projection(query), _like_a_projection(key)
    tensors = [with_unit_stride(t) for t in (grad_query, grad_key, query, key)]
    tables = _unit_stride(cos), _unit_stride(sin)
    params = (query_weight, query_bias, key_weight, key_bias)
    programs = [kernels.rotary_backward.backward_programs(x) for x in (query, query, key, key)]
    partials = [
        None if p is None else scratch(query.new_empty(count, query.shape[3], dtype=torch.float32))
        for p, count in zip(params, programs, strict=True)
    ]
    weights = contiguous(query_weight), contiguous(key_weight)
    launch = kernels.rotary_backward.launch_qk_norm_rope_backward
    launch(*tensors, *tables, interleaved, norm, *weights, eps, dquery, dkey, *partials)
    return dquery, dkey, *sum_partials(partials, params)


def _fake_forward(query, key, *rest):
    return _like_a_projection(query), _like_a_projection(key)


def _fake_backward(grad_query, grad_key, query, key, cos, sin, interleaved, norm, *rest):
    params = (query.new_empty(0) if p is None else p.new_empty(p.shape) for p in rest[:4])
    return _like_a_projection(query), _like_a_projection(key), *params


_PARAMETERS = "Tensor? query_weight, Tensor? query_bias, Tensor? key_weight, Tensor? key_bias, float eps"

call_qk_norm_rope_forward = define(
    "qk_norm_rope_forward(Tensor query, Tensor key, Tensor? cos, Tensor? sin, bool interleaved, str? norm,"
    f" {_PARAMETERS}, bool transposed) -> (Tensor, Tensor)",
    qk_norm_rope_forward,
    _fake_forward,
)
call_qk_norm_rope_backward = define(
    "qk_norm_rope_backward(Tensor grad_query, Tensor grad_key, Tensor query, Tensor key, Tensor? cos, Tensor? sin,"
    f" bool interleaved, str norm, {_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    qk_norm_rope_backward,
    _fake_backward,
)


class QKNormRope(Operator):
    """(query, key, cos, sin, interleaved, norm, four parameters, eps) → (query, key); the tables get no gradient."""

    @staticmethod
    def forward(query, key, cos, sin, interleaved, norm, query_weight, query_bias, key_weight, key_bias, eps):
        params = query_weight, query_bias, key_weight, key_bias
        return call_qk_norm_rope_forward(query, key, cos, sin, interleaved, norm, *params, eps, False)

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, cos, sin, ctx.interleaved, ctx.norm, *params, ctx.eps = inputs
        kept = (None, None) if ctx.norm is None else (query, key)
        ctx.save_for_backward(*kept, cos, sin, *params)

    @staticmethod
    def backward(ctx, grad_query, grad_key):
        query, key, cos, sin, *params = ctx.saved_tensors
        if ctx.norm is None:
            arguments = (grad_query, grad_key, cos, sin, ctx.interleaved, None, *params, ctx.eps, True)
            dquery, dkey = run_backward(call_qk_norm_rope_forward, *arguments)
            return dquery, dkey, *[None] * 9
        arguments = (grad_query, grad_key, query, key, cos, sin, ctx.interleaved, ctx.norm, *params, ctx.eps)
        dquery, dkey, *grads = run_backward(call_qk_norm_rope_backward, *arguments)
        grads = [None if p is None else g for p, g in zip(params, grads, strict=True)]
        return dquery, dkey, None, None, None, None, *grads, None


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    norm: str | None,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``cos``, ``sin``: (1 or B, T, D) or None."""
    params = query_weight, query_bias, key_weight, key_bias
    if wants_grad(query, key, *params):
        query_, key_, cos_, sin_, *params_ = distinct(query, key, cos, sin, *params)
        return apply(QKNormRope, query_, key_, cos_, sin_, interleaved, norm, *params_, eps)
    return call_qk_norm_rope_forward(query, key, cos, sin, interleaved, norm, *params, eps, False)
