"""The two branches of a block, attention and MLP, from normalized hidden states to what is added to the residual.

Bias and activation are one operator with the product before them; query, key and value are read where the projection wrote
them. The block's own modules keep the weights; those without a fused form (an adapter, active dropout, an MLP of another kind)
are called as they are.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backend, reference
from . import grid, layouts, multihead
from .call import Call
from .dropping import active
from .operators import ACTIVATIONS, TORCH, TRITON
from .parts import Layout, Parts, attribute, parameter
from .reading import has_plain_tables, head_count, positions_of, score_scale, separate_bias


def attention(parts: Parts, layout: Layout, ops: Any, x: Tensor, call: Call) -> Tensor:
    """What normalized hidden states x (B, N, C), or images (B, H, W, C), attend to, projected to their shape."""
    names = layout.attention
    owner = parts.child(names.owner)
    if layout.window is not None:
        return _project_out(parts, layout, ops, x, _image_attention(parts, layout, ops, x))
    query, key, value = _project(parts, layout, ops, x, call)
    keywords = {"attn_mask": call.attn_mask, "is_causal": call.is_causal, "scale": score_scale(owner, query.shape[-1])}
    positions = positions_of(parts, layout, call)
    if positions is not None and not has_plain_tables(call):
        out = ops.rotary_attention(query, key, value, **positions, **keywords)
    else:
        if positions is not None:
            query, key = _rotated_plainly(query, key, **positions)
        out = ops.attention(query, key, value, **keywords)
    del query, key, value
    tokens_first = layout.multihead and multihead.tokens_first(owner, call.present)
    # Dropout draws in the order of memory, in which torch's attention leaves tokens first also where the batch comes first.
    turned = layout.multihead and not tokens_first and any(active(parts.child(layout.residuals[0].drop)))
    out = (out.permute(2, 0, 1, 3) if tokens_first or turned else out.transpose(1, 2)).flatten(2)
    out = _project_out(parts, layout, ops, x, out)
    return out.transpose(0, 1) if turned else out


def _image_attention(parts: Parts, layout: Layout, ops: Any, x: Tensor) -> Tensor:
    """The attention's output (B, H, W, C) of a block whose normalized hidden states x are images."""
    names = layout.attention
    owner, path = parts.child(names.owner), names.qkv[0]
    norms = parts.part(names.query_norm), parts.part(names.key_norm)
    project = functools.partial(linear, parts, layout, ops, path)
    bias = False if path in layout.called else parts.child(path).bias
    return grid.attention(parts.block, owner, ops, x, project, bias, norms, functools.partial(score_scale, owner))


def _project_out(parts: Parts, layout: Layout, ops: Any, x: Tensor, out: Tensor) -> Tensor:
    """What the block's attention makes of its normalized hidden states x and the heads' output."""
    out_norm = parts.part(layout.attention.out_norm)
    if out_norm is not None:
        out = out_norm(out)
    if parts.child(layout.attention.gate) is not None:
        out = out * linear(parts, layout, ops, layout.attention.gate, x).sigmoid()
    return linear(parts, layout, ops, layout.attention.out, out)


def _project(parts: Parts, layout: Layout, ops: Any, x: Tensor, call: Call) -> list[Tensor]:
    """Query, key and value, (B, heads, N, D), without what ``positions_of`` tells; norms without a fused form are applied."""
    names = layout.attention
    owner = parts.child(names.owner)
    if layout.multihead:
        return multihead.project(owner, ops, x, x, x, multihead.tokens_first(owner, call.present))
    heads = head_count(owner)
    if len(names.qkv) == 1:
        packed = linear(parts, layout, ops, names.qkv[0], x, bias=separate_bias(owner))
        query, key, value = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        key_heads = attribute(owner, layouts.KEY_HEAD_COUNT, heads)
        projected = [linear(parts, layout, ops, path, x) for path in names.qkv]
        counts = (heads, key_heads, key_heads)
        query, key, value = (t.unflatten(2, (n, -1)).transpose(1, 2) for t, n in zip(projected, counts, strict=True))
    if layout.head_norm is None:
        norms = parts.part(names.query_norm), parts.part(names.key_norm)
        query, key = (t if n is None else n(t).to(value.dtype) for n, t in zip(norms, (query, key), strict=True))
    return [query, key, value]


