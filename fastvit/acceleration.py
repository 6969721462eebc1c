"""One line for a model: ``accelerate`` serves its blocks with the fused operators, in place, and ``restore`` undoes it.

A block is served when its children have known names and kinds and its computation has been proved equal on a probe
(``fastvit.integrations``). The module keeps its identity, class name, parameters and hooks; what cannot be served stays
as it was, with its reason in the report. At every call a served block checks that nothing was attached to it since, and
runs its own forward where something was.
"""

import fnmatch
import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import backend as _backend
from .integrations import probe, swap
from .integrations.parts import Layout, find_layout
from .verification import Verification, compare

__all__ = ["Report", "Verification", "accelerate", "accelerated", "report", "restore", "verify"]

STATE = "_fastvit_state"
Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Report:
    """What ``accelerate`` did, or would do (``planned``).

    ``replaced``: module name → what serves it. ``skipped``: module name → why it was left as it was. ``fallbacks``: module
    name → why a served module last ran its own forward. ``accelerated``: whether the model is. ``str()`` gives a table.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    backend: str = ""
    planned: bool = False
    accelerated: bool = True

    def __str__(self) -> str:
        if not (self.accelerated or self.planned):
            return "fastvit: not accelerated (call fastvit.accelerate(model) first)"
        if not self.replaced and not self.skipped:
            return "fastvit: nothing to replace (the model has no transformer block of a known layout)"
        verb = "would be replaced (dry run)" if self.planned else "replaced"
        lines = [f"fastvit: {len(self.replaced)} blocks {verb}, {len(self.skipped)} left as they were"]
        if self.replaced and self.backend:
            lines.append(f"backend: {self.backend}")
        rows = {**self.replaced, **{name: f"left alone: {reason}" for name, reason in self.skipped.items()}}
        width = max(map(len, rows))
        for name, text in rows.items():
            lines.append(f"  {name or '(the model)':<{width}}  {text}")
            if name in self.fallbacks:
                lines.append(f"  {'':<{width}}  ! its last call ran its own forward: {self.fallbacks[name]}")
        return "\n".join(lines)


@dataclass
class _State:
    """Kept in the accelerated model's ``__dict__``: plain data, so that copies and pickles of the model keep their report."""

    options: dict[str, Any]
    skipped: dict[str, str]
    served: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    layouts: dict[str, Layout]
    skipped: dict[str, str]


_dry_runs: "weakref.WeakKeyDictionary[nn.Module, Report]" = weakref.WeakKeyDictionary()


def accelerate(
    model: Model,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    backend: str = "auto",
    precision: str | None = None,
    cuda_graphs: bool = False,
    dry_run: bool = False,
) -> Model:
    """Serves the transformer blocks of ``model`` with the fused operators, in place, and returns it.

    Works before or after ``.to()``, ``.half()``, ``.eval()``, also on the ``meta`` device; calling it again starts afresh
    with the new options. Nothing is left half done: when it raises, the model is as it was.

    Args:
        model: any module; blocks of Hugging Face ViT and DINOv2 and of timm's VisionTransformer are served today.
        include, exclude: glob patterns on module names ("encoder.layer.*"); a pattern also takes what lies inside a module
            that it matches. Excluded blocks appear in the report.
        backend: "auto" follows ``fastvit.get_backend()`` at every call; "triton" or "torch" pins these blocks to one.
        precision: None keeps the model's own dtype.
        cuda_graphs: must be False in this version.
        dry_run: changes nothing; ``report(model)`` then shows what would be done.

    Raises:
        TypeError: ``model`` is no module. ValueError: an unknown option, a pattern that matches no module, or a model whose
            served blocks were wrapped since (``fully_shard``).
    """
    _check_module(model)
    _check_options(backend, precision, cuda_graphs)
    _check_unwrapped(model)
    selected = _select(model, _patterns("include", include), _patterns("exclude", exclude))
    with _undone_on_error(model):
        restored = _snapshot(model)
        _release(model)
        plan = _plan(model, selected)
        if dry_run:
            _revert(restored)
            accelerated = STATE in model.__dict__ or any(map(swap.is_served, model.modules()))
            planned = {name: layout.describe() for name, layout in plan.layouts.items()}
            _dry_runs[model] = Report(planned, plan.skipped, {}, _describe_backend(model, backend), True, accelerated)
            return model
        _serve(model, plan, backend)
        options = {"include": include, "exclude": exclude, "backend": backend}
        model.__dict__[STATE] = _State(options, plan.skipped, tuple(plan.layouts))
    _dry_runs.pop(model, None)
    return model


