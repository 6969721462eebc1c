"""One line for a model: ``accelerate`` serves its blocks with the fused operators, in place, and ``restore`` undoes it.

A block is served when its children have known names and kinds and its computation has been proved equal on a probe
(``fastvit.integrations``). The module keeps its identity, class name, parameters and hooks; what cannot be served stays
as it was, with its reason in the report. At every call a served block checks that nothing was attached to it since, and
runs its own forward where something was.
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree

from . import backend as _backend
from . import graphs, planning, walk
from .integrations import multihead, swap
from .integrations.parts import AnyLayout
from .ops.quantized import FORMATS
from .ops.quantized import why_not as why_not_in_8_bits
from .quantization import Accuracy
from .reporting import Report, count_flops, served_by
from .verification import Verification, compare, observed

__all__ = ["Report", "Verification", "accelerate", "accelerated", "report", "restore", "verify"]

Model = TypeVar("Model", bound=nn.Module)


_dry_runs: "weakref.WeakKeyDictionary[nn.Module, tuple[Report, dict[str, AnyLayout]]]" = weakref.WeakKeyDictionary()


def accelerate(
    model: Model,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    backend: str = "auto",
    precision: str | Accuracy | None = None,
    cuda_graphs: bool = False,
    dry_run: bool = False,
) -> Model:
    """Serves the transformer blocks of ``model`` with the fused operators, in place, and returns it.

    Works before or after ``.to()``, ``.half()``, ``.eval()``, also on the ``meta`` device; calling it again starts afresh
    with the new options. Nothing is left half done: when it raises, the model is as it was.

    Args:
        model: any module; docs/compatibility.md lists the families whose blocks are served.
        include, exclude: glob patterns on module names ("encoder.layer.*"); a pattern also takes what lies inside a module
            that it matches. Excluded blocks appear in the report.
        backend: "auto" follows ``fastvit.get_backend()`` at every call; "triton" or "torch" pins these blocks to one.
        precision: None keeps the model's own dtype. "fp8" and "int8" compute linears in 8 bits, for inference on NVIDIA GPUs of
            compute capability 8.9 and 8.0 and later; what ``quantization.accuracy`` returned does so where that is accurate.
        cuda_graphs: calls in inference that come again with the same signature (shapes, strides, dtypes and all that is no
            tensor) replay a CUDA graph: small batches no longer wait for launches. A call that cannot be replayed, every one
            without a CUDA device among them, runs as it would without, and the report says why.
        dry_run: changes nothing; ``report(model)`` then shows what would be done.

    Raises:
        TypeError: ``model`` is no module. ValueError: an unknown option, a pattern that matches no module, or a model whose
            served blocks were wrapped since (``fully_shard``), or 8 bits asked for where they do not run.
    """
    _check_module(model)
    _check_options(backend, precision)
    if not dry_run:
        _check_precision(model, backend, precision)
    walk.check_unwrapped(model)
    included, excluded = planning.patterns("include", include), planning.patterns("exclude", exclude)
    selected = planning.select(model, included, excluded)
    with walk.undone_on_error(model):
        restored = walk.snapshot(model)
        walk.release(model)
        plan = planning.plan(model, selected, precision)
        if dry_run:
            walk.revert(restored)
            accelerated = walk.STATE in model.__dict__ or any(map(swap.is_served, model.modules()))
            planned = {name: layout.describe() + plan.notes.get(name, "") for name, layout in plan.layouts.items()}
            found = Report(planned, plan.skipped, {}, _describe_backend(model, backend), True, accelerated)
            _dry_runs[model] = found, plan.layouts
            return model
        walk.serve(model, plan, backend)
        options = {"include": included, "exclude": excluded, "backend": backend}
        ungraphed = walk.graph(model, plan) if cuda_graphs else {}
        model.__dict__[walk.STATE] = walk.State(options, plan.skipped, tuple(plan.layouts), ungraphed)
    _dry_runs.pop(model, None)
    return model


@contextmanager
def accelerated(model: Model, **options: Any) -> Iterator[Model]:
    """``with accelerated(model):`` accelerates within the block; on leaving, the model is as it was before."""
    _check_module(model)
    before = walk.snapshot(model)
    accelerate(model, **options)
    try:
        yield model
    finally:
        walk.check_unwrapped(model)
        walk.release(model)
        walk.revert(before)


def restore(model: Model) -> Model:
    """Gives every block of ``model`` its own class back and forgets the report: exactly the model that came in.

    Raises ``ValueError`` when a served block was wrapped since (``fully_shard``): unwrap it first. ``TypeError``: ``model`` is
    no module.
    """
    _check_module(model)
    walk.check_unwrapped(model)
    with walk.undone_on_error(model):
        walk.release(model)
    _dry_runs.pop(model, None)
    return model


def report(model: nn.Module, *inputs: Any, **keywords: Any) -> Report:
    """What serves which block of ``model``, what was left alone and why; after ``dry_run=True``, what would be.

    With ``inputs``, also how much of the arithmetic that is (``.flops``, ``.total_flops``, ``.fused_share``): the model runs
    once on them, with its own forwards in evaluation mode and without gradients; a model and inputs on the ``meta`` device
    are counted without computing. A module that a fused path calls as it is (an MLP of another kind, an adapter) does not
    count as fused, nor does a block in ``.fallbacks``, nor a ``torch.nn.MultiheadAttention`` that is asked for its weights.
    Where a GPU serves the model on ``auto``, it runs once more, accelerated, for ``.served_by``: which operators went to the
    kernels and which to the vendor's, and why.

    Raises ``TypeError`` when ``model`` is no module; with inputs, ``ValueError`` when its served blocks were wrapped since.
    """
    _check_module(model)
    found, layouts = _found(model)
    if not inputs and not keywords:
        return found
    walk.check_unwrapped(model)
    modules = dict(model.named_modules())
    blocks = {name: modules[name] for name in layouts if name in modules and name not in found.fallbacks}
    called = {name: getattr(layouts[name], "called", ()) for name in blocks}
    alone = {name: block for name, block in blocks.items() if isinstance(layouts[name], multihead.MultiheadLayout)}
    own: set[str] = set()  # those whose calls in this run the fused path does not serve: most ask for weights
    without = _Switch(model).off

    def watch(name: str, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        if isinstance(multihead.read_call(module, args, kwargs), str):
            own.add(name)
        return forward(*args, **kwargs)

    @contextmanager
    def counting() -> Iterator[None]:
        with graphs.paused(model), without(), _without_gradients(model), observed(model, alone, watch):
            yield

    inputs, keywords = _pytree.tree_map_only(Tensor, Tensor.detach, (inputs, keywords))
    flops, total = count_flops(model, inputs, keywords, blocks, called, counting)
    flops = {name: 0 if name in own else flops.get(name, 0) for name in layouts}
    served: dict[str, str] = {}
    if found.replaced and not found.planned and _kernels_serve(model):
        with graphs.paused(model):  # what is replayed decides nothing
            served = served_by(model, inputs, keywords)
    return replace(found, flops=flops, total_flops=total, served_by=served)


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """No parameter requires one: views of those that do, made without gradients, are more than the FLOP counter can take."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.is_leaf]
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