def mlp(parts: Parts, layout: Any, ops: Any, x: Tensor) -> Tensor:
    """What the MLP makes of normalized hidden states; ``layout``: of a block, or of a mask decoder's two-way block."""
    if layout.mlp is None:
        return parts.block.get_submodule(layouts.OPAQUE_MLP)(x)
    names = layout.mlp
    hidden_norm = parts.part(names.hidden_norm)
    drops = list(active(parts.child(names.hidden_drop)))
    own = names.fc1 in layout.called or names.fc2 in layout.called
    inference = ops is TRITON and not torch.is_grad_enabled()  # two linears below; the one operator is for backward
    if hidden_norm is None and not drops and layout.gating is None and not own and not inference:
        fc1, fc2 = parts.child(names.fc1), parts.child(names.fc2)
        weights = (parameter(fc, name) for fc in (fc1, fc2) for name in ("weight", "bias"))
        return ops.mlp(x, *weights, activation=layout.activation)
    if layout.gating is None:
        hidden = linear(parts, layout, ops, names.fc1, x, layout.activation)
    else:
        hidden = linear(parts, layout, ops, names.fc1, x)
        if layout.gating == "beside":
            gate, value = linear(parts, layout, ops, names.gate, x), hidden
        else:
            first, last = hidden.chunk(2, dim=-1)
            gate, value = (first, last) if layout.gating == "first" else (last, first)
        hidden = ops.glu(gate, value, activation=layout.activation)
        del gate, value
    for module in drops:
        hidden = module(hidden)
    if hidden_norm is not None:
        hidden = hidden_norm(hidden)
    return linear(parts, layout, ops, names.fc2, hidden)


def linear(
    parts: Parts,
    layout: Layout,
    ops: Any,
    path: str | None,
    x: Tensor,
    activation: str | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A plain linear with its epilogue; any other module (an adapter, a quantized linear) called as it is."""
    module = parts.child(path)
    if path not in layout.called:
        bias = parameter(module, "bias") if bias is None else bias
        if activation is None and ops is TRITON and backend.get_backend() == "auto":  # what the module itself would do
            return F.linear(x, parameter(module, "weight"), bias)
        return ops.linear(x, parameter(module, "weight"), bias, activation=activation)
    out = module(x) if bias is None else module(x) + bias
    return out if activation is None else ACTIVATIONS[activation](out)


def _rotated_plainly(query: Tensor, key: Tensor, **positions: Any) -> tuple[Tensor, Tensor]:
    """Query and key, rotated by the reference's operators, which have gradients for the tables too."""
    dtype = query.dtype
    query, key = reference.qk_norm_rope(query, key, **positions)
    return query.to(dtype), key.to(dtype)


def queries_and_keys(block: nn.Module, layout: Layout, call: Call) -> tuple[Tensor, Tensor, float]:
    """(query (B, H, N, D), key (B, Hk, N, D), scale) that the block's attention takes the softmax of, on PyTorch's operators.

    For looking at attention weights, which the fused kernels never hold.
    """
    x, parts = call.hidden, Parts(block)
    norm = parts.child(layout.norms.before)
    if not layout.post_norm:
        x = TORCH.layer_norm(x, norm.weight, norm.bias, norm.eps)
    query, key, _ = _project(parts, layout, TORCH, x, call)
    positions = positions_of(parts, layout, call)
    if positions is not None:
        prepare = _rotated_plainly if has_plain_tables(call) else TORCH.qk_norm_rope
        query, key = prepare(query, key, **positions)
    return query, key, score_scale(parts.child(layout.attention.owner), query.shape[-1])
