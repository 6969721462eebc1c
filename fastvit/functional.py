"""Fused operators for Vision Transformers, differentiable, on Triton kernels or PyTorch's own (see ``fastvit.backend``).

Shapes: B batch, H heads, N queries, M keys, D head dim, C = H·D channels. Floating-point tensors of one dtype
(float32, bfloat16, float16; float64 on the torch backend) and one device, of any strides; results are fresh tensors.
Under autocast, operators behave as PyTorch's: ``attention``, ``linear`` and ``mlp`` compute in the autocast dtype,
the norms in float32; ``glu`` and ``qk_norm_rope`` keep the dtype they are given, and ``rotary_attention`` is ``qk_norm_rope``,
then ``attention``. ``fastvit.reference`` holds the same functions in plain PyTorch: the specification.

Wrong input raises ``TypeError`` (not a tensor of a dtype above, mixed dtypes, not a number) or ``ValueError``
(shapes, devices, head_dim over 256, a negative eps), naming the argument, its shape and what was expected.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from .backend import resolve
from .ops import _instant, dispatch, onednn_operators, torch_backend, torch_image_attention  # noqa: F401  # onednn_operators registers
from .ops import attention as _attention_op
from .ops import glu as _glu_op
from .ops import image_attention as _image_attention_op
from .ops import layer_norm as _layer_norm_op
from .ops import linear as _linear_op
from .ops import rotary as _rotary_op
from .ops import rotary_attention as _rotary_attention_op
from .ops._common import wants_grad

__all__ = [
    "add_layer_norm",
    "attention",
    "glu",
    "image_attention",
    "layer_norm",
    "linear",
    "mlp",
    "qk_norm_rope",
    "rotary_attention",
]


def _autocast(*tensors: Any, to_float32: bool = False) -> tuple:
    """The tensors as autocast would hand them to an operator of its lower-precision (or float32) list; the first one's device
    decides."""
    if not isinstance(tensors[0], Tensor):
        return tensors  # the checks refuse it
    device_type = "cuda" if tensors[0].is_cuda else tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.float32 if to_float32 else torch.get_autocast_dtype(device_type)
    castable = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(t.to(dtype) if t is not None and t.dtype in castable else t for t in tensors)


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
    """softmax(scale·QKᵀ + bias)·V without the N×M matrix in memory (Vaswani et al. 2017; Dao 2023, FlashAttention-2).

    Args:
        query: (B, H, N, D), D from 1 to 256.
        key: (B, Hk, M, D), H a multiple of Hk (grouped queries).
        value: (B, Hk, M, Dv), Dv from 1 to 256.
        attn_mask: broadcastable to (B, H, N, M); bool (True = attend) or additive, of any floating-point dtype.
        is_causal: query n attends to keys m ≤ n only; combines with ``attn_mask``.
        scale: factor on the scores; D ** -0.5 when None.
        rel_h: (B, H, N, Kh) and ``rel_w`` (B, H, N, Kw), Kh·Kw = M: rel_h[n, m // Kw] + rel_w[n, m % Kw] is added to the
            scores after scaling (Li et al. 2021, MViTv2, decomposed relative positions).

    Returns:
        (B, H, N, Dv). A row with nothing to attend to gives zeros and zero gradients. Differentiable in query, key, value,
        an additive attn_mask, rel_h and rel_w.
    """
    return _instant.run(_attention, query, key, value, attn_mask, is_causal, scale, rel_h, rel_w)


def _attention(query, key, value, attn_mask, is_causal, scale, rel_h, rel_w):
    query, key, value = _autocast(query, key, value)
    _checks.check_attention(query, key, value, attn_mask, rel_h, rel_w, is_causal, scale)
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    if resolve(query) == "triton":
        way = dispatch.attention(query, key, value, attn_mask, rel_h, is_causal, scale, rel_w)
        if way == "kernel":
            return _attention_op.attention(query, key, value, attn_mask, is_causal, scale, rel_h, rel_w)
    return torch_backend.attention(query, key, value, attn_mask, is_causal, scale, rel_h, rel_w)


def _attention_by_sdpa(query, key, value, attn_mask, is_causal, scale, rel_h, rel_w):
    if attn_mask is None and rel_h is None and query.numel() and query.shape[1] == key.shape[1]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    return torch_backend.attention(query, key, value, attn_mask, is_causal, scale, rel_h, rel_w)


_instant.by_vendor[_attention, "sdpa"] = _attention_by_sdpa


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
    """Segment Anything's encoder attention, global or in windows, on the image as it lies (Kirillov et al. 2023, appendix A).

    No window is cut out, no token is padded and no bias is N×M: padded keys and values are read from the one vector that
    they all equal, padded queries are never computed, and relative positions are added where the scores are.

    Args:
        qkv: (B, Hi, Wi, 3·C), channels laid out [3, heads, D], D from 1 to 256.
        num_heads: the heads that divide C.
        rel_pos_h: (L, D), row y − k + S − 1 of which belongs to a query at row y and a key at row k of a window (or image)
            of S rows; interpolated linearly to L = 2·S − 1 where it has another length. ``rel_pos_w`` likewise for columns;
            both or neither. The bias comes from the unscaled query (Li et al. 2021, MViTv2, eq. 4).
        window_size: 0 attends to the whole image; w > 0 within w×w windows side by side, padded at the bottom and the right.
        pad_qkv: (3·C,), what the projection makes of a padded token, that is its bias: padded keys and values, which are
            attended to. None stands for zeros.
        scale: factor on the scores; D ** -0.5 when None.

    Returns:
        (B, Hi, Wi, C). Differentiable in qkv, both tables and pad_qkv.
    """
    tables = rel_pos_h, rel_pos_w
    return _instant.run(_image_attention, qkv, num_heads, *tables, window_size, pad_qkv, scale)


def _image_attention(qkv, num_heads, rel_pos_h, rel_pos_w, window_size, pad_qkv, scale):
    qkv, rel_pos_h, rel_pos_w, pad_qkv = _autocast(qkv, rel_pos_h, rel_pos_w, pad_qkv)
    _checks.check_image_attention(qkv, num_heads, rel_pos_h, rel_pos_w, window_size, pad_qkv, scale)
    height, width, channels = qkv.shape[1:]
    window = (window_size, window_size) if window_size else (height, width)
    scale = float((channels // (3 * num_heads)) ** -0.5 if scale is None else scale)
    if rel_pos_h is not None and rel_pos_w is not None:
        rel_pos_h = torch_image_attention.resized_table(rel_pos_h, window[0])
        rel_pos_w = torch_image_attention.resized_table(rel_pos_w, window[1])
    serving = _image_attention_op if resolve(qkv) == "triton" else torch_image_attention
    if serving is _image_attention_op:
        dispatch.image_attention(qkv, window_size)
    return serving.image_attention(qkv, num_heads, rel_pos_h, rel_pos_w, window, pad_qkv, scale)


def layer_norm(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6, *, statistics: str = "token"
) -> Tensor:
    """(x − mean) / sqrt(var + eps) · weight + bias, statistics in float32 (Ba et al. 2016).

    Args:
        input: (..., C); (B, N, C) for ``statistics="image"``.
        weight, bias: (C,), in the input's dtype or float32; None leaves them out.
        eps: added to the variance; at least 0.
        statistics: "token" normalizes over the channels, "image" over all tokens and channels of an image.

    Returns:
        a tensor of the input's shape and dtype.
    """
    return _instant.run(_layer_norm, input, weight, bias, eps, statistics)


def _layer_norm(input, weight, bias, eps, statistics):
    input, weight, bias = _autocast(input, weight, bias, to_float32=True)
    _checks.check_layer_norm(input, weight, bias, eps, statistics)
    if resolve(input) == "triton":
        return _layer_norm_op.layer_norm(input, weight, bias, float(eps), statistics)
    return torch_backend.layer_norm(input, weight, bias, eps, statistics)


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    layer_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """total = residual + layer_scale·branch and its layer norm in one pass (LayerScale: Touvron et al. 2021, eq. 4).

    Args:
        residual, branch: (..., C), of one dtype or one of them float32.
        weight, bias: (C,) of the norm, or None.
        eps: added to the variance; at least 0.
        layer_scale: (C,), or None for 1.

    Returns:
        (normalized, total), of the residual's shape and the two inputs' promoted dtype.
    """
    return _instant.run(_add_layer_norm, residual, branch, weight, bias, eps, layer_scale)


def _add_layer_norm(residual, branch, weight, bias, eps, layer_scale):
    cast = _autocast(residual, branch, weight, bias, layer_scale, to_float32=True)
    residual, branch, weight, bias, layer_scale = cast
    _checks.check_add_layer_norm(residual, branch, weight, bias, eps, layer_scale)
    if resolve(branch if branch.dtype == torch.float64 else residual) == "triton":
        return _layer_norm_op.add_layer_norm(residual, branch, weight, bias, float(eps), layer_scale)
    return torch_backend.add_layer_norm(residual, branch, weight, bias, eps, layer_scale)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """activation(x·Wᵀ + b), bias and activation in the product's epilogue, or PyTorch's linear where a rule of ``auto`` says so.

    Args:
        input: (..., in).
        weight: (out, in), as in ``torch.nn.Linear``.
        bias: (out,) or None.
        activation: "gelu" (erf; Hendrycks & Gimpel 2016), "gelu_tanh", "quick_gelu" (x·σ(1.702x)), "relu" or None.

    Returns:
        (..., out).
    """
    if activation is None:  # nothing of ours to launch, perhaps
        return _linear(input, weight, bias, None)
    return _instant.run(_linear, input, weight, bias, activation)


def _linear(input, weight, bias, activation):
    input, weight, bias = _autocast(input, weight, bias)
    _checks.check_linear(input, weight, bias, activation)
    if resolve(input) == "triton":
        way = dispatch.linear(input, weight, bias, activation)
        if way == "kernel":
            return _linear_op.linear(input, weight, bias, activation)
        return dispatch.linear_by(way, input, weight, bias, activation)
    return torch_backend.linear(input, weight, bias, activation)


for _name in ("vendor", "vendor_fused"):
    _instant.by_vendor[_linear, _name] = functools.partial(dispatch.linear_by, _name)


def mlp(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str | None = "gelu",
) -> Tensor:
    """activation(x·W1ᵀ + b1)·W2ᵀ + b2 (Dosovitskiy et al. 2021, eq. 3).

    Args:
        input: (..., C).
        fc1_weight, fc1_bias: (hidden, C), (hidden,) or None.
        fc2_weight, fc2_bias: (out, hidden), (out,) or None.
        activation: as in ``linear``.

    Returns:
        (..., out).
    """
    return _instant.run(_mlp, input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)


def _mlp(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation):
    cast = _autocast(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    input, fc1_weight, fc1_bias, fc2_weight, fc2_bias = cast
    _checks.check_mlp(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
    if resolve(input) == "triton":
        if dispatch.linear(input, fc1_weight, fc1_bias, activation) == "kernel":
            return _linear_op.mlp(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)
        if not torch.compiler.is_compiling() and not wants_grad(*cast):  # each linear by its own way
            return linear(linear(input, fc1_weight, fc1_bias, activation=activation), fc2_weight, fc2_bias)
    return torch_backend.mlp(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)


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
    """Queries and keys normalized (Dehghani et al. 2023, ViT-22B) and turned to their positions (Su et al. 2021), in one pass.

    y·cos + r(y)·sin with y = norm(x), in float32 and rounded once.

    Args:
        query: (B, H, N, D), D from 1 to 256; the slices of a packed (B, N, 3, H, D) are read in place.
        key: (B, Hk, N, D).
        cos, sin: (T, D), (B or 1, T, D) or (B or 1, 1, T, D), T ≤ N, of any floating-point dtype; both or neither, D even.
            The first N − T tokens (class and register tokens) are not rotated. Constants: they get no gradient.
        interleaved: r(y) = [−y1, y0, −y3, y2, …] instead of [−y_D/2, …, −y_D−1, y0, …, y_D/2−1].
        norm: "layer" (layer norm over D), "rms" (x / sqrt(mean(x²) + eps) · weight; Zhang & Sennrich 2019) or None.
        query_weight, key_weight: (D,), in the query's dtype or float32, or None.
        query_bias, key_bias: likewise, for "layer" alone.
        eps: added to the variance or the mean square; at least 0.

    Returns:
        (query, key), each of its argument's shape and dtype. Without gradients their memory is in the order (B, N, H, D), in
        which attention reads the rows of a projection. Differentiable in query, key, weights and biases.

    Raises:
        ValueError: neither tables nor a norm, one table without the other, or a table that requires a gradient.
    """
    params = query_weight, query_bias, key_weight, key_bias
    return _instant.run(_qk_norm_rope, query, key, cos, sin, interleaved, norm, *params, eps)


def _qk_norm_rope(query, key, cos, sin, interleaved, norm, query_weight, query_bias, key_weight, key_bias, eps):
    params = query_weight, query_bias, key_weight, key_bias
    _checks.check_qk_norm_rope(query, key, cos, sin, interleaved, norm, eps, *params)
    _checks.check_constant(cos=cos, sin=sin)
    cos, sin = _tables(cos), _tables(sin)
    op = _rotary_op if resolve(query) == "triton" else torch_backend
    return op.qk_norm_rope(query, key, cos, sin, interleaved, norm, *params, float(eps))


def _tables(table: Tensor | None) -> Tensor | None:
    """cos or sin of any accepted shape as (1 or B, T, D)."""
    if table is None:
        return None
    if table.dim() == 3:
        return table
    return table.squeeze(1) if table.dim() == 4 else table[None]


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
    """``attention`` over the queries and keys of ``qk_norm_rope``, whose arguments these are.

    On Triton, without gradients or masks and up to as many tokens as the GPU's tuning table says, one kernel normalizes
    and rotates queries and keys as it loads them, and neither is written to memory; everywhere else it is the two operators.

    Args:
        value: (B, Hk, N, Dv), Dv from 1 to 256.
        attn_mask, is_causal, scale: as in ``attention``.

    Returns:
        (B, H, N, Dv). Differentiable in query, key, value, weights, biases and an additive attn_mask.

    Raises:
        ValueError: neither tables nor a norm, one table without the other, or a table that requires a gradient.
    """
    positions = cos, sin, interleaved, norm, query_weight, query_bias, key_weight, key_bias, eps
    return _instant.run(_rotary_attention, query, key, value, *positions, attn_mask, is_causal, scale)


def _rotary_attention(
    query,
    key,
    value,
    cos,
    sin,
    interleaved,
    norm,
    query_weight,
    query_bias,
    key_weight,
    key_bias,
    eps,
    attn_mask,
    is_causal,
    scale,
):
    params = dict(query_weight=query_weight, query_bias=query_bias, key_weight=key_weight, key_bias=key_bias)
    if attn_mask is None and is_causal is False and _triton_attends(query, key, value):
        parameters = query_weight, query_bias, key_weight, key_bias
        _checks.check_qk_norm_rope(query, key, cos, sin, interleaved, norm, eps, *parameters)
        _checks.check_constant(cos=cos, sin=sin)
        _checks.check_attention(query, key, value, None, None, None, is_causal, scale)
        tables, eps = (_tables(cos), _tables(sin)), float(eps)
        score_scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
        inputs = query, key, value
        way = dispatch.attention(*inputs, None, None, False, score_scale, *parameters, op="rotary_attention")
        if way == "kernel":
            return _rotary_attention_op.rotary_attention(*inputs, *tables, interleaved, norm, *parameters, eps, score_scale)
    query, key = qk_norm_rope(query, key, cos, sin, interleaved=interleaved, norm=norm, eps=eps, **params)
    return attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)


def _triton_attends(*tensors: Tensor) -> bool:
    """Whether ``attention`` would hand these to Triton without a cast between a norm or rotation and itself."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return False
    device_type = tensors[0].device.type
    if torch.is_autocast_enabled(device_type) and any(t.dtype != torch.get_autocast_dtype(device_type) for t in tensors):
        return False
    return resolve(tensors[0]) == "triton"


def glu(gate: Tensor, value: Tensor, *, activation: str = "silu") -> Tensor:
    """activation(gate)·value, the gated linear unit between two projections (Shazeer 2020; SwiGLU for "silu").

    Args:
        gate, value: (..., C), of one shape; the halves of a packed (..., 2·C) are read in place.
        activation: "silu" (x·σ(x)), "gelu" (erf), "gelu_tanh", "quick_gelu" (x·σ(1.702x)), "relu" or "sigmoid".

    Returns:
        (..., C).
    """
    return _instant.run(_glu, gate, value, activation)


def _glu(gate, value, activation):
    _checks.check_glu(gate, value, activation)
    if resolve(gate) == "triton":
        return _glu_op.glu(gate, value, activation)
    return torch_backend.glu(gate, value, activation)
