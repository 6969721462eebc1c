"""Masks for prompts: a picture is encoded once and then prompted as often as one likes.

Kirillov et al., "Segment Anything" (2023), section 3: the image encoder takes seconds, the prompt encoder and the mask decoder
milliseconds. ``SamPredictor`` has the calls and the results of the class of that name in segment_anything 1.0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .transforms import ResizeLongestSide, as_pixels

FORMATS = ("RGB", "BGR")
LABELS = (-1, 0, 1)  # padding, background, foreground
NEEDED = ("image_encoder", "prompt_encoder", "mask_decoder", "preprocess", "postprocess_masks", "mask_threshold", "image_format")


class SamPredictor:
    """Encodes a picture with SAM and predicts masks for prompts in it.

    >>> predictor = fastvit.SamPredictor(sam)
    >>> predictor.set_image(photograph)
    >>> masks, scores, low_res = predictor.predict(point_coords=[[320, 240]], point_labels=[1])

    Args:
        sam_model: ``fastvit.models.Sam``, or segment_anything's (accelerated or not), in any floating dtype. Raises
            ``TypeError`` for what lacks SAM's parts.

    ``original_size`` and ``input_size`` are (H, W) of the picture before and after scaling, ``features`` is its embedding.
    """

    def __init__(self, sam_model: Any) -> None:
        missing = [name for name in NEEDED if not hasattr(sam_model, name)]
        if missing:
            raise TypeError(f"sam_model is {type(sam_model).__name__}, without {', '.join(missing)}; expected a Sam")
        self.model = sam_model
        self.transform = ResizeLongestSide(sam_model.image_encoder.img_size)
        self.features: Any
        self.original_size: Any
        self.input_size: Any
        self.reset_image()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def set_image(self, image: Any, image_format: str = "RGB") -> None:
        """Encodes a picture; prompts are about this one until the next.

        Args:
            image: (H, W, 3) uint8, or a Pillow picture of any mode.
            image_format: the order of an array's channels, "RGB" or "BGR".
        """
        if image_format not in FORMATS:
            raise ValueError(f"image_format is {image_format!r}; expected one of {', '.join(FORMATS)}")
        pixels = as_pixels(image)
        given = image_format if pixels is image else "RGB"
        if given != self.model.image_format:
            pixels = pixels[..., ::-1]
        scaled = torch.as_tensor(self.transform.apply_image(np.ascontiguousarray(pixels)), device=self.device)
        self.set_torch_image(scaled.permute(2, 0, 1).contiguous()[None], pixels.shape[:2])

    @torch.no_grad()
    def set_torch_image(self, transformed_image: Tensor, original_image_size: Sequence[int]) -> None:
        """Encodes a picture that has been scaled already.

        Args:
            transformed_image: (1, 3, H', W'), values from 0 to 255, the longest side as ``transform`` makes it.
            original_image_size: (H, W) before scaling.
        """
        side = self.model.image_encoder.img_size
        shape = tuple(transformed_image.shape)
        if len(shape) != 4 or shape[:2] != (1, 3) or max(shape[2:]) != side:
            raise ValueError(f"transformed_image has shape {shape}; expected (1, 3, H, W) with a longest side of {side}")
        height, width = original_image_size
        self.reset_image()
        pixels = self.model.preprocess(transformed_image.to(self.device))
        self.features = self.model.image_encoder(pixels.to(self._dtype))
        self.original_size = (int(height), int(width))
        self.input_size = shape[2:]
        self.is_image_set = True

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for one prompt: points, a box and a mask together mean one object.

        Args:
            point_coords: (N, 2), as (x, y) in pixels of the picture.
            point_labels: (N,), 1 for the object, 0 for what is not it; -1 for a row that is to be ignored.
            box: (4,) or (1, 4), as (x0, y0, x1, y1) in pixels of the picture.
            mask_input: (1, h, w) logits: one of the masks that an earlier call returned last.
            multimask_output: three masks instead of one, for prompts that may mean part, object or group.
            return_logits: logits instead of the booleans "logit > model.mask_threshold".

        Returns:
            masks (C, H, W), bool or float32; the model's own estimate of their IoU (C,), float32; the masks as the decoder
            gives them (C, h, w), float32 logits, 256×256 for a model of 1024 pixels.
        """
        self._check_set()
        points = self._points(point_coords, point_labels)
        boxes = None if box is None else self._box(box)
        low_res_input = None if mask_input is None else self._mask(mask_input)
        masks, quality, low_res = self.predict_torch(
            *points, boxes, low_res_input, multimask_output=multimask_output, return_logits=return_logits
        )
        return masks[0].cpu().numpy(), quality[0].cpu().numpy(), low_res[0].cpu().numpy()

    @torch.no_grad()
    def predict_torch(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks for B prompts at once, on the model's device.

        Args:
            point_coords: (B, N, 2) in the scaled picture: ``transform.apply_coords_torch`` brings them there.
            point_labels: (B, N), as in ``predict``.
            boxes: (B, 4) in the scaled picture.
            mask_input: (B, 1, h, w) logits.

        Returns:
            masks (B, C, H, W), estimated IoU (B, C) and low-resolution logits (B, C, h, w); no numbers below float32.
        """
        low_res, quality = self.predict_low_res(point_coords, point_labels, boxes, mask_input, multimask_output)
        masks = self.upscale(low_res)
        return masks if return_logits else masks > self.model.mask_threshold, quality, low_res

    @torch.no_grad()
    def predict_low_res(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """What ``predict_torch`` knows before it scales masks up: logits (B, C, h, w) and estimated IoU (B, C)."""
        self._check_set()
        if (point_coords is None) != (point_labels is None):
            raise ValueError("point_coords and point_labels belong together; expected both or neither")
        encoder = self.model.prompt_encoder
        sparse, dense = encoder(
            points=None if point_coords is None else (point_coords, point_labels),
            boxes=boxes,
            masks=None if mask_input is None else mask_input.to(self._dtype),
        )
        low_res, quality = self.model.mask_decoder(
            image_embeddings=self.features,
            image_pe=encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
        )
        return _at_least_float32(low_res), _at_least_float32(quality)

    @torch.no_grad()
    def upscale(self, low_res: Tensor) -> Tensor:
        """Logits (B, C, h, w) → (B, C, H, W) of the picture that is set."""
        self._check_set()
        return self.model.postprocess_masks(low_res, self.input_size, self.original_size)

    def get_image_embedding(self) -> Tensor:
        """(1, C, h, w): 256 channels on a grid of 64×64 for a model of 1024 pixels."""
        self._check_set()
        return self.features

    def reset_image(self) -> None:
        """Forgets the picture, and lets go of its embedding's memory."""
        self.is_image_set = False
        self.features = self.original_size = self.input_size = None

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.image_encoder.parameters()).dtype

    def _check_set(self) -> None:
        if not self.is_image_set:
            raise RuntimeError("no image is set; call set_image before predicting")

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32, device=self.device)

    def _points(self, coords: ArrayLike | None, labels: ArrayLike | None) -> tuple[Tensor | None, Tensor | None]:
        if coords is None and labels is None:
            return None, None
        if coords is None or labels is None:
            missing = "point_coords" if coords is None else "point_labels"
            raise ValueError(f"{missing} is None; expected it beside {'point_labels' if coords is None else 'point_coords'}")
        points = _numbers("point_coords", coords, (None, 2))
        kinds = _numbers("point_labels", labels, (len(points),))
        if not np.isin(kinds, LABELS).all():
            raise ValueError(f"point_labels is {kinds.tolist()}; expected 1 (object), 0 (background) or -1 (no point)")
        scaled = self._tensor(self.transform.apply_coords(points, self.original_size))
        return scaled[None], torch.as_tensor(kinds.astype(np.int32), device=self.device)[None]

    def _box(self, box: ArrayLike) -> Tensor:
        numbers = _numbers("box", box, (1, 4) if np.ndim(box) == 2 else (4,))  # type: ignore[arg-type]
        return self._tensor(self.transform.apply_boxes(numbers, self.original_size))

    def _mask(self, mask: ArrayLike) -> Tensor:
        size = tuple(self.model.prompt_encoder.mask_input_size)
        return self._tensor(_numbers("mask_input", mask, (1, *size)))[None]


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Half-precision logits would be scaled up, compared and counted in half precision."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _numbers(name: str, values: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """An array of finite numbers of this shape, None standing for any length. Raises ``TypeError`` or ``ValueError``."""
    try:
        array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    except ValueError:
        raise ValueError(f"{name} has rows of different lengths; expected {_layout(shape)}") from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} has dtype {array.dtype}; expected numbers")
    if array.ndim != len(shape) or any(want not in (None, have) for have, want in zip(array.shape, shape, strict=True)):
        raise ValueError(f"{name} has shape {array.shape}; expected {_layout(shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    return array


def _layout(shape: tuple[int | None, ...]) -> str:
    sides = ", ".join("N" if side is None else str(side) for side in shape)
    return f"({sides},)" if len(shape) == 1 else f"({sides})"
