"""Models on the fused operators: the textbook Vision Transformer, and Segment Anything."""

from .positions import position_similarity, sinusoidal_position
from .sam import Sam, load_sam, sam_vit_b, sam_vit_h, sam_vit_l
from .vit import VisionTransformer, vit_base, vit_huge, vit_large

__all__ = [
    "Sam",
    "VisionTransformer",
    "load_sam",
    "position_similarity",
    "sam_vit_b",
    "sam_vit_h",
    "sam_vit_l",
    "sinusoidal_position",
    "vit_base",
    "vit_huge",
    "vit_large",
]
