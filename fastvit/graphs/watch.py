"""Whether a module is still what a graph of it was recorded from: looked at before every replay.

Looked at are the class, children, hooks and mode of every module inside, what the classes define, which tensors parameters and
buffers are and how they lie where, where 8-bit weights were made of them also their version counters; and the attributes of the
module itself and of its configs (``attributes``). Values of weights that are changed in place need no look: a replay reads
them; buffers, and tensors among those attributes, that a recording reads are looked at for it (``Reads``). Not seen is any
other attribute that Python would read, as the epsilon of a block inside.
"""

import operator
import sys
from collections.abc import Container, Iterable
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.dispatched import has_forward_of_its_own
from ..integrations.recheck import CAPTURE_MODULE
from ..integrations.swap import ATTRIBUTE as SERVING
from ..integrations.swap import own_class
from ..nn import GLOBAL_HOOKS
from .attributes import Attributes

_END = object()
_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
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
        self.empty = [table for table in tables if not table]
        self.tables = [*(table for table in tables if table), {"": _END}]  # the end, so that one more or less is seen
        self.children = list(chain.from_iterable(map(dict.values, self.tables)))
        self.kinds = list(map(type, self.modules))
        self.definitions = [*(vars(cls).values() for cls in _classes({type(module), *self.kinds})), (_END,)]
        self.defined = list(chain.from_iterable(self.definitions))
        tensors = [child for child in self.children if isinstance(child, Tensor)]
        self.why_never = _why_never(module, tensors)
        self.tensors = [] if self.why_never else tensors
        self.places = list(map(Tensor.data_ptr, self.tensors))
        self.layouts = list(map(_layout, self.tensors))
        self.guards = _guards(self.tensors)
        self.rounded = [tensor for inner in module.modules() for tensor in _rounded(inner)]
        self.versions = _versions(self.rounded)
        self.attributes = Attributes(module.__dict__)
        configs = {id(config): config for config in map(_config, (module, *self.modules)) if config}.values()
        self.configs = [(config, Attributes(config)) for config in configs]

    def replaced(self, module: nn.Module) -> bool:
        """Whether a child, a class, a function, a tensor or a setting is another one now, or lies elsewhere."""
        return (
            not all(map(operator.is_, _tables(module.__dict__), self.own_tables))  # a shallow copy's
            or any(self.empty)
            or not all(map(operator.is_, chain.from_iterable(map(dict.values, self.tables)), self.children))
            or list(map(type, self.modules)) != self.kinds
            or not all(map(operator.is_, chain.from_iterable(self.definitions), self.defined))
            or list(map(Tensor.data_ptr, self.tensors)) != self.places
            or self._lie_otherwise()
            or _versions(self.rounded) != self.versions
            or self.attributes.changed(module.__dict__)
            or any(attributes.changed(config) for config, attributes in self.configs)
        )

    def _lie_otherwise(self) -> bool:
        """Whether a tensor has another shape, strides or dtype, which leave its address as it was. The guards say no sooner than
        that: their answer depends on the thread's mode too."""
        if self.guards is not None and self.guards.check(*self.tensors):
            return False
        if list(map(_layout, self.tensors)) != self.layouts:
            return True
        self.guards = _guards(self.tensors)
        return False

    def loose(self) -> list[Tensor]:
        """The tensors among the attributes of the module itself and of its configs."""
        return [*self.attributes.tensors, *(tensor for _, attributes in self.configs for tensor in attributes.tensors)]

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


class Reads:
    """What a recording reads that may be written over, or exchanged, unseen by ``watch``: buffers inside the module, and tensors
    among its attributes. ``loose``: what ``watch.loose()`` was before it; ``read``: the storages of all that it reads beside its
    inputs."""

    def __init__(self, watch: Watch, loose: list[Tensor], read: Container[int]):
        self.loose = [(index, tensor) for index, tensor in enumerate(loose) if _storage(tensor) in read]
        self.places = self._places()
        buffers = [t for t in watch.tensors if not isinstance(t, nn.Parameter) and _storage(t) in read]
        self.tensors = [*buffers, *(tensor for _, tensor in self.loose)]
        self.versions = _versions(self.tensors)

    def replaced(self, watch: Watch) -> bool:
        """Whether an attribute is another tensor now, or lies elsewhere; to be asked of what ``watch`` has just looked at."""
        if not self.loose:
            return False
        now = watch.loose()
        return any(now[index] is not tensor for index, tensor in self.loose) or self._places() != self.places

    def _places(self) -> list[tuple]:
        return [(tensor.data_ptr(), *_layout(tensor)) for _, tensor in self.loose]

    def written(self) -> bool:
        """Whether one of them was written in place since it was last looked at: by a call of another signature, maybe."""
        return _versions(self.tensors) != self.versions

    def written_anew(self) -> bool:
        """The same, and takes them as they are now."""
        before, self.versions = self.versions, _versions(self.tensors)
        return self.versions != before


def _config(module: nn.Module) -> dict[str, Any] | None:
    """What a config says that a module of transformers goes by at every call."""
    config = module.__dict__.get("config")
    return getattr(config, "__dict__", None)


def _classes(kinds: set[Any]) -> set[Any]:
    """The classes that modules came with, and those of their bases that have a forward."""
    own = set(map(own_class, kinds))
    return {base for cls in own for base in cls.__mro__ if base is cls or "forward" in vars(base)} - {nn.Module}


def _layout(tensor: Tensor) -> _Layout:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _guards(tensors: list[Tensor]) -> Any:
    """What compares the layouts of many tensors in one call, or None where this PyTorch has no such thing."""
    made = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)
    if made is None or not tensors:
        return None
    return made(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


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