@contextmanager
def accelerated(model: Model, **options: Any) -> Iterator[Model]:
    """``with accelerated(model):`` accelerates within the block; on leaving, the model is as it was before."""
    _check_module(model)
    before = _snapshot(model)
    accelerate(model, **options)
    try:
        yield model
    finally:
        _check_unwrapped(model)
        _release(model)
        _revert(before)


def restore(model: Model) -> Model:
    """Gives every block of ``model`` its own class back and forgets the report: exactly the model that came in.

    Raises ``ValueError`` when a served block was wrapped since (``fully_shard``): unwrap it first. ``TypeError``: ``model`` is
    no module.
    """
    _check_module(model)
    _check_unwrapped(model)
    _release(model)
    _dry_runs.pop(model, None)
    return model


def report(model: nn.Module) -> Report:
    """What serves which block of ``model``, what was left alone and why; after ``dry_run=True``, what would be.

    Raises ``TypeError`` when ``model`` is no module.
    """
    _check_module(model)
    state: _State | None = model.__dict__.get(STATE)
    if model in _dry_runs:
        return replace(_dry_runs[model])
    served = {name: m.__dict__.get(swap.ATTRIBUTE) for name, m in model.named_modules() if swap.is_served(m)}
    replaced = {name: serving.layout.describe() for name, serving in served.items() if serving is not None}
    fallbacks = {name: serving.fallback for name, serving in served.items() if serving is not None and serving.fallback}
    pinned = state.options["backend"] if state else next((s.backend for s in served.values() if s), "auto")
    skipped = dict(state.skipped) if state else {}
    gone = [name for name in state.served if name not in served] if state else []
    skipped.update(dict.fromkeys(gone, "it was served, and was restored or replaced since"))
    accelerated = bool(replaced) or (state is not None and not gone)
    return Report(replaced, skipped, fallbacks, _describe_backend(model, pinned), accelerated=accelerated)


def verify(model: nn.Module, *inputs: Any, **keywords: Any) -> Verification:
    """Runs an accelerated model and its own forwards on the same inputs, in float32 and evaluation mode, and compares.

    The model is left as it was and not copied; one in a lower precision needs its parameters in float32 once for the call.
    The result has ``max_abs_error``, ``relative_error`` (of the largest value of an output), ``passed`` (relative error at
    most 1e-4) and reads as one line. Where a GPU serves the model, its blocks on ``auto`` are held to the kernels, which
    ``auto`` would leave aside in float32: what is verified is what serves the model in half precision. Both runs begin with
    the same random state. Raises ``ValueError`` when ``model`` has no accelerated block, ``TypeError`` when it is no module.
    """
    _check_module(model)
    blocks = [module for module in model.modules() if swap.is_served(module)]
    if not blocks:
        raise ValueError("model has no accelerated block to verify; call fastvit.accelerate(model) first")
    servings: list[swap.Serving] = [block.__dict__[swap.ATTRIBUTE] for block in blocks]
    before = [serving.fallback for serving in servings]
    for serving in servings:
        serving.fallback = None
    try:
        within = _with_kernels if _kernels_serve(model) else nullcontext
        result = compare(model, inputs, keywords, within, without=lambda: _own_forwards(blocks))
        fused = sum(serving.fallback is None for serving in servings)
    finally:
        for serving, fallback in zip(servings, before, strict=True):
            serving.fallback = fallback
    return replace(result, blocks=len(blocks), fused_blocks=fused)


def _kernels_serve(model: nn.Module) -> bool:
    """Whether ``auto`` is in force and means the kernels for this model in half precision."""
    gpus = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers()) if tensor.is_cuda}
    return _backend.get_backend() == "auto" and bool(gpus) and all(_backend.why_not_triton(gpu) is None for gpu in gpus)


def _with_kernels():
    return _backend.use_backend_in_thread("triton")


# --- walk and swap ------------------------------------------------------------------------------------------------------


def _plan(model: nn.Module, selected: dict[str, str | None]) -> _Plan:
    """Which modules are served and which block-like ones are not; ``selected``: name → why it was not selected."""
    layouts: dict[str, Layout] = {}
    skipped: dict[str, str] = {}
    proofs: dict[tuple, str | None] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{served}.") or not served for served in layouts):  # computed by the module around it
            continue
        layout = find_layout(module)
        if layout is None:
            continue
        reason = selected[name] or _why_not_swap(module) or (layout if isinstance(layout, str) else None)
        if reason is None and not isinstance(layout, str):
            key = probe.signature(module, layout)
            if key not in proofs:
                proofs[key] = probe.why_different(module, layout)
            reason = proofs[key]
            if reason is None:
                layouts[name] = layout
                continue
        skipped[name] = str(reason)
    return _Plan(layouts, skipped)


