"""Where the parts of a block are and how they are put together; looks them up by path, fast enough for every call."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import decoder, layouts, multihead, two_way
from .multihead import PLAIN_TENSORS

ACTIVATION_NAMES = {
    "gelu": "GELU",
    "gelu_tanh": "tanh GELU",
    "quick_gelu": "quick GELU",
    "relu": "ReLU",
    "silu": "SiLU",
    "sigmoid": "sigmoid",
}
GATED_NAMES = {"silu": "SwiGLU", "gelu": "GEGLU", "relu": "ReGLU"}
Named = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layout:
    """Where a block's parts are, and how they are put together.

    ``post_norm``: normalizes after the sums. ``gating``: None, or where a gated MLP's gate is: "beside" fc1 in a linear of its
    own, or the "first" or "last" half of fc1. ``head_norm``: "layer" or "rms" where queries and keys have a norm that the
    fused operator computes. ``head_dim``: where it is known. ``kinds``: path → class of every descendant that the fused path
    stands in for. ``own``: path → why that descendant is called as the module it is. ``window``: where the hidden states are
    images, tokens a side of the attention's windows, 0 for the whole image; ``relative``: with tables of relative positions.
    ``called``: the paths of ``own``; ``plain``: whether, beside its dropouts, it has nothing that ``ops.block`` does not know.
    """

    norms: layouts.Norms
    attention: layouts.Attention
    mlp: layouts.Mlp | None
    residuals: tuple[layouts.Residual, layouts.Residual]
    arguments: tuple[str, ...]
    kinds: tuple[tuple[str, type], ...]
    activation: str | None = None
    gating: str | None = None
    post_norm: bool = False
    multihead: bool = False
    head_norm: str | None = None
    head_dim: int | None = None
    own: Named = ()
    window: int | None = None
    relative: bool = False

    called: tuple[str, ...] = field(init=False)
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "called", tuple(path for path, _ in self.own))
        odd = self.post_norm or self.multihead or self.own or self.gating or self.head_norm
        object.__setattr__(self, "plain", not odd and self.mlp is not None)

    @property
    def rotary(self) -> bool:
        return layouts.COS_SIN in self.arguments or layouts.SIN_COS in self.arguments

    def describe(self) -> str:
        features = (("relative positions", self.relative), ("q/k norm", self.head_norm), ("rotary", self.rotary))
        extras = [name for name, has in features if has]
        where = "" if self.window is None else f" in windows of {self.window}" if self.window else " on the image"
        attention = " + ".join([f"fused attention{where}", *extras, "LayerNorm" if self.post_norm else "add+LayerNorm"])
        if self.mlp is None:
            return f"{attention}, own MLP{self._own_parts()}"
        activation = ACTIVATION_NAMES[self.activation or ""]
        name = GATED_NAMES.get(self.activation or "", f"{activation}-gated") if self.gating else activation
        return f"{attention} + {name} MLP{self._own_parts()}"

    def _own_parts(self) -> str:
        return "".join(f"; {path} {reason}" for path, reason in self.own)


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


Children = dict[str | None, Any]


class Parts:
    """A block and its descendants by path; ``children``: those that were looked up before."""

    def __init__(self, block: nn.Module, children: Children | None = None):
        self.block = block
        self.children: Children = {} if children is None else children

    def child(self, path: str | None) -> Any:
        """``child`` of the block."""
        if path not in self.children:
            self.children[path] = child(self.block, path)
        return self.children[path]

    def part(self, path: str | None) -> Any:
        """``part`` of the block."""
        found = self.child(path)
        return None if isinstance(found, nn.Identity) else found


class Known:
    """A block's descendants as they were looked up, good for as long as every module in it has the children it had.

    ``stood_in_for``: kind, module and attributes of those that ``hooked`` looks at. Holds no reference to the block itself,
    which may hold this.
    """

    def __init__(self, block: nn.Module, kinds: tuple[tuple[str, type], ...]):
        self.children: Children = {path: child(block, path) for path, _ in kinds}
        found = [(kind, self.children[path]) for path, kind in kinds if self.children[path] is not None]
        self.stood_in_for = [(kind, module, module.__dict__) for kind, module in found]
        self.complete = len(found) == len(kinds)
        self.tables = [(m if m is not block else None, m._modules, _items(m)) for m in block.modules() if m._modules]

    def holds(self, block: nn.Module) -> bool:
        for module, table, items in self.tables:
            if (block if module is None else module)._modules is not table or tuple(table.items()) != items:
                return False
        return True

    def plainly_the_same(self) -> bool:
        """Whether ``hooked`` has nothing to look at more closely."""
        hooks = torch.nn.modules.module
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
            return False
        if hooks._global_backward_hooks or hooks._global_backward_pre_hooks or not self.complete:
            return False
        for kind, module, own in self.stood_in_for:
            if module.__class__ is not kind or "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return False
            if own["_backward_hooks"] or own["_backward_pre_hooks"]:
                return False
            if kind is nn.Linear and type(own["_parameters"].get("weight")) not in PLAIN_TENSORS:
                return False
        return True


def _items(module: nn.Module) -> tuple:
    return tuple(module._modules.items())


def parameter(module: Any, name: str) -> Any:
    """``getattr`` for a parameter, past a module's slower own; replicas of ``DataParallel`` have plain attributes instead."""
    table = module._parameters
    return table[name] if name in table else getattr(module, name)


def attribute(module: Any, name: str, default: Any = None) -> Any:
    """``getattr`` with a default, which a module's own reaches only by raising an error."""
    own = module.__dict__
    if name in own:
        return own[name]
    if _may_have(type(module), name):
        return getattr(module, name, default)
    for table in (module._parameters, module._buffers, module._modules):
        if name in table:
            return table[name]
    return default


def _may_have(cls: Any, name: str) -> bool:
    """Whether a class has an attribute, or finds attributes in its own way. A constant to compilers: they look for one that is
    not there at every call, which takes Python an exception."""
    return hasattr(cls, name) or cls.__getattr__ is not nn.Module.__getattr__


_may_have._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see backend._why_not_gpu


AnyLayout = Layout | multihead.MultiheadLayout | decoder.DecoderLayout | two_way.TwoWayLayout


def is_no_encoder_block(module: nn.Module) -> bool:
    """Whether a module is of those served that are no encoder block: an attention by itself, a part of a mask decoder."""
    return isinstance(module, nn.MultiheadAttention) or decoder.looks_like(module) or two_way.looks_like(module)
