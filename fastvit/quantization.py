"""What FP8 costs in accuracy, found out on any device before a model is served in it: ``accuracy(model, inputs)``.

FP8 linears are simulated: inputs and weights are rounded to e4m3 exactly as the kernels round them and multiplied in float32
(``fastvit.reference_fp8``). Each part of each block is rounded alone, which gives its loss, 1 − cosine of the model's features
with and without. The errors of different parts are nearly independent, so losses add up; those that cost most for what they
compute stay in the model's own dtype until the rest fits the loss that is allowed, and that choice is measured once more.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from . import reference_fp8
from .integrations import fp8, swap
from .integrations.parts import PLAIN_LINEARS, Layout, find_layout
from .verification import eager_where_compiled, evaluated, observed

Part = tuple[str, str]  # (block name, "qkv" or "mlp")
Paths = dict[Part, tuple[str, ...]]  # the names of its linears


@dataclass(frozen=True)
class Accuracy:
    """What FP8 does to a model's output, and which parts of it stay as they are; ``accelerate(model, precision=this)`` obeys.

    ``losses``: (block, part) → 1 − feature cosine with that part alone in FP8. ``errors``: linear → relative error of its output
    (Frobenius norm, worst input). ``parts``: block → its parts in FP8. ``kept``: (block, part) → why it stays. ``skipped``: block
    → why none of it can. ``feature_cosine``: mean over output vectors, ``worst_cosine`` their least, both of the choice;
    ``full_cosine``: the mean with every part in FP8. ``top1_agreement``: share of outputs (B, classes) with the same largest
    entry, None for outputs of another rank. ``share``: of the blocks' linears, by multiplications, that are in FP8.
    """

    losses: dict[Part, float]
    errors: dict[str, float]
    parts: dict[str, frozenset[str]]
    kept: dict[Part, str]
    skipped: dict[str, str]
    feature_cosine: float
    worst_cosine: float
    full_cosine: float
    top1_agreement: float | None
    share: float
    min_cosine: float

    @property
    def passed(self) -> bool:
        return self.feature_cosine >= self.min_cosine

    def __str__(self) -> str:
        lines = [
            f"fastvit: FP8 simulated: feature cosine {self.feature_cosine:.5f} ({'at least' if self.passed else 'BELOW'}"
            f" {self.min_cosine}; worst vector {self.worst_cosine:.5f}), {self.full_cosine:.5f} with everything in FP8",
            f"in FP8: {self.share:.0%} of the blocks' linears by multiplications",
        ]
        if self.top1_agreement is not None:
            lines.append(f"top-1 agreement: {self.top1_agreement:.1%}")
        lines += [f"  {name}.{part}: stays, {reason}" for (name, part), reason in self.kept.items()]
        lines += [f"  {name}: stays, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    min_cosine: float = 0.999,
    features: Callable[[Any], Tensor] | None = None,
) -> Accuracy:
    """Simulates FP8 in ``model`` on ``inputs`` and chooses which parts of its blocks stay in its own dtype.

    The model is left as it was; it runs once on every input for each part (two a block), and a few times more.

    Args:
        model: any module with blocks that ``accelerate`` serves, accelerated or not, on any device.
        inputs: what the model is called with, several times: tensors, tuples of arguments, or dictionaries of keywords.
        min_cosine: the mean cosine of the features with and without FP8 that is to be reached.
        features: from the model's output to the features (..., C); default: its first floating-point tensor, of which one of
            four dimensions is an image's (B, C, H, W).

    Raises ``TypeError`` when ``model`` is no module, ``ValueError`` for no inputs, a ``min_cosine`` outside of 0 … 1, an output
    without a tensor, or a model without a block that FP8 can serve.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    if not 0 < min_cosine < 1:
        raise ValueError(f"min_cosine is {min_cosine}; expected a number between 0 and 1")
    batches = [inputs] if isinstance(inputs, Tensor | dict) else list(inputs)
    if not batches:
        raise ValueError("inputs is empty; expected tensors, tuples of arguments or dictionaries of keywords")
    with _own_forwards(model), evaluated(model), eager_where_compiled(model):
        paths, skipped = _parts(model)
        if not paths:
            found = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:1])
            raise ValueError(
                f"model has no block that FP8 can serve ({found or 'it has no transformer block of a known layout'})"
            )
        modules = dict(model.named_modules())
        sizes = {part: sum(modules[path].weight.numel() for path in names) for part, names in paths.items()}

        def run(parts: Iterable[Part], errors: dict[str, float] | None = None) -> list[Tensor]:
            with _rounded(model, paths, parts, errors):
                return _run(model, batches, features)

        errors: dict[str, float] = {}
        exact, full = run(()), run(paths, errors)
        losses = {part: _loss(run([part]), exact) for part in paths}
        chosen = sorted(paths, key=lambda part: losses[part] / sizes[part])
        while sum(losses[part] for part in chosen) > 1 - min_cosine:
            chosen.pop()
        result = run(chosen)
        while chosen and not _loss(result, exact) <= 1 - min_cosine:
            chosen.pop()
            result = run(chosen)
    cosines = torch.cat([_cosine(a, b) for a, b in zip(result, exact, strict=True)])
    total = sum(modules[f"{name}.{path}" if name else path].weight.numel() for name, path in _all_linears(model, paths))
    return Accuracy(
        losses,
        errors,
        {name: frozenset(p for n, p in chosen if n == name) for name in dict.fromkeys(n for n, _ in chosen)},
        {part: f"alone it costs {losses[part]:.1e} of cosine" for part in paths if part not in chosen},
        skipped,
        cosines.mean().item(),
        cosines.min().item(),
        1 - _loss(full, exact),
        _agreement(result, exact),
        sum(sizes[part] for part in chosen) / total,
        min_cosine,
    )


