"""Models on the fused operators: the textbook Vision Transformer."""

from .positions import position_similarity, sinusoidal_position
from .vit import VisionTransformer, vit_base, vit_huge, vit_large

__all__ = ["VisionTransformer", "position_similarity", "sinusoidal_position", "vit_base", "vit_huge", "vit_large"]
