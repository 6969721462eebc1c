"""Finds the parts of a block under a library's names, and checks at every call that they are still what was found.

The check at every call is what makes later changes safe: a hook, an adapter or a quantized weight that appears in a block
after ``accelerate`` is seen, and the block runs its own forward.
"""

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import MAX_HEAD_DIM
from . import layouts

GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")
CAPTURE_MODULE = "transformers.utils.output_capturing"
PLAIN_TENSORS = (Tensor, nn.Parameter)


@dataclass(frozen=True)
class Layout:
    """Where a block's parts are. ``kinds``: path → class of every descendant that the fused path stands in for."""

    norms: layouts.Norms
    attention: layouts.Attention
    mlp: layouts.Mlp | None
    residuals: tuple[layouts.Residual, layouts.Residual]
    activation: str | None
    arguments: tuple[str, ...]
    kinds: tuple[tuple[str, type], ...]

    def describe(self) -> str:
        if self.mlp is None:
            return "fused attention + add+LayerNorm, own MLP"
        names = {"gelu": "GELU", "gelu_tanh": "tanh GELU", "quick_gelu": "quick GELU", "relu": "ReLU"}
        return f"fused attention + add+LayerNorm + {names[self.activation or '']} MLP"


def child(module: nn.Module, path: str | None) -> Any:
    """The descendant module at ``path``, or None where there is none. Some fifty look-ups a call: straight to the table."""
    found: Any = module if path else None
    for name in path.split(".") if path else ():
        found = found._modules.get(name)
        if found is None:
            break
    return found


def part(module: nn.Module, path: str | None) -> Any:
    """``child``, an Identity counting as none."""
    found = child(module, path)
    return None if isinstance(found, nn.Identity) else found


# --- at match time ------------------------------------------------------------------------------------------------------


def find_layout(block: nn.Module) -> Layout | str | None:
    """The block's layout, a reason why a block-like module has none, or None for a module that is no such block."""
    norms = next((n for n in layouts.NORMS if child(block, n.before) is not None and child(block, n.after) is not None), None)
    if norms is None or (child(block, "attention") is None and child(block, "attn") is None):
        return None
    attention = next((a for a in layouts.ATTENTIONS if all(child(block, path) is not None for path in (*a.qkv, a.out))), None)
    if attention is None:
        return "its attention has none of the known layouts"
    mlp = next((m for m in layouts.MLPS if all(child(block, p) is not None for p in (m.fc1, m.activation, m.fc2))), None)
    if mlp is None and child(block, layouts.OPAQUE_MLP) is None:
        return "its MLP has none of the known layouts"
    residuals = max(layouts.RESIDUALS, key=lambda pair: sum(child(block, path) is not None for path in (*pair[0], *pair[1])))
    reason = (
        _why_not_norms(block, norms)
        or _why_not_attention(block, attention)
        or (mlp and _why_not_mlp(block, mlp))
        or next(filter(None, (_why_not_residual(block, residual) for residual in residuals)), None)
    )
    if reason:
        return reason
    signature = inspect.signature(type(block).forward)
    arguments = tuple(p.name for p in list(signature.parameters.values())[1:] if p.kind is p.POSITIONAL_OR_KEYWORD)
    if not arguments:
        return "its forward takes no hidden states by name"
    found = _kinds(block, norms, attention, mlp, residuals)
    if isinstance(found, str):
        return found
    activation = _activation(child(block, mlp.activation)) if mlp else None
    return Layout(norms, attention, mlp, residuals, activation, arguments, found)


