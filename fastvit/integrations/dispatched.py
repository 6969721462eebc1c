"""Modules that Hugging Face accelerate has dispatched: its hooks keep a module's forward beside it and run it from their own.

A held forward that is the class's own can be exchanged while the hooks hold it. Hooks inside a block that only send tensors
to the device they are on (``device_map="auto"`` puts one on every module) stand in nobody's way; those that load weights do.
"""

import functools
import types
from typing import Any

from torch import nn

HELD = "_old_forward"
HOOK = "_hf_hook"


def binds(method: Any, module: nn.Module, function: Any) -> bool:
    """Whether ``method`` is ``function`` bound to ``module``."""
    return isinstance(method, types.MethodType) and method.__self__ is module and method.__func__ is function


def has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether an instance was given another forward than its class's; hooks that were removed leave the class's there."""
    return "forward" in module.__dict__ and not binds(module.__dict__["forward"], module, type(module).forward)


def holds_forward_of_class(module: nn.Module) -> bool:
    """Whether hooks hold the forward of the module's class."""
    held: Any = module.__dict__.get(HELD)
    return binds(held, module, type(module).forward) and isinstance(module.__dict__.get("forward"), functools.partial)


def only_aligned_with(block: nn.Module, module: nn.Module) -> bool:
    """Whether all that hooks do for ``module``, inside ``block``, is to send its input where the block's hooks sent theirs."""
    around: Any = block.__dict__.get(HOOK)
    hook: Any = module.__dict__.get(HOOK)
    if not _aligns(around) or not _aligns(hook) or not holds_forward_of_class(module):
        return False
    return not hook.offload and not hook.io_same_device and not hook.no_grad and hook.execution_device == around.execution_device


def _aligns(hook: Any) -> bool:
    kind = type(hook)
    return kind.__name__ == "AlignDevicesHook" and kind.__module__.partition(".")[0] == "accelerate"


def exchange_class(module: nn.Module, cls: type) -> None:
    """Gives ``module`` another class, whose forward its hooks, or what they left behind when they were removed, then run."""
    former = type(module).forward
    if type(module) is cls:
        return
    module.__class__ = cls
    for name in (HELD, "forward"):
        if binds(module.__dict__.get(name), module, former):
            module.__dict__[name] = types.MethodType(type(module).forward, module)


def without_hooks(attributes: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """``attributes``, those of a module, less the hooks and what they hold."""
    bound = isinstance(module.__dict__.get("forward"), types.MethodType | types.FunctionType)
    if not bound and not holds_forward_of_class(module):
        return attributes
    return {name: value for name, value in attributes.items() if name not in ("forward", HELD, HOOK)}
