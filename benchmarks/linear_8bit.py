"""The linears of a block in FP8 and INT8, on a GPU: checked against the float64 product of the rounded operands, then timed.

Three kinds, as ``accelerate(precision=...)`` launches them: qkv; fc1 with GELU, its result rounded again; fc2 on what fc1 gave,
with the residual. Peers: ``fastvit_bf16`` and ``cublas_bf16``, the same linear unrounded; ``scaled_mm`` (FP8) and ``int_mm``
(INT8), PyTorch's own products with a scale a row of both operands, and what PyTorch does about it after them. ``floor_ms``
is at twice the rate of a bf16 product.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvit
from fastvit import functional, reference_quantized
from fastvit.ops import quantized

from . import accuracy, measure, results
from .settings import Settings, Task

KINDS = ("qkv", "fc1", "fc2")
ROUNDED_ERROR = {"fp8": 0.04, "int8": 0.02}  # ‖rounded − exact‖ / ‖exact‖ of a hidden layer: its own rounding errs by less
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """``rows`` tokens of ``channels``; ``kind``: which linear of the block."""

    name: str
    rows: int
    channels: int
    kind: str
    precision: str

    @property
    def sizes(self) -> tuple[int, int]:
        """(inputs, outputs)."""
        inputs, outputs = {"qkv": (1, 3), "fc1": (1, 4), "fc2": (4, 1)}[self.kind]
        return inputs * self.channels, outputs * self.channels

    @property
    def flops(self) -> float:
        k, n = self.sizes
        return 2.0 * self.rows * k * n

    @property
    def bytes(self) -> float:
        """Operands once; what comes out in bf16, or rounded after fc1; fc2's residual."""
        k, n = self.sizes
        return self.rows * k + k * n + self.rows * n * {"qkv": 2, "fc1": 1, "fc2": 4}[self.kind]


CASES = tuple(
    Case(f"{model} {kind}", rows, channels, kind, precision)
    for precision in quantized.FORMATS
    for model, rows, channels in (
        ("ViT-L/16 224, batch 64", 64 * 197, 1024),
        ("ViT-H/14 224, batch 64", 64 * 257, 1280),
        ("SAM-H", 4096, 1280),
        ("SAM-H, batch 8", 8 * 4096, 1280),
    )
    for kind in KINDS
)


def tasks(settings: Settings) -> Iterator[Task]:
    """On a dry run one size in each format, by the definition."""
    for case in CASES:
        sized = replace(case, rows=5, channels=32) if settings.dry else case
        if settings.dry and not case.name.startswith("ViT-L"):
            continue
        row = results.new_row(case.name, "linear_8bit", "forward", case.precision, [sized.rows, *sized.sizes])
        yield Task(row, functools.partial(run, sized), contestants=tuple(_peers(case)))


def _peers(case: Case) -> dict[str, Callable[["Operands"], Call]]:
    theirs = {"fp8": ("scaled_mm", _scaled_mm), "int8": ("int_mm", _int_mm)}[case.precision]
    return {"fastvit_bf16": _bf16(functional.linear), "cublas_bf16": _bf16(_linear), theirs[0]: theirs[1]}


class Operands:
    """One set of inputs: x, weight, bias and residual in bf16, and what of them is rounded."""

    def __init__(self, case: Case, device: str):
        self.case, self.form = case, quantized.FORMATS[case.precision]
        (k, n), half = case.sizes, {"dtype": torch.bfloat16, "device": device}
        self.x, self.weight = torch.randn(case.rows, k, **half), torch.randn(n, k, **half) / k**0.5
        self.bias = torch.randn(n, **half)
        self.residual = torch.randn(case.rows, n, **half) if case.kind == "fc2" else None
        self.activation = "gelu" if case.kind == "fc1" else None
        self.block = reference_quantized.BLOCK if case.kind == "fc2" and case.precision == "int8" else None
        self.rounded_weight = quantized.quantize_weight(self.weight, self.form, self.bias)
        self.given = None  # the scale of a whole hidden layer in FP8
        if case.precision == "fp8" and case.kind == "fc1":
            self.x = F.layer_norm(self.x, (k,))
            self.given = reference_quantized.hidden_scale(self.weight, self.bias, None, None)
        if case.precision == "fp8" and case.kind == "fc2":
            self.given = self.x.abs().amax().float().view(1) / 64  # a bound seven times what there is
        self.rounded = by_definition(self.x, case.precision, self.block, self.given if case.kind == "fc2" else None)

    def exact(self, rounded: bool) -> Tensor:
        """In float64, of the rounded operands or of those in bf16."""
        x, weight = self.x.double(), self.weight.double()
        if rounded:
            x = _dequantized(self.rounded).double()
            weight = self.rounded_weight.values.double() * self.rounded_weight.scale[:, None].double()
        return self.finish(F.linear(x, weight, self.bias.double()))

    def finish(self, product: Tensor) -> Tensor:
        out = F.gelu(product) if self.activation else product
        return out if self.residual is None else out + self.residual.to(out.dtype)

    def ours(self) -> Call:
        """What a block launches."""
        if self.case.kind == "fc1":
            return lambda: quantized.linear_quantized(  # type: ignore[return-value]
                self.rounded, self.rounded_weight, "gelu", self.given
            )
        return lambda: quantized.linear(self.rounded, self.rounded_weight, torch.bfloat16, residual=self.residual)


def _dequantized(rounded: quantized.Quantized) -> Tensor:
    if rounded.scale.dim() == 2:
        return reference_quantized.dequantize(rounded.values, rounded.scale.t(), reference_quantized.BLOCK)
    return reference_quantized.dequantize(rounded.values, rounded.scale[:, None])


