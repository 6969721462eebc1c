"""Masks for prompts: a picture is encoded once and then prompted as often as one likes.

Kirillov et al., "Segment Anything" (2023), section 3: the image encoder takes seconds, the prompt encoder and the mask decoder
milliseconds. ``SamPredictor`` has the calls and the results of the class of that name in segment_anything 1.0, and takes several
pictures besides, which it encodes in batches.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from .embeddings import Size, embed, embed_all, scale
from .prompts import encode_prompts, read_prompt
from .transforms import ResizeLongestSide

NEEDED = ("image_encoder", "prompt_encoder", "mask_decoder", "preprocess", "postprocess_masks", "mask_threshold", "image_format")


class SamPredictor:
    """Encodes a picture with SAM and predicts masks for prompts in it.

    >>> predictor = fastvit.SamPredictor(sam)
    >>> predictor.set_image(photograph)
    >>> masks, scores, low_res = predictor.predict(point_coords=[[320, 240]], point_labels=[1])

    Args:
        sam_model: ``fastvit.models.Sam`` in any floating dtype, or segment_anything's, accelerated or not, whose prompt
            encoder takes float32 alone and is given it. Of either the image encoder, where the time goes, may have a dtype
            of its own. Raises ``TypeError`` for what lacks SAM's parts.

    ``original_size`` and ``input_size`` are (H, W) of the picture before and after scaling, ``features`` is its embedding
    (1, C, h, w). After ``set_images`` the sizes are lists of these, and ``features`` is (pictures, C, h, w).
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
            image: (H, W, 3) uint8, or floats from 0 to 1, or a Pillow picture of any mode.
            image_format: the order of an array's channels, "RGB" or "BGR".

        Raises ``TypeError`` and ``ValueError`` for what is no picture.
        """
        self.set_torch_image(*scale(image, image_format, self.model, self.transform))

    @torch.no_grad()
    def set_images(self, images: Iterable[Any], image_format: str = "RGB", *, batch_size: int = 8) -> None:
        """Encodes several pictures, each of its own size; prompts say by ``image_index`` which of them they are about.

        Args:
            images: pictures as ``set_image`` takes them.
            image_format: the order of the arrays' channels, "RGB" or "BGR".
            batch_size: pictures that the image encoder sees at once.

        Raises as ``set_image``; the message says which picture it is.
        """
        if isinstance(images, (str, bytes, np.ndarray, Image.Image)) or not isinstance(images, Iterable):
            raise TypeError(f"images is {type(images).__name__}; expected a list of pictures (set_image takes a single one)")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self.reset_image()
        embedded = embed_all(images, image_format, batch_size, self.model, self.transform)
        self.features, self.original_size, self.input_size = embedded
        self.is_image_set = True

    @torch.no_grad()
    def set_torch_image(self, transformed_image: Tensor, original_image_size: Sequence[int]) -> None:
        """Encodes a picture that has been scaled already, or several of one size.

        Args:
            transformed_image: (B, 3, H', W'), values from 0 to 255, the longest side as ``transform`` makes it. Where B is
                not 1, a single prompt is about all of them, and ``predict_torch`` gives a row each.
            original_image_size: (H, W) before scaling.
        """
        if not isinstance(transformed_image, Tensor):
            raise TypeError(f"transformed_image is {type(transformed_image).__name__}; expected a torch.Tensor")
        side = self.model.image_encoder.img_size
        shape = tuple(transformed_image.shape)
        if len(shape) != 4 or shape[1] != 3 or max(shape[2:]) != side or not shape[0]:
            raise ValueError(f"transformed_image has shape {shape}; expected (B, 3, H, W) with a longest side of {side}")
        if len(original_image_size) != 2:
            raise ValueError(f"original_image_size is {original_image_size}; expected (H, W)")
        height, width = original_image_size
        self.reset_image()
        self.features = embed(self.model, [transformed_image.to(self.device)])
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
        *,
        text_embedding: ArrayLike | None = None,
        image_index: int = 0,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for one prompt: points, a box and a mask together mean one object.

        Args:
            point_coords: (N, 2), as (x, y) in pixels of the picture.
            point_labels: (N,), 1 for the object, 0 for what is not it; -1 for a row that is to be ignored. Another whole
                number marks a place alone. Without points, labels mean nothing.
            box: (4,), (1, 4) or (2, 2), as (x0, y0, x1, y1) in pixels of the picture.
            mask_input: (1, h, w) logits: one of the low-resolution masks that an earlier call returned.
            multimask_output: three masks instead of one, for prompts that may mean part, object or group.
            return_logits: logits instead of the booleans "logit > model.mask_threshold".
            text_embedding: (text_dim,), CLIP's of a text or an image, for a Sam of ours that has a ``text_dim``.
            image_index: which of the pictures of ``set_images``, the first being 0.

        Returns:
            masks (C, H, W), bool or float32; the model's own estimate of their IoU (C,), float32; the masks as the decoder
            gives them (C, h, w), float32 logits, 256×256 for a model of 1024 pixels.

        Raises ``RuntimeError`` where no picture is set, ``TypeError`` and ``ValueError`` for prompts that do not fit.
        """
        _, size, _ = self._picture(image_index)
        given = point_coords, point_labels, box, mask_input, text_embedding
        prompt = read_prompt(self.model, self.transform, size, *given)
        masks, quality, low_res = self.predict_torch(
            **prompt, multimask_output=multimask_output, return_logits=return_logits, image_index=image_index
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
        *,
        text_embeddings: Tensor | None = None,
        image_index: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Masks for B prompts of one picture at once, on the model's device.

        Args:
            point_coords: (B, N, 2) in the scaled picture: ``transform.apply_coords_torch`` brings them there.
            point_labels: (B, N), as in ``predict``.
            boxes: (B, 4), (B, 1, 4) or (B, 2, 2) in the scaled picture.
            mask_input: (B, 1, h, w) logits, or (1, 1, h, w) for all of the prompts.
            text_embeddings: (B, text_dim), as in ``predict``.
            multimask_output, return_logits, image_index: as in ``predict``.

        Returns:
            masks (B, C, H, W), estimated IoU (B, C) and low-resolution logits (B, C, h, w), in float32 at least.
        """
        prompts = point_coords, point_labels, boxes, mask_input
        low_res, quality = self.predict_low_res(
            *prompts, multimask_output, text_embeddings=text_embeddings, image_index=image_index
        )
        masks = self.upscale(low_res, image_index=image_index)
        return masks if return_logits else masks > self.model.mask_threshold, quality, low_res

    @torch.no_grad()
    def predict_low_res(
        self,
        point_coords: Tensor | None,
        point_labels: Tensor | None,
        boxes: Tensor | None = None,
        mask_input: Tensor | None = None,
        multimask_output: bool = True,
        *,
        text_embeddings: Tensor | None = None,
        image_index: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """What ``predict_torch`` knows before it scales masks up: logits (B, C, h, w) and estimated IoU (B, C)."""
        features, _, _ = self._picture(image_index)
        sparse, dense, positions = encode_prompts(self.model, point_coords, point_labels, boxes, mask_input, text_embeddings)
        low_res, quality = self.model.mask_decoder(
            image_embeddings=features.to(positions.dtype),
            image_pe=positions,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
        )
        return _at_least_float32(low_res), _at_least_float32(quality)

    @torch.no_grad()
    def upscale(self, low_res: Tensor, *, image_index: int = 0) -> Tensor:
        """Logits (B, C, h, w) → (B, C, H, W) of the picture that is set."""
        _, original_size, input_size = self._picture(image_index)
        return self.model.postprocess_masks(low_res, input_size, original_size)

    def get_image_embedding(self) -> Tensor:
        """(1, C, h, w): 256 channels on a grid of 64×64 for a model of 1024 pixels; after ``set_images`` one each picture."""
        self._picture(0)
        return self.features

    def reset_image(self) -> None:
        """Forgets the pictures, and lets go of their embeddings' memory."""
        self.is_image_set = False
        self.features = self.original_size = self.input_size = None

    def _picture(self, image_index: int) -> tuple[Tensor, Size, Size]:
        """(features, original size, input size) of a picture that is set. Raises for one that is not."""
        if not self.is_image_set:
            raise RuntimeError("no image is set; call set_image before predicting")
        several = isinstance(self.original_size, list)
        count = len(self.original_size) if several else 1
        if not isinstance(image_index, (int, np.integer)) or not 0 <= image_index < count:
            raise ValueError(f"image_index is {image_index!r}; expected the place of one of {count} images, from 0 on")
        if several:
            return self.features[image_index : image_index + 1], self.original_size[image_index], self.input_size[image_index]
        return self.features, self.original_size, self.input_size


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Half-precision logits would be scaled up, compared and counted in half precision."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
