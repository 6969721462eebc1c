"""A transformer block computed with the fused operators: z' = MHA(LN(z)) + z, z'' = MLP(LN(z')) + z', or post-norm.

This is the way from a call to the output: which operators serve it (``operators``), whether as one Function (``whole``), a few
samples at a time (``pieces``) or step by step (``branches``, ``sums``). And the same for what is served that is no encoder
block, whose own files compute it.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from . import decoder, handoff, multihead, pieces, two_way
from .branches import attention, mlp
from .call import Call
from .operators import TORCH, TRITON, choose_backend, held_to
from .parts import Known, Layout, Parts, parameter
from .sums import add, add_norm, branch_of, norms_of
from .whole import at_once


def compute(
    block: nn.Module,
    layout: Layout,
    call: Call,
    pinned: str = "auto",
    next_norm: nn.LayerNorm | None = None,
    known: Known | None = None,
) -> Tensor:
    """The block's output for a call.

    ``next_norm``: the first norm of the block that follows; in inference on Triton the last sum and that norm are one
    kernel, and the norm's result is left for that block (see ``handoff``). ``known``: descendants looked up before.
    """
    x = call.hidden
    chosen, parts = choose_backend(pinned, x), Parts(block, None if known is None else known.children)
    run, ops = _post_norm if layout.post_norm else _pre_norm, TRITON if chosen == "triton" else TORCH
    samples = pieces.samples_of(parts, layout, call) if chosen == "torch" else None
    if samples is not None:
        return pieces.joined(lambda piece: run(parts, layout, ops, chosen, piece.hidden, piece, None), call, samples)
    if chosen == "torch" or pinned == "auto":
        return run(parts, layout, ops, chosen, x, call, next_norm)
    with held_to(pinned):
        return run(parts, layout, ops, chosen, x, call, next_norm)


def compute_multihead(module: Any, call: multihead.MultiheadCall, pinned: str = "auto") -> tuple[Tensor, None]:
    """The output of a ``torch.nn.MultiheadAttention`` for a call."""
    chosen = choose_backend(pinned, call.query)
    with held_to(pinned):
        return multihead.compute(module, TRITON if chosen == "triton" else TORCH, call)


def compute_decoder(module: Any, layout: decoder.DecoderLayout, call: decoder.DecoderCall, pinned: str = "auto") -> Any:
    """The output of a mask decoder's attention for a call."""
    chosen = choose_backend(pinned, call.query)
    with held_to(pinned):
        return decoder.compute(module, layout, TRITON if chosen == "triton" else TORCH, call)


def compute_two_way(module: Any, layout: two_way.TwoWayLayout, call: two_way.TwoWayCall, pinned: str = "auto") -> Any:
    """The outputs of a mask decoder's two-way block for a call."""
    chosen = choose_backend(pinned, call.tokens)
    with held_to(pinned):
        ops = TRITON if chosen == "triton" else TORCH

        def summed(residual: Tensor, branch: Tensor, norm: Any, owned: bool) -> Tensor:
            return add_norm(ops, chosen, residual, branch, None, owned, norm)[0]

        return two_way.compute(module, layout, ops, call, summed, functools.partial(mlp, Parts(module), layout, ops))


def _pre_norm(parts: Parts, layout: Layout, ops: Any, chosen: str, x: Tensor, call: Call, next_norm: Any) -> Tensor:
    """z' = MHA(LN(z)) + z, z'' = MLP(LN(z')) + z' (Dosovitskiy et al. 2021, eqs. 2 and 3)."""
    before, after = parts.child(layout.norms.before), parts.child(layout.norms.after)
    normed = handoff.collect(x, before)
    if layout.plain and ops is TRITON and not torch.compiler.is_compiling():
        out = at_once(parts, layout, chosen, x, call, normed, next_norm)
        if out is not None:
            return out
    if normed is None:
        normed = norms_of(ops).layer_norm(x, parameter(before, "weight"), parameter(before, "bias"), before.eps)
    branch = attention(parts, layout, ops, normed, call)
    del normed
    branch, scale, owned = branch_of(parts, layout.residuals[0], layout.attention.drop, branch)
    owned = owned and layout.attention.out not in layout.called
    normed, x = add_norm(ops, chosen, x, branch, scale, owned, after)
    branch = mlp(parts, layout, ops, normed)
    del normed
    branch, scale, owned = branch_of(parts, layout.residuals[1], layout.mlp.drop if layout.mlp else (), branch)
    owned = owned and layout.mlp is not None and layout.mlp.fc2 not in layout.called
    if next_norm is not None and handoff.possible(chosen, x, branch, next_norm):
        return handoff.add_layer_norm(ops, x, branch, next_norm, scale)
    return add(x, branch, scale, owned)


def _post_norm(parts: Parts, layout: Layout, ops: Any, chosen: str, x: Tensor, call: Call, _next_norm: Any) -> Tensor:
    """z' = LN(MHA(z) + z), z'' = LN(MLP(z') + z') (Vaswani et al. 2017, section 3.1)."""
    branch = attention(parts, layout, ops, x, call)
    branch, scale, owned = branch_of(parts, layout.residuals[0], layout.attention.drop, branch)
    owned = owned and layout.attention.out not in layout.called
    x, _ = add_norm(ops, chosen, x, branch, scale, owned, parts.child(layout.norms.before))
    branch = mlp(parts, layout, ops, x)
    branch, scale, owned = branch_of(parts, layout.residuals[1], layout.mlp.drop if layout.mlp else (), branch)
    owned = owned and layout.mlp is not None and layout.mlp.fc2 not in layout.called
    return add_norm(ops, chosen, x, branch, scale, owned, parts.child(layout.norms.after))[0]
