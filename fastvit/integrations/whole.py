"""A plain pre-norm block as a whole, on Triton: one autograd Function in training, one recipe in inference (``ops.block``)."""

from typing import Any

import torch
from torch import Tensor

from ..ops import block as one_block
from . import grid, handoff, layouts
from .call import Call
from .dropping import active, by_sample, dropouts, training
from .parts import Layout, Parts, attribute, parameter
from .reading import head_count, layer_scale_of, score_scale, separate_bias


def at_once(
    parts: Parts, layout: Layout, chosen: str, x: Tensor, call: Call, normed: Tensor | None, next_norm: Any
) -> Tensor | None:
    """The output of a block whose layout is plain; None for a call that is computed step by step.

    ``normed``: its first norm, where the block before left it; ``next_norm``: as in ``block.compute``.
    """
    attention, child = layout.attention, parts.child
    mlp: Any = layout.mlp
    first, second = layout.residuals
    modules = (attention.out_norm, attention.gate, mlp.hidden_norm)
    images = layout.window is not None
    if images and not torch.is_grad_enabled():
        return None
    if call.attn_mask is not None or call.is_causal or call.cos is not None or any(parts.part(path) for path in modules):
        return None
    if any(active(*map(child, dropouts(layout)))):
        return None
    drop_paths = [training(parts.part(residual.drop_path)) for residual in layout.residuals]
    if any(path is not None and not (torch.is_grad_enabled() and by_sample(path)) for path in drop_paths):
        return None
    owner = child(attention.owner)
    heads = head_count(owner)
    if attribute(owner, layouts.KEY_HEAD_COUNT, heads) != heads or separate_bias(owner) is not None:
        return None

    def parameters(path: str) -> tuple[Any, Any]:
        return parameter(child(path), "weight"), parameter(child(path), "bias")

    tensors = [x, *parameters(layout.norms.before), *parameters(attention.out), layer_scale_of(parts, first.scale)]
    tensors += [*parameters(layout.norms.after), *parameters(mlp.fc1), *parameters(mlp.fc2), layer_scale_of(parts, second.scale)]
    tensors += grid.tables(owner) if images else (None, None)
    for path in attention.qkv:
        tensors += parameters(path)
    eps = child(layout.norms.before).eps, child(layout.norms.after).eps
    features = tensors[-2].shape[0] // (heads if len(attention.qkv) == 3 else 3 * heads)
    options = one_block.Options(heads, *eps, score_scale(owner, features), layout.activation or "", layout.window)
    if torch.is_grad_enabled():
        return one_block.block(tensors, options, drop_paths)
    if next_norm is None or not handoff.possible(chosen, x, x, next_norm):
        return one_block.infer(tensors, options, normed, None)
    following = parameter(next_norm, "weight"), parameter(next_norm, "bias"), next_norm.eps
    with handoff.versioned():
        made = one_block.infer(tensors, options, normed, following)
    return None if made is None else handoff.leave(made[0], made[1], next_norm)
