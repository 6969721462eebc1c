"""Segment Anything (Kirillov et al. 2023): one pass over an image, then masks for any number of prompts."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _checks
from .image_encoder import ImageEncoder
from .mask_decoder import MaskDecoder
from .prompt_encoder import PromptEncoder
from .transformer import TwoWayTransformer

PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, of 8-bit RGB


class Sam(nn.Module):
    """Masks of the objects that prompts point at. The state dict is that of Segment Anything's checkpoints.

    Args:
        image_encoder, prompt_encoder, mask_decoder: the parts, of one number of channels and one grid.
        pixel_mean, pixel_std: of each channel, taken from pixels before encoding.
    """

    mask_threshold: float = 0.0
    image_format: str = "RGB"
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        image_encoder: ImageEncoder,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        pixel_mean: Sequence[float] = PIXEL_MEAN,
        pixel_std: Sequence[float] = PIXEL_STD,
    ):
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @torch.no_grad()
    def forward(self, batched_input: list[dict[str, Any]], multimask_output: bool) -> list[dict[str, Tensor]]:
        """Masks for images and their prompts. All images are encoded together; their prompts may differ in kind and number.

        Args:
            batched_input: for each image a dictionary of
                "image" (3, H, W), pixels in 0 … 255, resized so that its longest side is the encoder's ``img_size``;
                "original_size" (height, width), before it was resized;
                and where there are such prompts, in pixels of the resized image,
                "point_coords" (B, N, 2) and "point_labels" (B, N), "boxes" (B, 4), "mask_inputs" (B, 1, 4·h, 4·w) and
                "text_embeddings" (B, text_dim): see ``PromptEncoder``.
            multimask_output: whether each prompt gets several masks or one.

        Returns:
            for each image a dictionary of "masks" (B, masks, height, width), bool, of the original size; "iou_predictions"
            (B, masks); and "low_res_logits" (B, masks, 4·h, 4·w), which a later prompt may take as "mask_inputs".
        """
        images = torch.stack([self.preprocess(record["image"]) for record in batched_input])
        embeddings = self.image_encoder(images)
        return [
            self._decode(embedding.unsqueeze(0), record, multimask_output)
            for embedding, record in zip(embeddings, batched_input, strict=True)
        ]

    def _decode(self, embedding: Tensor, record: dict[str, Any], multimask_output: bool) -> dict[str, Tensor]:
        points = (record["point_coords"], record["point_labels"]) if "point_coords" in record else None
        sparse, dense = self.prompt_encoder(
            points=points, boxes=record.get("boxes"), masks=record.get("mask_inputs"), text=record.get("text_embeddings")
        )
        logits, iou = self.mask_decoder(embedding, self.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output)
        masks = self.postprocess_masks(logits, record["image"].shape[-2:], record["original_size"]) > self.mask_threshold
        return {"masks": masks, "iou_predictions": iou, "low_res_logits": logits}

    def preprocess(self, x: Tensor) -> Tensor:
        """Pixels (..., 3, H, W), H and W up to the encoder's ``img_size``, → normalized, padded with zeros at the bottom and
        the right, in the model's dtype: (..., 3, img_size, img_size)."""
        side, dtype = self.image_encoder.img_size, self.pixel_mean.dtype
        if not isinstance(x, Tensor):
            raise TypeError(f"image is {type(x).__name__}; expected a torch.Tensor")
        if x.dim() < 3 or x.shape[-3] != len(self.pixel_mean) or max(x.shape[-2:]) > side:
            expected = f"(…, {len(self.pixel_mean)}, height, width) with sides up to {side}, so resize its longest side to that"
            raise ValueError(f"image has shape {tuple(x.shape)}; expected {expected}")
        exact = torch.promote_types(dtype, torch.float32)
        x = (x.to(exact) - self.pixel_mean.to(exact)) / self.pixel_std.to(exact)
        return F.pad(x, (0, side - x.shape[-1], 0, side - x.shape[-2])).to(dtype)

    def postprocess_masks(self, masks: Tensor, input_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
        """Logits (B, masks, h, w) of a padded image → (B, masks, height, width), bilinearly.

        Args:
            masks: of any resolution.
            input_size: (height, width) of the image within its padding, at most the encoder's ``img_size``.
            original_size: (height, width) to resize it to.
        """
        _checks.check_rank("masks", masks, 4, "(prompts, masks, height, width)")
        side = self.image_encoder.img_size
        masks = F.interpolate(masks, (side, side), mode="bilinear", align_corners=False)
        masks = masks[..., : input_size[0], : input_size[1]]
        return F.interpolate(masks, tuple(original_size), mode="bilinear", align_corners=False)


def build_sam(
    image_size: int = 1024,
    patch_size: int = 16,
    dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    global_attention: Sequence[int] = (2, 5, 8, 11),
    window_size: int = 14,
    mlp_ratio: float = 4.0,
    norm_eps: float = 1e-6,
    *,
    prompt_dim: int = 256,
    mask_in_channels: int = 16,
    text_dim: int | None = None,
    prompt_norm_eps: float = 1e-6,
    decoder_depth: int = 2,
    decoder_heads: int = 8,
    decoder_mlp_dim: int = 2048,
    decoder_downsample_rate: int = 2,
    decoder_norm_eps: float = 1e-5,
    num_multimask_outputs: int = 3,
    iou_head_depth: int = 3,
    iou_head_hidden_dim: int = 256,
    pixel_mean: Sequence[float] = PIXEL_MEAN,
    pixel_std: Sequence[float] = PIXEL_STD,
    device: Any = None,
    dtype: Any = None,
) -> Sam:
    """A ``Sam`` in evaluation mode, with random weights, of any sizes.

    ``image_size`` to ``norm_eps`` are arguments of ``ImageEncoder``; ``prompt_dim`` is the channels of embeddings and tokens;
    ``mask_in_channels``, ``text_dim`` and ``prompt_norm_eps`` are of ``PromptEncoder``, ``decoder_…`` of
    ``TwoWayTransformer``, the others of ``MaskDecoder`` and ``Sam``.
    """
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    encoder = ImageEncoder(
        image_size,
        patch_size,
        dim=dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        out_channels=prompt_dim,
        window_size=window_size,
        global_attention=global_attention,
        norm_eps=norm_eps,
        **factory,
    )
    grid = image_size // patch_size
    prompts = PromptEncoder(prompt_dim, grid, image_size, mask_in_channels, text_dim, prompt_norm_eps, **factory)
    transformer = TwoWayTransformer(
        decoder_depth, prompt_dim, decoder_heads, decoder_mlp_dim, decoder_downsample_rate, decoder_norm_eps, **factory
    )
    decoder = MaskDecoder(transformer, prompt_dim, num_multimask_outputs, iou_head_depth, iou_head_hidden_dim, **factory)
    return Sam(encoder, prompts, decoder, pixel_mean, pixel_std).to(device=device, dtype=dtype).eval()
