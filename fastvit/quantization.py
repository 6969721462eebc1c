"""What 8-bit linears cost in accuracy, found out on any device before a model is served in them: ``accuracy(model, inputs)``.

They are simulated: inputs and weights are rounded to e4m3 or int8 exactly as the kernels round them and multiplied in float32,
or, far slower, with sums like those of Hopper's tensor cores (``fastvit.reference_quantized``). Each part of each block is
rounded alone, which gives its loss, 1 − cosine of the model's features with and without. The errors of different parts are
nearly independent, so losses add up; those that cost most for what they compute stay in the model's own dtype until the rest fits
the loss that is allowed, and that choice is measured once more. Pictures differ in what they lose: it is the upper end of the
mean's confidence interval that has to fit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

from . import reference_quantized
from .integrations import quantized, swap
from .integrations.matching import PLAIN_LINEARS, find_layout
from .integrations.parts import Layout
from .verification import eager_where_compiled, evaluated, observed

INPUTS = "tensors, tuples of arguments or mappings of keywords"
Part = tuple[str, str]  # (block name, "qkv" or "mlp")
Paths = dict[Part, tuple[str, ...]]  # the names of its linears
Norms = dict[str, str]  # a linear after an activation without a gate → the norm before its MLP
T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)  # Student's t, 95 %, one side, 1 to 9 degrees of freedom


@dataclass(frozen=True)
class Accuracy:
    """What 8 bits do to a model's output, and which parts of it stay as they are; ``accelerate(model, precision=this)`` obeys.

    ``precision``: "fp8" or "int8". ``losses``: (block, part) → 1 − feature cosine with that part alone in 8 bits. ``errors``:
    linear → relative error of its output (Frobenius norm, worst input). ``parts``: block → its parts in 8 bits. ``kept``: (block,
    part) → why it stays. ``skipped``: block → why none of it can. ``feature_cosine``: mean over output vectors, ``worst_cosine``
    their least, both of the choice; ``cosine_bound``: what the mean over pictures like these is above with 95 % confidence, None
    for one picture; a little too high, since the same pictures made the choice. ``full_cosine``: the mean with every part in 8
    bits. ``top1_agreement``: share of outputs (B, classes) with the same largest entry, None for outputs of another rank.
    ``share``: of the blocks' linears, by multiplications, that are in 8 bits. ``pictures``: how many there were.
    """

    precision: str
    losses: dict[Part, float]
    errors: dict[str, float]
    parts: dict[str, frozenset[str]]
    kept: dict[Part, str]
    skipped: dict[str, str]
    feature_cosine: float
    worst_cosine: float
    cosine_bound: float | None
    full_cosine: float
    top1_agreement: float | None
    share: float
    min_cosine: float
    pictures: int

    @property
    def passed(self) -> bool:
        """Whether ``cosine_bound`` reaches ``min_cosine``; of one picture, whether its own cosine does."""
        return (self.feature_cosine if self.cosine_bound is None else self.cosine_bound) >= self.min_cosine

    def check_model(self, model: nn.Module) -> None:
        """Raises ``ValueError`` where ``model`` does not have the blocks that were measured."""
        modules = dict(model.named_modules())
        absent = next((block for block, _ in self.losses if block not in modules), None)
        if absent is not None:
            raise ValueError(
                f"precision was measured on another model: this one has no block {absent!r};"
                " give accuracy and accelerate the same module"
            )

    def __str__(self) -> str:
        name = self.precision.upper()
        bound = (
            "one picture, which says nothing of others"
            if self.cosine_bound is None
            else f"of {self.pictures} pictures; of others like them above {self.cosine_bound:.5f} with 95 % confidence"
        )
        lines = [
            f"fastvit: {name} simulated: feature cosine {self.feature_cosine:.5f} ({bound};"
            f" {'reaches' if self.passed else 'MISSES'} {self.min_cosine}; worst vector {self.worst_cosine:.5f}),"
            f" {self.full_cosine:.5f} with everything in {name}",
            f"in {name}: {self.share:.0%} of the blocks' linears by multiplications",
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
    precision: str = "fp8",
    min_cosine: float = 0.999,
    features: Callable[[Any], Tensor] | None = None,
    promote: int | None = None,
) -> Accuracy:
    """Simulates 8-bit linears in ``model`` on ``inputs`` and chooses which parts of its blocks stay in its own dtype.

    The model is left as it was; it runs once on every input for each part (two a block), and a few times more.

    Args:
        model: any module with blocks that ``accelerate`` serves, or fastvit's own, accelerated or not, on any device.
        inputs: what the model is called with, several times: tensors, tuples of arguments, or mappings of keywords. The more
            pictures they hold, the narrower the interval and the more can be chosen; a handful at least.
        precision: "fp8" or "int8".
        min_cosine: the mean cosine of the features with and without that is to be reached on pictures like these.
        features: from the model's output to the features (B, ..., C); default: its first floating-point tensor, of which one of
            four dimensions is an image's (B, C, H, W).
        promote: None sums in float32. Of FP8 a number sums as Hopper's tensor cores do, and adds what they sum up to in float32
            after every so many products, 0: never. Takes some fifty times as long.

    Raises ``TypeError`` when ``model`` is no module, ``ValueError`` for no inputs, an unknown ``precision``, a ``promote`` that
    is negative or not FP8's, a ``min_cosine`` outside of 0 … 1, an output without a tensor, or a model without a block that
    8-bit linears can serve.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    dtype = _format(precision, promote)
    if not 0 < min_cosine < 1:
        raise ValueError(f"min_cosine is {min_cosine}; expected a number between 0 and 1")
    if not isinstance(inputs, Iterable):
        raise TypeError(f"inputs is {type(inputs).__name__}; expected {INPUTS}")
    batches = [inputs] if isinstance(inputs, Tensor | Mapping) else list(inputs)
    if not batches:
        raise ValueError(f"inputs is empty; expected {INPUTS}")
    with _own_forwards(model), evaluated(model), eager_where_compiled(model):
        paths, skipped, norms = _parts(model)
        if not paths:
            found = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:1])
            raise ValueError(
                f"model has no block that 8-bit linears can serve ({found or 'it has no transformer block of a known layout'})"
            )
        modules = dict(model.named_modules())
        sizes = {part: sum(modules[path].weight.numel() for path in names) for part, names in paths.items()}

        def run(parts: Iterable[Part], errors: dict[str, float] | None = None) -> list[Tensor]:
            with _rounded(model, paths, norms, parts, dtype, promote, errors):
                return _run(model, batches, features)

        errors: dict[str, float] = {}
        exact, full = run(()), run(paths, errors)
        losses = {part: _losses(run([part]), exact) for part in paths}
        chosen = sorted(paths, key=lambda part: losses[part].mean().item() / sizes[part])
        while chosen and not _upper(torch.stack([losses[part] for part in chosen]).sum(0)) <= 1 - min_cosine:
            chosen.pop()
        result = run(chosen)
        while chosen and not _upper(_losses(result, exact)) <= 1 - min_cosine:
            chosen.pop()
            result = run(chosen)
    cosines = torch.cat([_cosine(a, b).flatten() for a, b in zip(result, exact, strict=True)])
    each = _losses(result, exact)
    total = sum(modules[f"{name}.{path}" if name else path].weight.numel() for name, path in _all_linears(model, paths))
    means = {part: loss.mean().item() for part, loss in losses.items()}
    return Accuracy(
        precision=precision,
        losses=means,
        errors=errors,
        parts={name: frozenset(p for n, p in chosen if n == name) for name in dict.fromkeys(n for n, _ in chosen)},
        kept={part: f"alone it costs {means[part]:.1e} of cosine" for part in paths if part not in chosen},
        skipped=skipped,
        feature_cosine=cosines.mean().item(),
        worst_cosine=cosines.min().item(),
        cosine_bound=1 - _upper(each) if len(each) > 1 else None,
        full_cosine=1 - _losses(full, exact).mean().item(),
        top1_agreement=_agreement(result, exact),
        share=sum(sizes[part] for part in chosen) / total,
        min_cosine=min_cosine,
        pictures=len(each),
    )


