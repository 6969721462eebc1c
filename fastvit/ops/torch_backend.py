"""The torch backend: every operator on PyTorch's own kernels, for CPUs and for GPUs that Triton does not serve.

Same results as ``fastvit.reference``, lean in memory: no N×M bias or score matrix beyond a block of query rows, and
in inference no intermediate that could be written over. Everything is differentiable by PyTorch's autograd.

On x86 CPUs linears, and in inference attention over many tokens, go to oneDNN where it is the faster library (``onednn``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import onednn, onednn_attention, onednn_training
from ._inplace import activate
from ._inplace import may_write as _may_write

# Query rows whose bias is held at one time; on 2 CPU cores 256 rows of a 64×64 grid measured fastest (64: +40 %).
BIAS_ROWS = 256

# A hidden layer on a CPU that is held at one time, where it would take over twice as much.
HIDDEN_BYTES = 2**24

# A bias from here on (finfo.min of a whole row, say) leaves nothing of the score it is added to.
SWALLOWS_SCORES = 1e30


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
        floats = (t for t in (query, key, value, attn_mask, rel_h, rel_w) if t is not None and t.is_floating_point())
        nothing = 0 * torch.stack([t.sum().to(query.dtype) for t in floats]).sum()  # every gradient is zeros, none is None
        return query.new_zeros(*query.shape[:3], value.shape[3]) + nothing
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + attn_mask.shape)
    tokens = min(query.shape[2], key.shape[2])
    if attn_mask is None and not is_causal and onednn.serves_attention(tokens, query, key, value, rel_h, rel_w):
        serve = torch.ops.fastvit.onednn_attention if torch.compiler.is_compiling() else onednn_attention.attention
        return serve(query, key, value, scale, rel_h, rel_w)
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
    if bias.dtype != torch.bool:
        empty = (bias == float("-inf")).all(-1, keepdim=True)
        bias = bias.masked_fill(empty, 0)
        wide = torch.promote_types(bias.dtype, query.dtype)
        if wide != query.dtype:  # rounded last, when what a row has in common, which softmax ignores, is gone
            bias = bias.to(wide)
            highest = bias.detach().amax(-1, keepdim=True)
            query = query.masked_fill(highest.abs() >= SWALLOWS_SCORES, 0)
            bias = bias - highest
        bias = bias.to(query.dtype)
    else:
        empty = ~bias.any(-1, keepdim=True)
        bias = bias | empty
    if bias.is_cuda and bias.shape[-1] < key.shape[2]:  # one value a row: the memory-efficient kernel reads a mask by rows
        bias = bias.expand(*bias.shape[:-1], key.shape[2]).contiguous()
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return out.masked_fill(empty, 0)


def layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, statistics: str) -> Tensor:
    if statistics == "token":
        return _token_norm(input, weight, bias, eps)
    normalized = F.layer_norm(input, input.shape[-2:], None, None, eps)
    if weight is not None:
        normalized = normalized * weight.to(input.dtype)
    return normalized if bias is None else normalized + bias.to(input.dtype)


def _token_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Parameters of other dtypes than the input's: PyTorch takes them on CPUs only, both and in float32 beside a half."""
    shape, dtype = input.shape[-1:], input.dtype
    params = [p.dtype for p in (weight, bias) if p is not None]
    half = dtype in (torch.bfloat16, torch.float16)
    if all(p == dtype for p in params) or (half and input.is_cpu and params == [torch.float32] * 2):
        return F.layer_norm(input, shape, weight, bias, eps)
    wide = torch.float32 if half else dtype
    weight, bias = (p if p is None else p.to(wide) for p in (weight, bias))
    return F.layer_norm(input.to(wide), shape, weight, bias, eps).to(dtype)


