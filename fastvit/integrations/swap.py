"""Serves a block by giving the module another class: a subclass of its own, of the same name, with another forward.

The module stays the same object with the same parameters, children, hooks and ``isinstance``; giving its class back is
all there is to undo. Pickling and ``copy.deepcopy`` go by the original class and serve the copy again.
"""

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import dispatch
from ..ops._state import exporting
from . import decoder, multihead, quantized, two_way
from .block import compute, compute_decoder, compute_multihead, compute_two_way
from .call import nested_again, read_call
from .dispatched import exchange_class
from .multihead import MultiheadLayout
from .operators import choose_backend
from .parts import AnyLayout, Known, Layout
from .recheck import hooked, why_not_now, why_not_parts

ATTRIBUTE = "_fastvit_serving"
TRACED = "_fastvit_traced"
PAUSED = "_fastvit_paused"


@dataclass
class Serving:
    """What a served block, or an attention that is served by itself, carries.

    ``fallback``: why it last ran its own forward, None after a fused call. ``weights``: those of its parts that are in
    8 bits; ``note``: what the report says of its precision. ``known``: its descendants, looked up once; no copy takes them along.
    ``elements``: in what compilers read, of a block that its compiler may be left to, those of its parameters.
    """

    layout: AnyLayout
    backend: str
    next_norm: nn.LayerNorm | None = None
    fallback: str | None = None
    weights: quantized.Weights | None = None
    note: str = ""
    elements: int = 0
    known: Known | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "known": None}

    def look_up(self, block: nn.Module) -> Known | None:
        """The descendants of the block that carries this."""
        known = self.known
        if known is None or not known.holds(block):
            self.known = known = Known(block, self.layout.kinds)
        return known

    def describe(self) -> str:
        return self.layout.describe() + self.note


