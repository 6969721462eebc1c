"""From pictures to SAM's embeddings: scaled to the model's side, and through the image encoder, several at a time.

Sizes are (H, W) in pixels.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .transforms import ResizeLongestSide, as_pixels

FORMATS = ("RGB", "BGR")
Size = tuple[int, int]


def scale(image: Any, image_format: str, model: Any, transform: ResizeLongestSide) -> tuple[Tensor, Size]:
    """A picture as ``SamPredictor.set_image`` takes it → (1, 3, H', W') uint8 on the model's device, channels in its order, and
    the size before. Raises ``TypeError`` and ``ValueError`` for what is no picture."""
    if image_format not in FORMATS:
        raise ValueError(f"image_format is {image_format!r}; expected one of {', '.join(FORMATS)}")
    pixels = as_pixels(image)
    given = "RGB" if isinstance(image, Image.Image) else image_format
    if given != model.image_format:
        pixels = pixels[..., ::-1]
    scaled = torch.as_tensor(transform.apply_image(np.ascontiguousarray(pixels)), device=model.device)
    return scaled.permute(2, 0, 1).contiguous()[None], (pixels.shape[0], pixels.shape[1])


def embed(model: Any, pictures: Sequence[Tensor]) -> Tensor:
    """Scaled pictures (n, 3, H', W') each → (all of them, C, h, w), in one call of the image encoder and in its dtype."""
    dtype = next(model.image_encoder.parameters()).dtype
    return model.image_encoder(torch.cat([model.preprocess(picture) for picture in pictures]).to(dtype))


def embed_all(
    images: Iterable[Any], image_format: str, batch_size: int, model: Any, transform: ResizeLongestSide
) -> tuple[Tensor, list[Size], list[Size]]:
    """Pictures of any sizes → embeddings (pictures, C, h, w), and the sizes before and after scaling. Raises as ``scale``, with
    the place of the picture in the message."""
    features, original_sizes, input_sizes = [], [], []
    pictures = _scale_each(images, image_format, model, transform)
    while batch := list(islice(pictures, batch_size)):
        features.append(embed(model, [picture for picture, _ in batch]))
        original_sizes += [size for _, size in batch]
        input_sizes += [(picture.shape[2], picture.shape[3]) for picture, _ in batch]
    if not features:
        raise ValueError("images holds no picture; expected at least one")
    return torch.cat(features), original_sizes, input_sizes


def _scale_each(
    images: Iterable[Any], image_format: str, model: Any, transform: ResizeLongestSide
) -> Iterator[tuple[Tensor, Size]]:
    for index, image in enumerate(images):
        try:
            yield scale(image, image_format, model, transform)
        except (TypeError, ValueError) as error:
            raise type(error)(f"images[{index}]: {error}") from error
