"""The shapes that matter, named by the models they come from. One table for every benchmark and for the tests of them."""

import math

import torch

from .problems import Attention, Glu, ImageAttention, LayerNorm, Linear, LinearAddNorm, Problem, Rotary

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Case = Problem

ATTENTION = [
    Attention("ViT-B/16 224", 64, 12, 197, 64),
    Attention("ViT-B/16 384", 32, 12, 577, 64),
    Attention("ViT-B/16 512", 16, 12, 1025, 64),
    Attention("ViT-B/16 768", 8, 12, 2305, 64),
    Attention("ViT-B/16 1024", 2, 12, 4097, 64),
    Attention("ViT-L/16 224", 32, 16, 197, 64),
    Attention("ViT-L/14 224", 32, 16, 257, 64),
    Attention("ViT-L/16 384", 16, 16, 577, 64),
    Attention("ViT-L/14 518", 8, 16, 1370, 64),
    Attention("ViT-H/14 224", 32, 16, 257, 80),
    Attention("ViT-H/16 512", 8, 16, 1024, 80),
    Attention("ViT-H/14 378", 16, 16, 730, 80),
    Attention("ViT-H/14 518", 8, 16, 1370, 80),
    Attention("DINOv2-B with registers 518", 8, 12, 1374, 64),
    Attention("SAM-B global", 1, 12, 4096, 64, rel=(64, 64)),
    Attention("SAM-H global", 1, 16, 4096, 80, rel=(64, 64)),
    Attention("SAM-B global, no bias", 1, 12, 4096, 64),
    Attention("SAM-H global, no bias", 1, 16, 4096, 80),
    Attention("SAM-B window", 25, 12, 196, 64, rel=(14, 14)),
    Attention("SAM mask decoder, tokens to image", 64, 8, 7, 16, keys=4096),
    Attention("SAM mask decoder, tokens to image, batch 1", 1, 8, 7, 16, keys=4096),
    Attention("SAM mask decoder, image to tokens", 64, 8, 4096, 16, keys=7),
    Attention("SAM2 memory attention", 1, 1, 4096, 256, keys=7 * 4096),
    Attention("latent diffusion, 64×64", 2, 8, 4096, 40),
    Attention("latent diffusion, 32×32", 2, 8, 1024, 80),
    Attention("latent diffusion, 16×16", 2, 8, 256, 160),
    Attention("CoTracker3", 64, 8, 60, 48),
    Attention("BERT-B padded", 32, 12, 512, 64, mask="boolean"),
    Attention("CLIP text", 64, 8, 77, 64, causal=True),
]

IMAGE_ATTENTION = [
    ImageAttention("SAM-B windows", 1, 64, 12, 64, window=14),
    ImageAttention("SAM-L windows", 1, 64, 16, 64, window=14),
    ImageAttention("SAM-H windows", 1, 64, 16, 80, window=14),
    ImageAttention("SAM-B global", 1, 64, 12, 64),
    ImageAttention("SAM-L global", 1, 64, 16, 64),
    ImageAttention("SAM-H global", 1, 64, 16, 80),
]

ROTARY = [
    Rotary(name, *sizes, attend=attend, **kind)
    for name, sizes, kind in (
        ("DINOv3-B 512", (16, 12, 1029, 64), {"prefix": 5}),
        ("DINOv3-L 224", (32, 16, 201, 64), {"prefix": 5}),
        ("EVA-02-L 224", (32, 16, 257, 64), {"prefix": 1, "interleaved": True}),
        ("ViT-22B 224", (8, 48, 256, 128), {"norm": "layer", "rotate": False}),
    )
    for attend in (False, True)
]

LINEAR = [
    Linear("ViT-B/16 224 fc1", 64 * 197, 768, 3072, "gelu"),
    Linear("ViT-B/16 224 fc2", 64 * 197, 3072, 768),
    Linear("ViT-L/16 224 fc1", 32 * 197, 1024, 4096, "gelu"),
    Linear("ViT-H/14 224 fc1", 32 * 257, 1280, 5120, "gelu"),
    Linear("SAM-H fc1", 4096, 1280, 5120, "gelu"),
    Linear("SAM-H qkv", 4096, 1280, 3840),
    Linear("CLIP-L fc1", 32 * 257, 1024, 4096, "quick_gelu"),
    Linear("SigLIP fc1", 32 * 196, 768, 3072, "gelu_tanh"),
    Linear("SAM mask decoder fc1", 64 * 7, 256, 2048, "relu"),
]

LINEAR_ADD_NORM = [
    LinearAddNorm("ViT-L/16 224 fc2 + add + norm, batch 1", 197, 4096, 1024),
    LinearAddNorm("ViT-L/16 224 proj + add + norm, batch 1", 197, 1024, 1024),
    LinearAddNorm("ViT-B/16 224 fc2 + add + norm, batch 1", 197, 3072, 768),
    LinearAddNorm("ViT-B/16 224 proj + add + norm, batch 1", 197, 768, 768),
    LinearAddNorm("ViT-H/14 224 fc2 + add + norm, batch 1", 257, 5120, 1280),
    LinearAddNorm("ViT-H/14 224 proj + add + norm, batch 1", 257, 1280, 1280),
]

GLU = [
    Glu("DINOv2-g/14 224 SwiGLU", 32 * 257, 4096),
    Glu("DINOv3-H+/16 224 SwiGLU", 32 * 201, 5120),
    Glu("EVA-02-L 224 SwiGLU", 32 * 257, 2730),
]

LAYER_NORM = [
    LayerNorm("ViT-B/16 224", 64 * 197, 768),
    LayerNorm("ViT-L/16 224", 64 * 197, 1024),
    LayerNorm("ViT-B/16 224, batch 256", 256 * 197, 768),
    LayerNorm("SAM-H", 4096, 1280),
    LayerNorm("DINOv2-B add", 8 * 1374, 768, add=True),
    LayerNorm("ViT-L/16 224 add", 64 * 197, 1024, add=True),
    LayerNorm("ViT-L/16 224 add, batch 256", 256 * 197, 1024, add=True),
    LayerNorm("SAM-H add", 4096, 1280, add=True),
]

ALL: dict[str, list] = {
    "attention": ATTENTION,
    "image_attention": IMAGE_ATTENTION,
    "rotary": ROTARY,
    "linear": [*LINEAR, *LINEAR_ADD_NORM, *GLU],
    "layer_norm": LAYER_NORM,
}


def floor_ms(case: Case, direction: str, element: int, tflop_s: float, gb_s: float) -> float:
    """No version runs faster: the larger of arithmetic at the matrix units' rate and bytes at the memory's."""
    return max(case.flops(direction) / (tflop_s * 1e9), case.bytes(direction, element) / (gb_s * 1e6))


def sets_beyond_cache(case: Case, element: int, cache_bytes: int) -> int:
    """How many input sets to rotate through so that none is still in the cache when it comes round again."""
    return max(1, min(64, math.ceil(2 * cache_bytes / case.bytes("forward", element))))
