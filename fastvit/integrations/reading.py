"""What the modules of a block say besides their weights: heads, the scores' scale, positions, biases kept apart, LayerScale.

Read anew at every call, by the names in ``layouts``: any of it may have been changed since ``accelerate``.
"""

from typing import Any

import torch
from torch import Tensor

from . import layouts
from .call import Call
from .parts import Layout, Parts, attribute


def head_count(owner: Any) -> int:
    """The query heads of an attention that has a layout."""
    for name in layouts.HEAD_COUNTS:
        count = attribute(owner, name)
        if count is not None:
            return count
    raise AttributeError(f"{type(owner).__name__} has none of {', '.join(layouts.HEAD_COUNTS)}")


def score_scale(owner: Any, head_dim: int) -> float:
    """What the owner multiplies its scores by, 1/√head_dim where it does not say."""
    for name in layouts.SCALINGS:
        scaling = attribute(owner, name)
        if isinstance(scaling, float):
            return scaling
    return head_dim**-0.5


def separate_bias(owner: Any) -> Tensor | None:
    """The packed projection's bias where the owner keeps it in three (timm's EVA, whose keys have zeros)."""
    biases = []
    for name in layouts.SEPARATE_BIASES:
        bias = attribute(owner, name)
        if bias is None:
            return None
        biases.append(bias)
    return torch.cat(biases)


def positions_of(parts: Parts, layout: Layout, call: Call) -> dict[str, Any] | None:
    """The arguments of ``qk_norm_rope`` beside query and key; None where the block neither rotates nor normalizes them."""
    if layout.head_norm is None and call.cos is None:
        return None
    names = layout.attention
    keywords: dict[str, Any] = {"cos": call.cos, "sin": call.sin, "interleaved": _interleaved(parts.child(names.owner), layout)}
    if layout.head_norm is not None:
        norms = parts.part(names.query_norm), parts.part(names.key_norm)
        for name, norm in zip(("query", "key"), norms, strict=True):
            keywords[f"{name}_weight"] = norm.weight
            keywords[f"{name}_bias"] = getattr(norm, "bias", None)
        keywords |= {"norm": layout.head_norm, "eps": norms[0].eps}
    return keywords


def has_plain_tables(call: Call) -> bool:
    """Whether the tables are learned, or each head's own, which only plain PyTorch operators rotate by."""
    cos = call.cos
    return cos is not None and (cos.requires_grad or (cos.dim() == 4 and cos.shape[1] != 1))


def _interleaved(owner: Any, layout: Layout) -> bool:
    """Whether rotary positions pair neighbouring channels; transformers' pair channel d with d + D/2."""
    return layouts.SIN_COS in layout.arguments and not getattr(owner, layouts.ROTATES_HALVES, False)


def layer_scale_of(parts: Parts, path: str | None) -> Any:
    """A LayerScale's one parameter, or the block's own of that name; in replicas of ``DataParallel`` a plain attribute."""
    layer_scale = parts.part(path)
    if layer_scale is None:
        return None if path is None or "." in path or parts.child(path) is not None else attribute(parts.block, path)
    for name in layouts.SCALE_PARAMETERS:
        if name in layer_scale._parameters or name in layer_scale._buffers or name in layer_scale.__dict__:
            return getattr(layer_scale, name)
    raise AttributeError(f"{type(layer_scale).__name__} has none of {', '.join(layouts.SCALE_PARAMETERS)}")
