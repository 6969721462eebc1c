"""Segment Anything (Kirillov et al. 2023) on the fused operators, with the names of its published checkpoints."""

from .image_encoder import ImageEncoder

__all__ = ["ImageEncoder"]
