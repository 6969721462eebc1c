"""A plain block's batch, a few samples at a time: on a CPU, in inference, where its widest activation is over 32 MiB.

glibc asks the system for tensors of that size anew at every call, and fresh pages are slow to touch. Samples do not see each
other in a block, so that the results are the same but for the order in which matrix products sum.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..ops import torch_backend
from ..ops._inplace import may_write
from .call import Call
from .dropping import draws
from .parts import Layout, Parts, parameter

BYTES = torch_backend.HIDDEN_BYTES  # of the widest activation of one piece; a batch of no more than twice that stays whole


def samples_of(parts: Parts, layout: Layout, call: Call) -> int | None:
    """Samples to a piece of a call that PyTorch's operators serve; None where the batch stays whole.

    That is so where it is small; where a graph of it is made, by autograd or by a compiler, to which its size should mean
    nothing; where random numbers are drawn, in the batch's order; where a module is called as it is, which may be watched; and
    where a mask or a table is of another number of samples.
    """
    if torch.is_grad_enabled() or not may_write() or not layout.plain or call.present is not None:
        return None
    x, mlp = call.hidden, layout.mlp
    if mlp is None or not x.is_cpu or type(x) is not Tensor or x.shape[0] < 2:
        return None
    names = layout.attention
    if any(parts.part(path) for path in (names.query_norm, names.key_norm, names.out_norm, mlp.hidden_norm)):
        return None
    if any(t is not None and t.dim() == 4 and len(t) not in (1, len(x)) for t in (call.attn_mask, call.cos, call.sin)):
        return None
    features = max(3 * x.shape[-1], parameter(parts.child(mlp.fc1), "weight").shape[0])
    widest = x.numel() // max(x.shape[-1], 1) * features * x.element_size()
    return max(1, BYTES * x.shape[0] // widest) if widest > 2 * BYTES and not draws(parts, layout) else None


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
