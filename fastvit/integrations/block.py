"""A pre-norm transformer block computed with the fused operators: z' = MHA(LN(z)) + z, z'' = MLP(LN(z')) + z'.

Residual, LayerScale and the following LayerNorm are one operator, bias and activation another; query, key and value are
read where the projection wrote them. In inference on the torch backend, sums are written over branches that came out of our
own linears; what a module of the user's returned may be held by others. The block's own modules keep the weights; those
without a fused form (stochastic depth, active dropout, norms of queries and keys, a gated MLP) are called as they are.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend, functional
from ..ops import torch_backend
from . import handoff, layouts
from .parts import Layout, child, part


def _torch_attention(query, key, value, attn_mask=None, *, is_causal=False, scale=None):
    return torch_backend.attention(query, key, value, attn_mask, is_causal, scale, None, None)


def _torch_layer_norm(input, weight, bias, eps):
    return torch_backend.layer_norm(input, weight, bias, eps, "token")


def _torch_add_layer_norm(residual, branch, weight, bias, eps, *, layer_scale=None):
    return torch_backend.add_layer_norm(residual, branch, weight, bias, eps, layer_scale)


def _torch_linear(input, weight, bias=None, *, activation=None):
    return torch_backend.linear(input, weight, bias, activation)


def _torch_mlp(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, activation="gelu"):
    return torch_backend.mlp(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)


TORCH = SimpleNamespace(
    attention=_torch_attention,
    layer_norm=_torch_layer_norm,
    add_layer_norm=_torch_add_layer_norm,
    linear=_torch_linear,
    mlp=_torch_mlp,
)
TRITON = functional


def choose_backend(pinned: str, x: Tensor) -> str:
    """``"triton"`` or ``"torch"`` for a block pinned to a backend; ``"auto"`` follows the setting in force.

    Raises ``ValueError`` when pinned to ``triton`` and that cannot serve the tensor.
    """
    if pinned == "torch":
        return "torch"
    return backend.resolve(x, setting=None if pinned == "auto" else pinned)


def compute(
    block: nn.Module,
    layout: Layout,
    x: Tensor,
    pinned: str = "auto",
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    next_norm: nn.LayerNorm | None = None,
) -> Tensor:
    """The block's output for hidden states ``x`` (B, N, C).

    ``next_norm``: the first norm of the block that follows; in inference on Triton the last sum and that norm are one
    kernel, and the norm's result is left for that block (see ``handoff``).
    """
    chosen = choose_backend(pinned, x)
    switch = chosen == "triton" and backend.resolve(x) != "triton"
    use_backend = backend.use_backend if torch.compiler.is_compiling() else backend.use_backend_in_thread
    with use_backend("triton") if switch else nullcontext():
        ops = TRITON if chosen == "triton" else TORCH
        before, after = child(block, layout.norms.before), child(block, layout.norms.after)
        normed = handoff.collect(x, before)
        if normed is None:
            normed = ops.layer_norm(x, before.weight, before.bias, before.eps)
        branch = _attention(block, layout.attention, ops, normed, attn_mask, is_causal)
        branch, scale, owned = _branch(block, layout.residuals[0], layout.attention.drop, branch)
        if owned and chosen == "torch" and _may_overwrite(branch, x, scale):
            normed, x = torch_backend.add_layer_norm_(x, branch, after.weight, after.bias, after.eps, scale)
        else:
            normed, x = ops.add_layer_norm(x, branch, after.weight, after.bias, after.eps, layer_scale=scale)
        branch = _mlp(block, layout, ops, normed)
        del normed
        branch, scale, owned = _branch(block, layout.residuals[1], layout.mlp.drop if layout.mlp else (), branch)
        owned = owned and layout.mlp is not None  # what a module of the user's returned may be held by others
        if next_norm is not None and handoff.possible(chosen, x, branch, next_norm):
            return handoff.add_layer_norm(ops, x, branch, next_norm, scale)
        return _add(x, branch, scale, owned)


def _attention(
    block: nn.Module, names: layouts.Attention, ops: Any, x: Tensor, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    batch, tokens, _ = x.shape
    owner = child(block, names.owner)
    heads = next(getattr(owner, name) for name in layouts.HEAD_COUNTS if hasattr(owner, name))
    projected = [_linear(ops, child(block, path), x) for path in names.qkv]
    if len(projected) == 1:
        query, key, value = projected[0].view(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        query, key, value = (t.view(batch, tokens, heads, -1).transpose(1, 2) for t in projected)
    del projected
    query_norm, key_norm = part(block, names.query_norm), part(block, names.key_norm)
    if query_norm is not None:
        query = query_norm(query).to(value.dtype)
    if key_norm is not None:
        key = key_norm(key).to(value.dtype)
    out = ops.attention(query, key, value, attn_mask, is_causal=is_causal, scale=_scale(owner, query.shape[-1]))
    out = out.transpose(1, 2).reshape(batch, tokens, -1)
    del query, key, value
    out_norm, gate = part(block, names.out_norm), child(block, names.gate)
    if out_norm is not None:
        out = out_norm(out)
    if gate is not None:
        out = out * _linear(ops, gate, x).sigmoid()
    return _linear(ops, child(block, names.out), out)


def _scale(owner: Any, head_dim: int) -> float:
    scaling = getattr(owner, "scaling", None)
    return head_dim**-0.5 if scaling is None else scaling


def _mlp(block: nn.Module, layout: Layout, ops: Any, x: Tensor) -> Tensor:
    if layout.mlp is None:
        return block.get_submodule(layouts.OPAQUE_MLP)(x)
    fc1, fc2 = child(block, layout.mlp.fc1), child(block, layout.mlp.fc2)
    hidden_norm = part(block, layout.mlp.hidden_norm)
    drops = list(_active(child(block, layout.mlp.hidden_drop)))
    if hidden_norm is None and not drops:
        return ops.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation=layout.activation)
    hidden = _linear(ops, fc1, x, layout.activation)
    for module in drops:
        hidden = module(hidden)
    if hidden_norm is not None:
        hidden = hidden_norm(hidden)
    return _linear(ops, fc2, hidden)


def _linear(ops: Any, module: Any, x: Tensor, activation: str | None = None) -> Tensor:
    return ops.linear(x, module.weight, module.bias, activation=activation)


def _active(*dropouts: Any) -> Iterator[nn.Module]:
    """The dropouts that drop something now."""
    return (module for module in dropouts if module is not None and module.training and getattr(module, "p", 0))


def _branch(
    block: nn.Module, residual: layouts.Residual, drops: tuple[str, ...], branch: Tensor
) -> tuple[Tensor, Tensor | None, bool]:
    """The branch as it enters the sum, the LayerScale still to be applied to it, and whether no module touched it here."""
    owned = True
    for module in _active(*(child(block, path) for path in drops), child(block, residual.drop)):
        branch, owned = module(branch), False
    layer_scale = part(block, residual.scale)
    scale = None if layer_scale is None else _scale_of(layer_scale)
    drop_path = part(block, residual.drop_path)
    if drop_path is not None and drop_path.training:
        branch, owned = drop_path(branch if scale is None else branch * scale), False
        scale = None
    return branch, scale, owned


def _scale_of(layer_scale: Any) -> Any:
    """Its one parameter; in replicas of ``DataParallel`` a plain attribute."""
    for name in layouts.SCALE_PARAMETERS:
        if name in layer_scale._parameters or name in layer_scale.__dict__:
            return getattr(layer_scale, name)
    raise AttributeError(f"{type(layer_scale).__name__} has none of {', '.join(layouts.SCALE_PARAMETERS)}")


def _may_overwrite(branch: Tensor, *others: Tensor | None) -> bool:
    """Whether a sum may be written over a ``branch`` that nobody else holds: inference, one dtype, nothing traced."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(branch) is not Tensor:
        return False
    if branch.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return all(other is None or other.dtype == branch.dtype for other in others)


def _add(residual: Tensor, branch: Tensor, scale: Tensor | None, owned: bool) -> Tensor:
    if owned and _may_overwrite(branch, residual, scale):
        return torch_backend.add_(residual, branch, scale)
    if scale is None:
        return residual + branch
    if residual.dtype == branch.dtype == scale.dtype:
        return torch.addcmul(residual, branch, scale)
    return residual + scale * branch
