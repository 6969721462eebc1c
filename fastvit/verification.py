"""Compares a model with and without something, in float32, without a second copy of the model, and block by block."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

RELATIVE_TOLERANCE = 1e-4


class BlockError(NamedTuple):
    """One call of an accelerated block. ``relative_error``: its output against the original's, inherited errors included;
    ``own_error``: the same for the original's input, so the block's own doing. Both of the output's largest value."""

    name: str
    relative_error: float
    own_error: float


@dataclass(frozen=True)
class Verification:
    """``max_abs_error`` over all outputs; ``relative_error``: the worst output's, relative to its largest value.
    ``blocks`` accelerated blocks the model has, ``fused_blocks`` of them on the fused path. ``trace``: the error of every
    call of a block, in order of execution; ``first_out_of_line``: the first block whose own error is not tolerable."""

    max_abs_error: float
    relative_error: float
    passed: bool
    blocks: int = 0
    fused_blocks: int = 0
    tolerance: float = RELATIVE_TOLERANCE
    trace: tuple[BlockError, ...] = ()

    @property
    def first_out_of_line(self) -> str | None:
        first = self._first_out_of_line()
        return None if first is None else first.name

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        called = len({call.name for call in self.trace})
        notes = {"ran their own forward": called - self.fused_blocks, "were not called": self.blocks - called}
        others = ", ".join(f"{count} {what}" for what, count in notes.items() if count)
        line = (
            f"{verdict}: {self.blocks} accelerated blocks{f' ({others})' if others else ''} against the original in float32:"
            f" max abs error {self.max_abs_error:.2e}, relative {self.relative_error:.2e} (allowed {self.tolerance:.0e})"
        )
        return "\n".join([line, *self._second_line()])

    def __bool__(self) -> bool:
        return self.passed

    def _first_out_of_line(self) -> BlockError | None:
        return next((call for call in self.trace if not call.own_error <= self.tolerance), None)

    def _second_line(self) -> Iterator[str]:
        first = self._first_out_of_line()
        if first is not None:
            yield f"first out of line: {first.name or '(the model)'} errs by {first.own_error:.2e} on the original's own input"
        elif not self.passed:
            yield "no block is out of line on the original's own input: the error arises between blocks, or grows along them"


def compare(
    model: nn.Module,
    inputs: tuple,
    keywords: dict[str, Any],
    blocks: Mapping[str, nn.Module],
    *,
    within: Callable[[], AbstractContextManager],
    without: Callable[[], AbstractContextManager],
    again: Callable[[nn.Module], AbstractContextManager],
    fell_back: Callable[[nn.Module], bool],
) -> Verification:
    """Outputs of ``model`` ``within()`` against ``without()``, in evaluation mode and float32, from one random state.

    Args:
        blocks: name → each block whose errors are traced.
        again: inside ``without()``, accelerates one block; it is run once more on the input that it gets there.
        fell_back: whether the call that a block has just made was its own forward.

    Raises ``ValueError`` when the two outputs differ in structure or shape, or hold no tensor.
    """
    inputs, keywords = _pytree.tree_map(_float32, (inputs, keywords))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lower = {name: t.float() for name, t in tensors if t.is_floating_point() and t.dtype != torch.float32}
    gpus = {t.device.index for _, t in tensors if t.is_cuda}
    device_types = {"cpu", *(t.device.type for _, t in tensors)}
    trace = _Trace(again, fell_back, gpus)

    def run(how: Callable[[], AbstractContextManager], observe: Callable | None) -> Any:
        watching = observed(model, blocks, observe) if observe else nullcontext()
        with how(), watching, torch.random.fork_rng(gpus):  # so that both runs draw the same random numbers
            return torch.func.functional_call(model, lower, inputs, keywords)

    with evaluated(model), torch.no_grad(), _no_autocast(device_types):
        compiled = is_compiled(model)
        if compiled:  # what was compiled is compared as it is, and traced in a run of its own
            actual, expected = run(within, None), run(without, None)
        with eager_where_compiled(model):
            traced = run(within, trace.accelerated), run(without, trace.original)
        if not compiled:
            actual, expected = traced
    error = _distance(actual, expected)
    if error.tensors == 0:
        raise ValueError("the model's output holds no tensor to compare")
    return Verification(
        error.largest,
        error.relative,
        passed=error.relative <= RELATIVE_TOLERANCE,
        blocks=len(blocks),
        fused_blocks=len(trace.called - trace.fell_back),
        trace=tuple(trace.calls),
    )


