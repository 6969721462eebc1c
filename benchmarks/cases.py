"""The shapes that matter, named by the models they come from. One table for every benchmark and for the tests of them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Attention:
    """(batch, heads, queries, dim) attending to (batch, heads, keys, dim), q, k and v slices of one packed tensor."""

    name: str
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
        """The same kind of problem, small enough for an interpreter."""
        rel = (2, 3) if self.rel else None
        return replace(self, batch=1, heads=1, queries=6 if rel else 5, keys=6, dim=16, rel=rel)

    @property
    def key_count(self) -> int:
        return self.keys or self.queries

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        def packed(count, tokens):
            tensor = torch.randn(self.batch, tokens, count, self.heads, self.dim, dtype=dtype, device=device)
            return [t.detach().requires_grad_(requires_grad) for t in tensor.permute(2, 0, 3, 1, 4).unbind(0)]

        if self.keys:
            (query,), (key, value) = packed(1, self.queries), packed(2, self.keys)
        else:
            query, key, value = packed(3, self.queries)
        tensors = {"query": query, "key": key, "value": value}
        if self.mask == "boolean":
            tensors["attn_mask"] = torch.rand(self.batch, 1, 1, self.key_count, device=device) > 0.2
        if self.rel:
            for name, size in zip(("rel_h", "rel_w"), self.rel, strict=True):
                shape = (self.batch, self.heads, self.queries, size)
                tensors[name] = torch.randn(shape, dtype=dtype, device=device).requires_grad_(requires_grad)
        return tensors

    def flops(self, direction: str) -> float:
        """Multiply-adds count two; backward repeats the scores, then takes four products: five matrix products to two."""
        forward = 4 * self.batch * self.heads * self.queries * self.key_count * self.dim * (0.5 if self.causal else 1)
        return {"forward": forward, "backward": 2.5 * forward, "step": 3.5 * forward}[direction]

    def bytes(self, direction: str, element: int) -> float:
        """Forward reads q, k, v and the bias and writes the output; backward reads these and two more, and writes three."""
        q = self.batch * self.heads * self.queries * self.dim * element
        k = self.batch * self.heads * self.key_count * self.dim * element
        rel = self.batch * self.heads * self.queries * sum(self.rel or ()) * element
        forward, backward = 2 * q + 2 * k + rel, 4 * q + 4 * k + 2 * rel
        return {"forward": forward, "backward": backward, "step": forward + backward}[direction]

    @property
    def shape(self) -> list[int]:
        return [self.batch, self.heads, self.queries, self.key_count, self.dim]


@dataclass(frozen=True)
class Linear:
    """(rows, width) · (outputs, width)ᵀ + bias, activated."""

    name: str
    rows: int
    width: int
    outputs: int
    activation: str | None = None
    op = "linear"

    def small(self) -> "Linear":
        return replace(self, rows=5, width=16, outputs=24)

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        shapes = {"input": (self.rows, self.width), "weight": (self.outputs, self.width), "bias": (self.outputs,)}
        tensors = {name: torch.randn(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        tensors["weight"] *= self.width**-0.5
        return {name: tensor.requires_grad_(requires_grad) for name, tensor in tensors.items()}

    def flops(self, direction: str) -> float:
        return 2 * self.rows * self.width * self.outputs * {"forward": 1, "backward": 2, "step": 3}[direction]

    def bytes(self, direction: str, element: int) -> float:
        forward = (self.rows * (self.width + self.outputs) + self.outputs * self.width) * element
        backward = (2 * self.rows * (self.width + self.outputs) + 2 * self.outputs * self.width) * element
        return {"forward": forward, "backward": backward, "step": forward + backward}[direction]

    @property
    def shape(self) -> list[int]:
        return [self.rows, self.width, self.outputs]


@dataclass(frozen=True)
class LayerNorm:
    """Layer norm of (rows, channels), alone or after residual + layer_scale · branch."""

    name: str
    rows: int
    channels: int
    add: bool = False

    @property
    def op(self) -> str:
        return "add_layer_norm" if self.add else "layer_norm"

    def small(self) -> "LayerNorm":
        return replace(self, rows=5, channels=24)

    def inputs(self, dtype: torch.dtype, device: str, requires_grad: bool) -> dict[str, Tensor]:
        names = ["residual", "branch"] if self.add else ["input"]
        shapes = dict.fromkeys(names, (self.rows, self.channels)) | dict.fromkeys(("weight", "bias"), (self.channels,))
        if self.add:
            shapes["layer_scale"] = (self.channels,)
        return {k: torch.randn(s, dtype=dtype, device=device).requires_grad_(requires_grad) for k, s in shapes.items()}

    def flops(self, direction: str) -> float:
        return 8.0 * self.rows * self.channels  # of no account beside the bytes

    def bytes(self, direction: str, element: int) -> float:
        """Every tensor read once and written once."""
        tensors = {"forward": 4, "backward": 5, "step": 9} if self.add else {"forward": 2, "backward": 3, "step": 5}
        return tensors[direction] * self.rows * self.channels * element

    @property
    def shape(self) -> list[int]:
        return [self.rows, self.channels]


Case = Attention | Linear | LayerNorm

ATTENTION = [
    Attention("ViT-B/16 224", 64, 12, 197, 64),
    Attention("ViT-L/16 384", 16, 16, 577, 64),
    Attention("ViT-H/14 224", 32, 16, 257, 80),
    Attention("DINOv2-B with registers 518", 8, 12, 1374, 64),
    Attention("SAM-B global", 1, 12, 4096, 64, rel=(64, 64)),
    Attention("SAM-H global", 1, 16, 4096, 80, rel=(64, 64)),
    Attention("SAM-B window", 25, 12, 196, 64, rel=(14, 14)),
    Attention("SAM mask decoder, tokens to image", 64, 8, 7, 16, keys=4096),
    Attention("SAM2 memory attention", 1, 1, 4096, 256, keys=7 * 4096),
    Attention("latent diffusion, 64×64", 2, 8, 4096, 40),
    Attention("latent diffusion, 32×32", 2, 8, 1024, 80),
    Attention("CoTracker3", 64, 8, 60, 48),
    Attention("BERT-B padded", 32, 12, 512, 64, mask="boolean"),
    Attention("CLIP text", 64, 8, 77, 64, causal=True),
]

LINEAR = [
    Linear("ViT-B/16 224 fc1", 64 * 197, 768, 3072, "gelu"),
    Linear("ViT-B/16 224 fc2", 64 * 197, 3072, 768),
    Linear("ViT-L/16 224 fc1", 32 * 197, 1024, 4096, "gelu"),
    Linear("SAM-H fc1", 4096, 1280, 5120, "gelu"),
    Linear("SAM-H qkv", 4096, 1280, 3840),
    Linear("CLIP-L fc1", 32 * 257, 1024, 4096, "quick_gelu"),
    Linear("SigLIP fc1", 32 * 196, 768, 3072, "gelu_tanh"),
    Linear("SAM mask decoder fc1", 64 * 7, 256, 2048, "relu"),
]

LAYER_NORM = [
    LayerNorm("ViT-B/16 224", 64 * 197, 768),
    LayerNorm("ViT-L/16 224", 64 * 197, 1024),
    LayerNorm("SAM-H", 4096, 1280),
    LayerNorm("DINOv2-B add", 8 * 1374, 768, add=True),
    LayerNorm("ViT-L/16 224 add", 64 * 197, 1024, add=True),
    LayerNorm("SAM-H add", 4096, 1280, add=True),
]

ALL: dict[str, list] = {"attention": ATTENTION, "linear": LINEAR, "layer_norm": LAYER_NORM}


def floor_ms(case: Case, direction: str, element: int, tflop_s: float, gb_s: float) -> float:
    """No version runs faster: the larger of arithmetic at the matrix units' rate and bytes at the memory's."""
    return max(case.flops(direction) / (tflop_s * 1e9), case.bytes(direction, element) / (gb_s * 1e6))


def sets_beyond_cache(case: Case, element: int, cache_bytes: int) -> int:
    """How many input sets to rotate through so that none is still in the cache when it comes round again."""
    return max(1, min(64, math.ceil(2 * cache_bytes / case.bytes("forward", element))))
