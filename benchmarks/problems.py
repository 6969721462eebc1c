"""Operators as benchmark cases: inputs of the layout that models give, FLOPs, and the bytes that must move.

Every case has ``name``, ``op`` (a function of ``fastvit.functional``), ``shape``, ``options`` (its keyword arguments that are not
tensors), ``inputs(dtype, device, requires_grad)``, ``small()`` (the same kind of problem for an interpreter) and ``on_cpu()``
(for a CPU: fewer images or heads). Multiply-adds count two. Backward of attention repeats the scores, then takes four products.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

CPU_FLOPS = 4.5e9  # a forward pass of most cases on a CPU: some tens of milliseconds


@dataclass(frozen=True)
class Problem(ABC):
    """What all cases share; a case says ``work()`` in FLOPs and ``traffic()`` in elements, each of (forward, backward)."""

    name: str
    directions: ClassVar[tuple[str, ...]] = ("forward", "backward")

    @property
    def options(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def work(self) -> tuple[float, float]:
        """FLOPs."""

    @abstractmethod
    def traffic(self) -> tuple[float, float]:
        """Elements read and written."""

    def flops(self, direction: str) -> float:
        return _of(self.work(), direction)

    def bytes(self, direction: str, element: int) -> float:
        """Every input read once and every output written once; ``element``: bytes of a number."""
        return _of(self.traffic(), direction) * element


def _of(pair: tuple[float, float], direction: str) -> float:
    forward, backward = pair
    return {"forward": forward, "backward": backward, "step": forward + backward}[direction]


def _packed(count: int, batch: int, tokens: int, heads: int, dim: int, dtype, device, requires_grad) -> list[Tensor]:
    """``count`` tensors (B, H, N, D) that are slices of one projection (B, N, count, H, D)."""
    tensor = torch.randn(batch, tokens, count, heads, dim, dtype=dtype, device=device)
    return [t.detach().requires_grad_(requires_grad) for t in tensor.permute(2, 0, 3, 1, 4).unbind(0)]


def _fewer(case: Any) -> Any:
    """The case with fewer images, then fewer heads, then fewer keys, until a CPU takes it."""
    for field in ("batch", "heads", "keys"):
        count = getattr(case, field, 0)
        if count > 1 and case.work()[0] > CPU_FLOPS:
            share = CPU_FLOPS / case.work()[0]
            least = 4096 if field == "keys" else 1
            case = replace(case, **{field: max(min(count, least), int(count * share))})
    return case


@dataclass(frozen=True)
class Attention(Problem):
    """(batch, heads, queries, dim) attending to (batch, heads, keys, dim), q, k and v slices of one packed tensor."""

    batch: int
    heads: int
    queries: int
    dim: int
    keys: int = 0
    rel: tuple[int, int] | None = None
    mask: str | None = None
    causal: bool = False
    op = "attention"

    def small(self) -> "Attention":
        rel = (2, 3) if self.rel else None
        return replace(self, batch=1, heads=1, queries=6 if rel else 5, keys=6 if rel or self.keys else 0, dim=16, rel=rel)

    def on_cpu(self) -> "Attention":
        return _fewer(self)

    @property
    def options(self) -> dict[str, Any]:
        return {"is_causal": self.causal}

    @property
    def key_count(self) -> int:
        return self.keys or self.queries

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        where = (dtype, device, requires_grad)
        if self.keys:
            (query,) = _packed(1, self.batch, self.queries, self.heads, self.dim, *where)
            key, value = _packed(2, self.batch, self.keys, self.heads, self.dim, *where)
        else:
            query, key, value = _packed(3, self.batch, self.queries, self.heads, self.dim, *where)
        tensors = {"query": query, "key": key, "value": value}
        if self.mask == "boolean":
            tensors["attn_mask"] = torch.rand(self.batch, 1, 1, self.key_count, device=device) > 0.2
        if self.rel:
            for name, size in zip(("rel_h", "rel_w"), self.rel, strict=True):
                shape = (self.batch, self.heads, self.queries, size)
                tensors[name] = torch.randn(shape, dtype=dtype, device=device).requires_grad_(requires_grad)
        return tensors

    def work(self) -> tuple[float, float]:
        forward = 4 * self.batch * self.heads * self.queries * self.key_count * self.dim * (0.5 if self.causal else 1)
        return forward, 2.5 * forward

    def traffic(self) -> tuple[float, float]:
        q, k = (self.batch * self.heads * count * self.dim for count in (self.queries, self.key_count))
        rel = self.batch * self.heads * self.queries * sum(self.rel or ())
        return 2 * q + 2 * k + rel, 4 * q + 4 * k + 2 * rel

    @property
    def shape(self) -> list[int]:
        return [self.batch, self.heads, self.queries, self.key_count, self.dim]


@dataclass(frozen=True)
class ImageAttention(Problem):
    """SAM's encoder attention on (batch, side, side, 3·heads·dim), global (window 0) or in windows, relative positions on."""

    batch: int
    side: int
    heads: int
    dim: int
    window: int = 0
    op = "image_attention"

    def small(self) -> "ImageAttention":
        return replace(self, batch=1, side=5, heads=2, dim=16, window=3 if self.window else 0)

    def on_cpu(self) -> "ImageAttention":
        return self if self.window else replace(self, heads=min(self.heads, 4))  # one head alone would be another problem

    @property
    def options(self) -> dict[str, Any]:
        return {"num_heads": self.heads, "window_size": self.window}

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        channels, rows = 3 * self.heads * self.dim, 2 * (self.window or self.side) - 1
        tensors = {
            "qkv": torch.randn(self.batch, self.side, self.side, channels, dtype=dtype, device=device),
            "rel_pos_h": torch.randn(rows, self.dim, dtype=dtype, device=device) * 0.1,
            "rel_pos_w": torch.randn(rows, self.dim, dtype=dtype, device=device) * 0.1,
        }
        if self.window:
            tensors["pad_qkv"] = torch.randn(channels, dtype=dtype, device=device)
        return {name: tensor.requires_grad_(requires_grad) for name, tensor in tensors.items()}

    def work(self) -> tuple[float, float]:
        """Padded queries are not computed; padded keys are attended to."""
        reach = self.window or self.side
        tokens, channels = self.batch * self.side**2, self.heads * self.dim
        forward = 4 * tokens * reach**2 * channels + 2 * tokens * 2 * reach * channels
        return forward, 2.5 * forward

    def traffic(self) -> tuple[float, float]:
        tensor = self.batch * self.side**2 * self.heads * self.dim
        return 4 * tensor, 8 * tensor

    @property
    def shape(self) -> list[int]:
        return [self.batch, self.side, self.side, self.heads, self.dim, self.window]


