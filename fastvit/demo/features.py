"""What the pictures show of a ViT: class-token attention and the main directions of its patch tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.saliency import HEADS, PATCH, SaliencyModel


def class_attention(model: SaliencyModel, pixels: Tensor) -> Tensor:
    """How the last layer's class token attends to the patches, per head: (6, h, w), each head's map summing to ≤ 1.

    A fused kernel never holds this matrix, so its one row of interest is computed here: a hook takes what enters the last
    layer, and softmax(q_class·Kᵀ / √D) follows from the layer's own norm and projections, in fp32.
    """
    backbone: Any = model.backbone
    layer = backbone.encoder.layer[-1] if model.library == "hf" else backbone.blocks[-1]
    entered: list[Tensor] = []

    def remember(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(args[0] if args else kwargs["hidden_states"])

    hook = layer.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        model.tokens(pixels)
    finally:
        hook.remove()
    query, key = _query_and_key(layer, layer.norm1(entered[0]))
    query, key = (t.float().unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key))
    scores = query[:, :, :1] @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    weights = torch.softmax(scores, dim=-1)[0, :, 0, 1:]
    return weights.unflatten(-1, (pixels.shape[2] // PATCH, pixels.shape[3] // PATCH))


def _query_and_key(layer: Any, normalized: Tensor) -> tuple[Tensor, Tensor]:
    attention = layer.attn if hasattr(layer, "attn") else layer.attention
    if hasattr(attention, "qkv"):
        query, key, _ = attention.qkv(normalized).chunk(3, dim=-1)
        return query, key
    if hasattr(attention, "q_proj"):
        return attention.q_proj(normalized), attention.k_proj(normalized)
    return attention.attention.query(normalized), attention.attention.key(normalized)  # transformers before 5.23


class TokenColours:
    """Patch tokens as colours: their three main directions (PCA) become red, green and blue."""

    def __init__(self, tokens: Tensor):
        """Fits the directions to tokens (N, C); the same fit then colours another model's tokens."""
        tokens = tokens.float()
        self.mean = tokens.mean(0)
        _, _, directions = torch.linalg.svd(tokens - self.mean, full_matrices=False)
        scores = (tokens - self.mean) @ directions[:3].T
        sign = torch.where((scores**3).mean(0) < 0, -1.0, 1.0)  # an SVD leaves it open: let the rarer side be the bright one
        self.directions = directions[:3].T * sign
        self.spread = scores.std(0).clamp_min(1e-12)

    def __call__(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(h·w, C) → (h, w, 3) between 0 and 1."""
        scores = (tokens.float() - self.mean) @ self.directions
        return (0.08 + 0.84 * torch.sigmoid(1.3 * scores / self.spread)).unflatten(0, grid)  # short of neon