def by_definition(x: Tensor, precision: str, block: int | None = None, given: Tensor | None = None) -> quantized.Quantized:
    """x (rows, columns) rounded as the kernels round, scales as they want them."""
    values, scale = reference_quantized.quantize(x, quantized.FORMATS[precision], block, given)
    if given is not None:
        return quantized.Quantized(values, given)
    return quantized.Quantized(values, scale.t().contiguous() if block else scale.flatten())


def _linear(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str | None) -> Tensor:
    out = F.linear(x, weight, bias)
    return F.gelu(out) if activation else out


def _bf16(function: Callable[..., Tensor]) -> Callable[[Operands], Call]:
    def build(on: Operands) -> Call:
        def call() -> Tensor:
            out = function(on.x, on.weight, on.bias, activation=on.activation)
            return out if on.residual is None else out + on.residual

        return call

    return build


def _scales(on: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """(values, scale a row, weight's scale), as products with one scale a row want them."""
    values, scale = reference_quantized.quantize(on.x, on.form)
    return values, scale, on.rounded_weight.scale[None, :].contiguous()


def _scaled_mm(on: Operands) -> Call:
    values, scale, weight_scale = _scales(on)
    options: dict[str, Any] = {"scale_a": scale, "scale_b": weight_scale, "bias": on.bias, "out_dtype": torch.bfloat16}
    weight = on.rounded_weight.values.t()
    return lambda: on.finish(torch._scaled_mm(values, weight, **options))


def _int_mm(on: Operands) -> Call:
    values, scale, weight_scale = _scales(on)
    weight = on.rounded_weight.values.t()
    return lambda: on.finish((torch._int_mm(values, weight) * (scale * weight_scale) + on.bias).bfloat16())


def check(precision: str, out: Any, exact: Tensor) -> float:
    """The error of what a kernel returned, a tensor in bf16 or ``Quantized``, against float64. Raises ``WrongResult``."""
    if not isinstance(out, quantized.Quantized):
        return accuracy.check("fastvit", [out], [exact], torch.bfloat16)
    (error,) = accuracy.errors([_dequantized(out)], [exact])
    allowed = ROUNDED_ERROR[precision]
    if not (error.overall <= allowed and error.row <= 4 * allowed):
        raise accuracy.WrongResult(
            f"fastvit errs by {error.overall:.2g}, {error.row:.2g} in a row, allowed {allowed}, {4 * allowed}"
        )
    return error.overall


def run(case: Case, row: results.Row, settings: Settings) -> None:
    """Fills the row; a wrong result of ours gets an ``error`` and no time. ``NotRun`` where the GPU has no such products."""
    row |= {"gflop": case.flops / 1e9, "mbyte": case.bytes / 1e6, "rate": 2}
    row["floor_ms"] = settings.floor_ms(row["gflop"] / row["rate"], row["mbyte"])
    absent = quantized.why_not(case.precision, torch.device(settings.device))
    if absent and not settings.dry:
        raise results.NotRun(absent)
    torch.manual_seed(0)
    cache = torch.cuda.get_device_properties(0).L2_cache_size if settings.device == "cuda" else 0
    sets = [Operands(case, settings.device) for _ in range(max(1, min(8, math.ceil(2 * cache / case.bytes))))]
    exact = sets[0].exact(rounded=True)

    def time_of(build: Callable[[Operands], Call]) -> measure.Timing:
        calls = [build(on) for on in sets]
        if settings.device == "cpu":
            return measure.interleaved({"call": calls[0]}, settings.budget_s(0.2))["call"]
        return measure.measure(calls, settings.budget_s(0.2))

    with torch.no_grad():
        if absent:
            build: Callable[[Operands], Call] = lambda on: lambda: on.exact(rounded=True).bfloat16()  # noqa: E731
        else:
            build = Operands.ours
        out: Any = build(sets[0])()
        row["max_error"] = check(case.precision, out, exact)
        timing = time_of(build)
        row |= {"ours_ms": timing.ms, "ours_spread": timing.spread, "peak_mb": timing.peak_mb}
        row["timed"], row["events_ms"] = {"fastvit": timing.timed}, {"fastvit": timing.events_ms}
        for name, peer in _peers(case).items():
            reason = settings.why_not(name)
            if reason is None:
                try:
                    with fastvit.use_backend("triton" if name == "fastvit_bf16" and settings.device == "cuda" else "auto"):
                        bf16 = name.endswith("bf16")
                        theirs = sets[0].exact(rounded=False) if bf16 else exact
                        found = [peer(sets[0])()]
                        if bf16 or case.kind != "fc2":
                            accuracy.check(name, found, [theirs], torch.bfloat16)
                        elif not accuracy.relative_error(found, [theirs]) <= 2 * ROUNDED_ERROR[case.precision]:
                            # With a scale a row of fc2's input they round other values: it may cost what rounding costs.
                            raise accuracy.WrongResult(f"{name} is off by more than twice what rounding costs")
                        timing = time_of(peer)
                    row["peers"][name], row["peers_peak_mb"][name] = timing.ms, timing.peak_mb
                    row["timed"][name], row["events_ms"][name] = timing.timed, timing.events_ms
                except Exception as error:  # whatever a peer throws, it does not serve this case
                    reason = results.describe(error)
                    if results.is_sticky(reason):
                        row["broke"] = name
            if reason is not None:
                row["unavailable"][name] = reason
            if "broke" in row:
                return
