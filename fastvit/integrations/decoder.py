"""The attention of Segment Anything's mask decoder, served as a module of its own (Kirillov et al. 2023, appendix A).

Queries, keys and values are projected to fewer channels, attend there, and are projected back. segment_anything gives it
tokens (B, N, C); transformers (B, P, N, C), P prompts an image, and wants the attention weights beside the output: where the
implementation has none of them (sdpa), neither has the fused attention; where it has them, the module runs its own forward.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import MAX_HEAD_DIM
from . import layouts
from .multihead import PLAIN_TENSORS

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
OUT = "out_proj"
INNER_WIDTH = "internal_dim"
DROPS = ("dropout_p", "dropout", "attention_dropout")  # of the weights, in training
ARGUMENTS = (("q", "k", "v"), ("query", "key", "value"))  # the second is transformers'


@dataclass(frozen=True)
class DecoderLayout:
    """``arguments``: of the module's forward. ``prompts``: whether it is given (B, P, N, C) and gives (output, weights).
    ``kinds``: as in ``parts.Layout``."""

    arguments: tuple[str, ...]
    prompts: bool
    heads: int
    kinds: tuple[tuple[str, type], ...]
    called: tuple[str, ...] = ()

    def describe(self) -> str:
        return "fused attention"


@dataclass(frozen=True)
class DecoderCall:
    """Tensors (..., N, C), (..., M, C) and (..., M, C) of one or two leading dimensions."""

    query: Tensor
    key: Tensor
    value: Tensor


def looks_like(module: nn.Module) -> bool:
    """Whether a module has the parts of a mask decoder's attention."""
    return hasattr(module, INNER_WIDTH) and module._modules.keys() >= {*PROJECTIONS, OUT}


def find_layout(module: Any) -> DecoderLayout | str:
    """The layout of a module that looks like a mask decoder's attention, or why it is not served."""
    for name, part in module.named_modules():
        if name and name not in (*PROJECTIONS, OUT):
            return f"unknown child {name!r} ({type(part).__name__})"
        if name and type(part) is not nn.Linear:
            return f"{name} is a {type(part).__name__}, not a plain Linear"
        if name and type(part.weight) not in PLAIN_TENSORS:
            return f"{name}.weight is a {type(part.weight).__name__}, not a plain Parameter"
    heads = next((getattr(module, name) for name in layouts.HEAD_COUNTS if hasattr(module, name)), None)
    widths = {getattr(module, name).out_features for name in PROJECTIONS}
    if not isinstance(heads, int) or len(widths) != 1 or min(widths) % heads:
        return "query, key and value do not have heads of one size each"
    if min(widths) // heads > MAX_HEAD_DIM:
        return f"head_dim is {min(widths) // heads}; the attention kernels serve up to {MAX_HEAD_DIM}"
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    arguments = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    if arguments[:3] not in ARGUMENTS:
        return "its forward does not take queries, keys and values by name"
    kinds = tuple((name, type(getattr(module, name))) for name in (*PROJECTIONS, OUT))
    return DecoderLayout(arguments, arguments[:3] == ARGUMENTS[1], heads, kinds)


def read_call(module: Any, layout: DecoderLayout, args: tuple, kwargs: dict) -> DecoderCall | str:
    """What the module was called with, or why the fused path does not serve the call."""
    if len(args) > len(layout.arguments):
        return f"it was called with {len(args)} positional arguments"
    values = {**dict(zip(layout.arguments, args, strict=False)), **kwargs}
    given = [values.pop(name, None) for name in layout.arguments[:3]]
    rank, shape = (4, "(batch, prompts, tokens, channels)") if layout.prompts else (3, "(batch, tokens, channels)")
    if not all(isinstance(t, Tensor) and t.dim() == rank and not t.is_nested for t in given):
        return f"queries, keys and values are not three tensors of shape {shape}"
    query, key, value = given
    batches = {t.shape[:-2].numel() for t in given}
    if len(batches) != 1 or key.shape[-2] != value.shape[-2]:
        return "queries, keys and values are not of one batch and one number of keys"
    for name, other in values.items():
        if other is not None and other is not False and name not in layouts.HARMLESS:
            return f"it was called with {name}"
    return why_not_now(module, weights_wanted=layout.prompts) or DecoderCall(query, key, value)


def why_not_now(module: Any, weights_wanted: bool) -> str | None:
    """Why an attention must run its own forward this time, or None; ``weights_wanted``: if it has them, it returns them."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation == "eager" and weights_wanted:
        return "the attention implementation 'eager' returns the attention weights"
    if implementation not in (None, "sdpa", "eager"):
        return f"the attention implementation {implementation!r} was asked for"
    if getattr(module, "is_causal", False):
        return "it is set to causal attention"
    if module.training and any(getattr(module, name, 0.0) for name in DROPS):
        return "dropout of the attention weights is active"
    return None


def compute(module: Any, layout: DecoderLayout, ops: Any, call: DecoderCall) -> Any:
    """What the module's own forward returns: the output (..., N, C), in transformers beside the weights, None."""
    out = attend(module, layout, ops, call.query, call.key, call.value)
    return (out, None) if layout.prompts else out


def attend(module: Any, layout: DecoderLayout, ops: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The module's output (..., N, C)."""
    shape = query.shape[:-1]
    projected = (_linear(ops, module, name, t) for name, t in zip(PROJECTIONS, (query, key, value), strict=True))
    query, key, value = (t.flatten(0, -3).unflatten(2, (layout.heads, -1)).transpose(1, 2) for t in projected)
    scale = next((s for s in (getattr(module, name, None) for name in layouts.SCALINGS) if isinstance(s, float)), None)
    out = ops.attention(query, key, value, scale=query.shape[-1] ** -0.5 if scale is None else scale)
    return _linear(ops, module, OUT, out.transpose(1, 2).reshape(*shape, -1))


def _linear(ops: Any, module: Any, name: str, x: Tensor) -> Tensor:
    linear = module._modules[name]
    return ops.linear(x, linear.weight, linear.bias)


def probe_inputs(module: Any, layout: DecoderLayout, generator: torch.Generator, tokens: int, keys: int) -> tuple[Tensor, ...]:
    """Random queries, keys and values for a stand-in."""
    batch = (2, 2) if layout.prompts else (2,)
    widths = [getattr(module, name).in_features for name in PROJECTIONS]
    return tuple(torch.randn(*batch, n, w, generator=generator) for n, w in zip((tokens, keys, keys), widths, strict=True))
