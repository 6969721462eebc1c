"""The specification: every functional operator in plain eager PyTorch, one equation a line, nothing clever.

Shapes: B batch, H heads, N queries, M keys, D head dim, C = H·D channels. Signatures are those of
``fastvit.functional``; the tests hold every other implementation to these, in float64.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(x: Tensor, activation: str | None) -> Tensor:
    """gelu: x·Φ(x); gelu_tanh: its tanh form; quick_gelu: x·σ(1.702x); relu: max(x, 0); None: x."""
    if activation is None:
        return x
    if activation == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "relu":
        return torch.relu(x)
    raise ValueError(f"activation is {activation!r}; expected gelu, gelu_tanh, quick_gelu, relu or None")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
) -> Tensor:
    """softmax(scale·QKᵀ + bias)·V, a row with nothing to attend to giving zeros (Vaswani et al. 2017, eq. 1).

    query (B,H,N,D), key (B,Hk,M,D), value (B,Hk,M,Dv) → (B,H,N,Dv). bias: ``attn_mask`` where it is additive, and
    rel_h[n, m // Kw] + rel_w[n, m % Kw] (Li et al. 2021, MViTv2, eq. 4). ``is_causal``: query n attends to keys m ≤ n.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query @ key.transpose(-2, -1)) * scale
    if rel_h is not None and rel_w is not None:
        scores = scores + (rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)).flatten(-2)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)
    return weights.to(value.dtype) @ value


def relative_position_table(table: Tensor, size: int) -> Tensor:
    """(2·S−1, D) → R (size, size, D) with R[y, k] = table[y − k + size − 1], interpolated linearly to 2·size−1 rows."""
    if table.shape[0] != 2 * size - 1:
        table = F.interpolate(table.t().unsqueeze(0), size=2 * size - 1, mode="linear")[0].t()
    position = torch.arange(size, device=table.device)
    return table[position[:, None] - position[None, :] + size - 1]


