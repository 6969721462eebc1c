"""Prompts as a user writes them → the tensors that SAM takes, and these → what its mask decoder takes.

Points and boxes come in pixels of the picture and are scaled as it was. What does not fit is refused by the argument's name.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.func import functional_call

from ..models.sam import PromptEncoder
from .transforms import ResizeLongestSide


def read_prompt(
    model: Any,
    transform: ResizeLongestSide,
    original_size: tuple[int, int],
    point_coords: ArrayLike | None,
    point_labels: ArrayLike | None,
    box: ArrayLike | None,
    mask_input: ArrayLike | None,
    text_embedding: ArrayLike | None,
) -> dict[str, Any]:
    """The prompt of ``SamPredictor.predict`` for a picture of ``original_size`` (H, W), as ``predict_torch`` takes it by name:
    a batch of one, on the model's device. Raises ``TypeError`` and ``ValueError``."""

    def batch(values: np.ndarray, dtype: type = np.float32) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(values, dtype), device=model.device)[None]

    prompt: dict[str, Any] = {"point_coords": None, "point_labels": None}
    if point_coords is not None:
        points = _numbers("point_coords", point_coords, (None, 2))
        prompt["point_coords"] = batch(transform.apply_coords(points, original_size))
        if point_labels is not None:
            prompt["point_labels"] = batch(_numbers("point_labels", point_labels, (len(points),)), np.int32)
    if box is not None:
        shape = np.shape(box) if np.shape(box) in ((1, 4), (2, 2)) else (4,)  # type: ignore[arg-type]
        prompt["boxes"] = batch(transform.apply_boxes(_numbers("box", box, shape), original_size)[0])
    if mask_input is not None:
        prompt["mask_input"] = batch(_numbers("mask_input", mask_input, (1, *model.prompt_encoder.mask_input_size)))
    if text_embedding is not None:
        prompt["text_embeddings"] = batch(_numbers("text_embedding", text_embedding, (None,)))
    return prompt


def encode_prompts(
    model: Any,
    point_coords: Tensor | None,
    point_labels: Tensor | None,
    boxes: Tensor | None,
    mask_input: Tensor | None,
    text_embeddings: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of ``SamPredictor.predict_torch`` → their tokens (B, N, C), dense prompts (B, C, h, w) and the positions of the
    picture (1, C, h, w), in the mask decoder's dtype.

    segment_anything's prompt encoder takes float32 alone: weights of another dtype are converted for the call. Raises
    ``ValueError`` for points without labels and for a text where the model takes none.
    """
    encoder = model.prompt_encoder
    if point_coords is not None and point_labels is None:
        raise ValueError("point_labels is None; expected one each of the point_coords")
    points = None if point_coords is None else (point_coords, point_labels)
    prompts: dict[str, Any] = {"points": points, "boxes": boxes, "masks": mask_input}
    if text_embeddings is not None:
        if getattr(encoder, "text_embedding", None) is None:
            raise ValueError("text_embeddings: the model takes none; expected a Sam of fastvit's with a text_dim")
        prompts["text"] = text_embeddings
    original = not isinstance(encoder, PromptEncoder)
    if original and mask_input is not None:
        prompts["masks"] = mask_input.float()
    own, dtype = (next(part.parameters()).dtype for part in (encoder, model.mask_decoder))
    if original and own != torch.float32:
        weights = {name: tensor.float() for name, tensor in encoder.state_dict().items()}
        sparse, dense = functional_call(encoder, weights, kwargs=prompts)
        matrix = {name.removeprefix("pe_layer."): t for name, t in weights.items() if name.startswith("pe_layer.")}
        positions = functional_call(encoder.pe_layer, matrix, (encoder.image_embedding_size,)).unsqueeze(0)
    else:
        sparse, dense = encoder(**prompts)
        positions = encoder.get_dense_pe()
    return sparse.to(dtype), dense.to(dtype), positions.to(dtype)


def _numbers(name: str, values: Any, shape: tuple[int | None, ...]) -> np.ndarray:
    """An array of finite numbers of this shape, None standing for any length. Raises ``TypeError`` or ``ValueError``."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # which NumPy has not
    try:
        array = np.asarray(values)
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