def _found(model: nn.Module) -> tuple[Report, dict[str, AnyLayout]]:
    """The report without FLOPs, and the layout of every block in it that is served, or would be."""
    if model in _dry_runs:
        planned, layouts = _dry_runs[model]
        return replace(planned), {name: layouts[name] for name in planned.replaced}
    state: walk.State | None = model.__dict__.get(walk.STATE)
    served = {name: m.__dict__.get(swap.ATTRIBUTE) for name, m in model.named_modules() if swap.is_served(m)}
    layouts = {name: serving.layout for name, serving in served.items() if serving is not None}
    replaced = {name: serving.describe() for name, serving in served.items() if serving is not None}
    fallbacks = {name: serving.fallback for name, serving in served.items() if serving is not None and serving.fallback}
    pinned = state.options["backend"] if state else next((s.backend for s in served.values() if s), "auto")
    skipped = dict(state.skipped) if state else {}
    gone = [name for name in state.served if name not in served] if state else []
    skipped.update(dict.fromkeys(gone, "it was served, and was restored or replaced since"))
    accelerated = bool(replaced) or (state is not None and not gone)
    graphed = graphs.describe(model) | (state.ungraphed if state else {})
    found = Report(replaced, skipped, fallbacks, _describe_backend(model, pinned), accelerated=accelerated, graphs=graphed)
    return found, layouts


