"""What 8-bit linears cost in accuracy, found out on any device before a model is served in them: ``accuracy(model, inputs)``.

They are simulated (``fastvit.simulation``). Each part of each block is rounded alone, which gives its loss, 1 − cosine of the
model's features with and without. The errors of different parts are nearly independent, so losses add up; those that cost most
for what they compute stay in the model's own dtype until the rest fits the loss that is allowed, and that choice is measured once
more. Pictures differ in what they lose: it is the upper end of the mean's confidence interval that has to fit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from . import agreement, reference_quantized, simulation
from .integrations.quantized import CalibratedWeight
from .simulation import Part
from .verification import eager_where_compiled, evaluated

INPUTS = "tensors, tuples of arguments or mappings of keywords"


@dataclass(frozen=True)
class Accuracy:
    """What 8 bits do to a model's output, and which parts of it stay as they are; ``accelerate(model, precision=this)`` obeys.

    ``precision``: "fp8" or "int8". ``losses``: (block, part) → 1 − feature cosine with that part alone in 8 bits. ``errors``:
    linear → relative error of its output (Frobenius norm, worst input). ``parts``: block → its parts in 8 bits. ``kept``: (block,
    part) → why it stays. ``skipped``: block → why none of it can. ``feature_cosine``: mean over output vectors, ``worst_cosine``
    their least, both of the choice; ``cosine_bound``: what the mean over pictures like these is above with 95 % confidence, None
    for one picture; a little too high, since the same pictures made the choice. ``full_cosine``: the mean with every part in 8
    bits. ``top1_agreement``: share of pictures of the same class with and without: logits have the largest entry's, others, where
    labels were given, their nearest neighbours', else None; one that is NaN agrees with none. ``top1``, ``top1_exact``: share of
    right classes with 8 bits and without, None without labels.
    ``share``: of the blocks' linears, by multiplications, that are in 8 bits.
    ``pictures``: how many there were. ``calibrated``: linear → what its weight is rounded to, of a calibration.
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
    min_cosine: float | None
    pictures: int
    calibrated: dict[str, CalibratedWeight] = field(default_factory=dict, repr=False, compare=False)
    top1: float | None = None
    top1_exact: float | None = None

    @property
    def passed(self) -> bool:
        """Whether ``cosine_bound``, of one picture its own cosine, reaches ``min_cosine``, if there is one."""
        return (
            self.min_cosine is None
            or (self.feature_cosine if self.cosine_bound is None else self.cosine_bound) >= self.min_cosine
        )

    def check_model(self, model: nn.Module) -> None:
        """Raises ``ValueError`` where ``model`` lacks blocks that were measured, or has other weights than were calibrated."""
        modules = dict(model.named_modules())
        absent = next((block for block in (*(block for block, _ in self.losses), *self.parts) if block not in modules), None)
        if absent is not None:
            raise ValueError(
                f"precision was measured on another model: this one has no block {absent!r};"
                " give accuracy and accelerate the same module"
            )
        for name, weight in self.calibrated.items():
            linear = modules.get(name)
            now, bias = getattr(linear, "weight", None), getattr(linear, "bias", None)
            if not isinstance(now, Tensor) or not now.is_meta:
                weight.check(name, now, bias)

    def calibrated_in(self, block: str) -> dict[str, CalibratedWeight]:
        """Path within the block → what the linear's weight is rounded to."""
        prefix = f"{block}." if block else ""
        return {name.removeprefix(prefix): w for name, w in self.calibrated.items() if name.startswith(prefix)}

    def __str__(self) -> str:
        name = self.precision.upper()
        bound = (
            "one picture, which says nothing of others"
            if self.cosine_bound is None
            else f"of {self.pictures} pictures; of others like them above {self.cosine_bound:.5f} with 95 % confidence"
        )
        asked = "" if self.min_cosine is None else f" {'reaches' if self.passed else 'MISSES'} {self.min_cosine};"
        lines = [
            f"fastvit: {name} simulated: feature cosine {self.feature_cosine:.5f} ({bound};{asked}"
            f" worst vector {self.worst_cosine:.5f}),"
            f" {self.full_cosine:.5f} with everything in {name}",
            f"in {name}: {self.share:.0%} of the blocks' linears by multiplications",
        ]
        if self.top1_agreement is not None:
            right = "" if self.top1 is None else f" ({self.top1:.1%} right, {self.top1_exact:.1%} without)"
            lines.append(f"top-1 agreement: {self.top1_agreement:.1%}{right}")
        if self.calibrated:
            lines.append("weights are rounded for the inputs of the calibration")
        lines += [f"  {name}.{part}: stays, {reason}" for (name, part), reason in self.kept.items()]
        lines += [f"  {name}: stays, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


@torch.no_grad()
def accuracy(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    precision: str = "fp8",
    min_cosine: float | None = 0.999,
    features: Callable[[Any], Tensor] | None = None,
    promote: int | None = None,
    calibration: Iterable[Any] | None = None,
    labels: Sequence[int] | Tensor | None = None,
) -> Accuracy:
    """Simulates 8-bit linears in ``model`` on ``inputs`` and chooses which parts of its blocks stay in its own dtype.

    The model is left as it was; it runs once on every input for each part (two a block), and a few times more.

    Args:
        model: any module with blocks that ``accelerate`` serves, or fastvit's own, accelerated or not, on any device.
        inputs: what the model is called with, several times: tensors, tuples of arguments, or mappings of keywords. The more
            pictures they hold, the narrower the interval and the more can be chosen; a handful at least.
        precision: "fp8" or "int8".
        min_cosine: the mean cosine of the features with and without that is to be reached on pictures like these. None: no part
            stays and none runs alone.
        features: from the model's output to the features (B, ..., C); default: its first floating-point tensor, of which one of
            four dimensions is an image's (B, C, H, W).
        promote: None sums in float32. Of FP8 a number sums as Hopper's tensor cores do, and adds what they sum up to in float32
            after every so many products, 0: never. Takes some fifty times as long.
        calibration: more such inputs, other pictures than those of ``inputs``, some thousands of tokens. Weights are then not
            rounded to the nearest, but so that the products of inputs like these err least (``quantize_fitted`` of
            ``fastvit.reference_quantized``, Frantar et al. 2022), which takes nothing where they are used. Changing those weights
            or their biases afterwards is an error where they are used; changing a norm before them is none, but costs accuracy.
        labels: the class, from 0 on, of every picture of ``inputs``, for ``top1``. The model's own output (B, classes) is logits
            where it is named so (Hugging Face), or where the model's ``head``, ``heads``, ``classifier`` or ``fc`` holds a linear
            to as many. What ``features`` chooses, embeddings and tokens take their class by their nearest neighbours among these
            pictures' exact features, each the mean over its places: 20, or as many others as the smallest class has.

    Raises ``TypeError`` when ``model`` is no module or inputs are not of those kinds, ``ValueError`` for no inputs or no picture
    in them, an unknown ``precision``, a ``promote`` that is no integer, negative or not FP8's, a ``min_cosine`` that is no number
    within 0 … 1, ``labels`` that are not an integer a picture or beyond the classes of logits, or, for nearest neighbours, fewer
    than two classes or a class of one picture, a calibration that gives infinite or NaN, an output without a tensor, or a model
    without a block that 8-bit linears can serve.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    dtype = _format(precision, promote)
    if min_cosine is not None and not (isinstance(min_cosine, int | float) and 0 < min_cosine < 1):
        raise ValueError(f"min_cosine is {min_cosine!r}; expected a number between 0 and 1")
    batches = _batches("inputs", inputs)
    with simulation.own_forwards(model), evaluated(model), eager_where_compiled(model):
        rounding = simulation.find(model, dtype)
        if not rounding.paths:
            found = "; ".join(f"{name}: {reason}" for name, reason in list(rounding.skipped.items())[:1])
            raise ValueError(
                f"model has no block that 8-bit linears can serve ({found or 'it has no transformer block of a known layout'})"
            )
        _calibrate(rounding, calibration)

        def run(parts: Iterable[Part], errors: dict[str, float] | None = None) -> list[Tensor]:
            found = []
            with rounding.applied(parts, promote, errors):
                for output in simulation.outputs(model, batches):
                    found.append(agreement.features(output, features).cpu())
                    are_logits.append(agreement.are_logits(model, output, features))
            return found

        are_logits: list[bool] = []
        errors: dict[str, float] = {}
        exact = run(())
        logits = all(are_logits)
        given = _labels(labels, exact, logits)
        full = run(rounding.paths, errors)
        losses: dict[Part, Tensor] = {}
        chosen, result = list(rounding.paths), full
        if min_cosine is not None:
            losses = {part: agreement.losses(run([part]), exact) for part in rounding.paths}
            chosen.sort(key=lambda part: losses[part].mean().item() / rounding.size(part))
            while chosen and not agreement.upper(torch.stack([losses[part] for part in chosen]).sum(0)) <= 1 - min_cosine:
                chosen.pop()
            result = run(chosen)
            while chosen and not agreement.upper(agreement.losses(result, exact)) <= 1 - min_cosine:
                chosen.pop()
                result = run(chosen)
    cosines = torch.cat([agreement.cosine(a, b).flatten() for a, b in zip(result, exact, strict=True)])
    each = agreement.losses(result, exact)
    means = {part: loss.mean().item() for part, loss in losses.items()}
    said, meant = (agreement.classes(outputs, exact, given, logits) for outputs in (result, exact))
    paths = {path for part in chosen for path in rounding.paths[part]}
    return Accuracy(
        precision=precision,
        losses=means,
        errors=errors,
        parts={name: frozenset(p for n, p in chosen if n == name) for name in dict.fromkeys(n for n, _ in chosen)},
        kept={part: f"alone it costs {means[part]:.1e} of cosine" for part in losses if part not in chosen},
        skipped=rounding.skipped,
        feature_cosine=cosines.mean().item(),
        worst_cosine=cosines.min().item(),
        cosine_bound=1 - agreement.upper(each) if len(each) > 1 else None,
        full_cosine=1 - agreement.losses(full, exact).mean().item(),
        top1_agreement=agreement.share(said, meant),
        share=rounding.share(chosen),
        min_cosine=min_cosine,
        pictures=len(each),
        calibrated={path: weight for path, weight in rounding.calibrated.items() if path in paths},
        top1=agreement.share(said, given),
        top1_exact=agreement.share(meant, given),
    )


@contextmanager
def simulated(
    model: nn.Module,
    precision: "str | Accuracy" = "fp8",
    *,
    promote: int | None = None,
    calibration: Iterable[Any] | None = None,
) -> Iterator[nn.Module]:
    """``with simulated(model): model(x)`` gives what 8-bit linears would, on any device: for measuring by a metric of one's own.

    ``precision``: "fp8" or "int8" rounds every part that can be, an ``Accuracy`` those that it chose, as it calibrated them.
    Blocks run their own forwards. ``promote``, ``calibration``: as in ``accuracy``.

    Raises ``ValueError`` for another ``precision`` or ``promote``, an ``Accuracy`` that was measured on another model, or one and
    a calibration.
    """
    found = precision if isinstance(precision, Accuracy) else None
    if found is not None:
        found.check_model(model)
        if calibration is not None:
            raise ValueError("calibration is given with an Accuracy, which has its own; expected one of them")
    dtype = _format(precision if found is None else found.precision, promote)
    with simulation.own_forwards(model):
        rounding = simulation.find(model, dtype)
        _calibrate(rounding, calibration)
        chosen = list(rounding.paths)
        if found is not None:
            rounding.calibrated = found.calibrated
            chosen = [(block, part) for block, part in chosen if part in found.parts.get(block, ())]
        with rounding.applied(chosen, promote):
            yield model


@torch.no_grad()
def _calibrate(rounding: simulation.Rounding, inputs: Iterable[Any] | None) -> None:
    if inputs is not None:
        batches = _batches("calibration", inputs)
        with evaluated(rounding.model), eager_where_compiled(rounding.model):
            rounding.calibrate(lambda: [None for _ in simulation.outputs(rounding.model, batches)])


def _batches(name: str, inputs: Any) -> list:
    if not isinstance(inputs, Iterable):
        raise TypeError(f"{name} is {type(inputs).__name__}; expected {INPUTS}")
    batches = [inputs] if isinstance(inputs, Tensor | Mapping) else list(inputs)
    if not batches:
        raise ValueError(f"{name} is empty; expected {INPUTS}")
    for batch in batches:
        if not isinstance(batch, Tensor | tuple | Mapping):
            raise TypeError(f"{name} holds a {type(batch).__name__}; expected {INPUTS}")
        first = next(iter(_pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)), None)
        if isinstance(first, Tensor) and not first.numel():
            raise ValueError(f"{name} holds a tensor {tuple(first.shape)}; expected a picture or more in each")
    return batches


def _labels(labels: Sequence[int] | Tensor | None, exact: list[Tensor], logits: bool) -> Tensor | None:
    if labels is None:
        return None
    pictures = sum(map(len, exact))
    try:
        found = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"labels are {labels!r:.80}; expected an integer from 0 on for each of {pictures} pictures") from None
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if found.shape != (pictures,) or not whole or found.long().min() < 0:
        raise ValueError(
            f"labels are {tuple(found.shape)} in {found.dtype}; expected an integer from 0 on for each of {pictures} pictures"
        )
    found = found.long()
    if not logits:
        agreement.neighbours(found)
    elif found.max() >= exact[0].shape[1]:
        raise ValueError(
            f"labels go up to {found.max()}; expected them below {exact[0].shape[1]}, the classes of the model's logits"
        )
    return found


def _format(precision: Any, promote: int | None) -> torch.dtype:
    if not isinstance(precision, str) or precision not in reference_quantized.FORMATS:
        names = " or ".join(map(repr, reference_quantized.FORMATS))
        raise ValueError(f"precision is {precision!r}; expected {names}")
    if promote is not None and (precision != "fp8" or type(promote) is not int or promote < 0):
        raise ValueError(f"promote is {promote} for {precision!r}; expected None, or for 'fp8' a number of products from 0 on")
    return reference_quantized.FORMATS[precision]
