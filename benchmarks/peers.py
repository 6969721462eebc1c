"""Who competes in a case: our operator, its float64 reference, and the peers that compute the same.

A peer is built when its turn comes, so that one whose library is absent says so in its row. Names: ``eager`` the operator
written in PyTorch; ``sdpa*`` PyTorch's fused attention, its own choice or one backend; ``compile*`` what a compiled model makes
of it; ``flex`` FlexAttention, compiled; ``bias_folded*`` relative positions as channels (``ways``).
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit import functional, reference
from fastvit.backend import resolve
from fastvit.ops.linear_norm import linear_add_norm_forward

from . import image_peers, ways
from .problems import Attention, ImageAttention, LinearAddNorm, Problem

Function = Callable[..., Any]
BACKENDS = {
    "sdpa": None,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Peer:
    """``build()`` gives the function; ``mode``: torch.compile's, or None where nothing is compiled."""

    build: Callable[[], Function]
    mode: str | None = None


def compiled(function: Function, mode: str = "default") -> Function:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, mode=mode)


def _sdpa(backend: SDPBackend | None, query, key, value, attn_mask=None, rel_h=None, rel_w=None, is_causal=False):
    """PyTorch's fused attention as models call it (its own choice without a backend): a decomposed bias is written out first."""
    with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
        if rel_h is not None:
            return ways.dense(query, key, value, rel_h, rel_w, query.shape[-1] ** -0.5)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, is_causal=is_causal)


def _by_way(way: Function, query, key, value, rel_h, rel_w, is_causal=False):
    return way(query, key, value, rel_h, rel_w, query.shape[-1] ** -0.5)


def _flex(case: Attention) -> Function:
    """FlexAttention by score_mod, causal cases by a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.rel:
        return functools.partial(_by_way, ways.flex)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks = None
    if case.causal:
        blocks = create_block_mask(lambda b, h, q, k: q >= k, None, None, case.queries, case.key_count, device=device)

    def attention(query, key, value, attn_mask=None, is_causal=False):
        def masked(score, batch, head, query_index, key_index):
            return torch.where(attn_mask[batch, 0, 0, key_index], score, -float("inf"))

        return flex_attention(query, key, value, score_mod=None if attn_mask is None else masked, block_mask=blocks)

    return attention


def _xformers(case: Attention) -> Function:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    def attention(query, key, value, rel_h=None, rel_w=None, is_causal=False):
        bias: Any = LowerTriangularMask() if is_causal else None
        if rel_h is not None:
            bias = (rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)).flatten(-2)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return memory_efficient_attention(query, key, value, attn_bias=bias).transpose(1, 2)

    return attention


def _flash_attn(case: Attention) -> Function:
    from flash_attn import flash_attn_func

    def attention(query, key, value, is_causal=False):
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return flash_attn_func(query, key, value, causal=is_causal).transpose(1, 2)

    return attention


def _activation(x: Tensor, activation: str | None) -> Tensor:
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return F.silu(x) if activation == "silu" else reference.activate(x, activation)


def _linear(input, weight, bias, activation=None):
    return _activation(F.linear(input, weight, bias), activation)


def _layer_norm(input, weight, bias):
    return F.layer_norm(input, input.shape[-1:], weight, bias, 1e-6)


def _add_layer_norm(residual, branch, weight, bias, layer_scale):
    total = residual + layer_scale * branch
    return F.layer_norm(total, total.shape[-1:], weight, bias, 1e-6), total


def _linear_add_norm(linear, add_layer_norm):
    """The two one after the other, the norm's statistics in ``add_layer_norm``."""

    def both(input, weight, bias, residual, norm_weight, norm_bias):
        return add_layer_norm(residual, linear(input, weight, bias), norm_weight, norm_bias)

    return both