class Swapped(nn.Module):
    """Mixed in before a module's own class by ``swapped_class``; copies and pickles go by that and are swapped again."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        mixins, cls = [], type(self)
        while "_fastvit_original" in cls.__dict__:
            mixins.append(cls.__bases__[0])
            cls = original_class(cls)
        arguments = tuple(cls if value is type(self) else value for value in arguments)
        return (_rebuild, (function, arguments, tuple(reversed(mixins))), *rest)


def _rebuild(function: Any, arguments: tuple, mixins: tuple) -> nn.Module:
    module = function(*arguments)
    for mixin in mixins:
        module.__class__ = swapped_class(type(module), mixin)
    return module


_swapped_classes: dict[tuple[type, Any], type] = {}


def swapped_class(cls: Any, mixin: Any) -> type:
    """The subclass of ``cls``, of the same name, whose forward is ``mixin.forward_of(cls, cls.forward)``; always the same one."""
    if (cls, mixin) not in _swapped_classes:
        forward = functools.wraps(cls.forward)(mixin.forward_of(cls, cls.forward))
        members = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "forward": forward}
        swapped = type(cls)(cls.__name__, (mixin, cls), {**members, "_fastvit_original": cls})
        _swapped_classes[cls, mixin] = swapped
    return _swapped_classes[cls, mixin]


class ServedBlock(Swapped):
    """Mixed in before a block's own class: runs the fused path where it can and the class's own forward otherwise."""

    _fastvit_traced = ""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _tell_compilers(self)

    @staticmethod
    def forward_of(cls: Any, own_forward: Any) -> Any:
        def forward(self, *args, **kwargs):
            compiling = torch.compiler.is_compiling()
            serving: Any = _as_traced(self._fastvit_traced) if compiling else None
            if serving is None:
                serving = self.__dict__.get(ATTRIBUTE)
            if cls.forward is not own_forward:
                call: Any = "its class was given another forward"
            elif serving is None:
                call = "it carries no description of its parts"
            elif compiling and serving.elements and _is_compilers(serving, args, kwargs):
                call = "a compiler serves it better"
            else:
                known = None if compiling else serving.look_up(self)
                call = _read(self, serving, args, kwargs, known)
            if isinstance(call, str):
                _note(serving, call)
                return cls.forward(self, *args, **kwargs)
            _note(serving, None)
            if isinstance(call, multihead.MultiheadCall):
                return compute_multihead(self, call, serving.backend)
            if isinstance(call, decoder.DecoderCall):
                return compute_decoder(self, serving.layout, call, serving.backend)
            if isinstance(call, two_way.TwoWayCall):
                return compute_two_way(self, serving.layout, call, serving.backend)
            if serving.weights is not None:
                out = quantized.compute(self, serving.layout, serving.weights, call, serving.backend, known)
            else:
                out = compute(self, serving.layout, call, serving.backend, serving.next_norm, known)
            return out if call.present is None else nested_again(out, call.present)

        return forward


def original_class(cls: type) -> type:
    """The class that ``swapped_class`` was given."""
    return cls.__dict__["_fastvit_original"]


def own_class(cls: type) -> type:
    """The class that a module of ``cls`` came with."""
    while "_fastvit_original" in cls.__dict__:
        cls = original_class(cls)
    return cls


def is_served(module: nn.Module) -> bool:
    return isinstance(module, ServedBlock)


def is_wrapped(module: nn.Module) -> bool:
    """Whether a served block, or a graphed module, was given yet another class since (as ``fully_shard`` does)."""
    return isinstance(module, Swapped) and "_fastvit_original" not in type(module).__dict__


def serve(module: nn.Module, serving: Serving) -> None:
    exchange_class(module, swapped_class(type(module), ServedBlock))
    module.__dict__[ATTRIBUTE] = serving
    _tell_compilers(module)


def release(module: nn.Module) -> None:
    exchange_class(module, original_class(type(module)))
    module.__dict__.pop(ATTRIBUTE, None)
    module.__dict__.pop(TRACED, None)


def pause(module: nn.Module) -> None:
    """Gives a served module its own class until ``resume``."""
    serving = module.__dict__[ATTRIBUTE]
    release(module)
    module.__dict__[PAUSED] = serving


def resume(module: nn.Module) -> None:
    """Serves a paused module again, unless it was restored, or served anew, meanwhile."""
    serving = module.__dict__.pop(PAUSED, None)
    if serving is not None and not is_served(module):
        serve(module, serving)


def link(module: nn.Module, following: nn.Module) -> None:
    """Lets a served block end with the first norm of the served block that follows it (see ``handoff``)."""
    layouts = [m.__dict__[ATTRIBUTE].layout for m in (module, following) if is_served(m) and not _rounds_first(m)]
    if len(layouts) == 2 and all(isinstance(layout, Layout) and not layout.post_norm for layout in layouts):
        module.__dict__[ATTRIBUTE].next_norm = following.get_submodule(layouts[1].norms.before)


def _rounds_first(module: nn.Module) -> bool:
    """Whether a served block rounds its first norm to 8 bits, which the block before it cannot leave for it."""
    weights = module.__dict__[ATTRIBUTE].weights
    return weights is not None and "qkv" in weights.parts


def _read(module: nn.Module, serving: Serving, args: tuple, kwargs: dict, known: Known | None) -> Any:
    """What a served module was called with, or the reason why its fused path does not serve this call."""
    layout = serving.layout
    if isinstance(layout, MultiheadLayout):
        return hooked(module, layout.kinds, known) or multihead.read_call(module, args, kwargs)
    if isinstance(layout, decoder.DecoderLayout):
        return hooked(module, layout.kinds, known) or decoder.read_call(module, layout, args, kwargs)
    if isinstance(layout, two_way.TwoWayLayout):
        return why_not_parts(module, layout, known) or two_way.read_call(module, layout, args, kwargs)
    call = read_call(module, layout, args, kwargs)
    if isinstance(call, str):
        return call
    reason = why_not_now(module, layout, call.attn_mask is not None, known)
    if reason is None and serving.weights is not None:
        reason = quantized.why_not_now(module, layout, serving.weights, call, serving.backend, known)
    return reason or call


def _note(serving: Serving | None, reason: str | None) -> None:
    if serving is not None and not torch.compiler.is_compiling() and serving.fallback != reason:
        serving.fallback = reason


# --- what compilers read --------------------------------------------------------------------------------------------------
#
# A compiler checks at every call all that it read of a module's attributes, but a text in a module only when the module has
# changed. So that is what a block carries for it: the key of what it would read otherwise, which no one changes.

_keys: dict[tuple, str] = {}
_numbers = itertools.count(1)  # of keys, no two alike in any threads
_traced: dict[str, Serving | None] = {"": None}


def _tell_compilers(module: nn.Module) -> None:
    """Keeps what a served module is traced by, and its key in the module; one whose linears are in 8 bits is read itself."""
    serving: Serving | None = module.__dict__.get(ATTRIBUTE)
    module.__dict__.pop(TRACED, None)
    if serving is None or serving.weights is not None:
        return
    layout, backend = serving.layout, serving.backend
    may_be_left = backend == "auto" and isinstance(layout, Layout) and layout.window is None
    elements = sum(parameter.numel() for parameter in module.parameters()) if may_be_left else 0
    key = _keys.setdefault((layout, backend, elements), str(next(_numbers)))
    _traced.setdefault(key, Serving(layout, backend, elements=elements))
    module.__dict__[TRACED] = key


def _as_traced(key: str) -> Serving | None:
    return _traced[key]


_as_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see backend._why_not_gpu


def _is_compilers(serving: Serving, args: tuple, kwargs: dict) -> bool:
    """Whether a compiler makes more of a block's own forward than of our operators: see ``dispatch.block``."""
    layout: Any = serving.layout
    x = args[0] if args else kwargs.get(layout.arguments[0])
    if exporting() or not isinstance(x, Tensor) or x.dim() != 3 or choose_backend(serving.backend, x) != "triton":
        return False
    return dispatch.block(x, serving.elements) == "original"
