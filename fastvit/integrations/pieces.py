"""A plain block's batch, a few samples at a time: on a CPU, in inference, where its widest activation is over 32 MiB.

glibc asks the system for tensors of that size anew at every call, and fresh pages are slow to touch. Samples do not see each
other in a block, so that the results are the same but for the order in which matrix products sum.
"""

import dataclasses
from collections.abc import Callable, Iterator

from torch import Tensor

from ..ops import torch_backend
from .call import Call

BYTES = torch_backend.HIDDEN_BYTES  # of the widest activation of one piece; a batch of no more than twice that stays whole


def samples_of(x: Tensor, features: int) -> int | None:
    """Samples to a piece of hidden states x (B, ..., C), the widest activation having ``features`` a token; None for all."""
    if not x.is_cpu or type(x) is not Tensor or x.shape[0] < 2:
        return None
    whole = x.numel() // max(x.shape[-1], 1) * features * x.element_size()
    return max(1, BYTES * x.shape[0] // whole) if whole > 2 * BYTES else None


def joined(block: Callable[[Call], Tensor], call: Call, samples: int) -> Tensor:
    """What ``block`` makes of the call, so many samples at a time."""
    first, *others = _pieces(call, samples)
    made = block(first)
    out = made.new_empty(call.hidden.shape[0], *made.shape[1:])
    out[:samples] = made
    for number, piece in enumerate(others, 1):
        out[number * samples : (number + 1) * samples] = block(piece)
    return out


def _pieces(call: Call, samples: int) -> Iterator[Call]:
    batch = call.hidden.shape[0]
    for start in range(0, batch, samples):
        rows = slice(start, start + samples)
        mask, cos, sin = (
            t[rows] if t is not None and t.dim() == 4 and t.shape[0] == batch else t for t in (call.attn_mask, call.cos, call.sin)
        )
        yield dataclasses.replace(call, hidden=call.hidden[rows], attn_mask=mask, cos=cos, sin=sin)
