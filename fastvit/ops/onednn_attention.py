"""Attention over many tokens on an x86 CPU, a head at a time: both products by oneDNN, a tile of scores between them.

PyTorch's SDPA multiplies with MKL, which leaves half of an AMD CPU idle; oneDNN's linear does not, and takes any matrix for
its weight. A tile holds whole rows of keys, so its softmax is one call. Tiles are large: every call ends with its threads
waiting for each other, which costs little where there are few and they are long.
"""

import torch
from torch import Tensor

# Scores that a tile holds, 4 MiB in float32: more outgrow the caches, fewer are more calls, after each of which threads wait.
TILE_SCORES = 2**20

# Fewer rows than this leave oneDNN's product at half its speed, so a tile has as many even where it gets larger.
LEAST_ROWS = 128

# Queries and keys from which on this outruns SDPA.
LEAST_TOKENS = 512


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, rel_h: Tensor | None, rel_w: Tensor | None) -> Tensor:
    """softmax(scale·q·kᵀ + rel_h + rel_w)·v for float32 tensors (B, H, N, D), (B, H, M, D), (B, H, M, Dv), without gradients.

    rel_h (B, H, N, Kh) and rel_w (B, H, N, Kw), any strides, Kh·Kw = M: the decomposed relative positions. Returns
    (B, H, N, Dv), which lies in memory as (B, N, H, Dv); zeros where relative positions leave a row nothing to attend to.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    tiles = -(-queries // max(TILE_SCORES // keys, LEAST_ROWS))
    size = -(-queries // tiles)
    # A weight that is not contiguous would send oneDNN's linear to a kernel a thousand times slower.
    query, value = query.contiguous(), value.transpose(2, 3).contiguous()
    key = torch.mul(key, scale, out=key.new_empty(key.shape))
    bias = query.new_empty(size, keys) if rel_h is not None else None
    out = query.new_empty(batch, queries, heads * value.shape[2])
    for b in range(batch):
        for first in range(0, queries, size):
            rows = slice(first, first + size)
            heads_out = []
            for h in range(heads):
                if rel_h is None or rel_w is None or bias is None:
                    scores = _linear(query[b, h, rows], key[b, h])
                else:
                    tall, wide = rel_h[b, h, rows, :, None], rel_w[b, h, rows, None, :]
                    added = bias[: tall.shape[0]]
                    torch.add(tall, wide, out=added.view(-1, tall.shape[1], wide.shape[2]))
                    scores = torch.ops.mkldnn._linear_pointwise.binary(query[b, h, rows], added, key[b, h], None, "add")
                torch.softmax(scores, 1, out=scores)
                heads_out.append(_linear(scores, value[b, h]))
                del scores  # the next ones go there: first touched, a fresh page costs over a microsecond
            torch.cat(heads_out, dim=1, out=out[b, rows])
    out = out.unflatten(2, (heads, -1)).transpose(1, 2)
    if rel_h is not None and rel_w is not None:
        empty = rel_h.amax(-1, keepdim=True) + rel_w.amax(-1, keepdim=True) == float("-inf")
        if empty.any():
            out.masked_fill_(empty, 0)
    return out


def _linear(rows: Tensor, columns: Tensor) -> Tensor:
    """rows·columnsᵀ."""
    return torch.ops.mkldnn._linear_pointwise(rows, columns, None, "none", [], "")
