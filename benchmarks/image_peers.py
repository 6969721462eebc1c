"""What SAM's encoder attention is compared with: each takes ``functional.image_attention``'s qkv, tables and padding.

segment_anything's and transformers' own attention modules run with their two projections replaced by the identity, since the
operator begins after the one and ends before the other. Windows are cut out, padded and joined as those libraries do.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastvit import reference
from fastvit._torchvision import ensure_importable

from .ways import WAYS


def partition(qkv: Tensor, window: int, pad_qkv: Tensor | None) -> Tensor:
    """(B, H, W, C) → (B·windows, window, window, C), padded at the bottom and the right; as it is for window 0."""
    if not window:
        return qkv
    batch, height, width, channels = qkv.shape
    rows, columns = -(-height // window), -(-width // window)
    if (rows * window, columns * window) != (height, width):
        fill = qkv.new_zeros(channels) if pad_qkv is None else pad_qkv
        padded = fill.expand(batch, rows * window, columns * window, channels).clone()
        padded[:, :height, :width] = qkv
        qkv = padded
    return qkv.view(batch, rows, window, columns, window, channels).transpose(2, 3).reshape(-1, window, window, channels)


def join(windows: Tensor, window: int, like: Tensor) -> Tensor:
    """The inverse, without the padding: (B·windows, window, window, C) → (B, H, W, C)."""
    if not window:
        return windows
    batch, height, width, _ = like.shape
    rows, columns = -(-height // window), -(-width // window)
    image = windows.view(batch, rows, columns, window, window, -1).transpose(2, 3)
    return image.reshape(batch, rows * window, columns * window, -1)[:, :height, :width].contiguous()


def attend(way: Callable, windows: Tensor, num_heads: int, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
    """Attention of each (h, w, 3·C) window by one of ``ways``, (B, h, w, C)."""
    batch, height, width, channels = windows.shape
    query, key, value = windows.view(batch, height * width, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    grid = query.unflatten(2, (height, width))
    rel_h = torch.einsum("bnyxd,ykd->bnyxk", grid, reference.relative_position_table(rel_pos_h, height)).flatten(2, 3)
    rel_w = torch.einsum("bnyxd,xkd->bnyxk", grid, reference.relative_position_table(rel_pos_w, width)).flatten(2, 3)
    out = way(query, key, value, rel_h, rel_w, query.shape[-1] ** -0.5)
    return out.transpose(1, 2).reshape(batch, height, width, channels // 3)


def by_way(way: Callable, qkv, *, num_heads, rel_pos_h, rel_pos_w, window_size=0, pad_qkv=None) -> Tensor:
    windows = attend(way, partition(qkv, window_size, pad_qkv), num_heads, rel_pos_h, rel_pos_w)
    return join(windows, window_size, qkv)


def by_module(module: nn.Module, qkv, *, num_heads, rel_pos_h, rel_pos_w, window_size=0, pad_qkv=None) -> Tensor:
    """A library's own attention module, its tables replaced by those given.

    The indices that it makes at every call are made on the GPU, where they need no copy that a CUDA graph could not capture.
    """
    tables = {"rel_pos_h": rel_pos_h, "rel_pos_w": rel_pos_w}
    with qkv.device if qkv.is_cuda else contextlib.nullcontext():
        windows = torch.func.functional_call(module, tables, (partition(qkv, window_size, pad_qkv),))
    return join(windows[0] if isinstance(windows, tuple) else windows, window_size, qkv)


def _without_projections(module: nn.Module) -> nn.Module:
    module.qkv = module.proj = nn.Identity()
    return module.eval()


def _segment_anything(case) -> Callable:
    ensure_importable()
    from segment_anything.modeling.image_encoder import Attention

    side = case.window or case.side
    module = Attention(case.heads * case.dim, case.heads, use_rel_pos=True, input_size=(side, side))
    return functools.partial(by_module, _without_projections(module))


def _transformers(case) -> Callable:
    ensure_importable()
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

    sizes = {"hidden_size": case.heads * case.dim, "num_attention_heads": case.heads}
    config = SamVisionConfig(image_size=case.side * 16, patch_size=16, **sizes)
    return functools.partial(by_module, _without_projections(SamVisionSdpaAttention(config, case.window)))


def peers(case) -> dict[str, Callable[[], Callable]]:
    """Name → what builds the peer; options are bound by the caller."""
    built: dict[str, Callable[[], Callable]] = {
        "segment_anything": functools.partial(_segment_anything, case),
        "transformers_sdpa": functools.partial(_transformers, case),
    }
    return built | {name: functools.partial(functools.partial, by_way, way) for name, way in WAYS.items() if name != "flex"}