def verify(model: nn.Module, *inputs: Any, **keywords: Any) -> Verification:
    """Runs an accelerated model and its own forwards on the same inputs, in float32 and evaluation mode, and compares.

    The model is left as it was and not copied; one in a lower precision needs its parameters in float32 once for the call.
    The result has ``max_abs_error``, ``relative_error`` (of the largest value of an output), ``passed`` (relative error at
    most 1e-4) and reads as one line, or two when a block is out of line. Where a GPU serves the model, its blocks on
    ``auto`` are held to the kernels, which ``auto`` would leave aside in float32: what is verified is what serves the model
    in half precision. Both runs begin with the same random state.

    ``trace`` has, for every call of a block, the error of its output and its own error: that of the accelerated block given
    the input that it gets in the original, which is what tells a wrong block (``first_out_of_line``) from those after it,
    which inherit its error. For that a block on the fused path runs three times in all, and its outputs of the accelerated
    run wait on the CPU. CUDA graphs are left aside: what they replay are the launches of these very runs.

    Raises ``ValueError`` when ``model`` has no accelerated block or its blocks were wrapped since (``fully_shard``),
    ``TypeError`` when it is no module.
    """
    _check_module(model)
    walk.check_unwrapped(model)
    switch = _Switch(model)
    if not switch.servings:
        raise ValueError("model has no accelerated block to verify; call fastvit.accelerate(model) first")
    within = _with_kernels if _kernels_serve(model) else nullcontext
    before = {module: serving.fallback for module, serving in switch.servings.items()}
    try:
        for serving in switch.servings.values():
            serving.fallback = None
        with graphs.paused(model):
            return compare(
                model,
                inputs,
                keywords,
                switch.blocks,
                within=within,
                without=switch.off,
                again=lambda block: switch.on(block, within),
                fell_back=lambda block: switch.servings[block].fallback is not None,
            )
    finally:
        for module, fallback in before.items():
            switch.servings[module].fallback = fallback


class _Switch:
    """Turns the served blocks of a model off for a while, and single ones on again meanwhile."""

    def __init__(self, model: nn.Module):
        served = {name: module for name, module in model.named_modules() if swap.is_served(module)}
        self.blocks = {name: module for name, module in served.items() if swap.ATTRIBUTE in module.__dict__}
        self.servings: dict[nn.Module, swap.Serving] = {m: m.__dict__[swap.ATTRIBUTE] for m in self.blocks.values()}

    @contextmanager
    def off(self) -> Iterator[None]:
        try:
            for block in self.servings:
                swap.release(block)
            yield
        finally:
            for block, serving in self.servings.items():
                if not swap.is_served(block):
                    swap.serve(block, serving)

    @contextmanager
    def on(self, block: nn.Module, within: Callable[[], AbstractContextManager]) -> Iterator[None]:
        swap.serve(block, self.servings[block])
        try:
            with within():
                yield
        finally:
            swap.release(block)


def _kernels_serve(model: nn.Module) -> bool:
    """Whether ``auto`` is in force and means the kernels for this model in half precision."""
    gpus = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers()) if tensor.is_cuda}
    return _backend.get_backend() == "auto" and bool(gpus) and all(_backend.why_not_triton(gpu) is None for gpu in gpus)


def _with_kernels():
    return _backend.use_backend_in_thread("triton")


# --- options ------------------------------------------------------------------------------------------------------------


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")


def _check_options(backend: str, precision: str | Accuracy | None) -> None:
    if backend not in _backend.BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(_backend.BACKENDS)}")
    if precision not in (None, *FORMATS) and not isinstance(precision, Accuracy):
        raise ValueError(
            f"precision is {precision!r}; expected None (the model's own dtype), {', '.join(map(repr, FORMATS))} or what"
            " quantization.accuracy returned"
        )


def _check_precision(model: nn.Module, backend: str, precision: str | Accuracy | None) -> None:
    if precision is None:
        return
    name = precision.precision if isinstance(precision, Accuracy) else precision
    reason = f"backend is 'torch', and {name.upper()} has Triton kernels only" if backend == "torch" else None
    for device in {parameter.device for parameter in model.parameters()} if reason is None else ():
        reason = why_not_in_8_bits(name, device)
        if reason is None and device.type == "cpu" and "triton" not in (backend, _backend.get_backend()):
            reason = "tensors are left to PyTorch's operators"
        if reason is not None:
            reason = f"on {device}, {reason}"
            break
    if reason is not None:
        raise ValueError(
            f"precision={name!r} does not run here: {reason}; leave precision=None"
            " (fastvit.quantization.accuracy simulates it on any device)"
        )


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