@contextmanager
def simulated(model: nn.Module, precision: "str | Accuracy" = "fp8", *, promote: int | None = None) -> Iterator[nn.Module]:
    """``with simulated(model): model(x)`` gives what 8-bit linears would, on any device: for measuring by a metric of one's own.

    ``precision``: "fp8" or "int8" rounds every part that can be, an ``Accuracy`` those that it chose. Blocks run their own
    forwards. ``promote``: as in ``accuracy``.

    Raises ``ValueError`` for another ``precision`` or ``promote``, or an ``Accuracy`` that was measured on another model.
    """
    if isinstance(precision, Accuracy):
        precision.check_model(model)
    dtype = _format(precision.precision if isinstance(precision, Accuracy) else precision, promote)
    with _own_forwards(model):
        paths, _, norms = _parts(model)
        chosen = [part for part in paths if isinstance(precision, str) or part[1] in precision.parts.get(part[0], ())]
        with _rounded(model, paths, norms, chosen, dtype, promote):
            yield model


def _format(precision: str, promote: int | None) -> torch.dtype:
    if not isinstance(precision, str) or precision not in reference_quantized.FORMATS:
        names = " or ".join(map(repr, reference_quantized.FORMATS))
        raise ValueError(f"precision is {precision!r}; expected {names}")
    if promote is not None and (precision != "fp8" or promote < 0):
        raise ValueError(f"promote is {promote} for {precision!r}; expected None, or for 'fp8' a number of products from 0 on")
    return reference_quantized.FORMATS[precision]


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


