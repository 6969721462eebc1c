"""The operators that a block is computed with, under the names and with the arguments of ``fastvit.functional``.

``TRITON`` is that room itself, with its checks and its choice between kernels and the vendor's operators. ``TORCH`` goes past
both, straight to PyTorch's operators: what is given comes from a block that was checked. ``choose_backend`` says which of the
two serves a call, ``held_to`` keeps the modules inside the block to the same.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend, functional
from ..ops import torch_backend, torch_image_attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


def choose_backend(pinned: str, x: Tensor) -> str:
    """``"triton"`` or ``"torch"`` for a block pinned to a backend; ``"auto"`` follows the setting in force.

    Raises ``ValueError`` when pinned to ``triton`` and that cannot serve the tensor.
    """
    if pinned == "torch":
        return "torch"
    return backend.resolve(x, setting=None if pinned == "auto" else pinned)


def held_to(pinned: str) -> AbstractContextManager:
    """Holds the operators to the kernels where the block is pinned to them and the setting in force is another."""
    if pinned != "triton" or backend.get_backend() == "triton":
        return nullcontext()
    use_backend = backend.use_backend if torch.compiler.is_compiling() else backend.use_backend_in_thread
    return use_backend("triton")


def _torch_attention(query, key, value, attn_mask=None, *, is_causal=False, scale=None):
    return torch_backend.attention(query, key, value, attn_mask, is_causal, scale, None, None)


def _torch_image_attention(qkv, *, num_heads, rel_pos_h=None, rel_pos_w=None, window_size=0, pad_qkv=None, scale=None):
    window = (window_size, window_size) if window_size else tuple(qkv.shape[1:3])
    tables = (rel_pos_h, rel_pos_w)
    sized = [t if t is None else torch_image_attention.resized_table(t, side) for t, side in zip(tables, window, strict=True)]
    return torch_image_attention.image_attention(qkv, num_heads, sized[0], sized[1], window, pad_qkv, scale)


def _torch_layer_norm(input, weight, bias, eps):
    return torch_backend.layer_norm(input, weight, bias, eps, "token")


def _torch_add_layer_norm(residual, branch, weight, bias, eps, *, layer_scale=None):
    return torch_backend.add_layer_norm(residual, branch, weight, bias, eps, layer_scale)


def _torch_linear(input, weight, bias=None, *, activation=None):
    if torch.jit.is_tracing():  # one graph, whether gradients are wanted or not: nothing is written over
        out = F.linear(input, weight, bias)
        return out if activation is None else ACTIVATIONS[activation](out)
    return torch_backend.linear(input, weight, bias, activation)


def _torch_mlp(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, activation="gelu"):
    if torch.jit.is_tracing():
        return _torch_linear(_torch_linear(input, fc1_weight, fc1_bias, activation=activation), fc2_weight, fc2_bias)
    return torch_backend.mlp(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)


def _torch_qk_norm_rope(query, key, cos, sin, *, interleaved=False, norm=None, eps=1e-6, **weights):
    cos, sin = (t if t is None else t.squeeze(1) if t.dim() == 4 else t[None] for t in (cos, sin))
    params = [weights.get(f"{of}_{name}") for of in ("query", "key") for name in ("weight", "bias")]
    return torch_backend.qk_norm_rope(query, key, cos, sin, interleaved, norm, params[0], params[1], params[2], params[3], eps)


def _torch_rotary_attention(query, key, value, cos, sin, *, attn_mask=None, is_causal=False, scale=None, **positions):
    query, key = _torch_qk_norm_rope(query, key, cos, sin, **positions)
    return _torch_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)


def _torch_glu(gate, value, *, activation="silu"):
    return torch_backend.glu(gate, value, activation)


TORCH = SimpleNamespace(
    attention=_torch_attention,
    image_attention=_torch_image_attention,
    qk_norm_rope=_torch_qk_norm_rope,
    rotary_attention=_torch_rotary_attention,
    glu=_torch_glu,
    layer_norm=_torch_layer_norm,
    add_layer_norm=_torch_add_layer_norm,
    linear=_torch_linear,
    mlp=_torch_mlp,
)
TRITON = functional