def _kinds(block, norms, attention, mlp, residuals) -> tuple[tuple[str, type], ...] | str:
    """Every descendant's path and class; a reason where one has no part in the layout. Modules that are called as they
    are (an MLP of another kind, norms inside the attention) are left out: their hooks and changes take effect."""
    parts = {*norms, *attention.qkv, attention.owner, attention.out, *attention.drop, attention.gate}
    parts |= {f"{attention.owner}.{name}" for name in attention.weights_drop}
    called = {attention.query_norm, attention.key_norm, attention.out_norm}
    for residual in residuals:
        parts |= set(residual)
    if mlp is None:
        called.add(layouts.OPAQUE_MLP)
    else:
        parts |= {mlp.fc1, mlp.activation, mlp.fc2, mlp.hidden_drop, *mlp.drop}
        called.add(mlp.hidden_norm)
    parts |= {path.rpartition(".")[0] for path in parts if path}
    kinds = []
    for path, module in block.named_modules():
        if not path or any(path == c or path.startswith(f"{c}.") for c in called if c):
            continue
        # An activation may be built of others (it was recognised as a whole); anything else has a name of its own.
        if path not in parts and not (mlp and path.startswith(f"{mlp.activation}.")):
            return f"unknown child {path!r} ({type(module).__name__})"
        kinds.append((path, type(module)))
    return tuple(kinds)


def _name(module: nn.Module | None) -> str:
    return type(module).__name__


