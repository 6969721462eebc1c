"""Small Sams with seeded random weights, and pictures for them: 64 pixels, patches of 8, two blocks."""

from functools import partial

import numpy as np
import torch
from segment_anything import modeling
from skimage import data
from torch import Tensor, nn

from fastvit.models import sam as own

SIDE, PATCH, DIM = 64, 8, 32
GRID = SIDE // PATCH


def photograph(name: str = "chelsea") -> np.ndarray:
    """(H, W, 3) uint8: a whole photograph that scikit-image ships."""
    return getattr(data, name)()


def face() -> np.ndarray:
    """(96, 128, 3): the middle of the cat's face."""
    return photograph()[80:176, 130:258].copy()


def small_sam(seed: int = 0) -> modeling.Sam:
    """segment_anything's Sam, its relative positions and norms random too, with masks that are neither empty nor full."""
    torch.manual_seed(seed)
    sam = modeling.Sam(
        modeling.ImageEncoderViT(
            img_size=SIDE,
            patch_size=PATCH,
            embed_dim=DIM,
            depth=2,
            num_heads=2,
            mlp_ratio=2,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=(1,),
            window_size=3,
            out_chans=DIM,
        ),
        modeling.PromptEncoder(DIM, (GRID, GRID), (SIDE, SIDE), mask_in_chans=4),
        modeling.MaskDecoder(
            transformer_dim=DIM,
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=DIM, num_heads=8, mlp_dim=64),
            num_multimask_outputs=3,
            iou_head_depth=2,
            iou_head_hidden_dim=16,
        ),
    )
    for name, parameter in sam.named_parameters():
        is_scale = parameter.dim() == 1 and name.endswith("weight")
        nn.init.normal_(parameter, mean=1.0 if is_scale else 0.0, std=0.1 if is_scale else 0.3)
    return sam.eval().requires_grad_(False)


def own_sam(original: modeling.Sam) -> own.Sam:
    """fastvit's Sam with the weights of ``small_sam``."""
    sam = own.build_sam(
        image_size=SIDE,
        patch_size=PATCH,
        dim=DIM,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        global_attention=(1,),
        window_size=3,
        prompt_dim=DIM,
        mask_in_channels=4,
        decoder_mlp_dim=64,
        iou_head_depth=2,
        iou_head_hidden_dim=16,
    )
    sam.load_state_dict(original.state_dict())
    return sam.requires_grad_(False)


def with_text(sam: own.Sam, text_dim: int) -> own.Sam:
    """The same Sam, which takes texts as prompts too."""
    torch.manual_seed(1)
    sam.prompt_encoder.text_embedding = nn.Linear(text_dim, DIM)
    return sam.requires_grad_(False)


class Spots(nn.Module):
    """A mask decoder that adds to the masks of a random one a spot around the first point of the prompt.

    Random weights do not look at the prompt enough for a grid of points to find different things. Three spots of falling
    size, over the texture that the random decoder sees in the picture.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, *, sparse_prompt_embeddings: Tensor, image_pe: Tensor, **others) -> tuple[Tensor, Tensor]:
        masks, quality = self.decoder(sparse_prompt_embeddings=sparse_prompt_embeddings, image_pe=image_pe, **others)
        near = torch.einsum("bc,chw->bhw", sparse_prompt_embeddings[:, 0].float(), image_pe[0].float()).unsqueeze(1)
        near = nn.functional.interpolate(near, masks.shape[-2:], mode="bilinear")
        texture = (masks - masks.mean((-2, -1), keepdim=True)) / masks.std((-2, -1), keepdim=True)
        levels = torch.linspace(0.2, 0.5, masks.shape[1], device=masks.device).view(1, -1, 1, 1)
        return near / near.amax((-2, -1), keepdim=True) + 0.05 * texture - levels, quality.sigmoid()


def spotting(sam: nn.Module) -> nn.Module:
    """The same Sam, whose masks are where its prompts are."""
    sam.mask_decoder = Spots(sam.mask_decoder)
    return sam


def iou(first: np.ndarray, second: np.ndarray) -> float:
    """1 for two empty masks."""
    union = (first | second).sum()
    return float((first & second).sum() / union) if union else 1.0