def _in_a_block(input, weight, bias, residual, norm_weight, norm_bias):
    """As a block's recipe calls it on the kernels; no operator of ``functional`` is both."""
    if resolve(input) == "triton":
        return linear_add_norm_forward(input, weight, bias, residual, None, norm_weight, norm_bias, 1e-6)
    parts = _linear_add_norm(functional.linear, functional.add_layer_norm)
    return parts(input, weight, bias, residual, norm_weight, norm_bias)


def _eager_add_layer_norm(residual, branch, weight, bias):
    total = residual + branch
    return _layer_norm(total, weight, bias), total


def _glu(gate, value, activation):
    return _activation(gate, activation) * value


def _rotary(query, key, cos=None, sin=None, *, norm=None, interleaved=False, query_weight=None, key_weight=None):
    """As timm and transformers write it: each of queries and keys by itself."""

    def turn(x, weight):
        if norm == "layer":
            x = F.layer_norm(x, x.shape[-1:], weight, None, 1e-6)
        if cos is None:
            return x
        prefix, rotated = x.tensor_split([x.shape[2] - cos.shape[0]], dim=2)
        return torch.cat([prefix, rotated * cos + reference.rotate_pairs(rotated, interleaved) * sin], dim=2)

    return turn(query, query_weight), turn(key, key_weight)


def _rotary_sdpa(query, key, value, *args, **options):
    query, key = _rotary(query, key, *args, **options)
    return F.scaled_dot_product_attention(query, key, value)


EAGER: dict[str, Function] = {
    "linear": _linear,
    "layer_norm": _layer_norm,
    "add_layer_norm": _add_layer_norm,
    "linear_add_norm": _linear_add_norm(F.linear, _eager_add_layer_norm),
    "glu": _glu,
    "qk_norm_rope": _rotary,
    "rotary_attention": _rotary_sdpa,
}


def contestants(case: Problem) -> tuple[Function, Function, dict[str, Peer]]:
    """(ours, the float64 reference, the peers by name)."""
    bind = functools.partial(functools.partial, **case.options)
    found: dict[str, Peer] = {}
    if isinstance(case, LinearAddNorm):
        ours, exact = _in_a_block, _linear_add_norm(reference.linear, reference.add_layer_norm)
        found["vendor_add_layer_norm"] = Peer(lambda: _linear_add_norm(F.linear, functional.add_layer_norm))
    else:
        ours, exact = bind(getattr(functional, case.op)), bind(getattr(reference, case.op))
    if isinstance(case, Attention):
        found["eager"] = Peer(lambda: exact)
        found |= {name: Peer(functools.partial(bind, functools.partial(_sdpa, b))) for name, b in BACKENDS.items()}
        if case.rel:
            for name in ("bias_folded", "bias_folded_flash"):
                found[name] = Peer(functools.partial(bind, functools.partial(_by_way, ways.WAYS[name])))
                found[f"{name}_compile"] = Peer(found[name].build, "default")
        if case.mask is None:
            found["xformers"] = Peer(lambda: bind(_xformers(case)))
            if case.rel is None:
                found["flash_attn"] = Peer(lambda: bind(_flash_attn(case)))
        found["flex"] = Peer(lambda: bind(_flex(case)), "default")
        compiles = found["sdpa"].build  # what a model that is compiled calls
    elif isinstance(case, ImageAttention):
        found["eager"] = Peer(lambda: exact)
        found |= {name: Peer(lambda build=build: bind(build())) for name, build in image_peers.peers(case).items()}
        for name in ("bias_folded", "bias_folded_flash"):
            found[f"{name}_compile"] = Peer(found[name].build, "default")
        found["flex"] = Peer(lambda: bind(functools.partial(image_peers.by_way, ways.flex)), "default")
        compiles = found["sdpa_dense_bias"].build
    else:
        found["eager"] = Peer(lambda: bind(EAGER[case.op]))
        compiles = found["eager"].build
    found["compile"] = Peer(compiles, "default")
    found["compile_max_autotune"] = Peer(compiles, "max-autotune-no-cudagraphs")
    return ours, exact, found
