"""What a block was called with, read by the names of its forward's arguments."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import layouts, multihead
from .parts import Layout, child


@dataclass(frozen=True)
class Call:
    """Hidden states (B, N, C), or images (B, H, W, C), and what attends to what.

    ``attn_mask``: True = attend, or a bias, broadcastable to (B, H, N, N). ``cos``, ``sin``: rotary positions of the last T
    tokens, (T, D) or broadcastable to (B, H, T, D) and of that rank. ``present``: (B, N), True for tokens that exist, where
    the hidden states came as a nested tensor.
    """

    hidden: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    cos: Tensor | None = None
    sin: Tensor | None = None
    present: Tensor | None = None


def read_call(block: Any, layout: Layout, args: tuple, kwargs: dict) -> Call | str:
    """The call, or why the fused path does not serve one like it."""
    names = layout.arguments
    if len(args) > len(names):
        return f"it was called with {len(args)} positional arguments"
    values = dict(zip(names, args, strict=False))
    values.update(kwargs)
    x = values.pop(names[0], None)
    rank, shape = (3, "(batch, tokens, channels)") if layout.window is None else (4, "(batch, height, width, channels)")
    if not isinstance(x, Tensor) or x.dim() != rank:
        return f"the hidden states are not one tensor of shape {shape}"
    present = None
    if x.is_nested:
        nested = _padded(x)
        if isinstance(nested, str):
            return nested
        x, present = nested
    attn_mask, mask_is_whole, is_causal, cos, sin = None, False, False, None, None
    torchs: dict[str, Any] = {}
    for name, value in values.items():
        if name in layouts.MASKS:
            attn_mask, mask_is_whole = value, name == layouts.WHOLE_MASK
        elif name == layouts.CAUSAL:
            is_causal = bool(value)
        elif name in (layouts.FORBIDDING_MASK, layouts.PADDING_MASK):
            torchs[name] = value
        elif name in (layouts.COS_SIN, layouts.SIN_COS) and value is not None:
            rotary = _read_rotary(block, layout, name, value, x.shape[1])
            if isinstance(rotary, str):
                return rotary
            cos, sin = rotary
        elif value is not None and value is not False and name not in layouts.HARMLESS:
            return f"it was called with {name}"
    if present is not None and (attn_mask is not None or any(mask is not None for mask in torchs.values())):
        return "it was called with a nested tensor and a mask"
    if layouts.FORBIDDING_MASK in names:
        padding = torchs.get(layouts.PADDING_MASK) if present is None else present.logical_not()
        owner = child(block, layout.attention.owner)
        reason = multihead.why_not_given(owner, x, x, x)
        if reason is not None:
            return reason
        tokens_first = multihead.tokens_first(owner, present)
        read = multihead.read_masks(torchs.get(layouts.FORBIDDING_MASK), padding, is_causal, owner, x, x, tokens_first)
        if isinstance(read, str):
            return read
        attn_mask, is_causal = read
    elif layout.window is not None and (attn_mask is not None or is_causal):
        return "it was called with a mask, which attention on an image has none of"
    elif attn_mask is not None:
        is_causal = is_causal and not mask_is_whole
        if not isinstance(attn_mask, Tensor) or is_causal:
            return "it was called with a mask of an unknown kind"
        rank = attn_mask.dim()
        if rank not in (2, 4) or (attn_mask.dtype != torch.bool and not attn_mask.is_floating_point()):
            return f"it was called with a {attn_mask.dtype} mask of rank {rank}"
    return Call(x, attn_mask, is_causal, cos, sin, present)


def _read_rotary(block: Any, layout: Layout, name: str, value: Any, tokens: int) -> tuple[Tensor, Tensor] | str:
    """(cos, sin) of the last tokens."""
    if name == layouts.COS_SIN:
        pair = tuple(value) if isinstance(value, tuple | list) else ()
    else:
        pair = value.chunk(2, dim=-1)[::-1] if isinstance(value, Tensor) and value.dim() else ()
    if len(pair) != 2 or not all(isinstance(t, Tensor) and 2 <= t.dim() <= 4 and t.is_floating_point() for t in pair):
        return f"it was called with {name} of an unknown kind"
    cos, sin = pair
    prefix = getattr(child(block, layout.attention.owner), layouts.PREFIX_TOKENS, None)
    fits = cos.shape[-2] == tokens - prefix if prefix is not None else cos.shape[-2] <= tokens
    if not fits or sin.shape != cos.shape or layout.head_dim not in (None, cos.shape[-1]):
        return f"it was called with {name} that do not fit the tokens"
    return (cos.unsqueeze(0), sin.unsqueeze(0)) if cos.dim() == 3 else (cos, sin)  # of three dimensions, the first is heads


def _padded(x: Tensor) -> tuple[Tensor, Tensor] | str:
    """(padded (B, N, C), present (B, N)) of a nested tensor, as ``torch.nn.TransformerEncoder`` makes them in inference."""
    if x.layout != torch.strided or (torch.is_grad_enabled() and x.requires_grad):
        return "it was called with a nested tensor of an unknown kind"
    padded = x.to_padded_tensor(0.0)
    lengths = x._nested_tensor_size()[:, 0].to(x.device)
    return padded, torch.arange(padded.shape[1], device=x.device)[None, :] < lengths[:, None]


def nested_again(out: Tensor, present: Tensor) -> Tensor:
    """The tokens that exist, as a nested tensor."""
    return torch._nested_tensor_from_mask(out, present, mask_check=False)
