"""Segment Anything's three sizes (Kirillov et al. 2023, appendix A: ViT-B, ViT-L and ViT-H after He et al. 2022, MAE)."""

import os
from typing import Any

from .checkpoints import fill, read_checkpoint
from .sam import Sam, build_sam


def sam_vit_b(checkpoint: str | os.PathLike[str] | None = None, **options: Any) -> Sam:
    """SAM with a ViT-B: 12 blocks, 768 channels, 12 heads, global attention in every third; 93,735,472 parameters.

    Args:
        checkpoint: weights of a model of these sizes, as ``load_sam`` takes them; None leaves random ones.
        options: any argument of ``build_sam``.

    Raises:
        CheckpointError (a ``ValueError``): as ``load_sam``, and for weights of other sizes.
    """
    sizes = {"dim": 768, "depth": 12, "num_heads": 12, "global_attention": (2, 5, 8, 11)}
    return _build(sizes, checkpoint, options)


def sam_vit_l(checkpoint: str | os.PathLike[str] | None = None, **options: Any) -> Sam:
    """SAM with a ViT-L: 24 blocks, 1024 channels, 16 heads, global attention in every sixth; 312,342,832 parameters.

    Arguments and errors are ``sam_vit_b``'s.
    """
    sizes = {"dim": 1024, "depth": 24, "num_heads": 16, "global_attention": (5, 11, 17, 23)}
    return _build(sizes, checkpoint, options)


def sam_vit_h(checkpoint: str | os.PathLike[str] | None = None, **options: Any) -> Sam:
    """SAM with a ViT-H: 32 blocks, 1280 channels, 16 heads, global attention in every eighth; 641,090,608 parameters.

    Arguments and errors are ``sam_vit_b``'s.
    """
    sizes = {"dim": 1280, "depth": 32, "num_heads": 16, "global_attention": (7, 15, 23, 31)}
    return _build(sizes, checkpoint, options)


def _build(sizes: dict[str, Any], checkpoint: str | os.PathLike[str] | None, options: dict[str, Any]) -> Sam:
    if checkpoint is None:
        return build_sam(**{**sizes, **options})
    options = dict(options)
    to = {name: options.pop(name, None) for name in ("device", "dtype")}
    tensors, known = read_checkpoint(checkpoint)
    return fill({**sizes, **known, **options}, tensors, checkpoint).to(**to)