def image_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    rel_pos_h: Tensor | None = None,
    rel_pos_w: Tensor | None = None,
    window_size: int = 0,
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Segment Anything's encoder attention (Kirillov et al. 2023, appendix A), windowed or global.

    qkv (B, Hi, Wi, 3·C), channels [3, heads, D] → (B, Hi, Wi, C). ``window_size`` w > 0: non-overlapping w×w windows,
    padded at the bottom and the right with ``pad_qkv`` (3·C), which is attended to. The bias comes from the unscaled query.
    """
    batch, height, width, channels = qkv.shape
    window_h, window_w = (window_size, window_size) if window_size else (height, width)
    pad_h, pad_w = -height % window_h, -width % window_w
    full = qkv.new_zeros(batch, height + pad_h, width + pad_w, channels)
    if pad_qkv is not None:
        full = full + pad_qkv
    full = torch.cat([torch.cat([qkv, full[:, :height, width:]], dim=2), full[:, height:]], dim=1)
    rows, columns = full.shape[1] // window_h, full.shape[2] // window_w
    windows = full.reshape(batch, rows, window_h, columns, window_w, 3, num_heads, channels // (3 * num_heads))
    query, key, value = windows.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3)
    rel_h = rel_w = None
    if rel_pos_h is not None and rel_pos_w is not None:
        grid = query.unflatten(2, (window_h, window_w))
        rel_h = torch.einsum("bnyxd,ykd->bnyxk", grid, relative_position_table(rel_pos_h, window_h)).flatten(2, 3)
        rel_w = torch.einsum("bnyxd,xkd->bnyxk", grid, relative_position_table(rel_pos_w, window_w)).flatten(2, 3)
    out = attention(query, key, value, scale=scale, rel_h=rel_h, rel_w=rel_w)
    out = out.unflatten(2, (window_h, window_w)).unflatten(0, (batch, rows, columns)).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(batch, height + pad_h, width + pad_w, channels // 3)[:, :height, :width].contiguous()


def layer_norm(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6, *, statistics: str = "token"
) -> Tensor:
    """(x − mean) / sqrt(var + eps) · weight + bias (Ba et al. 2016), with the biased variance.

    ``statistics="token"``: over the channels; ``"image"``: over all tokens and channels of an image, input (B, N, C).
    """
    if statistics not in ("token", "image"):
        raise ValueError(f"statistics is {statistics!r}; expected 'token' or 'image'")
    dims = (-1,) if statistics == "token" else (-2, -1)
    centred = input - input.mean(dims, keepdim=True)
    normalized = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    if weight is not None:
        normalized = normalized * weight
    if bias is not None:
        normalized = normalized + bias
    return normalized


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """total = residual + layer_scale·branch (LayerScale: Touvron et al. 2021); returns (layer_norm(total), total)."""
    total = residual + (branch if layer_scale is None else layer_scale * branch)
    return layer_norm(total, weight, bias, eps), total


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """activation(x·Wᵀ + b), weight (out, in) as in ``torch.nn.Linear``."""
    return activate(F.linear(input, weight, bias), activation)


def mlp(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str | None = "gelu",
) -> Tensor:
    """activation(x·W1ᵀ + b1)·W2ᵀ + b2."""
    return linear(linear(input, fc1_weight, fc1_bias, activation=activation), fc2_weight, fc2_bias)


def rotate_pairs(x: Tensor, interleaved: bool) -> Tensor:
    """Every pair (a, b) of the last dimension turned by 90°: (−b, a); pairs (i, i + D/2), or (2i, 2i+1) interleaved."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _norm_and_rotate(x, cos, sin, interleaved, norm, weight, bias, eps) -> Tensor:
    if norm == "layer":
        y = layer_norm(x, weight, bias, eps)
    elif norm == "rms":
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        y = y if weight is None else y * weight
    elif norm is None:
        y = x
    else:
        raise ValueError(f"norm is {norm!r}; expected 'layer', 'rms' or None")
    if cos is None or sin is None:
        return y.to(x.dtype)
    cos, sin = (t.unsqueeze(1) if t.dim() == 3 else t for t in (cos, sin))
    prefix, rotated = y.tensor_split([x.shape[2] - cos.shape[-2]], dim=2)
    rotated = rotated * cos + rotate_pairs(rotated, interleaved) * sin
    return torch.cat([prefix, rotated], dim=2).to(x.dtype)


def qk_norm_rope(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
    norm: str | None = None,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """y·cos + rotate_pairs(y)·sin with y = norm(x), for x = query (B,H,N,D) and x = key (B,Hk,N,D).

    ``norm``: "layer", "rms" (x / sqrt(mean(x²) + eps) · weight; Zhang & Sennrich 2019) over D, or None (Dehghani et al.
    2023, ViT-22B, normalize queries and keys). cos, sin: rotary positions (Su et al. 2021), (T, D), (B or 1, T, D) or
    (B or 1, 1, T, D); the first N − T tokens are not rotated.
    """
    return (
        _norm_and_rotate(query, cos, sin, interleaved, norm, query_weight, query_bias, eps),
        _norm_and_rotate(key, cos, sin, interleaved, norm, key_weight, key_bias, eps),
    )


def rotary_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
    norm: str | None = None,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    eps: float = 1e-6,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """attention(*qk_norm_rope(query, key), value), (B,H,N,D), (B,Hk,N,D), (B,Hk,N,Dv) → (B,H,N,Dv)."""
    params = dict(query_weight=query_weight, query_bias=query_bias, key_weight=key_weight, key_bias=key_bias)
    query, key = qk_norm_rope(query, key, cos, sin, interleaved=interleaved, norm=norm, eps=eps, **params)
    return attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)


def glu(gate: Tensor, value: Tensor, *, activation: str = "silu") -> Tensor:
    """activation(gate)·value (Shazeer 2020); beside ``activate``'s, silu: x·σ(x) and sigmoid: σ(x)."""
    if activation == "silu":
        return gate * torch.sigmoid(gate) * value
    if activation == "sigmoid":
        return torch.sigmoid(gate) * value
    if activation is None:
        raise ValueError("activation is None; expected silu, gelu, gelu_tanh, quick_gelu, relu or sigmoid")
    return activate(gate, activation) * value
