"""The Vision Transformer of Dosovitskiy et al. (2021), "An Image is Worth 16x16 Words", on the fused operators."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..nn import EncoderBlock, LayerNorm, Linear, check_count, pair
from .positions import resize_positions, sinusoidal_position

NORM_EPS = 1e-6
INITIAL_STD = 0.02


class PatchEmbedding(nn.Module):
    """Patches flattened and projected, images (B, channels, H, W) → tokens (B, N, dim) row by row (eq. 1).

    A convolution whose stride is its size: the same numbers as the linear map of flattened patches.
    """

    def __init__(self, patch_size: tuple[int, int], in_channels: int, dim: int, bias: bool, device: Any, dtype: Any):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size, bias=bias, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Patches, a class token and positions through ``depth`` encoder blocks; the class token's output is classified.

    Parameters are named as in timm's ``VisionTransformer`` and its state dict loads.

    Args:
        image_size: height and width of the images that the position table is for, one number when equal. Other images whose
            sides are multiples of the patch are taken too: the learned table is resized bicubically (``resize_positions``).
        patch_size: height and width of a patch.
        num_classes: logits; with 0, ``forward`` returns the class token's features (B, dim).
        dim: channels of a token.
        depth: encoder blocks.
        num_heads: heads of each; they divide ``dim``.
        mlp_dim: hidden channels of each MLP.
        activation: of the MLPs: "gelu", "gelu_tanh", "quick_gelu" or "relu".
        pos_embed: "learned", a table (1, 1 + N, dim); or "sinusoidal", without parameters, of the tokens as they come, class
            token first (``sinusoidal_position``), whatever their number.
        patch_bias: whether the projection of patches has a bias.
        norm_statistics: "token", or "image" for norms over all tokens and channels of an image (``LayerNorm``).
        in_channels: channels of the images.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        activation: str | None = "gelu",
        pos_embed: str = "learned",
        patch_bias: bool = True,
        norm_statistics: str = "token",
        *,
        in_channels: int = 3,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        image_size, patch_size = pair("image_size", image_size), pair("patch_size", patch_size)
        for name, count in (("dim", dim), ("mlp_dim", mlp_dim), ("in_channels", in_channels)):
            check_count(name, count)
        for name, count in (("num_classes", num_classes), ("depth", depth)):
            check_count(name, count, minimum=0)
        if pos_embed not in ("learned", "sinusoidal"):
            raise ValueError(f"pos_embed is {pos_embed!r}; expected 'learned' or 'sinusoidal'")
        if pos_embed == "sinusoidal" and dim % 2:
            raise ValueError(f"dim is {dim}; expected an even number for sinusoidal positions")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.patch_size = dim, patch_size
        self.grid_size = _grid("image_size", image_size, patch_size)
        self.patch_embed = PatchEmbedding(patch_size, in_channels, dim, patch_bias, device, dtype)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim, **factory))
        self.pos_embed: nn.Parameter | None = None
        if pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid_size[0] * self.grid_size[1], dim, **factory))
        options = {"mlp_ratio": mlp_dim / dim, "activation": activation, "norm_statistics": norm_statistics, **factory}
        self.blocks = nn.Sequential(*(EncoderBlock(dim, num_heads, norm_eps=NORM_EPS, **options) for _ in range(depth)))
        self.norm = LayerNorm(dim, NORM_EPS, norm_statistics, **factory)
        self.head: nn.Module = Linear(dim, num_classes, **factory) if num_classes else nn.Identity()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights of linears and patches and the position table from a normal distribution of deviation 0.02 cut at two of
        its deviations, biases and the class token zero, norms the identity."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD, a=-2 * INITIAL_STD, b=2 * INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, LayerNorm):
                module.reset_parameters()
        nn.init.zeros_(self.cls_token)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=INITIAL_STD, a=-2 * INITIAL_STD, b=2 * INITIAL_STD)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) → logits (B, num_classes), or (B, dim) where ``num_classes`` is 0."""
        return self.head(self.forward_features(images)[:, 0])

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) → normalized tokens (B, 1 + N, dim), the class token first, patches row by row."""
        return self.norm(self.blocks(self.embed(images)))

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) → tokens with their positions (B, 1 + N, dim), as the first block takes them."""
        _checks.check_tensors("images", images=images)
        _checks.check_rank("images", images, 4, "(batch, channels, height, width)")
        channels = self.patch_embed.proj.in_channels
        if images.shape[1] != channels:
            raise ValueError(f"images has shape {tuple(images.shape)}; expected {channels} channels in dimension 1")
        grid = _grid("images", (images.shape[2], images.shape[3]), self.patch_size)
        patches = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(images.shape[0], -1, -1).to(patches.dtype), patches], dim=1)
        if self.pos_embed is None:
            return tokens + sinusoidal_position(tokens.shape[1], self.dim, device=tokens.device, dtype=tokens.dtype)
        return tokens + resize_positions(self.pos_embed, self.grid_size, grid)


def _grid(name: str, size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of an image."""
    if size[0] % patch[0] or size[1] % patch[1] or 0 in size:
        raise ValueError(f"{name} has height and width {size}; expected multiples of patch_size {patch}")
    return size[0] // patch[0], size[1] // patch[1]


def vit_base(**options: Any) -> VisionTransformer:
    """ViT-B/16 at 224 px, 1000 classes: 12 blocks, 768 channels, 12 heads, 86,567,656 parameters (the paper: 86 M).

    ``options``: any argument of ``VisionTransformer``.
    """
    return _build(options, patch_size=16, dim=768, depth=12, num_heads=12, mlp_dim=3072)


def vit_large(**options: Any) -> VisionTransformer:
    """ViT-L/16 at 224 px, 1000 classes: 24 blocks, 1024 channels, 16 heads, 304,326,632 parameters.

    The paper's table 1 says 307 M, which is what ``patch_size=32`` has: 306.5 M, the larger patches having more weights.
    ``options``: any argument of ``VisionTransformer``.
    """
    return _build(options, patch_size=16, dim=1024, depth=24, num_heads=16, mlp_dim=4096)


def vit_huge(**options: Any) -> VisionTransformer:
    """ViT-H/14 at 224 px, 1000 classes: 32 blocks, 1280 channels, 16 heads, 632,045,800 parameters (the paper: 632 M).

    ``options``: any argument of ``VisionTransformer``.
    """
    return _build(options, patch_size=14, dim=1280, depth=32, num_heads=16, mlp_dim=5120)


def _build(options: dict[str, Any], **defaults: Any) -> VisionTransformer:
    return VisionTransformer(**{"image_size": 224, "num_classes": 1000, **defaults, **options})
