"""Compares a model with and without something, in float32, without a second copy of the model."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

RELATIVE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verification:
    """``max_abs_error`` over all outputs; ``relative_error``: the worst output's, relative to its largest value.
    ``blocks`` accelerated blocks took part, ``fused_blocks`` of them on the fused path."""

    max_abs_error: float
    relative_error: float
    passed: bool
    blocks: int = 0
    fused_blocks: int = 0
    tolerance: float = RELATIVE_TOLERANCE

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        own = "" if self.fused_blocks == self.blocks else f" ({self.blocks - self.fused_blocks} ran their own forward)"
        return (
            f"{verdict}: {self.blocks} accelerated blocks{own} against the original in float32:"
            f" max abs error {self.max_abs_error:.2e}, relative {self.relative_error:.2e} (allowed {self.tolerance:.0e})"
        )

    def __bool__(self) -> bool:
        return self.passed


def compare(
    model: nn.Module,
    inputs: tuple,
    keywords: dict[str, Any],
    within: Callable[[], AbstractContextManager],
    without: Callable[[], AbstractContextManager],
) -> Verification:
    """Outputs of ``model`` ``within()`` against ``without()``, in evaluation mode and float32, from one random state.

    Raises ``ValueError`` when the two outputs differ in structure or shape, or hold no tensor.
    """
    inputs, keywords = _pytree.tree_map(_float32, (inputs, keywords))
    lower = {name: t.float() for name, t in _tensors(model) if t.is_floating_point() and t.dtype != torch.float32}
    training = [(module, module.training) for module in model.modules()]
    gpus = {t.device.index for _, t in _tensors(model) if t.is_cuda}
    device_types = {"cpu", *(t.device.type for _, t in _tensors(model))}
    try:
        model.eval()
        with torch.no_grad(), _no_autocast(device_types):
            with within(), torch.random.fork_rng(gpus):  # so that both draw the same random numbers
                actual = torch.func.functional_call(model, lower, inputs, keywords)
            with without(), torch.random.fork_rng(gpus):
                expected = torch.func.functional_call(model, lower, inputs, keywords)
    finally:
        for module, was in training:
            module.training = was
    return _errors(actual, expected)


class _no_autocast(AbstractContextManager):
    def __init__(self, device_types: set[str]):
        self.contexts = [torch.autocast(kind, enabled=False) for kind in device_types if kind != "meta"]

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _errors(actual: Any, expected: Any) -> Verification:
    left, left_structure = _pytree.tree_flatten(actual)
    right, right_structure = _pytree.tree_flatten(expected)
    if left_structure != right_structure:
        raise ValueError(f"the accelerated output has structure {left_structure}; the original's is {right_structure}")
    worst, relative, compared = 0.0, 0.0, 0
    for ours, theirs in zip(left, right, strict=True):
        if not isinstance(theirs, Tensor):
            continue
        if ours.shape != theirs.shape:
            raise ValueError(f"an accelerated output has shape {tuple(ours.shape)}; the original's is {tuple(theirs.shape)}")
        compared += 1
        if theirs.numel() == 0:
            continue
        if not theirs.is_floating_point():
            relative = relative if torch.equal(ours, theirs) else float("inf")
            continue
        error = (ours.double() - theirs.double()).abs().max().item()
        largest = theirs.double().abs().max().item()
        worst = max(worst, error) if error == error else float("inf")
        relative = max(relative, error / largest if largest else error) if error == error else float("inf")
    if compared == 0:
        raise ValueError("the model's output holds no tensor to compare")
    return Verification(worst, relative, relative <= RELATIVE_TOLERANCE)
