"""Segment Anything (Kirillov et al. 2023) on the fused operators, with the names of its published checkpoints."""

from .checkpoints import CheckpointError, infer_sizes, load_sam, sam_without_weights, to_huggingface_state_dict
from .image_encoder import ImageEncoder
from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder
from .sam import Sam, build_sam
from .transformer import TwoWayTransformer
from .variants import sam_vit_b, sam_vit_h, sam_vit_l

__all__ = [
    "CheckpointError",
    "ImageEncoder",
    "MaskDecoder",
    "PromptEncoder",
    "Sam",
    "TwoWayTransformer",
    "build_sam",
    "infer_sizes",
    "load_sam",
    "sam_vit_b",
    "sam_vit_h",
    "sam_vit_l",
    "sam_without_weights",
    "to_huggingface_state_dict",
]
