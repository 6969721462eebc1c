"""The memory layouts a tensor can arrive in. Whatever lies in memory beside its elements is NaN, so reading it shows."""

import torch
from torch import Tensor

LAYOUTS = ["contiguous", "embedded", "gaps", "transposed", "expanded"]


def _surrounded(shape, like: Tensor) -> Tensor:
    filler = True if like.dtype == torch.bool else float("nan")
    return torch.full(shape, filler, dtype=like.dtype, device=like.device)


def embedded(tensor: Tensor, margin: int = 3) -> Tensor:
    """The middle of a larger buffer of NaN: every stride is larger than the extent beneath it, rows start unaligned."""
    buffer = _surrounded([size + 2 * margin for size in tensor.shape], tensor)
    view = buffer[tuple(slice(margin, margin + size) for size in tensor.shape)]
    return view.copy_(tensor)


def gaps(tensor: Tensor) -> Tensor:
    """Every second element of the last dimension: the last stride is 2."""
    buffer = _surrounded([*tensor.shape[:-1], 2 * tensor.shape[-1]], tensor)
    return buffer[..., ::2].copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    """The dimensions in reverse order in memory: the last stride is the largest."""
    order = list(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def expanded(tensor: Tensor) -> Tensor:
    """One first entry for all: stride 0 in the first dimension (the values change to the first entry's)."""
    return tensor[:1].expand_as(tensor)


def lay_out_each(arguments: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Each laid out; parameters of one dimension, for which most layouts are one, with gaps wherever it is not contiguous."""
    strided = "contiguous" if layout == "contiguous" else "gaps"
    return {name: lay_out(tensor, strided if tensor.dim() == 1 else layout) for name, tensor in arguments.items()}


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "contiguous":
        return tensor.contiguous()
    return {"embedded": embedded, "gaps": gaps, "transposed": transposed, "expanded": expanded}[layout](tensor)
