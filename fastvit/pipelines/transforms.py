"""From a picture's pixels to the pixels that SAM's image encoder sees: the longest side scaled to the model's."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate


class ResizeLongestSide:
    """Scales pictures so that the longest side has ``target_length`` pixels, and points and boxes with them.

    Sides are rounded half up, each from its own product, as segment_anything 1.0 does; coordinates are scaled by the ratio
    of the rounded sides. ``original_size`` is (H, W) in pixels throughout.
    """

    def __init__(self, target_length: int) -> None:
        self.target_length = target_length

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 → (H', W', 3) uint8, by Pillow's antialiased bilinear filter: the one SAM was trained with."""
        height, width = self.get_preprocess_shape(image.shape[0], image.shape[1], self.target_length)
        return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))

    def apply_image_torch(self, image: Tensor) -> Tensor:
        """(B, C, H, W) floats → (B, C, H', W'), on the tensor's device; close to ``apply_image``, not equal to it."""
        size = self.get_preprocess_shape(image.shape[-2], image.shape[-1], self.target_length)
        return interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)

    def apply_coords(self, coords: ArrayLike, original_size: Sequence[int]) -> np.ndarray:
        """(…, 2) points as (x, y) in the picture → float64 points in the scaled picture."""
        return np.asarray(coords).astype(np.float64) * np.array(self._scale(original_size))

    def apply_boxes(self, boxes: ArrayLike, original_size: Sequence[int]) -> np.ndarray:
        """(…, 4) boxes as (x0, y0, x1, y1) → (B, 4) float64."""
        return self.apply_coords(np.asarray(boxes).reshape(-1, 2, 2), original_size).reshape(-1, 4)

    def apply_coords_torch(self, coords: Tensor, original_size: Sequence[int]) -> Tensor:
        """(…, 2) points → float32 points in the scaled picture, on their device."""
        x, y = self._scale(original_size)
        coords = coords.to(torch.float32)
        return torch.stack([coords[..., 0] * x, coords[..., 1] * y], dim=-1)

    def apply_boxes_torch(self, boxes: Tensor, original_size: Sequence[int]) -> Tensor:
        """(…, 4) boxes → (B, 4) float32, on their device."""
        return self.apply_coords_torch(boxes.reshape(-1, 2, 2), original_size).reshape(-1, 4)

    @staticmethod
    def get_preprocess_shape(oldh: int, oldw: int, long_side_length: int) -> tuple[int, int]:
        """(H', W') of a picture of ``oldh`` × ``oldw`` pixels. Raises ``ValueError`` where a side would vanish."""
        longest = max(oldh, oldw)
        if longest > 0:
            scale = long_side_length / longest
            height, width = int(oldh * scale + 0.5), int(oldw * scale + 0.5)
            if height and width:
                return height, width
        raise ValueError(
            f"image is {oldh}×{oldw} pixels; expected one whose sides are both at least a pixel"
            f" when the longest is scaled to {long_side_length}"
        )

    def _scale(self, original_size: Sequence[int]) -> tuple[float, float]:
        """Factors for x and for y."""
        height, width = original_size
        new_height, new_width = self.get_preprocess_shape(height, width, self.target_length)
        return new_width / width, new_height / height


def as_pixels(image: Any) -> np.ndarray:
    """A picture as (H, W, 3) uint8: an array of just that, one of floats from 0 to 1, which are scaled to 255 and cut off as
    segment_anything does, or a Pillow picture (whose pixels become RGB).

    Raises ``TypeError`` for another type or dtype, ``ValueError`` for another shape, range or an empty picture.
    """
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if not isinstance(image, np.ndarray):
        raise TypeError(f"image is {type(image).__name__}; expected a NumPy array (H, W, 3) of uint8 or a PIL.Image")
    if image.dtype != np.uint8 and image.dtype.kind != "f":
        raise TypeError(f"image has dtype {image.dtype}; expected uint8, with values from 0 to 255, or floats from 0 to 1")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image has shape {image.shape}; expected (H, W, 3) with at least one pixel")
    if image.dtype == np.uint8:
        return image
    low, high = image.min(), image.max()
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ValueError(f"image has floats from {low:g} to {high:g}; expected them from 0 to 1, or uint8 from 0 to 255")
    return (image * 255).astype(np.uint8)