def _why_not_swap(module: nn.Module) -> str | None:
    names = [cls.__name__ for cls in type(module).__mro__]
    if any(name in ("FSDPModule", "FullyShardedDataParallel") for name in names):
        return "it is sharded by FSDP, whose class a swap would strip: accelerate before fully_shard"
    if "_old_forward" in module.__dict__:
        return "accelerate's hooks hold its forward: call fastvit.accelerate before dispatching the model"
    if "forward" in module.__dict__:
        return "it has a forward of its own, set on the instance"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    return None


def _serve(model: nn.Module, plan: _Plan, backend: str) -> None:
    for name, layout in plan.layouts.items():
        swap.serve(model.get_submodule(name), swap.Serving(layout, backend))
    for container in model.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            for module, following in itertools.pairwise(container):
                swap.link(module, following)


def _release(model: nn.Module) -> None:
    for module in model.modules():
        if swap.is_served(module):
            swap.release(module)
        module.__dict__.pop(STATE, None)


def _check_unwrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if swap.is_wrapped(module):
            raise ValueError(f"{name} was given the class {type(module).__name__} after accelerate; undo that first")


_Snapshot = list[tuple[nn.Module, type, dict[str, Any]]]


def _snapshot(model: nn.Module) -> _Snapshot:
    keys = (swap.ATTRIBUTE, STATE)
    return [(m, type(m), {key: m.__dict__[key] for key in keys if key in m.__dict__}) for m in model.modules()]


def _revert(snapshot: _Snapshot) -> None:
    for module, cls, entries in snapshot:
        if type(module) is not cls:
            module.__class__ = cls
        for key in (swap.ATTRIBUTE, STATE):
            module.__dict__.pop(key, None)
        module.__dict__.update(entries)


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    snapshot = _snapshot(model)
    try:
        yield
    except BaseException:
        _revert(snapshot)
        raise


@contextmanager
def _own_forwards(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within it the blocks have their own classes back."""
    classes = [type(block) for block in blocks]
    try:
        for block in blocks:
            block.__class__ = swap.original_class(type(block))
        yield
    finally:
        for block, cls in zip(blocks, classes, strict=True):
            block.__class__ = cls


# --- options ------------------------------------------------------------------------------------------------------------


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")


def _check_options(backend: str, precision: str | None, cuda_graphs: bool) -> None:
    if backend not in _backend.BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(_backend.BACKENDS)}")
    if precision == "fp8":
        raise ValueError("precision='fp8' is not in this version; leave precision=None to keep the model's own dtype")
    if precision is not None:
        raise ValueError(f"precision is {precision!r}; expected None (the model's own dtype)")
    if cuda_graphs:
        raise ValueError("cuda_graphs=True is not in this version; leave it False, or capture the accelerated model yourself")


def _patterns(name: str, patterns: str | Iterable[str] | None) -> list[str] | None:
    if patterns is None:
        return None
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{name} is {type(patterns).__name__}; expected a glob pattern on module names, or several")
    found = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in found:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} has a {type(pattern).__name__}; expected glob patterns on module names")
    return found


def _select(model: nn.Module, include: list[str] | None, exclude: list[str] | None) -> dict[str, str | None]:
    """Module name → why the patterns leave it out, or None. A pattern takes the modules inside those it matches."""
    names = [name for name, _ in model.named_modules()]
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                example = next((name for name in names if name), "")
                raise ValueError(f"{option} pattern {pattern!r} matches no module of the model (names look like {example!r})")

    def matching(name: str, patterns: list[str]) -> str | None:
        parts = name.split(".")
        ancestors = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        return next((p for p in patterns for ancestor in ancestors if fnmatch.fnmatchcase(ancestor, p)), None)

    selected: dict[str, str | None] = {}
    for name in names:
        excluding = matching(name, exclude or [])
        if excluding is not None:
            selected[name] = f"excluded by the pattern {excluding!r}"
        elif include is not None and matching(name, include) is None:
            selected[name] = "not among the included patterns"
        else:
            selected[name] = None
    return selected


def _describe_backend(model: nn.Module, pinned: str) -> str:
    """The backend that a call would get now, and why."""
    tensor: Tensor | None = next(iter(model.parameters()), None)
    if tensor is None or tensor.is_meta:
        return f"{pinned} (decided by the device once the model is on one)"
    setting = pinned if pinned != "auto" else _backend.get_backend()
    if setting == "torch":
        return "torch (asked for)"
    reason = _backend.why_not_triton(tensor.device)
    if reason is None and (setting == "triton" or tensor.is_cuda):
        return "triton"
    if setting == "triton":
        return f"triton was asked for, and calls will fail: {reason}"
    return f"torch ({reason or 'on auto, CPU tensors are left to PyTorch'})"
