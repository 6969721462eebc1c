"""Modules whose forward is replayed where it was recorded: their class, and which modules of a model are given it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..integrations import swap
from ..integrations.dispatched import exchange_class
from .recorder import RECORDERS
from .recording import Shared
from .store import NEW, Graphs, inside

ATTRIBUTE = "_fastvit_graphs"


class GraphedModule(swap.Swapped):
    """Mixed in before a module's own class: replays its forward where it was recorded."""

    @staticmethod
    def forward_of(cls: Any, own_forward: Callable) -> Callable:
        def forward(self, *args, **kwargs):
            if torch.compiler.is_compiling():
                return cls.forward(self, *args, **kwargs)
            graphs = self.__dict__.get(ATTRIBUTE)
            if graphs is None or inside():
                return cls.forward(self, *args, **kwargs)
            return graphs.call(self, cls.forward, args, kwargs)

        return forward

    def _apply(self, *args: Any, **kwargs: Any) -> Any:  # .to(), .half(), .cuda(): what was recorded is of no use after it
        graphs = self.__dict__.get(ATTRIBUTE)
        if graphs is not None:
            graphs.forget()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]


def is_graphed(module: nn.Module) -> bool:
    return isinstance(module, GraphedModule)


def attach(model: nn.Module, blocks: Iterable[str], why_not: Callable[[nn.Module], str | None]) -> dict[str, str]:
    """Graphs ``model`` and every module around the ``blocks``; returns module name → why one of them is not.

    ``why_not``: why a module cannot be given another class, or None.
    """
    shared, refused = Shared(), {}
    around = {""} | {name[:end] for name in blocks for end in range(len(name)) if name[end] == "."}
    for name, module in list(model.named_modules()):
        if name not in around:
            continue
        callable_itself = type(module).forward is not nn.Module.forward
        reason = why_not(module) if callable_itself else "it has no forward: accelerate what is called"
        if reason is None:
            exchange_class(module, swap.swapped_class(type(module), GraphedModule))
            module.__dict__[ATTRIBUTE] = Graphs(shared)
        elif callable_itself or not name:  # a list inside is never called
            refused[name] = f"none: {reason}"
    return refused


def release(module: nn.Module) -> None:
    """Gives a graphed module its class back; what it recorded goes with what it carried."""
    exchange_class(module, swap.original_class(type(module)))
    module.__dict__.pop(ATTRIBUTE, None)


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """No module of ``model`` replays or records anything within it, and none forgets what it has."""
    graphed = [module for module in model.modules() if is_graphed(module)]
    for module in graphed:
        exchange_class(module, swap.original_class(type(module)))
    try:
        yield
    finally:
        for module in graphed:
            exchange_class(module, swap.swapped_class(type(module), GraphedModule))


def describe(model: nn.Module) -> dict[str, str]:
    """Module name → what its graphs did: of the model, and of those inside that were called by themselves, more than once."""
    found = {}
    for name, module in model.named_modules():
        graphs = module.__dict__.get(ATTRIBUTE) if is_graphed(module) else None
        if graphs is not None and (not name or (graphs.outcome and not graphs.outcome.endswith(NEW))):
            found[name] = f"{len(graphs.recordings)} recorded; {graphs.outcome or _before(model)}"
    return found


def _before(model: nn.Module) -> str:
    tensor = next(iter(model.parameters()), None)
    if tensor is None or tensor.device.type in (*RECORDERS, "meta"):
        return "it was not called yet"
    return f"CUDA graphs need a CUDA device, and the model is on {tensor.device}"
