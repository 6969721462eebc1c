"""Which modules of a model are served, which that look like blocks are not, and why."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .integrations import dispatched, probe, quantized
from .integrations.matching import find_layout
from .integrations.parts import AnyLayout
from .quantization import Accuracy

Patterns = tuple[str, ...] | None


@dataclass(frozen=True)
class Plan:
    """Module name → how it is served; those that look like blocks and are not → why; and what 8 bits make of the served."""

    layouts: dict[str, AnyLayout]
    skipped: dict[str, str]
    weights: dict[str, quantized.Weights]  # block → its parts in 8 bits
    notes: dict[str, str]  # block → what the report says of its precision


def patterns(name: str, patterns: str | Iterable[str] | None) -> Patterns:
    if patterns is None:
        return None
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{name} is {type(patterns).__name__}; expected a glob pattern on module names, or several")
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in found:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} has a {type(pattern).__name__}; expected glob patterns on module names")
    return found


def select(model: nn.Module, include: Patterns, exclude: Patterns) -> dict[str, str | None]:
    """Module name → why the patterns leave it out, or None. A pattern takes the modules inside those it matches."""
    names = [name for name, _ in model.named_modules()]
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                example = next((name for name in names if name), "")
                raise ValueError(f"{option} pattern {pattern!r} matches no module of the model (names look like {example!r})")

    def matching(name: str, patterns: tuple[str, ...]) -> str | None:
        parts = name.split(".")
        ancestors = [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
        return next((p for p in patterns for ancestor in ancestors if fnmatch.fnmatchcase(ancestor, p)), None)

    selected: dict[str, str | None] = {}
    for name in names:
        excluding = matching(name, exclude or ())
        if excluding is not None:
            selected[name] = f"excluded by the pattern {excluding!r}"
        elif include is not None and matching(name, include) is None:
            selected[name] = "not among the included patterns"
        else:
            selected[name] = None
    return selected


def plan(model: nn.Module, selected: dict[str, str | None], precision: str | Accuracy | None) -> Plan:
    """``selected``: module name → why it was not selected, as ``select`` returns it."""
    layouts: dict[str, AnyLayout] = {}
    skipped: dict[str, str] = {}
    proofs: dict[tuple, str | None] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{served}.") or not served for served in layouts):  # computed by the module around it
            continue
        layout = find_layout(module, own_blocks=precision is not None)
        if layout is None:
            continue
        reason = selected[name] or why_not_swap(module) or (layout if isinstance(layout, str) else None)
        if reason is None and not isinstance(layout, str):
            key = probe.signature(module, layout)
            if key not in proofs:
                proofs[key] = probe.why_different(module, layout)
            reason = proofs[key]
            if reason is None:
                layouts[name] = layout
                continue
        skipped[name] = str(reason)
    weights, notes = _in_8_bits(model, layouts, precision)
    return Plan(layouts, skipped, weights, notes)


def _in_8_bits(
    model: nn.Module, layouts: dict[str, AnyLayout], precision: str | Accuracy | None
) -> tuple[dict[str, quantized.Weights], dict[str, str]]:
    """(block → its parts in 8 bits, block → what the report says of it)."""
    weights: dict[str, quantized.Weights] = {}
    notes: dict[str, str] = {}
    if isinstance(precision, Accuracy):
        precision.check_model(model)
    name_of_format = precision.precision if isinstance(precision, Accuracy) else precision or ""
    for name, layout in layouts.items() if precision is not None else ():
        reason = quantized.why_not(model.get_submodule(name), layout)
        wanted = precision.parts.get(name, frozenset()) if isinstance(precision, Accuracy) else frozenset(quantized.PARTS)
        if reason is None and wanted:
            calibrated = precision.calibrated_in(name) if isinstance(precision, Accuracy) else {}
            weights[name] = quantized.Weights(name_of_format, wanted, calibrated)
        kept = [part for part in quantized.PARTS if part not in wanted]
        chosen = f"; in {name_of_format.upper()}: {', '.join(sorted(wanted)) or 'nothing'}"
        notes[name] = f"; in its own dtype: {reason}" if reason else chosen
        if reason is None and kept:
            notes[name] += f" ({', '.join(kept)} would cost too much accuracy)"
    return weights, notes


def why_not_swap(module: nn.Module) -> str | None:
    names = [cls.__name__ for cls in type(module).__mro__]
    if any(name in ("FSDPModule", "FullyShardedDataParallel") for name in names):
        return "it is sharded by FSDP, whose class a swap would strip: accelerate before fully_shard"
    hooked = dispatched.HELD in module.__dict__
    if hooked and not dispatched.holds_forward_of_class(module):
        return "accelerate's hooks hold its forward in an unknown way: call fastvit.accelerate before dispatching the model"
    if not hooked and dispatched.has_forward_of_its_own(module):
        return "it has a forward of its own, set on the instance"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    return None
