"""The torch backend: every operator on PyTorch's own kernels, for CPUs and for GPUs that Triton does not serve.

Same results as ``fastvit.reference``, lean in memory: no N×M bias or score matrix beyond a block of query rows, and
in inference no intermediate that could be written over. Everything is differentiable by PyTorch's autograd.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Query rows whose bias is held at one time; on 2 CPU cores 256 rows of a 64×64 grid measured fastest (64: +40 %).
BIAS_ROWS = 256


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
    """scaled_dot_product_attention, by blocks of query rows whenever a bias would otherwise be N×M."""
    if 0 in query.shape[:2]:
        return query.new_zeros(*query.shape[:3], value.shape[3]) + 0 * (query.sum() + key.sum() + value.sum())
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
    if rel_h is None and attn_mask is None:
        return _sdpa(query, key, value, None, is_causal, scale)
    if rel_h is None and not is_causal:
        return _masked_rows(query, key, value, attn_mask, False, scale, None, None, 0)
    tensors = (query, key, value, attn_mask, rel_h, rel_w)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    blocks = []
    for start in range(0, query.shape[2], BIAS_ROWS):
        rows = slice(start, start + BIAS_ROWS)
        mask_rows = attn_mask if attn_mask is None or attn_mask.shape[2] == 1 else attn_mask[:, :, rows]
        rel = (None, None) if rel_h is None or rel_w is None else (rel_h[:, :, rows], rel_w[:, :, rows])
        arguments = (query[:, :, rows], key, value, mask_rows, is_causal, scale, *rel, start)
        if needs_grad:
            blocks.append(checkpoint(_masked_rows, *arguments, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(_masked_rows(*arguments))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _masked_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    start: int,
) -> Tensor:
    """Attention of the query rows from ``start`` on, their bias built for these rows only."""
    bias = attn_mask
    if rel_h is not None and rel_w is not None:
        bias = (rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)).flatten(-2)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            bias = bias.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            bias = bias + attn_mask
    if is_causal:
        row = torch.arange(start, start + query.shape[2], device=query.device)[:, None]
        allowed = row >= torch.arange(key.shape[2], device=query.device)[None, :]
        if bias is None:
            bias = allowed
        elif bias.dtype == torch.bool:
            bias = bias & allowed
        else:
            bias = bias.masked_fill(~allowed, float("-inf"))
    return _sdpa(query, key, value, bias, False, scale)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    if bias is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)
    floats = bias.dtype != torch.bool
    if floats:
        bias = bias.to(query.dtype)
        empty = (bias == float("-inf")).all(-1, keepdim=True)
        bias = bias.masked_fill(empty, 0)
    else:
        empty = ~bias.any(-1, keepdim=True)
        bias = bias | empty
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return out.masked_fill(empty, 0)


def layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: str) -> Tensor:
    if statistics == "token":
        if input.device.type != "cpu" and weight is not None and weight.dtype != input.dtype:
            weight, bias = weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
        return F.layer_norm(input, input.shape[-1:], weight, bias, eps)
    normalized = F.layer_norm(input, input.shape[-2:], None, None, eps)
    if weight is not None:
        normalized = normalized * weight.to(input.dtype)
    return normalized if bias is None else normalized + bias.to(input.dtype)


def add_layer_norm(
    residual: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, layer_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    if layer_scale is None:
        total = residual + branch
    elif residual.dtype == branch.dtype == layer_scale.dtype:
        total = torch.addcmul(residual, branch, layer_scale)
    else:
        total = residual + layer_scale * branch
    return layer_norm(total, weight, bias, eps, "token"), total


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    return _activate(F.linear(input, weight, bias), activation)


def _activate(x: Tensor, activation: str | None) -> Tensor:
    """The activation of a tensor that nothing else holds: written over it when no gradient is wanted."""
    inplace = not (torch.is_grad_enabled() and x.requires_grad)
    if activation is None:
        return x
    if activation == "relu":
        return torch.relu_(x) if inplace else torch.relu(x)
    if activation == "quick_gelu":
        gate = torch.sigmoid(1.702 * x)
        return x.mul_(gate) if inplace else x * gate
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_(x, approximate=approximate) if inplace else F.gelu(x, approximate=approximate)


def mlp(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    return linear(linear(input, fc1_weight, fc1_bias, activation), fc2_weight, fc2_bias, None)
