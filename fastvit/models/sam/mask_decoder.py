"""Segment Anything's mask decoder (Kirillov et al. 2023, appendix A): output tokens and prompts against the image, the image
upscaled fourfold, and every mask the product of its token's hypernetwork with each pixel."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _checks, functional
from ...nn import check_count
from .layers import MLP, LayerNorm2d, is_untouched
from .transformer import TwoWayTransformer


class MaskDecoder(nn.Module):
    """Embeddings of an image and of prompts → logits of masks and their predicted IoU.

    Parameters are named as in Segment Anything's checkpoints.

    Args:
        transformer: of ``dim`` channels.
        dim: channels of embeddings and tokens, a multiple of 8.
        num_multimask_outputs: masks for an ambiguous prompt; one more is for a prompt that is not.
        iou_head_depth, iou_head_hidden_dim: linears of the MLP that predicts IoU, and their channels.
    """

    def __init__(
        self,
        transformer: TwoWayTransformer,
        dim: int = 256,
        num_multimask_outputs: int = 3,
        iou_head_depth: int = 3,
        iou_head_hidden_dim: int = 256,
        *,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        counts = {"num_multimask_outputs": num_multimask_outputs, "iou_head_depth": iou_head_depth}
        for name, count in (counts | {"iou_head_hidden_dim": iou_head_hidden_dim}).items():
            check_count(name, count)
        check_count("dim", dim, minimum=8)
        if dim % 8:
            raise ValueError(f"dim is {dim}; expected a multiple of 8")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.transformer_dim = dim
        self.transformer = transformer
        self.num_multimask_outputs, self.num_mask_tokens = num_multimask_outputs, num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, dim, **factory)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, dim, **factory)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 4, 2, stride=2, **factory),
            LayerNorm2d(dim // 4, **factory),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2, **factory),
            nn.GELU(),
        )
        hypernetworks = (MLP(dim, dim, dim // 8, 3, **factory) for _ in range(self.num_mask_tokens))
        self.output_hypernetworks_mlps = nn.ModuleList(hypernetworks)
        self.iou_prediction_head = MLP(dim, iou_head_hidden_dim, self.num_mask_tokens, iou_head_depth, **factory)

    def forward(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            image_embeddings: (1, dim, h, w) for B prompts of one image, or (images, dim, h, w) for prompts that come image
                by image, B / images each.
            image_pe: (1, dim, h, w), from ``PromptEncoder.get_dense_pe``.
            sparse_prompt_embeddings: (B, N, dim), or (1, N, dim) for all.
            dense_prompt_embeddings: (B, dim, h, w), or (1, dim, h, w) for all.
            multimask_output: whether to give the masks of an ambiguous prompt or the single one. While gradients are
                recorded, the parameters of the masks that are not given get zeros, not None: distributed training needs one each.

        Returns:
            logits (B, masks, 4·h, 4·w) and predicted IoU (B, masks), masks being ``num_multimask_outputs`` or 1.
        """
        wanted = slice(1, None) if multimask_output else slice(0, 1)
        return self.predict_masks(image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings, wanted)

    def predict_masks(
        self,
        image_embeddings: Tensor,
        image_pe: Tensor,
        sparse_prompt_embeddings: Tensor,
        dense_prompt_embeddings: Tensor,
        wanted: slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        """As ``forward``, of the ``wanted`` of all 1 + ``num_multimask_outputs`` masks, the single one first."""
        batch = self._check(image_embeddings, image_pe, sparse_prompt_embeddings, dense_prompt_embeddings)
        output_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        sparse = sparse_prompt_embeddings.expand(batch, -1, -1)
        tokens = torch.cat([output_tokens.expand(batch, -1, -1), sparse], dim=1)
        image = _with_prompt(image_embeddings, dense_prompt_embeddings)
        tokens, image = self.transformer(image, image_pe, tokens)
        mask_tokens = tokens[:, 1 : 1 + self.num_mask_tokens]
        hypernetworks: list[Any] = list(self.output_hypernetworks_mlps)
        every = slice(None)
        run, kept = (every, wanted) if torch.is_grad_enabled() else (wanted, every)
        factors = [hypernetworks[i](mask_tokens[:, i]) for i in range(self.num_mask_tokens)[run]]
        height, width = image_embeddings.shape[2:]
        masks = self._product(torch.stack(factors, dim=1)[:, kept], image, height, width)
        return masks, self.iou_prediction_head(tokens[:, 0])[:, wanted]

    def _product(self, factors: Tensor, image: Tensor, height: int, width: int) -> Tensor:
        """factors (B, masks, dim / 8) times the upscaled image (B, h·w, dim) → (B, masks, 4·h, 4·w).

        A deconvolution whose stride is its size is a linear that gives each of its places four times the channels. Nothing is
        put in order before the masks themselves, which have a few numbers a pixel instead of dim / 8.
        """
        layers: list[Any] = list(self.output_upscaling)
        kinds = (nn.ConvTranspose2d, LayerNorm2d, nn.GELU, nn.ConvTranspose2d, nn.GELU)
        plain = all(is_untouched(layer, kind) for layer, kind in zip(layers, kinds, strict=True))
        if not (plain and is_untouched(self.output_upscaling, nn.Sequential)):
            upscaled = self.output_upscaling(image.transpose(1, 2).unflatten(2, (height, width)))
            return (factors @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
        first, norm, _, second, _ = layers
        image = functional.linear(image, *_as_linear(first)).unflatten(2, (4, -1))
        image = F.gelu(functional.layer_norm(image, norm.weight, norm.bias, norm.eps))
        image = functional.linear(image, *_as_linear(second), activation="gelu").unflatten(3, (4, -1))
        masks = factors @ image.flatten(1, 3).to(factors.dtype).transpose(1, 2)
        masks = masks.unflatten(2, (height, width, 2, 2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5, 7)
        return masks.flatten(5, 7).flatten(2, 4)

    def _check(self, image: Tensor, positions: Tensor, sparse: Tensor, dense: Tensor) -> int:
        """B. Raises for embeddings that do not fit the decoder or each other."""
        names = {"image_embeddings": image, "image_pe": positions}
        names |= {"sparse_prompt_embeddings": sparse, "dense_prompt_embeddings": dense}
        _checks.check_tensors("image_embeddings", tuple(names), **names)
        _checks.check_rank("image_embeddings", image, 4, "(images, dim, height, width)")
        _checks.check_shape(
            "image_embeddings", image, (image.shape[0], self.transformer_dim, *image.shape[2:]), "transformer_dim"
        )
        _checks.check_rank("sparse_prompt_embeddings", sparse, 3, "(prompts, tokens, dim)")
        batch, count = sparse.shape[:2]
        _checks.check_shape("sparse_prompt_embeddings", sparse, (batch, count, self.transformer_dim), "transformer_dim")
        _checks.check_rank("dense_prompt_embeddings", dense, 4, "(prompts, dim, height, width)")
        if batch == 1:
            batch = max(image.shape[0], dense.shape[0])
        if image.shape[0] == 0 or batch % image.shape[0]:
            raise ValueError(f"sparse_prompt_embeddings has {batch} prompts; expected a multiple of the {image.shape[0]} images")
        of = 1 if dense.shape[0] == 1 else batch
        _checks.check_shape("dense_prompt_embeddings", dense, (of, *image.shape[1:]), "one each prompt, of the image's shape")
        _checks.check_shape("image_pe", positions, (1, *image.shape[1:]), "one of the image's shape")
        return batch


def _with_prompt(image: Tensor, dense: Tensor) -> Tensor:
    """(images, C, h, w) where one dense prompt is that of all masks, as without a mask prompt; else (B, C, h, w)."""
    if dense.shape[0] == 1 or dense.stride(0) == 0:
        return image + dense[:1]
    return (image.unsqueeze(1) + dense.unflatten(0, (image.shape[0], -1))).flatten(0, 1)


def _as_linear(deconvolution: Any) -> tuple[Tensor, Tensor]:
    """Weight (4·out, in) and bias (4·out,) of a 2×2 deconvolution with stride 2, outputs by row, column and channel."""
    weight = deconvolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return weight, deconvolution.bias.repeat(4)
