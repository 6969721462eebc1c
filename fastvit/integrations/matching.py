"""Finds the parts of a block under a library's names, or says why they are none that the fused operators could compute with."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import nn as own_modules
from .._checks import MAX_HEAD_DIM
from . import decoder, grid, layouts, multihead, two_way
from .multihead import PLAIN_TENSORS
from .parts import AnyLayout, Layout, child, part

PLAIN_LINEARS = (nn.Linear, own_modules.Linear)


def find_layout(block: nn.Module, own_blocks: bool = False) -> AnyLayout | str | None:
    """The layout of a block, of ``torch.nn.MultiheadAttention`` or of a part of a mask decoder; a reason why a module like these
    has none; or None for a module that is none of these.

    ``own_blocks``: fastvit's encoder blocks, which are fused already, have a layout too (for another precision).
    """
    if isinstance(block, nn.MultiheadAttention):
        return multihead.find_layout(block)
    if decoder.looks_like(block) and _package(block) != "fastvit":
        return decoder.find_layout(block)
    if two_way.looks_like(block) and _package(block) != "fastvit":
        return _find_two_way(block)
    norms = next((n for n in layouts.NORMS if child(block, n.before) is not None and child(block, n.after) is not None), None)
    if norms is None and all(child(block, f"{path}.norm") is not None for path in ("attn", layouts.OPAQUE_MLP)):
        return "its norms lie inside its attention and its MLP"  # TinyViT, MobileSAM's encoder
    if norms is None or all(child(block, name) is None for name in layouts.ATTENTION_NAMES):
        return None
    if _package(block) == "fastvit" and not (own_blocks and _name(block) == "EncoderBlock"):
        return "it is fastvit's own block, fused already"
    attention = _first(layouts.ATTENTIONS, lambda a: all(child(block, path) is not None for path in (*a.qkv, a.out)))
    if attention is None:
        return "its attention has none of the known layouts"
    own: dict[str, str] = {}
    reason = _why_not_norms(block, norms) or _why_not_attention(block, attention, own)
    if reason:
        return reason
    mlp, activation, gating = _find_mlp(block, own)
    if mlp is None and child(block, layouts.OPAQUE_MLP) is None:
        return activation or "its MLP has none of the known layouts"
    entry = layouts.OWN_RESIDUALS
    if _package(block) != "fastvit":
        entry = next(r for r in layouts.RESIDUALS if r.mark is None or hasattr(block, r.mark))
    reason = _why_not_residual(block, entry.attention) or _why_not_residual(block, entry.mlp)
    if reason:
        return reason
    arguments = _arguments(block)
    if not arguments:
        return "its forward takes no hidden states by name"
    window = grid.window_of(block)
    if window is not None and len(attention.qkv) != 1:
        return f"it has a {layouts.WINDOW} and no packed projection of queries, keys and values"
    head_norm = _head_norm(block, attention, own, may_fuse=window is None)
    residuals = (entry.attention, entry.mlp)
    called = {*own, attention.out_norm, mlp.hidden_norm if mlp else None} - {None}
    kinds = _kinds(block, norms, attention, mlp, residuals, called)
    if isinstance(kinds, str):
        return kinds
    return Layout(
        norms,
        attention,
        mlp,
        residuals,
        arguments,
        kinds,
        activation=activation if mlp else None,
        gating=gating,
        post_norm=getattr(block, layouts.NORM_FIRST, True) is False,
        multihead=not attention.qkv,
        head_norm=head_norm,
        head_dim=_head_dim(block, attention),
        own=tuple(own.items()),
        window=window,
        relative=window is not None and grid.tables(child(block, attention.owner))[0] is not None,
    )


def _find_two_way(block: nn.Module) -> two_way.TwoWayLayout | str:
    own: dict[str, str] = {}
    mlp, activation, gating = _find_mlp(block, own)
    if gating is not None:
        return "its MLP is gated"
    return two_way.find_layout(block, mlp, activation if mlp else None, own, _arguments(block))


def _arguments(module: nn.Module) -> tuple[str, ...]:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _first(entries: Any, fits: Any) -> Any:
    return next((entry for entry in entries if fits(entry)), None)


def _kinds(block, norms, attention, mlp, residuals, called: set[str]) -> tuple[tuple[str, type], ...] | str:
    """Every descendant's path and class; a reason where one has no part in the layout. Modules that are called as they
    are (adapters, an MLP of another kind, norms inside the attention) are left out: their hooks and changes take effect."""
    parts = {*norms, *attention.qkv, attention.owner, attention.out, *attention.drop, attention.gate}
    parts |= {attention.query_norm, attention.key_norm}
    parts |= {f"{attention.owner}.{name}" for name in layouts.WEIGHTS_DROPS}
    for residual in residuals:
        parts |= set(residual)
    if mlp is not None:
        parts |= {mlp.fc1, mlp.activation, mlp.fc2, mlp.hidden_drop, *mlp.drop, mlp.gate}
    parts |= {path.rpartition(".")[0] for path in parts if path}
    kinds = []
    for path, module in block.named_modules():
        if not path or any(path == c or path.startswith(f"{c}.") for c in called):
            continue
        # An activation may be built of others (it was recognised as a whole); anything else has a name of its own.
        if path not in parts and not (mlp and mlp.activation and path.startswith(f"{mlp.activation}.")):
            return f"unknown child {path!r} ({type(module).__name__})"
        kinds.append((path, type(module)))
    return tuple(kinds)


def _name(module: Any) -> str:
    return type(module).__name__


def _package(module: Any) -> str:
    return type(module).__module__.partition(".")[0]


def _plain_norm(norm: Any, names: tuple[type, ...] = (nn.LayerNorm,), timm_name: str = "LayerNorm") -> bool:
    timms = _name(norm) == timm_name and _package(norm) == "timm"
    ours = type(norm) is own_modules.LayerNorm and norm.statistics == "token" and nn.LayerNorm in names
    return (type(norm) in names or timms or ours) and not getattr(norm, "_fast_norm", False) and len(norm.normalized_shape) == 1


def _why_not_norms(block: nn.Module, norms: layouts.Norms) -> str | None:
    for path in norms:
        norm = child(block, path)
        if _plain_norm(norm):
            continue
        if getattr(norm, "_fast_norm", False):
            return f"{path} is set to timm's fast norm"
        if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) != 1:
            return f"{path} normalizes over {len(norm.normalized_shape)} dimensions"
        return f"{path} is a {_name(norm)}, not a LayerNorm"
    return None


def _why_not_attention(block: nn.Module, attention: layouts.Attention, own: dict[str, str]) -> str | None:
    owner = child(block, attention.owner)
    if not attention.qkv:
        return multihead.why_not(owner, f"{attention.owner} ")
    gate = child(block, attention.gate)
    if gate is not None and type(gate) is not nn.Linear:
        return f"{attention.gate} is a {_name(gate)}, not a plain Linear"
    for path in (*attention.qkv, attention.out):
        _call_if_odd(path, child(block, path), own)
    heads = _head_count(owner)
    if heads is None:
        return f"{attention.owner} does not say its number of heads"
    key_heads = getattr(owner, layouts.KEY_HEAD_COUNT, heads)
    counts = (heads, key_heads, key_heads) if len(attention.qkv) == 3 else (3 * heads,)
    features = [getattr(child(block, path), "out_features", None) for path in attention.qkv]
    known = [(total, count) for total, count in zip(features, counts, strict=True) if total is not None]
    if any(total % count for total, count in known) or len({total // count for total, count in known}) > 1:
        return f"query, key and value do not have {heads} heads of one size each"
    if known and known[0][0] // known[0][1] > MAX_HEAD_DIM:
        return f"head_dim is {known[0][0] // known[0][1]}; the attention kernels serve up to {MAX_HEAD_DIM}"
    return _first((_why_not_dropout(block, path) for path in attention.drop), bool)


def _head_dim(block: nn.Module, attention: layouts.Attention) -> int | None:
    owner = child(block, attention.owner)
    if not attention.qkv:
        return owner.embed_dim // owner.num_heads
    total = getattr(child(block, attention.qkv[0]), "out_features", None)
    heads = _head_count(owner) or 1
    return None if total is None else total // (heads if len(attention.qkv) == 3 else 3 * heads)


def _head_norm(block: nn.Module, attention: layouts.Attention, own: dict[str, str], may_fuse: bool = True) -> str | None:
    """The kind of norm that queries and keys have, where the fused operator computes it; others are noted in ``own``."""
    norms = [(path, part(block, path)) for path in (attention.query_norm, attention.key_norm)]
    present = [(path, norm) for path, norm in norms if norm is not None]
    for kind, names, timm_name in (("layer", (nn.LayerNorm,), "LayerNorm"), ("rms", (nn.RMSNorm,), "RmsNorm")):
        fused = (
            may_fuse
            and len(present) == 2
            and all(_plain_norm(norm, names, timm_name) and norm.eps is not None for _, norm in present)
        )
        if fused and present[0][1].eps == present[1][1].eps:
            return kind
    own.update({path: f"is called as the {_name(norm)} it is" for path, norm in present if path})
    return None


def _find_mlp(block: nn.Module, own: dict[str, str]) -> tuple[layouts.Mlp | None, str | None, str | None]:
    """(where the MLP's parts are, its activation, its gating); or None, and why, where it has no fused form."""
    mlp = _first(layouts.MLPS, lambda m: all(child(block, path) is not None for path in (m.fc1, m.fc2)) and _has(block, m))
    if mlp is None:
        own[layouts.OPAQUE_MLP] = "has none of the known layouts"
        return None, None, None
    fc1, fc2 = child(block, mlp.fc1), child(block, mlp.fc2)
    gating = "beside" if child(block, mlp.gate) is not None else None
    if gating is None and getattr(fc1, "out_features", 0) == 2 * getattr(fc2, "in_features", 0):
        owner = child(block, mlp.fc1.rpartition(".")[0])
        gating = "last" if getattr(owner, layouts.GATE_LAST, False) else "first"
    activation = activation_of(block, mlp, bool(gating))
    reason = _first((_why_not_dropout(block, path) for path in (mlp.hidden_drop, *mlp.drop)), bool)
    if activation is None:
        found: Any = child(block, mlp.activation) or getattr(block, mlp.activation or "", None)
        kind = _name(found) if isinstance(found, nn.Module) else getattr(found, "__name__", _name(found))
        reason = f"{mlp.activation} is a {kind}, an activation without a fused form"
    if reason is not None:
        own[layouts.OPAQUE_MLP] = f"is called as it is ({reason})"
        return None, reason, None
    for path in (mlp.fc1, mlp.fc2, mlp.gate):
        _call_if_odd(path, child(block, path), own)
    return mlp, activation, gating


def _has(block: nn.Module, mlp: layouts.Mlp) -> bool:
    """Whether the activation is where this entry has it: a child, or a function or (in fastvit's MLPs) a name as an attribute."""
    return mlp.activation is None or child(block, mlp.activation) is not None or _unchilded(block, mlp.activation) is not None


def _unchilded(block: nn.Module, path: str) -> Any:
    """A function that the block keeps as an attribute, or the name that an MLP of fastvit's has of its activation."""
    owner, _, name = path.rpartition(".")
    found: Any = getattr(child(block, owner) if owner else block, name, None)
    own = isinstance(found, str) and _package(child(block, owner)) == "fastvit"
    return found if callable(found) or own else None


def activation_of(block: nn.Module, mlp: layouts.Mlp, gated: bool) -> str | None:
    """The activation's name, None where it has no fused form."""
    if mlp.activation is None:
        return "silu" if gated else None
    module = child(block, mlp.activation)
    if module is None:
        found = _unchilded(block, mlp.activation)
        return found if isinstance(found, str) else {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}.get(found)
    if _package(module) not in layouts.ACTIVATION_PACKAGES:
        return None
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return (layouts.GATE_ACTIVATIONS if gated else layouts.ACTIVATIONS).get(_name(module))


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


def _call_if_odd(path: str | None, module: Any, own: dict[str, str]) -> None:
    """Notes a linear that is no plain one (an adapter, a quantized one): it is called as it is."""
    if path is None or module is None:
        return
    if type(module) not in PLAIN_LINEARS:
        kind = _name(module) if _name(module) != "Linear" else f"Linear of {_package(module)}'s own"
        own[path] = f"is called as it is (a {kind}, not a plain Linear)"
    elif type(module.weight) not in PLAIN_TENSORS:
        own[path] = f"is called as it is (its weight is a {_name(module.weight)}, not a plain Parameter)"


def _head_count(owner: Any) -> int | None:
    counts = (getattr(owner, name, None) for name in layouts.HEAD_COUNTS)
    return next((count for count in counts if isinstance(count, int)), None)
