"""Segment Anything's encoder blocks, whose hidden states are images (B, H, W, C) that attend in windows or as a whole.

Such a block cuts its normalized image into windows, padded with zeros at the bottom and the right, and projects them: a
padded token is attended to, as the projection of a zero token. The fused attention reads the image as it lies, and gets
that projection beside it (Kirillov et al. 2023, appendix A).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Attention
from . import layouts


def window_of(block: Any) -> int | None:
    """Tokens a side of a block's windows, 0 where it attends to the whole image; None for a block of token sequences."""
    owner = getattr(block, "attn", None)
    if isinstance(owner, Attention):  # fastvit's own, whose block does not say
        return owner.window_size if owner.on_grid else None
    size = getattr(block, layouts.WINDOW, None)
    return size if isinstance(size, int) and not isinstance(size, bool) and size >= 0 else None


def probe_shapes(window: int) -> tuple[tuple[int, int], ...]:
    """Images that neither fill their windows nor are square: tables are resized, or tokens padded, in either direction."""
    return ((window + 1, 2), (2, window + 1)) if window else ((9, 8),)


def tables(owner: Any) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The owner's relative positions of rows and columns, where it has them and uses them."""
    rows, columns = (getattr(owner, name, None) for name in layouts.RELATIVE_POSITIONS)
    if rows is None or columns is None or not getattr(owner, layouts.USES_POSITIONS, True):
        return None, None
    return rows, columns


def attention(
    block: Any,
    owner: Any,
    ops: Any,
    x: Tensor,
    project: Callable[[Tensor], Tensor],
    bias: Any,
    norms: tuple,
    scale: Callable[[int], float],
) -> Tensor:
    """The normalized image x (B, H, W, C) attended to: (B, H, W, C).

    ``project``: x → (..., [3, heads, D]). ``bias``: what it makes of a zero token (None for zeros), or False where that is to
    be asked of it. ``norms``: modules for queries and keys, or Nones. ``scale``: of the scores, by the head's width D.
    """
    heads = next(getattr(owner, name) for name in layouts.HEAD_COUNTS if hasattr(owner, name))
    packed = _normalized(project(x), heads, norms)
    window = window_of(block) or 0
    pad = None
    if window:
        pad = project(x.new_zeros(1, 1, 1, x.shape[3])).flatten() if bias is False else bias
        if any(norm is not None for norm in norms):  # a norm may turn zeros into something else
            pad = _normalized(packed.new_zeros(packed.shape[3]) if pad is None else pad, heads, norms)
    rows, columns = tables(owner)
    return ops.image_attention(
        packed,
        num_heads=heads,
        rel_pos_h=rows,
        rel_pos_w=columns,
        window_size=window,
        pad_qkv=pad,
        scale=scale(packed.shape[3] // (3 * heads)),
    )


def _normalized(packed: Tensor, heads: int, norms: tuple) -> Tensor:
    """(..., [3, heads, D]) with its queries and keys normalized."""
    if all(norm is None for norm in norms):
        return packed
    query, key, value = packed.unflatten(-1, (3, heads, -1)).unbind(-3)
    query, key = (t if norm is None else norm(t).to(value.dtype) for norm, t in zip(norms, (query, key), strict=True))
    return torch.stack([query, key, value], dim=-3).flatten(-3)


def why_not_in_windows(block: Any, owner: nn.Module, drop_path: Any, called: tuple[str, ...]) -> str | None:
    """Why a block in windows must run its own forward: what draws or looks there would meet the image instead."""
    if not window_of(block):
        return None
    if block.training:
        draws = [m for m in owner.modules() if m.training and isinstance(m, nn.Dropout) and m.p]
        if draws:
            return "dropout within the windows is active"
        if drop_path is not None and drop_path.training:
            return "stochastic depth of single windows is active"
    for path in called:
        module = block.get_submodule(path)
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in module.modules()):
            return f"{path} has hooks"
    return None
