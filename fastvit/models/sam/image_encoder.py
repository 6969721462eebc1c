"""Segment Anything's image encoder: a ViT with windows and relative positions (Kirillov et al. 2023, appendix A; Li et al.
2022, ViTDet), from a padded image to one embedding of 256 channels for each of its patches."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import _checks
from ...nn import Attention, LayerNorm, check_count
from .layers import LayerNorm2d, MLPBlock, add, add_layer_norm, is_own, is_token_norm, is_untouched

NORM_EPS = 1e-6


class PatchEmbedding(nn.Module):
    """Patches projected by a convolution whose stride is its size, images (B, channels, H, W) → (B, h, w, dim)."""

    def __init__(self, patch_size: int, in_channels: int, dim: int, *, device: Any = None, dtype: Any = None):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).permute(0, 2, 3, 1)


class EncoderBlock(nn.Module):
    """z' = MHA(LN(z)) + z and z'' = MLP(LN(z')) + z' on a grid (B, h, w, dim), globally or in windows.

    Args:
        dim: channels of a token.
        num_heads: heads that divide ``dim``.
        mlp_dim: hidden channels of the MLP.
        grid_size: side of the grid of tokens.
        window_size: side of the windows; 0 attends globally.
        norm_eps: added to the variance in both norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        grid_size: int,
        window_size: int,
        norm_eps: float = NORM_EPS,
        *,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, norm_eps, **factory)
        self.attn = Attention(dim, num_heads, rel_pos_size=window_size or grid_size, window_size=window_size, **factory)
        self.norm2 = LayerNorm(dim, norm_eps, **factory)
        self.mlp = MLPBlock(dim, mlp_dim, "gelu", **factory)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.advance(tokens, None, None)[0]

    def advance(self, tokens: Tensor, normed: Tensor | None, next_norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
        """(output, next_norm(output)): the sum that ends a block and the norm that begins the next are one operator.

        ``normed``: ``norm1`` of the tokens where the block before has computed it.
        """
        branch = self.attn(self.norm1(tokens) if normed is None else normed)
        del normed
        normed, tokens = add_layer_norm(tokens, branch, self.norm2, is_own(self.attn, Attention, "proj"))
        branch = self.mlp(normed)
        del normed
        owned = is_own(self.mlp, MLPBlock, "lin2")
        if next_norm is None:
            return add(tokens, branch, owned), None
        normed, tokens = add_layer_norm(tokens, branch, next_norm, owned)
        return tokens, normed


class ImageEncoder(nn.Module):
    """Images (B, in_channels, image_size, image_size), normalized and padded, → embeddings (B, out_channels, g, g).

    g = image_size / patch_size. The embeddings lie channels last in memory, as the mask decoder reads them. Parameters are
    named as in Segment Anything's checkpoints.

    Args:
        image_size: side of the images; the position table is of its grid and is not resized.
        patch_size: side of a patch.
        in_channels: channels of the images.
        dim: channels of a token.
        depth: encoder blocks.
        num_heads: heads of each; they divide ``dim``.
        mlp_ratio: hidden channels of each MLP in multiples of ``dim``, rounded to the nearest number.
        out_channels: channels of the embeddings.
        window_size: side of the windows that blocks attend within.
        global_attention: indices of the blocks that attend to the whole image.
        norm_eps: added to the variance in the blocks' norms.
    """

    def __init__(
        self,
        image_size: int = 1024,
        patch_size: int = 16,
        in_channels: int = 3,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        out_channels: int = 256,
        window_size: int = 14,
        global_attention: Sequence[int] = (2, 5, 8, 11),
        norm_eps: float = NORM_EPS,
        *,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        counts = {"image_size": image_size, "patch_size": patch_size, "in_channels": in_channels, "dim": dim}
        for name, count in (counts | {"out_channels": out_channels, "window_size": window_size}).items():
            check_count(name, count)
        check_count("depth", depth, minimum=0)
        if image_size % patch_size:
            raise ValueError(f"image_size is {image_size}; expected a multiple of patch_size {patch_size}")
        if not set(global_attention) <= set(range(depth)):
            raise ValueError(f"global_attention is {tuple(global_attention)}; expected indices of the {depth} blocks")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.img_size, self.patch_size = image_size, patch_size
        grid = image_size // patch_size
        self.patch_embed = PatchEmbedding(patch_size, in_channels, dim, **factory)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, dim, **factory))
        windows = (0 if index in global_attention else window_size for index in range(depth))
        mlp_dim = max(1, round(dim * mlp_ratio))
        self.blocks = nn.ModuleList(EncoderBlock(dim, num_heads, mlp_dim, grid, w, norm_eps, **factory) for w in windows)
        self.neck = nn.Sequential(
            nn.Conv2d(dim, out_channels, 1, bias=False, **factory),
            LayerNorm2d(out_channels, **factory),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False, **factory),
            LayerNorm2d(out_channels, **factory),
        )

    def forward(self, images: Tensor) -> Tensor:
        _checks.check_tensors("images", images=images)
        _checks.check_rank("images", images, 4, "(batch, channels, height, width)")
        expected = (images.shape[0], self.patch_embed.proj.in_channels, self.img_size, self.img_size)
        _checks.check_shape("images", images, expected, "padded to the encoder's img_size (Sam.preprocess does that)")
        patches = self.patch_embed(images)
        tokens = self.pos_embed + patches  # in this order the sum lies channels last, whatever the convolution gave
        del patches
        normed = None
        blocks: list[Any] = [*self.blocks, None]
        for block, following in itertools.pairwise(blocks):
            if is_untouched(block, EncoderBlock):
                norm = following.norm1 if is_untouched(following, EncoderBlock) else None
                tokens, normed = block.advance(tokens, normed, norm if is_token_norm(norm) else None)
            else:
                tokens, normed = block(tokens), None
        return self.neck(tokens.permute(0, 3, 1, 2))
