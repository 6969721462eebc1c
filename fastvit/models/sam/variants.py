"""Segment Anything's three sizes (Kirillov et al. 2023, appendix A: ViT-B, ViT-L and ViT-H after He et al. 2022, MAE)."""

import os
from typing import Any

from .checkpoints import fill, infer_sizes, read_checkpoint
from .files import CheckpointError
from .sam import Sam, build_sam

SIZES: dict[str, dict[str, Any]] = {
    "vit_b": {"dim": 768, "depth": 12, "num_heads": 12, "global_attention": (2, 5, 8, 11)},
    "vit_l": {"dim": 1024, "depth": 24, "num_heads": 16, "global_attention": (5, 11, 17, 23)},
    "vit_h": {"dim": 1280, "depth": 32, "num_heads": 16, "global_attention": (7, 15, 23, 31)},
}


def sam_vit_b(checkpoint: str | os.PathLike[str] | None = None, **options: Any) -> Sam:
    """SAM with a ViT-B: 12 blocks, 768 channels, 12 heads, global attention in every third; 93,735,472 parameters.

    Args:
        checkpoint: weights of a model of these sizes, as ``load_sam`` takes them; None leaves random ones.
        options: any argument of ``build_sam``.

    Raises:
        CheckpointError (a ``ValueError``): as ``load_sam``, and for weights of other sizes.
    """
    return _build("vit_b", checkpoint, options)


def sam_vit_l(checkpoint: str | os.PathLike[str] | None = None, **options: Any) -> Sam:
    """SAM with a ViT-L: 24 blocks, 1024 channels, 16 heads, global attention in every sixth; 312,342,832 parameters.

    Arguments and errors are ``sam_vit_b``'s.
    """
    return _build("vit_l", checkpoint, options)


def sam_vit_h(checkpoint: str | os.PathLike[str] | None = None, **options: Any) -> Sam:
    """SAM with a ViT-H: 32 blocks, 1280 channels, 16 heads, global attention in every eighth; 641,090,608 parameters.

    Arguments and errors are ``sam_vit_b``'s.
    """
    return _build("vit_h", checkpoint, options)


def _build(name: str, checkpoint: str | os.PathLike[str] | None, options: dict[str, Any]) -> Sam:
    sizes = {**SIZES[name], **options}
    if checkpoint is None:
        return build_sam(**sizes)
    options = dict(options)
    to = {name: options.pop(name, None) for name in ("device", "dtype")}
    tensors, known = read_checkpoint(checkpoint)
    found = infer_sizes(tensors, checkpoint)
    for other, others in SIZES.items():
        if all(found[key] == others[key] != sizes[key] for key in ("dim", "depth")):
            raise CheckpointError(f"{checkpoint}: holds a {other}; expected a {name} (sam_{other} and load_sam take it)")
    return fill({**SIZES[name], **known, **options}, tensors, checkpoint).to(**to)
