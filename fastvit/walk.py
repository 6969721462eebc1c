"""Puts fused forwards into a model's modules and takes them out again: all of them, or the model is as it was."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import graphs
from .integrations import dispatched, swap
from .planning import Plan, why_not_swap

STATE = "_fastvit_state"


@dataclass
class State:
    """Kept in the accelerated model's ``__dict__``: plain data, so that copies and pickles of the model keep their report."""

    options: dict[str, Any]
    skipped: dict[str, str]
    served: tuple[str, ...]
    ungraphed: dict[str, str] = field(default_factory=dict)


def serve(model: nn.Module, plan: Plan, backend: str) -> None:
    for name, layout in plan.layouts.items():
        serving = swap.Serving(layout, backend, weights=plan.weights.get(name), note=plan.notes.get(name, ""))
        swap.serve(model.get_submodule(name), serving)
    for container in model.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            for module, following in itertools.pairwise(container):
                swap.link(module, following)


def graph(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Graphs the model and what is around its fused blocks; returns module name → why it is not graphed."""
    return graphs.attach(model, [*plan.layouts, *(name for name, m in model.named_modules() if _is_own_block(m))], why_not_swap)


def _is_own_block(module: nn.Module) -> bool:
    """Whether a module is a block of fastvit's own models, which are fused as they are."""
    return type(module).__module__.startswith("fastvit.") and type(module).__name__ in ("EncoderBlock", "TwoWayBlock")


def release(model: nn.Module) -> None:
    for module in model.modules():
        if graphs.is_graphed(module):
            graphs.release(module)
        if swap.is_served(module):
            swap.release(module)
        module.__dict__.pop(swap.PAUSED, None)
        module.__dict__.pop(STATE, None)


def check_unwrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if swap.is_wrapped(module):
            wrapper = type(module).__name__
            raise ValueError(f"{name} was given the class {wrapper} after accelerate (as fully_shard does); undo that first")


KEYS = (swap.ATTRIBUTE, swap.TRACED, swap.PAUSED, graphs.ATTRIBUTE, STATE)  # all that serving writes
Snapshot = list[tuple[nn.Module, type, dict[str, Any]]]


def snapshot(model: nn.Module) -> Snapshot:
    return [(m, type(m), {key: m.__dict__[key] for key in KEYS if key in m.__dict__}) for m in model.modules()]


def revert(snapshot: Snapshot) -> None:
    for module, cls, entries in snapshot:
        dispatched.exchange_class(module, cls)
        for key in KEYS:
            module.__dict__.pop(key, None)
        module.__dict__.update(entries)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Everything that serving writes lies in the modules' classes and ``__dict__``s; both are put back as they were."""
    before = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, cls, entries in before:
            if type(module) is not cls:
                module.__class__ = cls
            for key in module.__dict__.keys() - entries.keys():
                del module.__dict__[key]
            module.__dict__.update(entries)
        raise
