"""Cases that only the tuner has: operators of the tuning tables that no other benchmark's case asks for, and small batches.

They are ``problems`` like the others; those whose peers are no concern here say themselves who computes the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastvit import functional, reference, reference_quantized
from fastvit.ops import quantized

from .problems import Attention, LayerNorm, Linear, Problem

Contestants = tuple[Callable[..., Any], Callable[..., Any], dict[str, Any]]  # ours, the float64 reference, peers: none


def _normal(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
    tensors = {name: torch.randn(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    for name in tensors.keys() & {"fc1_weight", "fc2_weight"}:
        tensors[name] *= shapes[name][1] ** -0.5
    return {name: tensor.requires_grad_(requires_grad) for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Mlp(Problem):
    """activation(x·W1ᵀ + b1)·W2ᵀ + b2 of (rows, width)."""

    rows: int
    width: int
    hidden: int
    activation: str = "gelu"
    op = "mlp"

    def small(self) -> "Mlp":
        return replace(self, rows=5, width=16, hidden=24)

    def contestants(self) -> Contestants:
        def of(mlp: Callable[..., Any]) -> Callable[..., Any]:
            return lambda **inputs: mlp(**inputs, activation=self.activation)

        return of(functional.mlp), of(reference.mlp), {}

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        shapes = {"input": (self.rows, self.width), "fc1_weight": (self.hidden, self.width), "fc1_bias": (self.hidden,)}
        shapes |= {"fc2_weight": (self.width, self.hidden), "fc2_bias": (self.width,)}
        return _normal(shapes, dtype, device, requires_grad)

    def work(self) -> tuple[float, float]:
        forward = 4.0 * self.rows * self.width * self.hidden
        return forward, 2 * forward

    def traffic(self) -> tuple[float, float]:
        forward = 2 * self.rows * (self.width + self.hidden) + 2 * self.width * self.hidden
        return forward, 2 * forward


@dataclass(frozen=True)
class ImageNorm(Problem):
    """Layer norm of (batch, tokens, channels) over all tokens of an image."""

    batch: int
    tokens: int
    channels: int
    op = "layer_norm"

    def small(self) -> "ImageNorm":
        return replace(self, batch=1, tokens=3, channels=24)

    def contestants(self) -> Contestants:
        def of(norm: Callable[..., Any]) -> Callable[..., Any]:
            return lambda **inputs: norm(**inputs, statistics="image")

        return of(functional.layer_norm), of(reference.layer_norm), {}

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        shapes = {"input": (self.batch, self.tokens, self.channels), "weight": (self.channels,), "bias": (self.channels,)}
        return _normal(shapes, dtype, device, requires_grad)

    def work(self) -> tuple[float, float]:
        return 8.0 * self.batch * self.tokens * self.channels, 12.0 * self.batch * self.tokens * self.channels

    def traffic(self) -> tuple[float, float]:
        return 3 * self.batch * self.tokens * self.channels, 5 * self.batch * self.tokens * self.channels


@dataclass(frozen=True)
class WideNorm(LayerNorm):
    """Of more channels than one program holds, small ones too."""

    def small(self) -> "WideNorm":
        return replace(self, rows=2, channels=8200)


@dataclass(frozen=True)
class BiasedAttention(Attention):
    """With an additive mask (1, heads, queries, keys) that is learned, as a table of positions is."""

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        mask = torch.randn(1, self.heads, self.queries, self.key_count, dtype=dtype, device=device)
        return super().inputs(dtype, device, requires_grad) | {"attn_mask": mask.requires_grad_(requires_grad)}


@dataclass(frozen=True)
class Linear8Bit(Problem):
    """activation(x·Wᵀ + b) of ``format`` operands, in bfloat16 or, ``rounded``, in the format again."""

    rows: int
    width: int
    outputs: int
    format: str = "fp8"
    activation: str | None = None
    rounded: bool = False
    op = "linear_8bit"
    directions = ("forward",)

    def small(self) -> "Linear8Bit":
        return replace(self, rows=5, width=16, outputs=24)

    @property
    def dtype(self) -> torch.dtype:
        return quantized.FORMATS[self.format]

    def contestants(self) -> Contestants:
        def ours(values, scale, weight, weight_scale, bias, given=None):
            operands = quantized.Quantized(values, scale), quantized.QuantizedWeight(weight, weight_scale, bias)
            if self.rounded:
                return quantized.linear_quantized(*operands, self.activation, given)
            return quantized.linear(*operands, torch.bfloat16, self.activation)

        def exact(values, scale, weight, weight_scale, bias, given=None):
            x, w = values.double() * scale.unsqueeze(-1), weight.double() * weight_scale.unsqueeze(-1)
            out = reference.linear(x, w, bias.double(), activation=self.activation)
            if not self.rounded:
                return out
            if given is not None:
                return reference_quantized.quantize(out, self.dtype, given=given)[0], given
            values, scale = reference_quantized.quantize(out, self.dtype, reference_quantized.BLOCK)
            return values, scale.t()

        return ours, exact, {}

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        x, w = (torch.randn(rows, self.width, device=device) for rows in (self.rows, self.outputs))
        values, scale = reference_quantized.quantize(x, self.dtype)
        weight, weight_scale = reference_quantized.quantize(w * self.width**-0.5, self.dtype)
        tensors = {"values": values, "scale": scale.squeeze(-1), "weight": weight, "weight_scale": weight_scale.squeeze(-1)}
        if self.rounded and self.format == "fp8":
            tensors["given"] = torch.full((1,), 16 / 448, device=device)  # beyond what comes out
        return tensors | {"bias": torch.randn(self.outputs, device=device)}

    def work(self) -> tuple[float, float]:
        return 2.0 * self.rows * self.width * self.outputs, 0.0

    def traffic(self) -> tuple[float, float]:
        return (self.rows * (self.width + 2 * self.outputs) + self.outputs * self.width) / 2, 0.0


@dataclass(frozen=True)
class Quantize(Problem):
    """Layer norm of (rows, channels) rounded to 8 bits, or, ``gated``, a gated product of two such halves."""

    rows: int
    channels: int
    gated: bool = False
    format: str = "fp8"
    op = "quantize"
    directions = ("forward",)

    def small(self) -> "Quantize":
        return replace(self, rows=5, channels=32)

    def contestants(self) -> Contestants:
        dtype = quantized.FORMATS[self.format]

        def ours(input, other):
            if self.gated:
                return quantized.glu(input, other, "silu", dtype)
            return quantized.layer_norm(input, other, None, 1e-6, dtype)

        def exact(input, other):
            if self.gated:
                values, scale = reference_quantized.quantize(reference.glu(input, other), dtype, reference_quantized.BLOCK)
                return values, scale.t()
            values, scale = reference_quantized.quantize(reference.layer_norm(input, other, None, 1e-6), dtype)
            return values, scale.squeeze(-1)

        return ours, exact, {}

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        input = torch.randn(self.rows, self.channels, dtype=dtype, device=device)
        return {"input": input, "other": torch.randn_like(input) if self.gated else torch.rand(self.channels).to(input)}

    def work(self) -> tuple[float, float]:
        return 12.0 * self.rows * self.channels, 0.0

    def traffic(self) -> tuple[float, float]:
        return (2.5 if self.gated else 1.5) * self.rows * self.channels, 0.0


CASES: list[Problem] = [
    Mlp("ViT-B/16 224", 64 * 197, 768, 3072),
    Mlp("ViT-L/16 224", 32 * 197, 1024, 4096),
    Linear("ViT-B/16 224 fc1, batch 1", 197, 768, 3072, "gelu"),
    Linear("ViT-B/16 224 fc2, batch 1", 197, 3072, 768),
    Linear("ViT-L/16 224 fc1, batch 1", 197, 1024, 4096, "gelu"),
    *(
        Linear8Bit(f"ViT-L/16 224 {name}, {kind}, batch {batch}", batch * 197, *sizes, kind, activation, activation is not None)
        for kind in ("fp8", "int8")
        for batch in (1, 16, 64)
        for name, sizes, activation in (("qkv", (1024, 3072), None), ("fc1", (1024, 4096), "gelu"), ("fc2", (4096, 1024), None))
    ),
    Quantize("ViT-L/16 224 norm", 64 * 197, 1024),
    Quantize("ViT-H/14 224 norm", 32 * 257, 1280),
    Quantize("DINOv2-g/14 224 SwiGLU", 32 * 257, 4096, gated=True),
    BiasedAttention("learned bias, 14×14", 64, 12, 196, 64, mask="additive"),
    BiasedAttention("learned bias, 64×64, d80", 1, 4, 4096, 80, mask="additive"),
    ImageNorm("norm over images", 64, 196, 768),
    WideNorm("wide", 2048, 16384),
]
