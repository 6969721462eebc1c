"""Where a token is: sinusoidal positions, tables of learned ones on another grid, and how alike two positions are."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import check_count


def sinusoidal_position(num_tokens: int, dim: int, *, device: Any = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """P (num_tokens, dim), row t = 0, 1, … being p_t = [sin(ω₁t), cos(ω₁t), …, sin(ω_{D/2}t), cos(ω_{D/2}t)].

    D = ``dim``, ω_k = 10000^(−2k/D), k = 1 … D/2 (Vaswani et al. 2017, sec. 3.5, there with k from 0). Values lie in [−1, 1],
    no two rows are equal, and p_t·p_s = Σ_k cos(ω_k(t − s)) depends on the distance alone. Computed in float64 and rounded
    to ``dtype`` (on devices that lack float64, in float32). Raises ``ValueError`` for an odd ``dim``.
    """
    check_count("num_tokens", num_tokens)
    check_count("dim", dim)
    if dim % 2:
        raise ValueError(f"dim is {dim}; expected an even number, a sine and a cosine each frequency")
    device = torch.get_default_device() if device is None else torch.device(device)
    exact = torch.float32 if device.type == "mps" else torch.float64
    k = torch.arange(1, dim // 2 + 1, device=device, dtype=exact)
    t = torch.arange(num_tokens, device=device, dtype=exact)
    angles = t[:, None] * 10000 ** (-2 * k / dim)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(dtype)


def position_similarity(table: Tensor) -> Tensor:
    """K = P·Pᵀ, (..., N, dim) → (..., N, N): how alike the vectors of every two positions are."""
    return table @ table.transpose(-2, -1)


def resize_positions(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """A learned table (1, 1 + h·w, dim) for a grid of another size: bicubic, antialiased, in float32, as timm does.

    The first row, the class token's, is kept. Rows and columns are each a matrix product, so that the gradient is
    deterministic on every device and can be compiled for any size, which PyTorch's own interpolation is not.
    """
    if old_grid == new_grid:
        return table
    rows, columns = (_bicubic(old, new, table.device) for old, new in zip(old_grid, new_grid, strict=True))
    with torch.autocast(table.device.type, enabled=False):
        grid = torch.einsum("yh,bhwc,xw->byxc", rows, table[:, 1:].float().unflatten(1, old_grid), columns)
    return torch.cat([table[:, :1], grid.flatten(1, 2).to(table.dtype)], dim=1)


def _bicubic(old: int, new: int, device: torch.device) -> Tensor:
    """(new, old): row i holds the weights that bicubic interpolation gives to the old places at the new place i."""
    places = torch.eye(old, device=device)[None, None]
    return F.interpolate(places, size=(new, old), mode="bicubic", antialias=True)[0, 0]