def _parts(model: nn.Module) -> tuple[Paths, dict[str, str], Norms]:
    """(the parts that can be in FP8, block → why it has none, norms before MLPs)."""
    paths: Paths = {}
    norms: Norms = {}
    skipped: dict[str, str] = {}
    for name, module, layout in _layouts(model):
        reason = layout if isinstance(layout, str) else quantized.why_not(module, layout)
        if reason is not None or isinstance(layout, str):
            skipped[name] = str(reason)
            continue
        for part in quantized.PARTS:
            paths[name, part] = tuple(f"{name}.{path}" if name else path for path in quantized.linears(layout, part))
        if layout.gating is None:
            norms[paths[name, "mlp"][-1]] = f"{name}.{layout.norms.after}" if name else layout.norms.after
    return paths, skipped, norms


def _all_linears(model: nn.Module, paths: Paths) -> Iterator[tuple[str, str]]:
    """(block, path) of every linear of the blocks that have parts, those that always stay included."""
    for name in dict.fromkeys(name for name, _ in paths):
        for path, module in model.get_submodule(name).named_modules():
            if type(module) in PLAIN_LINEARS:
                yield name, path


@contextmanager
def _rounded(
    model: nn.Module,
    paths: Paths,
    norms: Norms,
    parts: Iterable[Part],
    dtype: torch.dtype,
    promote: int | None,
    errors: dict[str, float] | None = None,
) -> Iterator[None]:
    """Within it the linears of ``parts`` compute in simulated 8 bits; ``errors`` takes the relative errors of their outputs."""
    first = {names[-1]: names[0] for (_, part), names in paths.items() if part == "mlp"}
    linears = {path: model.get_submodule(path) for part in parts for path in paths[part]}

    def rounded(name: str, module: Any, forward: Callable, args: tuple, kwargs: dict) -> Any:
        block = given = None
        if name in norms and dtype == reference_quantized.E4M3:
            fc1, norm = (cast(Any, model.get_submodule(path)) for path in (first[name], norms[name]))
            given = reference_quantized.hidden_scale(fc1.weight, fc1.bias, norm.weight, norm.bias)
        if name in first and given is None:
            block = reference_quantized.BLOCK
        out = reference_quantized.linear(
            args[0], module.weight, module.bias, dtype=dtype, block=block, given=given, promote=promote
        ).to(module.weight.dtype)
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
        arguments = batch if isinstance(batch, tuple) else () if isinstance(batch, Mapping) else (batch,)
        output = model(*arguments, **(batch if isinstance(batch, Mapping) else {}))
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
    found = F.cosine_similarity(actual.double(), exact.double(), dim=-1)
    return found.masked_fill((actual == exact).all(-1), 1.0)  # of two zeros as well


def _losses(actual: list[Tensor], exact: list[Tensor]) -> Tensor:
    """1 − mean cosine of every picture."""
    cosines = [_cosine(a, b) for a, b in zip(actual, exact, strict=True)]
    return torch.cat([1 - (c.flatten(1).mean(1) if c.dim() > 1 else c.view(-1)) for c in cosines])


def _upper(losses: Tensor) -> float:
    """What the mean of losses like these is below with 95 % confidence, by Student's t; of one, itself."""
    count = len(losses)
    if count == 1:
        return losses.item()
    t = T_95[count - 2] if count <= len(T_95) + 1 else 1.645 + 1.65 / (count - 1)
    return (losses.mean() + t * losses.std() / count**0.5).item()


def _agreement(actual: list[Tensor], exact: list[Tensor]) -> float | None:
    if any(tensor.dim() != 2 for tensor in exact):
        return None
    return torch.cat([a.argmax(1) == b.argmax(1) for a, b in zip(actual, exact, strict=True)]).double().mean().item()
