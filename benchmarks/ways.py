"""Ways of attention with decomposed relative positions: all compute softmax(scale·QKᵀ + rel_h + rel_w)·V, exactly.

Each is ``way(query, key, value, rel_h, rel_w, scale)`` on (B, H, N, D), (B, H, M, D) and (B, H, N, Kh), (B, H, N, Kw) with
Kh·Kw = M (the bias: Li et al. 2021, MViTv2, eq. 4), and gives (B, H, N, D).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def dense(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float) -> Tensor:
    """PyTorch's fused attention, the bias written out as an N×M mask."""
    bias = (rel_h.unsqueeze(-1) + rel_w.unsqueeze(-2)).flatten(-2)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


@functools.lru_cache(maxsize=8)
def _places(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows·columns, rows + columns): the one-hot row and column of every key, made once."""
    position = torch.arange(rows * columns, device=device)
    places = [F.one_hot(position // columns, rows), F.one_hot(position % columns, columns)]
    return torch.cat(places, dim=-1).to(dtype)


def folded(
    query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float, pad_value: bool = False
) -> Tensor:
    """The bias as more channels: q' = [q·scale, rel_h, rel_w], k' = [k, one-hot of the key's row, of its column].

    Channels are filled up to a multiple of 8, as flash kernels want them. ``pad_value``: the values too, which flash kernels
    need as wide as the keys.
    """
    rows, columns = rel_h.shape[-1], rel_w.shape[-1]
    one_hot = _places(rows, columns, key.dtype, key.device).expand(*key.shape[:2], -1, -1)
    fill = -(query.shape[-1] + rows + columns) % 8
    query = F.pad(torch.cat([query * scale, rel_h, rel_w], dim=-1), (0, fill))
    key = F.pad(torch.cat([key, one_hot], dim=-1), (0, fill))
    dim = value.shape[-1]
    if pad_value:
        value = F.pad(value, (0, key.shape[-1] - dim))
    return F.scaled_dot_product_attention(query, key, value, scale=1.0)[..., :dim]


def folded_flash(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float) -> Tensor:
    """``folded``, the values filled up too."""
    return folded(query, key, value, rel_h, rel_w, scale, pad_value=True)


def flex(query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float) -> Tensor:
    """FlexAttention with the bias as its ``score_mod``; fused only where the caller is compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    columns = rel_w.shape[-1]

    def add_bias(score, batch, head, query_index, key_index):
        row, column = key_index // columns, key_index % columns
        return score + rel_h[batch, head, query_index, row] + rel_w[batch, head, query_index, column]

    return flex_attention(query, key, value, score_mod=add_bias, scale=scale)


WAYS = {"sdpa_dense_bias": dense, "bias_folded": folded, "bias_folded_flash": folded_flash, "flex": flex}
