"""Attention over normalized and rotated queries and keys, in inference: one kernel for few tokens, two for many.

Which of the two is decided inside the operator, by the tuning table, so that a traced graph holds for any number of tokens.
It has no gradient of its own: where one is wanted, the operators that have one are called in its place.
"""

from torch import Tensor

from . import attention, rotary
from ._common import contiguous, define, kernels, wants_grad, with_unit_stride


def _new_result(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return attention._new_heads(query, batch, heads, tokens, value.shape[3])


def rotary_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    norm: str | None,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    eps: float,
    scale: float,
) -> Tensor:
    """Returns out (B, H, N, Dv), in memory (B, N, H, Dv); cos, sin (1 or B, T, D) or None."""
    params = query_weight, query_bias, key_weight, key_bias
    if query.shape[2] > kernels.rotary_attention.max_tokens(query, value, norm):
        query, key = rotary.qk_norm_rope_forward(query, key, cos, sin, interleaved, norm, *params, eps, False)
        return attention.attention_forward(query, key, value, None, None, None, False, scale, save=False)[0]
    out = _new_result(query, value)
    q, k, v, cos, sin = (t if t is None else with_unit_stride(t) for t in (query, key, value, cos, sin))
    kernels.rotary_attention.launch_rotary_attention(
        q, k, v, cos, sin, interleaved, norm, *map(contiguous, params), eps, scale, out
    )
    return out


def _fake_forward(query, key, value, *rest):
    return _new_result(query, value)


call_rotary_attention_forward = define(
    "rotary_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cos, Tensor? sin, bool interleaved, str? norm,"
    " Tensor? query_weight, Tensor? query_bias, Tensor? key_weight, Tensor? key_bias, float eps, float scale) -> Tensor",
    rotary_attention_forward,
    _fake_forward,
)


def rotary_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    norm: str | None,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
    eps: float,
    scale: float,
) -> Tensor:
    params = query_weight, query_bias, key_weight, key_bias
    if wants_grad(query, key, value, *params):
        query, key = rotary.qk_norm_rope(query, key, cos, sin, interleaved, norm, *params, eps)
        return attention.attention(query, key, value, None, False, scale, None, None)
    return call_rotary_attention_forward(query, key, value, cos, sin, interleaved, norm, *params, eps, scale)