def add_layer_norm(
    residual: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, layer_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    if layer_scale is None:
        total = residual + branch
    elif residual.dtype == branch.dtype == layer_scale.dtype:
        total = torch.addcmul(residual, branch, layer_scale)
    else:
        dtype = torch.promote_types(residual.dtype, branch.dtype)
        total = (residual + layer_scale * branch.to(dtype)).to(dtype)
    return layer_norm(total, weight, bias, eps, "token"), total


def add_layer_norm_(
    residual: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, layer_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``add_layer_norm`` that writes the total over ``branch``: for a caller who owns it and wants no gradient."""
    total = add_(residual, branch, layer_scale)
    return layer_norm(total, weight, bias, eps, "token"), total


def add_(residual: Tensor, branch: Tensor, layer_scale: Tensor | None) -> Tensor:
    """residual + layer_scale·branch, written over ``branch``; all of one dtype."""
    if layer_scale is None:
        return branch.add_(residual)
    return torch.addcmul(residual, branch, layer_scale, out=branch)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if weight.is_contiguous() and onednn.serves_linear(input, weight, bias, activation):
        serve = torch.ops.fastvit.onednn_linear if torch.compiler.is_compiling() else onednn.linear
        return serve(input, weight, bias, activation)
    if weight.is_contiguous() and onednn.trains_linear(input, weight, bias):
        return activate(onednn_training.Linear.apply(input, weight, bias), activation)
    return activate(F.linear(input, weight, bias), activation)


def mlp(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    if input.is_cpu and _may_write(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        rows = input.numel() // max(input.shape[-1], 1)
        pieces = -(-rows * fc1_weight.shape[0] * input.element_size() // HIDDEN_BYTES)
        # glibc asks the system anew for what is larger than two pieces, at every call, and fresh pages are slow.
        if pieces > 2:
            parts = input.reshape(rows, -1).split(-(-rows // pieces))
            out = [linear(linear(part, fc1_weight, fc1_bias, activation), fc2_weight, fc2_bias, None) for part in parts]
            return torch.cat(out).view(*input.shape[:-1], -1)
    return linear(linear(input, fc1_weight, fc1_bias, activation), fc2_weight, fc2_bias, None)


def _members(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second members of the last dimension's pairs, as views."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second


def _head_norm(x: Tensor, norm: str | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """The norm over the last dimension in ``dtype``; x itself, cast, without one."""
    x = x.to(dtype)
    if norm == "layer":
        return _token_norm(x, weight if weight is None else weight.to(dtype), bias if bias is None else bias.to(dtype), eps)
    if norm == "rms":
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x if weight is None else x * weight.to(dtype)
    return x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """(..., T, heads, D) rotated, contiguous; tables (1 or B, T, 1, D)."""
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = (_members(t, interleaved) for t in (x, cos, sin))
    pair = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    return torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)


def _rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    torch.mul(x, cos, out=out)
    (a, b), (out_a, out_b), (sin_a, sin_b) = (_members(t, interleaved) for t in (x, out, sin))
    out_a.addcmul_(b, sin_a, value=-1)
    out_b.addcmul_(a, sin_b)


def _norm_rope(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    dtype = x.dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    x = x.transpose(1, 2)  # (B, N, H, D): the order in memory that attention reads best
    y = _head_norm(x, norm, weight, bias, eps, wide)
    if cos is None or sin is None:
        return y.to(dtype).transpose(1, 2)
    cos, sin = cos.to(wide).unsqueeze(2), sin.to(wide).unsqueeze(2)
    prefix = x.shape[1] - cos.shape[1]
    if _may_write(x, weight, bias):
        out = y.new_empty(y.shape)
        out[:, :prefix] = y[:, :prefix]
        _rotate_into(out[:, prefix:], y[:, prefix:], cos, sin, interleaved)
    else:
        out = _rotate(y[:, prefix:], cos, sin, interleaved)
        out = torch.cat([y[:, :prefix], out], dim=1) if prefix else out
    return out.to(dtype).transpose(1, 2)


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
    return (
        _norm_rope(query, cos, sin, interleaved, norm, query_weight, query_bias, eps),
        _norm_rope(key, cos, sin, interleaved, norm, key_weight, key_bias, eps),
    )


def glu(gate: Tensor, value: Tensor, activation: str) -> Tensor:
    """Two passes over the tensors in inference, three for quick_gelu: x·σ(1.702x) = silu(1.702x) / 1.702."""
    write = _may_write(gate, value)
    if activation == "quick_gelu" and write and gate.dtype != torch.float16:  # whose largest values 1.702x would overflow
        out = F.silu(1.702 * gate, inplace=True)
        return torch.addcmul(out.new_zeros(()), out, value, value=1 / 1.702, out=out)
    if activation == "silu":
        out = F.silu(gate)
    elif activation == "sigmoid":
        out = torch.sigmoid(gate)
    elif activation == "quick_gelu":
        out = gate * torch.sigmoid(1.702 * gate)
    elif activation == "relu":
        out = torch.relu(gate)
    else:
        out = F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
    return out.mul_(value) if write else out * value