@dataclass(frozen=True)
class Rotary(Problem):
    """(batch, heads, tokens, dim), all but ``prefix`` tokens rotated; ``attend``: with the attention that follows."""

    batch: int
    heads: int
    tokens: int
    dim: int
    prefix: int = 0
    norm: str | None = None
    rotate: bool = True
    interleaved: bool = False
    attend: bool = False

    @property
    def op(self) -> str:
        return "rotary_attention" if self.attend else "qk_norm_rope"

    def small(self) -> "Rotary":
        return replace(self, batch=1, heads=2, tokens=6, dim=16, prefix=min(self.prefix, 2))

    def on_cpu(self) -> "Rotary":
        return _fewer(self) if self.attend else replace(self, batch=max(1, self.batch // 8))

    @property
    def options(self) -> dict[str, Any]:
        return {"norm": self.norm, "interleaved": self.interleaved}

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        parts = _packed(3, self.batch, self.tokens, self.heads, self.dim, dtype, device, requires_grad)
        tensors = dict(zip(("query", "key", "value"), parts if self.attend else parts[:2], strict=False))
        if self.rotate:
            angles = torch.rand(self.tokens - self.prefix, self.dim // 2, device=device) * 6.28
            angles = angles.repeat_interleave(2, -1) if self.interleaved else angles.repeat(1, 2)
            tensors |= {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
        if self.norm:
            for name in ("query_weight", "key_weight"):
                tensors[name] = torch.rand(self.dim, dtype=dtype, device=device).add_(0.5).requires_grad_(requires_grad)
        return tensors

    def work(self) -> tuple[float, float]:
        elements = self.batch * self.heads * self.tokens * self.dim
        attention = 4 * elements * self.tokens if self.attend else 0
        return attention + 12.0 * elements, 2.5 * attention + 18.0 * elements

    def traffic(self) -> tuple[float, float]:
        tensor = self.batch * self.heads * self.tokens * self.dim
        if self.attend:
            return 4 * tensor, 8 * tensor
        return 4 * tensor, (6 if self.norm else 4) * tensor

    @property
    def shape(self) -> list[int]:
        return [self.batch, self.heads, self.tokens, self.dim]


@dataclass(frozen=True)
class Glu(Problem):
    """activation(gate)·value of (rows, width), the two halves of one projection (rows, 2·width)."""

    rows: int
    width: int
    activation: str = "silu"
    op = "glu"

    def small(self) -> "Glu":
        return replace(self, rows=5, width=24)

    def on_cpu(self) -> "Glu":
        return replace(self, rows=self.rows // 8)

    @property
    def options(self) -> dict[str, Any]:
        return {"activation": self.activation}

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        halves = torch.randn(self.rows, 2 * self.width, dtype=dtype, device=device).chunk(2, dim=-1)
        return {n: t.detach().requires_grad_(requires_grad) for n, t in zip(("gate", "value"), halves, strict=True)}

    def work(self) -> tuple[float, float]:
        return 6.0 * self.rows * self.width, 12.0 * self.rows * self.width

    def traffic(self) -> tuple[float, float]:
        return 3 * self.rows * self.width, 5 * self.rows * self.width

    @property
    def shape(self) -> list[int]:
        return [self.rows, self.width]


@dataclass(frozen=True)
class Linear(Problem):
    """(rows, width) · (outputs, width)ᵀ + bias, activated."""

    rows: int
    width: int
    outputs: int
    activation: str | None = None
    op = "linear"

    def small(self) -> "Linear":
        return replace(self, rows=5, width=16, outputs=24)

    def on_cpu(self) -> "Linear":
        return replace(self, rows=max(1, min(self.rows, int(CPU_FLOPS / (2 * self.width * self.outputs)))))

    @property
    def options(self) -> dict[str, Any]:
        return {"activation": self.activation}

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        shapes = {"input": (self.rows, self.width), "weight": (self.outputs, self.width), "bias": (self.outputs,)}
        tensors = {name: torch.randn(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        tensors["weight"] *= self.width**-0.5
        return {name: tensor.requires_grad_(requires_grad) for name, tensor in tensors.items()}

    def work(self) -> tuple[float, float]:
        forward = 2.0 * self.rows * self.width * self.outputs
        return forward, 2 * forward

    def traffic(self) -> tuple[float, float]:
        forward = self.rows * (self.width + self.outputs) + self.outputs * self.width
        return forward, 2 * forward

    @property
    def shape(self) -> list[int]:
        return [self.rows, self.width, self.outputs]


@dataclass(frozen=True)
class LinearAddNorm(Problem):
    """(rows, width) · (outputs, width)ᵀ + bias, added to a residual, and the layer norm of the sum; in inference."""

    rows: int
    width: int
    outputs: int
    op = "linear_add_norm"
    directions = ("forward",)

    def small(self) -> "LinearAddNorm":
        return replace(self, rows=5, width=48, outputs=24)

    def on_cpu(self) -> "LinearAddNorm":
        return self

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        shapes = {"input": (self.rows, self.width), "weight": (self.outputs, self.width), "residual": (self.rows, self.outputs)}
        shapes |= dict.fromkeys(("bias", "norm_weight", "norm_bias"), (self.outputs,))
        tensors = {name: torch.randn(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        tensors["weight"] *= self.width**-0.5
        return {name: tensor.requires_grad_(requires_grad) for name, tensor in tensors.items()}

    def work(self) -> tuple[float, float]:
        return 2.0 * self.rows * self.width * self.outputs, 0.0

    def traffic(self) -> tuple[float, float]:
        return self.rows * (self.width + 3 * self.outputs) + self.outputs * self.width, 0.0

    @property
    def shape(self) -> list[int]:
        return [self.rows, self.width, self.outputs]


@dataclass(frozen=True)
class LayerNorm(Problem):
    """Layer norm of (rows, channels), alone or after residual + layer_scale · branch."""

    rows: int
    channels: int
    add: bool = False

    @property
    def op(self) -> str:
        return "add_layer_norm" if self.add else "layer_norm"

    def small(self) -> "LayerNorm":
        return replace(self, rows=5, channels=24)

    def on_cpu(self) -> "LayerNorm":
        return replace(self, rows=self.rows // 4)

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        names = ["residual", "branch"] if self.add else ["input"]
        shapes = dict.fromkeys(names, (self.rows, self.channels)) | dict.fromkeys(("weight", "bias"), (self.channels,))
        if self.add:
            shapes["layer_scale"] = (self.channels,)
        return {k: torch.randn(s, dtype=dtype, device=device).requires_grad_(requires_grad) for k, s in shapes.items()}

    def work(self) -> tuple[float, float]:
        """Of no account beside the bytes."""
        return 8.0 * self.rows * self.channels, 12.0 * self.rows * self.channels

    def traffic(self) -> tuple[float, float]:
        forward, backward = (4, 5) if self.add else (2, 3)
        return forward * self.rows * self.channels, backward * self.rows * self.channels

    @property
    def shape(self) -> list[int]:
        return [self.rows, self.channels]
