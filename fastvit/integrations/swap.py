"""Serves a block by giving the module another class: a subclass of its own, of the same name, with another forward.

The module stays the same object with the same parameters, children, hooks and ``isinstance``; giving its class back is
all there is to undo. Pickling and ``copy.deepcopy`` go by the original class and serve the copy again.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import layouts
from .block import compute
from .parts import Layout, why_not_now

ATTRIBUTE = "_fastvit_serving"


@dataclass
class Serving:
    """What a served block carries. ``fallback``: why it last ran its own forward, None after a fused call."""

    layout: Layout
    backend: str
    next_norm: nn.LayerNorm | None = None
    fallback: str | None = None


class ServedBlock(nn.Module):
    """Mixed in before a block's own class: runs the fused path where it can and the class's own forward otherwise."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        arguments = tuple(original_class(type(self)) if value is type(self) else value for value in arguments)
        return (_rebuild, (function, arguments), *rest)


def _rebuild(function: Any, arguments: tuple) -> nn.Module:
    module = function(*arguments)
    module.__class__ = served_class(type(module))
    return module


_served_classes: dict[type, type] = {}


def served_class(cls: type) -> type:
    """The subclass of ``cls`` that serves its instances; always the same one."""
    if cls not in _served_classes:
        _served_classes[cls] = _derive(cls)
    return _served_classes[cls]


def _derive(cls: Any) -> type:
    own_forward = cls.forward

    @functools.wraps(own_forward)
    def forward(self, *args, **kwargs):
        serving = self.__dict__.get(ATTRIBUTE)
        if cls.forward is not own_forward:
            call: Any = "its class was given another forward"
        else:
            call = _why_own_forward(self, serving, args, kwargs)
        if isinstance(call, str):
            _note(serving, call)
            return cls.forward(self, *args, **kwargs)
        _note(serving, None)
        assert serving is not None
        x, attn_mask, is_causal = call
        return compute(self, serving.layout, x, serving.backend, attn_mask, is_causal, serving.next_norm)

    members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "forward": forward}
    return type(cls)(cls.__name__, (ServedBlock, cls), {**members, "_fastvit_original": cls})


def original_class(cls: type) -> type:
    return cls.__dict__["_fastvit_original"]


def is_served(module: nn.Module) -> bool:
    return isinstance(module, ServedBlock)


def is_wrapped(module: nn.Module) -> bool:
    """Whether a served block was given yet another class since (as ``fully_shard`` does)."""
    return is_served(module) and "_fastvit_original" not in type(module).__dict__


def serve(module: nn.Module, serving: Serving) -> None:
    module.__class__ = served_class(type(module))
    module.__dict__[ATTRIBUTE] = serving


def release(module: nn.Module) -> None:
    module.__class__ = original_class(type(module))
    module.__dict__.pop(ATTRIBUTE, None)


def link(module: nn.Module, following: nn.Module) -> None:
    """Lets a served block end with the first norm of the served block that follows it (see ``handoff``)."""
    if is_served(module) and is_served(following):
        norm: Any = following.get_submodule(following.__dict__[ATTRIBUTE].layout.norms.before)
        module.__dict__[ATTRIBUTE].next_norm = norm


def _note(serving: Serving | None, reason: str | None) -> None:
    if serving is not None and not torch.compiler.is_compiling() and serving.fallback != reason:
        serving.fallback = reason


def _why_own_forward(
    block: nn.Module, serving: Serving | None, args: tuple, kwargs: dict
) -> str | tuple[Tensor, Tensor | None, bool]:
    """(hidden states, mask, is_causal) of a call that the fused path serves, or the reason why it does not."""
    if serving is None:
        return "it carries no description of its parts"
    names = serving.layout.arguments
    if len(args) > len(names):
        return f"it was called with {len(args)} positional arguments"
    values = dict(zip(names, args, strict=False))
    values.update(kwargs)
    x = values.pop(names[0], None)
    if not isinstance(x, Tensor) or x.dim() != 3:
        return "the hidden states are not one tensor of shape (batch, tokens, channels)"
    attn_mask, is_causal = None, False
    for name, value in values.items():
        if name in layouts.MASKS:
            attn_mask = value
        elif name == layouts.CAUSAL:
            is_causal = bool(value)
        elif value is not None and value is not False and name not in layouts.HARMLESS:
            return f"it was called with {name}"
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor) or is_causal:
            return "it was called with a mask of an unknown kind"
        rank = attn_mask.dim()
        if rank not in (2, 4) or (attn_mask.dtype != torch.bool and not attn_mask.is_floating_point()):
            return f"it was called with a {attn_mask.dtype} mask of rank {rank}"
    return why_not_now(block, serving.layout, attn_mask is not None) or (x, attn_mask, is_causal)
