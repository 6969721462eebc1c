"""The 8-bit kernels at the sizes of the models, each against float64: what ``smoke`` checks of them.

Products are ``linear_8bit``'s cases. What rounds (a LayerNorm, a residual sum and its LayerNorm, a gated product) is held to the
same operator in float64, as far off as rounding may be. Where there is no GPU, the definition takes the kernels' place.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastvit import reference, reference_quantized
from fastvit.ops import quantized

from . import linear_8bit
from .settings import Settings

KINDS = {"norm": (64 * 197, 1024), "add and norm": (64 * 257, 1280), "SwiGLU": (32 * 257, 4096)}  # rows, channels


@dataclass(frozen=True)
class Rounding:
    """Rows of ``channels`` in bf16, rounded to 8 bits after the operator ``kind``."""

    kind: str
    precision: str
    op = "quantize"

    @property
    def name(self) -> str:
        return "{} {} × {}".format(self.kind, *KINDS[self.kind])

    def check(self, settings: Settings) -> float:
        rows, channels = (5, 160) if settings.dry else KINDS[self.kind]
        half: dict[str, Any] = {"dtype": torch.bfloat16, "device": settings.device}
        x, other = torch.randn(2, rows, channels, **half)
        weight, bias, gamma = torch.randn(3, channels, **half)
        x64, other64, weight64, bias64, gamma64 = (tensor.double() for tensor in (x, other, weight, bias, gamma))
        form, block = quantized.FORMATS[self.precision], reference_quantized.BLOCK if self.kind == "SwiGLU" else None
        if self.kind == "norm":
            exact = reference.layer_norm(x64, weight64, bias64, 1e-6)
        elif self.kind == "add and norm":
            total = (x64 + gamma64 * other64).to(x.dtype)
            exact = reference.layer_norm(total.double(), weight64, bias64, 1e-6)
        else:
            exact = reference.glu(x64, other64, activation="silu")
        if settings.dry:
            out = linear_8bit.by_definition(exact, self.precision, block)
        elif self.kind == "norm":
            out = quantized.layer_norm(x, weight, bias, 1e-6, form)
        elif self.kind == "add and norm":
            out, _ = quantized.add_layer_norm(x, other, weight, bias, 1e-6, form, gamma)
        else:
            out = quantized.glu(x, other, "silu", form)
        return linear_8bit.check(self.precision, out, exact)


@dataclass(frozen=True)
class Product:
    case: linear_8bit.Case
    op = "linear_8bit"

    @property
    def precision(self) -> str:
        return self.case.precision

    @property
    def name(self) -> str:
        return self.case.name

    def check(self, settings: Settings) -> float:
        on = linear_8bit.Operands(replace(self.case, rows=5, channels=32) if settings.dry else self.case, settings.device)
        exact = on.exact(rounded=True)
        out = exact.bfloat16() if settings.dry else on.ours()()
        return linear_8bit.check(self.precision, out, exact)


CASES = [Rounding(kind, precision) for precision in quantized.FORMATS for kind in KINDS]
CASES += [Product(case) for case in linear_8bit.CASES]  # type: ignore[misc]


def why_not(case: Any, settings: Settings) -> str | None:
    """Why a case cannot be checked on the device, or None."""
    return None if settings.dry else quantized.why_not(case.precision, torch.device(settings.device))