@contextmanager
def simulated(model: nn.Module, precision: "str | Accuracy" = "fp8") -> Iterator[nn.Module]:
    """``with simulated(model): model(x)`` gives what FP8 would, on any device: for measuring by a metric of one's own.

    ``precision``: "fp8" rounds every part that FP8 serves, an ``Accuracy`` those that it chose. Blocks run their own forwards.
    """
    with _own_forwards(model):
        paths, _ = _parts(model)
        chosen = [part for part in paths if isinstance(precision, str) or part[1] in precision.parts.get(part[0], ())]
        with _rounded(model, paths, chosen):
            yield model


@contextmanager
def _own_forwards(model: nn.Module) -> Iterator[None]:
    served = {m: m.__dict__[swap.ATTRIBUTE] for m in model.modules() if swap.is_served(m) and swap.ATTRIBUTE in m.__dict__}
    try:
        for module in served:
            swap.release(module)
        yield
    finally:
        for module, serving in served.items():
            swap.serve(module, serving)


def _layouts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Layout | str]]:
    done: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in done):
            continue
        layout: Any = find_layout(module, own_blocks=True)
        if layout is not None:
            done.append(name)
            yield name, module, layout


def _parts(model: nn.Module) -> tuple[Paths, dict[str, str]]:
    """(the parts that can be in FP8, block → why it has none)."""
    paths: Paths = {}
    skipped: dict[str, str] = {}
    for name, module, layout in _layouts(model):
        reason = layout if isinstance(layout, str) else fp8.why_not(module, layout)
        if reason is not None or isinstance(layout, str):
            skipped[name] = str(reason)
            continue
        for part in fp8.PARTS:
            paths[name, part] = tuple(f"{name}.{path}" if name else path for path in fp8.linears(layout, part))
    return paths, skipped


def _all_linears(model: nn.Module, paths: Paths) -> Iterator[tuple[str, str]]:
    """(block, path) of every linear of the blocks that have parts, those that always stay included."""
    for name in dict.fromkeys(name for name, _ in paths):
        for path, module in model.get_submodule(name).named_modules():
            if type(module) in PLAIN_LINEARS:
                yield name, path


@contextmanager
def _rounded(model: nn.Module, paths: Paths, parts: Iterable[Part], errors: dict[str, float] | None = None) -> Iterator[None]:
    """Within it the linears of ``parts`` compute in simulated FP8; ``errors`` takes the relative errors of their outputs."""
    after_activation = {names[-1] for (_, part), names in paths.items() if part == "mlp"}
    linears = {path: model.get_submodule(path) for part in parts for path in paths[part]}

    def rounded(name: str, module: Any, forward: Callable, args: tuple, kwargs: dict) -> Any:
        block = reference_fp8.BLOCK if name in after_activation else None
        out = reference_fp8.linear(args[0], module.weight, module.bias, block=block).to(module.weight.dtype)
        if errors is not None:
            exact = forward(*args, **kwargs).float()
            error = ((out - exact).norm() / exact.norm().clamp(min=1e-30)).item()
            errors[name] = max(error, errors.get(name, 0.0))
        return out

    with observed(model, linears, rounded):
        yield


def _run(model: nn.Module, batches: list, features: Callable | None) -> list[Tensor]:
    found = []
    for batch in batches:
        arguments = batch if isinstance(batch, tuple) else () if isinstance(batch, dict) else (batch,)
        output = model(*arguments, **(batch if isinstance(batch, dict) else {}))
        found.append(_features(output, features).cpu())
    return found


def _features(output: Any, features: Callable | None) -> Tensor:
    if features is not None:
        return features(output)
    tensors = [t for t in _pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point() and t.dim()]
    if not tensors:
        raise ValueError("the model's output holds no floating-point tensor; say with features= where its features are")
    return tensors[0].movedim(1, -1) if tensors[0].dim() == 4 else tensors[0]


def _cosine(actual: Tensor, exact: Tensor) -> Tensor:
    return F.cosine_similarity(actual.double(), exact.double(), dim=-1).flatten()


def _loss(actual: list[Tensor], exact: list[Tensor]) -> float:
    return 1 - torch.cat([_cosine(a, b) for a, b in zip(actual, exact, strict=True)]).mean().item()


def _agreement(actual: list[Tensor], exact: list[Tensor]) -> float | None:
    if any(tensor.dim() != 2 for tensor in exact):
        return None
    return torch.cat([a.argmax(1) == b.argmax(1) for a, b in zip(actual, exact, strict=True)]).double().mean().item()
