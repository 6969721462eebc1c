"""Whether a module is still what a graph of it was recorded from: looked at before every replay.

Looked at are the class, children, hooks, mode and forward of every module inside, which tensors its parameters and buffers are
and how they lie where, where 8-bit weights were made of them also their version counters; and the numbers and strings among the
attributes of the module itself and of its configs. Values of weights that are changed in place need no look: a replay reads
them. Not seen is any other attribute that Python would read, as the epsilon of a block inside.
"""

import operator
import sys
import types
from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.dispatched import has_forward_of_its_own
from ..integrations.recheck import CAPTURE_MODULE
from ..integrations.swap import ATTRIBUTE as SERVING
from ..integrations.swap import own_class
from ..nn import GLOBAL_HOOKS

_PLAIN = {bool, int, float, str, type(None)}
_tables = operator.itemgetter("_parameters", "_buffers", "_modules")
_attached = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "training")


class Watch:
    """What ``module`` was. Holds no reference to the module itself, which holds this."""

    def __init__(self, module: nn.Module):
        named = list(module.named_modules())[1:]
        self.names = [name for name, _ in named]
        self.modules = [inner for _, inner in named]
        self.own = [inner.__dict__ for inner in self.modules]
        self.own_tables = _tables(module.__dict__)
        tables = [table for own in (module.__dict__, *self.own) for table in _tables(own)]
        self.tables, self.empty = [table for table in tables if table], [table for table in tables if not table]
        self.children = list(chain.from_iterable(map(dict.values, self.tables)))
        self.kinds = list(map(type, self.modules))
        classes: set[Any] = set(map(own_class, {type(module), *self.kinds}))
        self.forwards = [(cls, cls.forward) for cls in classes if isinstance(getattr(cls, "forward", None), types.FunctionType)]
        tensors = [child for child in self.children if isinstance(child, Tensor)]
        self.why_never = _why_never(module, tensors)
        self.tensors = [] if self.why_never else tensors
        self.square = [tensor for tensor in self.tensors if len(set(tensor.shape)) < tensor.dim()]
        self.places = self._places()
        self.rounded = [tensor for inner in module.modules() for tensor in _rounded(inner)]
        self.versions = self._versions()
        self.configs = list({id(config): config for config in map(_config, (module, *self.modules)) if config}.values())
        self.attributes = self._attributes(module)

    def replaced(self, module: nn.Module) -> bool:
        """Whether a child, a class, a tensor or a setting is another one now, or lies elsewhere."""
        return (
            not all(map(operator.is_, _tables(module.__dict__), self.own_tables))  # a shallow copy's
            or any(self.empty)
            or sum(map(len, self.tables)) != len(self.children)
            or not all(map(operator.is_, chain.from_iterable(map(dict.values, self.tables)), self.children))
            or list(map(type, self.modules)) != self.kinds
            or any(cls.forward is not forward for cls, forward in self.forwards)
            or self._places() != self.places
            or self._versions() != self.versions
            or self._attributes(module) != self.attributes
        )

    def _attributes(self, module: nn.Module) -> list[tuple]:
        owners = (module.__dict__, *self.configs)
        return [(name, value) for own in owners for name, value in own.items() if type(value) in _PLAIN]

    def _places(self) -> list[list]:
        """Where the tensors lie, and how: a slice begins at the same address, and a transpose, which fits if it is square."""
        return [
            list(map(Tensor.data_ptr, self.tensors)),
            list(map(Tensor.numel, self.tensors)),
            list(map(Tensor.stride, self.square)),
        ]

    def _versions(self) -> list[int]:
        return [0 if tensor.is_inference() else tensor._version for tensor in self.rounded]

    def why_not_now(self) -> str | None:
        """Why a replay would leave something out that Python does in a call now, or None."""
        if self.why_never is not None:
            return self.why_never
        for name in GLOBAL_HOOKS:
            if getattr(torch.nn.modules.module, name):
                return "a hook is registered for all modules"
        if any(map(operator.contains, self.own, repeat("forward"))):
            for name, module in zip(self.names, self.modules, strict=True):
                if has_forward_of_its_own(module):
                    return f"{name} has a forward of its own (set on the instance, as accelerate's hooks do)"
        for index, (hooks, before, training) in enumerate(map(_attached, self.own)):
            if training:
                return f"{self.names[index]} is in training mode: call model.eval()"
            if before or (hooks and not _idle(hooks.values())):
                return f"{self.names[index]} has hooks"
        return None


def _config(module: nn.Module) -> dict[str, Any] | None:
    """What a config says that a module of transformers goes by at every call."""
    config = module.__dict__.get("config")
    return getattr(config, "__dict__", None)


def _why_never(module: nn.Module, tensors: list[Tensor]) -> str | None:
    for name, inner in module.named_modules():
        where = name or "it"
        if type(inner).__name__ == "OptimizedModule" or inner._compiled_call_impl is not None:
            return f"{where} is compiled by torch.compile, whose mode='reduce-overhead' has graphs of its own"
        if any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(inner).__mro__):
            return f"{where} is sharded by FSDP"
    odd = next((tensor for tensor in tensors if type(tensor) not in (Tensor, nn.Parameter)), None)
    return None if odd is None else f"one of its weights is a {type(odd).__name__}, not a plain Parameter"


def _idle(hooks: Iterable[Any]) -> bool:
    """Whether all of these are the hooks by which transformers collects outputs, and nothing is collected now."""
    if any(hook.__module__ != CAPTURE_MODULE for hook in hooks):
        return False
    return sys.modules[CAPTURE_MODULE]._active_collector.get() is None


def _rounded(module: nn.Module) -> list[Tensor]:
    """The tensors that a block's 8-bit weights are made of."""
    serving = module.__dict__.get(SERVING)
    return [] if serving is None or serving.weights is None else list(module.parameters())