class _Trace:
    """Keeps on the CPU what each block gave in the accelerated run, for the original run to be compared with."""

    def __init__(self, again: Callable, fell_back: Callable, gpus: set[int]):
        self.again, self.has_fallen_back, self.gpus = again, fell_back, gpus
        self.kept: dict[str, deque[tuple[Any, bool]]] = defaultdict(deque)
        self.called: set[str] = set()
        self.fell_back: set[str] = set()
        self.calls: list[BlockError] = []

    def accelerated(self, name: str, block: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        output = forward(*args, **kwargs)
        fell_back = self.has_fallen_back(block)
        self.called.add(name)
        if fell_back:
            self.fell_back.add(name)
        self.kept[name].append((_pytree.tree_map(_kept, output), fell_back))
        return output

    def original(self, name: str, block: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        kept, fell_back = self.kept[name].popleft() if self.kept[name] else (None, False)
        own = None
        if not fell_back:  # otherwise both are its own forward, and what watches inside would see it twice
            with self.again(block), torch.random.fork_rng(self.gpus):
                own = forward(*args, **kwargs)
        output = forward(*args, **kwargs)
        self.calls.append(BlockError(name, _relative(kept, output), 0.0 if fell_back else _relative(own, output)))
        return output


def _kept(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


# --- runs that leave the model as it was ----------------------------------------------------------------------------------

Observe = Callable[[str, nn.Module, Callable, tuple, dict], Any]


@contextmanager
def observed(model: nn.Module, modules: Mapping[str, nn.Module], observe: Observe) -> Iterator[None]:
    """Within it, calls of ``modules`` (of ``model``) give ``observe(name, module, forward, args, kwargs)``.

    ``forward`` is the module's own at the time of the call. No hooks: some modules (``nn.TransformerEncoderLayer``) compute
    in another way when they have any.
    """
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise ValueError("model holds a DataParallel, whose replicas cannot be observed; pass the module inside it")
    # Hooks that were removed again leave a forward on the instance which is the class's, and follows when the class changes.
    held = [(name, module, module.__dict__.get("forward")) for name, module in modules.items()]
    try:
        for name, module, forward in held:
            of_class = forward is None or getattr(forward, "__func__", None) is type(module).forward
            current: Any = partial(_forward_of_class, module) if of_class else forward
            module.__dict__["forward"] = partial(_observing, observe, name, module, current)
        yield
    finally:
        for _, module, forward in held:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _observing(observe: Observe, name: str, module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    return observe(name, module, forward, args, kwargs)


def _forward_of_class(module: Any, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within it, and every module's own mode after it."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, was in training:
            module.training = was


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``Module.compile`` stands around a module of ``model``."""
    return any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in model.modules())


def eager_where_compiled(model: nn.Module) -> AbstractContextManager:
    """Runs compiled modules as the Python they were compiled from."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


class _no_autocast(AbstractContextManager):
    def __init__(self, device_types: set[str]):
        self.contexts = [torch.autocast(kind, enabled=False) for kind in device_types if kind != "meta"]

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


# --- errors -------------------------------------------------------------------------------------------------------------


class _Error(NamedTuple):
    largest: float
    relative: float
    tensors: int


def _relative(actual: Any, expected: Any) -> float:
    """The relative error of a block's output, infinite where it has another structure."""
    try:
        return _distance(actual, expected).relative
    except ValueError:
        return float("inf")


def _distance(actual: Any, expected: Any) -> _Error:
    left, left_structure = _pytree.tree_flatten(actual)
    right, right_structure = _pytree.tree_flatten(expected)
    if left_structure != right_structure:
        raise ValueError(f"the accelerated output has structure {left_structure}; the original's is {right_structure}")
    worst, relative, compared = 0.0, 0.0, 0
    for ours, theirs in zip(left, right, strict=True):
        if not isinstance(theirs, Tensor):
            continue
        if not isinstance(ours, Tensor):
            raise ValueError(f"an accelerated output is {type(ours).__name__}; the original's is a tensor")
        ours, theirs = _dense(ours), _dense(theirs)
        if ours.shape != theirs.shape:
            raise ValueError(f"an accelerated output has shape {tuple(ours.shape)}; the original's is {tuple(theirs.shape)}")
        compared += 1
        if theirs.numel() == 0:
            continue
        theirs = theirs.to(ours.device)
        if not theirs.is_floating_point():
            relative = relative if torch.equal(ours, theirs) else float("inf")
            continue
        error = (ours.double() - theirs.double()).abs().max().item()
        largest = theirs.double().abs().max().item()
        worst = max(worst, error) if error == error else float("inf")
        relative = max(relative, error / largest if largest else error) if error == error else float("inf")
    return _Error(worst, relative, compared)


def _dense(tensor: Tensor) -> Tensor:
    """``nn.TransformerEncoder`` packs padded batches into nested tensors, which have no shape: padded with zeros again."""
    return torch.nested.to_padded_tensor(tensor, 0.0) if tensor.is_nested else tensor
