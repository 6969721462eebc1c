"""Which mask is meant by words: proposals ranked by CLIP, without any training.

A mask's box is cut out of the picture, what is outside the mask is made faint, and CLIP (Radford et al., 2021) compares the
cut with the text. SAM's own text prompts (Kirillov et al., section 7.5) need weights that were never published.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from ..loading.errors import explained, library
from .boxes import boxes_of_masks
from .rle import decode_rle
from .transforms import as_pixels

BACKGROUNDS = ("blur", "blank", "keep")
GREY = (122, 116, 104)  # CLIP's mean colour, which its preprocessing turns into zeros


class Match(NamedTuple):
    """A mask, by its place among those given, and the cosine similarity of its picture with the text, from -1 to 1."""

    mask: int
    similarity: float


@torch.no_grad()
def rank_by_text(
    image: Any,
    masks: Tensor | np.ndarray | Sequence[Any],
    text: str,
    clip_model: nn.Module,
    clip_processor: Any,
    *,
    background: str = "blur",
    margin: float = 0.1,
    batch_size: int = 32,
) -> list[Match]:
    """All masks, the one that fits the text best first.

    Args:
        image: (H, W, 3) in RGB, uint8 or floats from 0 to 1, or a Pillow picture.
        masks: (N, H, W) booleans, or the records of ``SamAutomaticMaskGenerator.generate`` in any output mode.
        text: what to look for, in CLIP's language: "a photo of a cat" rather than "cat".
        clip_model: Hugging Face's ``CLIPModel``, or one with its outputs (``SiglipModel``); accelerated or not.
        clip_processor: the processor that belongs to it, for pictures and text.
        background: what becomes of the pixels outside the mask: "blur", "blank" (CLIP's mean colour) or "keep".
        margin: how far the cut reaches beyond the mask's box, as a part of the box's longer side.
        batch_size: cuts that the model sees at once.

    An empty mask resembles nothing: its similarity is -1. Raises ``TypeError`` and ``ValueError`` for what does not fit.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"text is {text!r}; expected words")
    if background not in BACKGROUNDS:
        raise ValueError(f"background is {background!r}; expected one of {', '.join(BACKGROUNDS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    if not margin >= 0:
        raise ValueError(f"margin is {margin}; expected at least 0, of the box's longer side")
    pixels = as_pixels(image)
    found = _as_masks(masks, pixels.shape[:2])
    filled = [index for index, mask in enumerate(found) if mask.any()]
    similarity = np.full(len(found), -1.0)
    for start in range(0, len(filled), batch_size):
        rows = filled[start : start + batch_size]
        cuts = [cut_out(pixels, found[row], background, margin) for row in rows]
        similarity[rows] = _similarities(cuts, text, clip_model, clip_processor)
    order = np.argsort(-similarity, kind="stable")
    return [Match(int(index), float(similarity[index])) for index in order]


def clip_processor(name: str) -> Any:
    """What prepares pictures and texts for the CLIP of that name, a folder or a Hugging Face id; runs no code that comes with it.

    Raises ``LoadError`` (a ``ValueError``) where it cannot be had.
    """
    with explained(name):
        return library("transformers").AutoProcessor.from_pretrained(name, trust_remote_code=False)


def cut_out(pixels: np.ndarray, mask: np.ndarray, background: str = "blur", margin: float = 0.1) -> Image.Image:
    """The part of a picture (H, W, 3) around a mask (H, W) with at least one pixel, its background as ``rank_by_text`` says."""
    x0, y0, x1, y1 = boxes_of_masks(torch.as_tensor(mask)).tolist()
    reach = round(margin * (max(x1 - x0, y1 - y0) + 1))
    x0, y0 = max(0, x0 - reach), max(0, y0 - reach)
    x1, y1 = min(mask.shape[1], x1 + 1 + reach), min(mask.shape[0], y1 + 1 + reach)
    cut = Image.fromarray(np.ascontiguousarray(pixels[y0:y1, x0:x1]))
    if background == "keep":
        return cut
    if background == "blur":
        behind = cut.filter(ImageFilter.GaussianBlur(max(cut.size) / 16))
    else:
        behind = Image.new("RGB", cut.size, GREY)
    return Image.composite(cut, behind, Image.fromarray(np.ascontiguousarray(mask[y0:y1, x0:x1])))


def _similarities(cuts: list[Image.Image], text: str, model: nn.Module, processor: Any) -> np.ndarray:
    parameter = next(model.parameters())
    inputs = processor(text=[text], images=cuts, return_tensors="pt", truncation=True, **_padding(model))
    output = model(
        **{
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
    )
    images, words = (nn.functional.normalize(embeds.float(), dim=-1) for embeds in (output.image_embeds, output.text_embeds))
    return (images @ words[0]).cpu().numpy()


def _padding(model: Any) -> dict[str, Any]:
    """SigLIP (Zhai et al., 2023) was trained on texts padded to one length, and its embedding is that of the last place."""
    config = model.config
    if not str(config.model_type).startswith("siglip"):
        return {"padding": True}
    return {"padding": "max_length", "max_length": config.text_config.max_position_embeddings}


def _as_masks(masks: Any, size: tuple[int, ...]) -> list[np.ndarray]:
    if isinstance(masks, Tensor):
        masks = masks.cpu().numpy()
    found = []
    for mask in masks:
        if isinstance(mask, Mapping):
            mask = mask.get("segmentation", mask)
        if isinstance(mask, Mapping):
            mask = decode_rle(mask)
        array = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        if array.dtype != bool:
            raise TypeError(f"masks hold {array.dtype}; expected booleans, or records of SamAutomaticMaskGenerator")
        if array.shape != size:
            raise ValueError(f"masks hold one of shape {array.shape}; expected the image's, {tuple(size)}")
        found.append(array)
    return found