def _package(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _why_not_norms(block: nn.Module, norms: layouts.Norms) -> str | None:
    for path in norms:
        norm = child(block, path)
        timm_norm = isinstance(norm, nn.LayerNorm) and _name(norm) == "LayerNorm" and _package(norm) == "timm"
        if not (type(norm) is nn.LayerNorm or timm_norm):
            return f"{path} is a {_name(norm)}, not a LayerNorm"
        if getattr(norm, "_fast_norm", False):
            return f"{path} is set to timm's fast norm"
        if len(norm.normalized_shape) != 1:
            return f"{path} normalizes over {len(norm.normalized_shape)} dimensions"
    return None


def _why_not_attention(block: nn.Module, attention: layouts.Attention) -> str | None:
    for path in (*attention.qkv, attention.out):
        reason = _why_not_linear(path, child(block, path))
        if reason:
            return reason
    gate = child(block, attention.gate)
    if gate is not None and type(gate) is not nn.Linear:
        return f"{attention.gate} is a {_name(gate)}, not a plain Linear"
    owner = child(block, attention.owner)
    heads = _head_count(owner)
    if heads is None:
        return f"{attention.owner} does not say its number of heads"
    out_features = {child(block, path).out_features for path in attention.qkv}
    parts = 3 if len(attention.qkv) == 1 else 1
    if len(out_features) != 1 or next(iter(out_features)) % (heads * parts):
        return f"query, key and value do not have {heads} heads of one size each"
    head_dim = out_features.pop() // (heads * parts)
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim is {head_dim}; the attention kernels serve up to {MAX_HEAD_DIM}"
    return next(filter(None, (_why_not_dropout(block, path) for path in attention.drop)), None)


def _why_not_mlp(block: nn.Module, mlp: layouts.Mlp) -> str | None:
    for path in (mlp.fc1, mlp.fc2):
        reason = _why_not_linear(path, child(block, path))
        if reason:
            return reason
    if _activation(child(block, mlp.activation)) is None:
        return f"{mlp.activation} is a {_name(child(block, mlp.activation))}, an activation without a fused form"
    return next(filter(None, (_why_not_dropout(block, path) for path in (mlp.hidden_drop, *mlp.drop))), None)


def _why_not_residual(block: nn.Module, residual: layouts.Residual) -> str | None:
    scale = part(block, residual.scale)
    if scale is not None:
        parameters = list(scale.named_parameters())
        if len(parameters) != 1 or parameters[0][0] not in layouts.SCALE_PARAMETERS or parameters[0][1].dim() != 1:
            return f"{residual.scale} is a {_name(scale)}, not a LayerScale of one value a channel"
    drop_path = part(block, residual.drop_path)
    if drop_path is not None and not _name(drop_path).endswith("DropPath"):
        return f"{residual.drop_path} is a {_name(drop_path)}, not a DropPath"
    return _why_not_dropout(block, residual.drop)


def _why_not_dropout(block: nn.Module, path: str | None) -> str | None:
    module = part(block, path)
    return None if module is None or type(module) is nn.Dropout else f"{path} is a {_name(module)}, not a Dropout"


def _why_not_linear(path: str, module: nn.Module | None) -> str | None:
    if type(module) is not nn.Linear:
        return f"{path} is a {_name(module)}, not a plain Linear"
    if type(module.weight) not in PLAIN_TENSORS:
        return f"{path}.weight is a {type(module.weight).__name__}, not a plain Parameter"
    return None


def _activation(module: nn.Module | None) -> str | None:
    if module is None or _package(module) not in layouts.ACTIVATION_PACKAGES:
        return None
    if type(module) is nn.GELU:
        return _gelu(module)
    return layouts.ACTIVATIONS.get(_name(module))


def _gelu(module: Any) -> str:
    return "gelu_tanh" if module.approximate == "tanh" else "gelu"


def _head_count(owner: nn.Module | None) -> int | None:
    counts = (getattr(owner, name, None) for name in layouts.HEAD_COUNTS)
    return next((count for count in counts if isinstance(count, int)), None)


# --- at every call ------------------------------------------------------------------------------------------------------


def why_not_now(block: nn.Module, layout: Layout, masked: bool) -> str | None:
    """Why a block that has a layout must run its own forward this time, or None; ``masked``: the call has a mask."""
    for name in GLOBAL_HOOKS:
        if getattr(torch.nn.modules.module, name):
            return "a hook is registered for all modules"
    for path, kind in layout.kinds:
        module = child(block, path)
        found: Any = type(module)
        if found is not kind:
            return f"{path} is now a {found.__name__} (it was a {kind.__name__})"
        if "forward" in module.__dict__:
            return f"{path} has a forward of its own (set on the instance, as accelerate's hooks do)"
        if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"{path} has hooks"
        if module._forward_hooks and not _only_idle_captures(module):
            return f"{path} has forward hooks"
        if kind is nn.GELU and _gelu(module) != layout.activation:  # of the other kinds, each class has one meaning
            return f"{path} now computes something else than {layout.activation}"
        weight = module._parameters.get("weight") if kind is nn.Linear else None
        if weight is not None and type(weight) not in PLAIN_TENSORS and not torch.compiler.is_exporting():
            return f"{path}.weight is now a {type(weight).__name__}, not a plain Parameter"
    owner = child(block, layout.attention.owner)
    implementation = getattr(getattr(owner, "config", None), "_attn_implementation", None)
    flash = isinstance(implementation, str) and implementation.startswith("flash_attention") and not masked
    if implementation not in (None, "sdpa", "eager") and not flash:
        return f"the attention implementation {implementation!r} was asked for"
    if getattr(owner, "is_causal", False):
        return f"{layout.attention.owner} is set to causal attention"
    if drops_attention_weights(block, layout):
        return "dropout of the attention weights is active"
    return None


def drops_attention_weights(block: nn.Module, layout: Layout) -> bool:
    """Whether the block now drops attention weights, which the fused attention does not."""
    owner = child(block, layout.attention.owner)
    for name in layout.attention.weights_drop:
        dropout = getattr(owner, name, 0.0)
        rate, training = (dropout.p, dropout.training) if isinstance(dropout, nn.Module) else (dropout, owner.training)
        if rate and training:
            return True
    return False


def _only_idle_captures(module: Any) -> bool:
    """Whether all forward hooks are those by which transformers collects attentions, and none is collected now."""
    if any(hook.__module__ != CAPTURE_MODULE for hook in module._forward_hooks.values()):
        return False
    collected = sys.modules[CAPTURE_MODULE]._active_collector.get()
    return collected is None or all("hidden_states" in key for key in collected)
