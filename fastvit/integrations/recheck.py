"""Checks at every call that a served block's parts are still what was found.

This is what makes later changes safe: a hook, an adapter or a quantized weight that appears in a block after ``accelerate``
is seen, and the block runs its own forward.
"""

import sys
from typing import Any

import torch
from torch import nn

from ..nn import GLOBAL_HOOKS
from ..ops._state import exporting
from . import grid, layouts, matching, two_way
from .dispatched import has_forward_of_its_own, only_aligned_with
from .multihead import PLAIN_TENSORS
from .parts import Known, Layout, Parts, attribute, child, part

CAPTURE_MODULE = "transformers.utils.output_capturing"


def why_not_now(block: nn.Module, layout: Layout, masked: bool, known: Known | None = None) -> str | None:
    """Why a block that has a layout must run its own forward this time, or None; ``masked``: the call has a mask."""
    parts = Parts(block, None if known is None else known.children)
    reason = why_not_parts(block, layout, known)
    if reason is not None:
        return reason
    owner = parts.child(layout.attention.owner)
    config = attribute(owner, "config")
    implementation = None if config is None else getattr(config, "_attn_implementation", None)
    flash = isinstance(implementation, str) and implementation.startswith("flash_attention") and not masked
    if implementation not in (None, "sdpa", "eager") and not flash:
        return f"the attention implementation {implementation!r} was asked for"
    if attribute(owner, "is_causal", False):
        return f"{layout.attention.owner} is set to causal attention"
    if drops_attention_weights(owner):
        return "dropout of the attention weights is active"
    return None if layout.window is None else why_not_in_windows(block, layout)


def why_not_in_windows(block: nn.Module, layout: Layout) -> str | None:
    """Why a block of windows of an image must run its own forward now, or None."""
    owner = layout.attention.owner
    called = tuple(path for path in layout.called if path.startswith(f"{owner}."))
    return grid.why_not_in_windows(block, child(block, owner), part(block, layout.residuals[0].drop_path), called)


def why_not_parts(block: nn.Module, layout: Layout | two_way.TwoWayLayout, known: Known | None = None) -> str | None:
    """Why the descendants that the fused path stands in for are no longer what they were, or None."""
    reason = hooked(block, layout.kinds, known)
    if reason is not None or layout.mlp is None:
        return reason
    same = layout.activation == matching.activation_of(block, layout.mlp, bool(layout.gating))
    return None if same else f"{layout.mlp.activation} now computes something else than {layout.activation}"


def hooked(module: nn.Module, kinds: tuple[tuple[str, type], ...], known: Known | None = None) -> str | None:
    """Why descendants that were of these kinds cannot be stood in for now, or None; ``known``: these descendants."""
    if known is not None and known.plainly_the_same():
        return None
    for name in GLOBAL_HOOKS:
        if getattr(torch.nn.modules.module, name):
            return "a hook is registered for all modules"
    for path, kind in kinds:
        found: Any = child(module, path)
        now: Any = type(found)
        if now is not kind:
            return f"{path} is now a {_among(now, kind)} (it was a {_among(kind, now)})"
        if "forward" in found.__dict__ and has_forward_of_its_own(found) and not only_aligned_with(module, found):
            return f"{path} has a forward of its own (set on the instance, as accelerate's hooks do)"
        if found._forward_pre_hooks or found._backward_hooks or found._backward_pre_hooks:
            return f"{path} has hooks"
        if found._forward_hooks and not _only_idle_captures(found):
            return f"{path} has forward hooks"
        weight = found._parameters.get("weight") if kind is nn.Linear else None
        if weight is not None and type(weight) not in PLAIN_TENSORS and not exporting():
            return f"{path}.weight is now a {type(weight).__name__}, not a plain Parameter"
    return None


def _among(kind: type, other: type) -> str:
    """A class's name, with its module where another has the same name."""
    return f"{kind.__module__}.{kind.__qualname__}" if kind.__name__ == other.__name__ else kind.__name__


def drops_attention_weights(owner: Any) -> bool:
    """Whether the attention now drops weights, which the fused one does not."""
    for name in layouts.WEIGHTS_DROPS:
        dropout = attribute(owner, name, 0.0)
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
