"""The two-way transformer of Segment Anything's mask decoder (Kirillov et al. 2023, appendix A): tokens and image attend to
each other. Post-norm blocks; the image's side of B prompts stays one image for as long as the prompts share it."""

from typing import Any

from torch import Tensor, nn

from ... import functional
from ...nn import LayerNorm, Linear
from .layers import MLPBlock, add_layer_norm, is_own

NORM_EPS = 1e-5


class Attention(nn.Module):
    """Multi-head attention in dim / downsample_rate channels: queries (B, N, dim), keys and values (B, M, dim) → (B, N, dim).

    Where batches differ, the smaller divides the greater, and each of its entries stands for as many consecutive ones.
    """

    def __init__(self, dim: int, num_heads: int, downsample_rate: int = 1, *, device: Any = None, dtype: Any = None):
        super().__init__()
        inner = dim // downsample_rate
        if inner < 1 or num_heads < 1 or inner % num_heads:
            raise ValueError(f"num_heads is {num_heads}; expected a divisor of dim / downsample_rate = {inner}")
        self.num_heads = num_heads
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = Linear(dim, inner, **factory)
        self.k_proj = Linear(dim, inner, **factory)
        self.v_proj = Linear(dim, inner, **factory)
        self.out_proj = Linear(inner, dim, **factory)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (self.q_proj(q), self.k_proj(k), self.v_proj(v)))
        batch = max(q.shape[0], k.shape[0]) if q.shape[0] and k.shape[0] else 0
        query, key, value = (for_each_prompt(t, batch) for t in heads)
        out = functional.attention(query, key, value)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves, then to the image; an MLP; the image attends to the tokens. Each followed by a norm.

    Args:
        dim, num_heads: of tokens and image.
        mlp_dim: hidden channels of the MLP, which has ReLU.
        downsample_rate: by which attention between tokens and image has fewer channels.
        first: of the first block, whose self-attention has neither positions nor a residual.
        norm_eps: added to the variance in the norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        downsample_rate: int = 2,
        first: bool = False,
        norm_eps: float = NORM_EPS,
        *,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.first = first
        self.self_attn = Attention(dim, num_heads, **factory)
        self.norm1 = LayerNorm(dim, norm_eps, **factory)
        self.cross_attn_token_to_image = Attention(dim, num_heads, downsample_rate, **factory)
        self.norm2 = LayerNorm(dim, norm_eps, **factory)
        self.mlp = MLPBlock(dim, mlp_dim, "relu", **factory)
        self.norm3 = LayerNorm(dim, norm_eps, **factory)
        self.norm4 = LayerNorm(dim, norm_eps, **factory)
        self.cross_attn_image_to_token = Attention(dim, num_heads, downsample_rate, **factory)

    def forward(self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor) -> tuple[Tensor, Tensor]:
        """queries, query_pe (B, N, dim); keys (B or images, h·w, dim), key_pe (1, h·w, dim) → (queries, keys)."""
        if self.first:
            queries = self.norm1(self.self_attn(queries, queries, queries))
        else:
            placed = queries + query_pe
            queries = _attended(queries, self.self_attn(placed, placed, queries), self.norm1, self.self_attn)
        placed_keys = keys + key_pe
        attention = self.cross_attn_token_to_image
        queries = _attended(queries, attention(queries + query_pe, placed_keys, keys), self.norm2, attention)
        branch = self.mlp(queries)
        queries = add_layer_norm(queries, branch, self.norm3, is_own(self.mlp, MLPBlock, "lin2"))[0]
        attention = self.cross_attn_image_to_token
        branch = attention(placed_keys, queries + query_pe, queries)
        del placed_keys
        return queries, _attended(for_each_prompt(keys, branch.shape[0]), branch, self.norm4, attention)


class TwoWayTransformer(nn.Module):
    """``depth`` two-way blocks and a last attention of the tokens to the image.

    Args:
        depth: blocks.
        dim, num_heads, mlp_dim, downsample_rate, norm_eps: as in ``TwoWayBlock``; the last norm's eps is 1e-5.
    """

    def __init__(
        self,
        depth: int = 2,
        dim: int = 256,
        num_heads: int = 8,
        mlp_dim: int = 2048,
        downsample_rate: int = 2,
        norm_eps: float = NORM_EPS,
        *,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(
            TwoWayBlock(dim, num_heads, mlp_dim, downsample_rate, index == 0, norm_eps, **factory) for index in range(depth)
        )
        self.final_attn_token_to_image = Attention(dim, num_heads, downsample_rate, **factory)
        self.norm_final_attn = LayerNorm(dim, NORM_EPS, **factory)

    def forward(self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            image_embedding: (B, dim, h, w), or (images, dim, h, w) for prompts that come image by image, B / images each.
            image_pe: (1, dim, h, w).
            point_embedding: (B, N, dim).

        Returns:
            the tokens (B, N, dim) and the image (B, h·w, dim).
        """
        queries, keys, positions = point_embedding, *(t.flatten(2).transpose(1, 2) for t in (image_embedding, image_pe))
        for layer in self.layers:
            queries, keys = layer(queries, keys, point_embedding, positions)
        attention = self.final_attn_token_to_image
        branch = attention(queries + point_embedding, keys + positions, keys)
        return _attended(queries, branch, self.norm_final_attn, attention), for_each_prompt(keys, queries.shape[0])


def for_each_prompt(images: Tensor, batch: int) -> Tensor:
    """(images, ...) → (batch, ...), each as many consecutive times; of a single image a view."""
    count = images.shape[0]
    if count == batch:
        return images
    return images.unsqueeze(1).expand(-1, batch // count, *images.shape[1:]).flatten(0, 1)


def _attended(residual: Tensor, branch: Tensor, norm: nn.Module, attention: nn.Module) -> Tensor:
    return add_layer_norm(residual, branch, norm, is_own(attention, Attention, "out_proj"))[0]
