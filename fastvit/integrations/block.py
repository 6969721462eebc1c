"""A transformer block computed with the fused operators: z' = MHA(LN(z)) + z, z'' = MLP(LN(z')) + z', or post-norm.

Residual, LayerScale and the following LayerNorm are one operator, bias and activation another; query, key and value are
read where the projection wrote them. In inference on the torch backend, sums are written over branches that came out of our
own linears; what a module of the user's returned may be held by others. The block's own modules keep the weights; those
without a fused form (stochastic depth, active dropout, adapters, an MLP of another kind) are called as they are.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backend, functional, reference
from ..ops import block as one_block
from ..ops import torch_backend, torch_image_attention
from ..ops._inplace import may_write
from . import decoder, grid, handoff, layouts, multihead, pieces, two_way
from .call import Call
from .parts import Known, Layout, Parts, attribute, parameter


def _torch_attention(query, key, value, attn_mask=None, *, is_causal=False, scale=None):
    return torch_backend.attention(query, key, value, attn_mask, is_causal, scale, None, None)


def _torch_image_attention(qkv, *, num_heads, rel_pos_h=None, rel_pos_w=None, window_size=0, pad_qkv=None, scale=None):
    window = (window_size, window_size) if window_size else tuple(qkv.shape[1:3])
    tables = (rel_pos_h, rel_pos_w)
    sized = [t if t is None else torch_image_attention.resized_table(t, side) for t, side in zip(tables, window, strict=True)]
    return torch_image_attention.image_attention(qkv, num_heads, sized[0], sized[1], window, pad_qkv, scale)


def _torch_layer_norm(input, weight, bias, eps):
    return torch_backend.layer_norm(input, weight, bias, eps, "token")


def _torch_add_layer_norm(residual, branch, weight, bias, eps, *, layer_scale=None):
    return torch_backend.add_layer_norm(residual, branch, weight, bias, eps, layer_scale)


def _torch_linear(input, weight, bias=None, *, activation=None):
    if torch.jit.is_tracing():  # one graph, whether gradients are wanted or not: nothing is written over
        out = F.linear(input, weight, bias)
        return out if activation is None else _ACTIVATIONS[activation](out)
    return torch_backend.linear(input, weight, bias, activation)


def _torch_mlp(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, activation="gelu"):
    if torch.jit.is_tracing():
        return _torch_linear(_torch_linear(input, fc1_weight, fc1_bias, activation=activation), fc2_weight, fc2_bias)
    return torch_backend.mlp(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation)


def _torch_qk_norm_rope(query, key, cos, sin, *, interleaved=False, norm=None, eps=1e-6, **weights):
    cos, sin = (t if t is None else t.squeeze(1) if t.dim() == 4 else t[None] for t in (cos, sin))
    params = [weights.get(f"{of}_{name}") for of in ("query", "key") for name in ("weight", "bias")]
    return torch_backend.qk_norm_rope(query, key, cos, sin, interleaved, norm, params[0], params[1], params[2], params[3], eps)


def _torch_rotary_attention(query, key, value, cos, sin, *, attn_mask=None, is_causal=False, scale=None, **positions):
    query, key = _torch_qk_norm_rope(query, key, cos, sin, **positions)
    return _torch_attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale)


def _torch_glu(gate, value, *, activation="silu"):
    return torch_backend.glu(gate, value, activation)


TORCH = SimpleNamespace(
    attention=_torch_attention,
    image_attention=_torch_image_attention,
    qk_norm_rope=_torch_qk_norm_rope,
    rotary_attention=_torch_rotary_attention,
    glu=_torch_glu,
    layer_norm=_torch_layer_norm,
    add_layer_norm=_torch_add_layer_norm,
    linear=_torch_linear,
    mlp=_torch_mlp,
)
TRITON = functional
DROP_PATH_PACKAGES = ("timm", "transformers", "fastvit")


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
    samples = _samples_at_once(parts, layout, call) if chosen == "torch" else None
    if samples is not None:
        return pieces.joined(lambda piece: run(parts, layout, ops, chosen, piece.hidden, piece, None), call, samples)
    if chosen == "torch" or pinned == "auto":
        return run(parts, layout, ops, chosen, x, call, next_norm)
    with _held_to(pinned):
        return run(parts, layout, ops, chosen, x, call, next_norm)


def compute_multihead(module: Any, call: multihead.MultiheadCall, pinned: str = "auto") -> tuple[Tensor, None]:
    """The output of a ``torch.nn.MultiheadAttention`` for a call."""
    chosen = choose_backend(pinned, call.query)
    with _held_to(pinned):
        return multihead.compute(module, TRITON if chosen == "triton" else TORCH, call)


def compute_decoder(module: Any, layout: decoder.DecoderLayout, call: decoder.DecoderCall, pinned: str = "auto") -> Any:
    """The output of a mask decoder's attention for a call."""
    chosen = choose_backend(pinned, call.query)
    with _held_to(pinned):
        return decoder.compute(module, layout, TRITON if chosen == "triton" else TORCH, call)


def compute_two_way(module: Any, layout: two_way.TwoWayLayout, call: two_way.TwoWayCall, pinned: str = "auto") -> Any:
    """The outputs of a mask decoder's two-way block for a call."""
    chosen = choose_backend(pinned, call.tokens)
    with _held_to(pinned):
        ops = TRITON if chosen == "triton" else TORCH

        def add_norm(residual: Tensor, branch: Tensor, norm: Any, owned: bool) -> Tensor:
            return _add_norm(ops, chosen, residual, branch, None, owned, norm)[0]

        return two_way.compute(module, layout, ops, call, add_norm, functools.partial(_mlp, Parts(module), layout, ops))


def _held_to(pinned: str) -> AbstractContextManager:
    """Holds the operators to the kernels where the block is pinned to them and the setting in force is another."""
    if pinned != "triton" or backend.get_backend() == "triton":
        return nullcontext()
    use_backend = backend.use_backend if torch.compiler.is_compiling() else backend.use_backend_in_thread
    return use_backend("triton")


def _pre_norm(parts: Parts, layout: Layout, ops: Any, chosen: str, x: Tensor, call: Call, next_norm: Any) -> Tensor:
    before, after = parts.child(layout.norms.before), parts.child(layout.norms.after)
    normed = handoff.collect(x, before)
    if layout.plain and ops is TRITON and not torch.compiler.is_compiling():
        out = _at_once(parts, layout, chosen, x, call, normed, next_norm)
        if out is not None:
            return out
    if normed is None:
        normed = _norms(ops).layer_norm(x, parameter(before, "weight"), parameter(before, "bias"), before.eps)
    branch = _attention(parts, layout, ops, normed, call)
    del normed
    branch, scale, owned = _branch(parts, layout.residuals[0], layout.attention.drop, branch)
    owned = owned and layout.attention.out not in layout.called
    normed, x = _add_norm(ops, chosen, x, branch, scale, owned, after)
    branch = _mlp(parts, layout, ops, normed)
    del normed
    branch, scale, owned = _branch(parts, layout.residuals[1], layout.mlp.drop if layout.mlp else (), branch)
    owned = owned and layout.mlp is not None and layout.mlp.fc2 not in layout.called
    if next_norm is not None and handoff.possible(chosen, x, branch, next_norm):
        return handoff.add_layer_norm(ops, x, branch, next_norm, scale)
    return _add(x, branch, scale, owned)


def _samples_at_once(parts: Parts, layout: Layout, call: Call) -> int | None:
    """How many samples at a time the torch backend computes the block's output for; None for all."""
    if torch.is_grad_enabled() or not may_write() or not layout.plain or call.present is not None:
        return None
    mlp: Any = layout.mlp
    features = max(3 * call.hidden.shape[-1], parameter(parts.child(mlp.fc1), "weight").shape[0])
    samples = pieces.samples_of(call.hidden, features)
    return None if samples is None or _draws(parts, layout) else samples


def _draws(parts: Parts, layout: Layout) -> bool:
    """Whether dropout or stochastic depth draws random numbers, or might."""
    return any(_active(*map(parts.child, _dropouts(layout)))) or any(
        _training(parts.part(residual.drop_path)) is not None for residual in layout.residuals
    )


def _dropouts(layout: Any) -> tuple[str | None, ...]:
    first, second = layout.residuals
    return *layout.attention.drop, first.drop, layout.mlp.hidden_drop, *layout.mlp.drop, second.drop


def _at_once(
    parts: Parts, layout: Layout, chosen: str, x: Tensor, call: Call, normed: Tensor | None, next_norm: Any
) -> Tensor | None:
    """The output of a plain block by one autograd Function or one recipe (``ops.block``); None where it has none now."""
    attention, child = layout.attention, parts.child
    mlp: Any = layout.mlp
    first, second = layout.residuals
    modules = (attention.out_norm, attention.gate, mlp.hidden_norm)
    images = layout.window is not None
    if images and not torch.is_grad_enabled():
        return None
    if call.attn_mask is not None or call.is_causal or call.cos is not None or any(parts.part(path) for path in modules):
        return None
    if any(_active(*map(child, _dropouts(layout)))):
        return None
    drop_paths = [_training(parts.part(residual.drop_path)) for residual in layout.residuals]
    if any(path is not None and not (torch.is_grad_enabled() and _by_sample(path)) for path in drop_paths):
        return None
    owner = child(attention.owner)
    heads = next(count for count in [attribute(owner, name) for name in layouts.HEAD_COUNTS] if count is not None)
    if attribute(owner, layouts.KEY_HEAD_COUNT, heads) != heads or _separate_bias(owner) is not None:
        return None

    def parameters(path: str) -> tuple[Any, Any]:
        return parameter(child(path), "weight"), parameter(child(path), "bias")

    tensors = [x, *parameters(layout.norms.before), *parameters(attention.out), _scale_of(parts, first.scale)]
    tensors += [*parameters(layout.norms.after), *parameters(mlp.fc1), *parameters(mlp.fc2), _scale_of(parts, second.scale)]
    tensors += grid.tables(owner) if images else (None, None)
    for path in attention.qkv:
        tensors += parameters(path)
    eps = child(layout.norms.before).eps, child(layout.norms.after).eps
    features = tensors[-2].shape[0] // (heads if len(attention.qkv) == 3 else 3 * heads)
    options = one_block.Options(heads, *eps, _scale(owner, features), layout.activation or "", layout.window)
    if torch.is_grad_enabled():
        return one_block.block(tensors, options, drop_paths)
    if next_norm is None or not handoff.possible(chosen, x, x, next_norm):
        return one_block.infer(tensors, options, normed, None)
    following = parameter(next_norm, "weight"), parameter(next_norm, "bias"), next_norm.eps
    with handoff.versioned():
        made = one_block.infer(tensors, options, normed, following)
    return None if made is None else handoff.leave(made[0], made[1], next_norm)


def _post_norm(parts: Parts, layout: Layout, ops: Any, chosen: str, x: Tensor, call: Call, _next_norm: Any) -> Tensor:
    """z' = LN(MHA(z) + z), z'' = LN(MLP(z') + z') (Vaswani et al. 2017, section 3.1)."""
    branch = _attention(parts, layout, ops, x, call)
    branch, scale, owned = _branch(parts, layout.residuals[0], layout.attention.drop, branch)
    owned = owned and layout.attention.out not in layout.called
    x, _ = _add_norm(ops, chosen, x, branch, scale, owned, parts.child(layout.norms.before))
    branch = _mlp(parts, layout, ops, x)
    branch, scale, owned = _branch(parts, layout.residuals[1], layout.mlp.drop if layout.mlp else (), branch)
    owned = owned and layout.mlp is not None and layout.mlp.fc2 not in layout.called
    return _add_norm(ops, chosen, x, branch, scale, owned, parts.child(layout.norms.after))[0]


def _add_norm(
    ops: Any, chosen: str, x: Tensor, branch: Tensor, scale: Tensor | None, owned: bool, norm: Any
) -> tuple[Tensor, Tensor]:
    """(norm(total), total) of total = x + scale·branch; ``owned``: nobody else holds the branch."""
    weight, bias = parameter(norm, "weight"), parameter(norm, "bias")
    if owned and chosen == "torch" and _may_overwrite(branch, x, scale):
        return torch_backend.add_layer_norm_(x, branch, weight, bias, norm.eps, scale)
    return _norms(ops).add_layer_norm(x, branch, weight, bias, norm.eps, layer_scale=scale)


def _norms(ops: Any) -> Any:
    """What computes sums and norms: for a compiler PyTorch's own operators, which it joins into one kernel across the ends of
    blocks, as ``handoff`` does where nothing is compiled, and calls without Python."""
    return TORCH if torch.compiler.is_compiling() and backend.get_backend() == "auto" else ops


def queries_and_keys(block: nn.Module, layout: Layout, call: Call) -> tuple[Tensor, Tensor, float]:
    """(query (B, H, N, D), key (B, Hk, N, D), scale) that the block's attention takes the softmax of, on PyTorch's operators.

    For looking at attention weights, which the fused kernels never hold.
    """
    x, parts = call.hidden, Parts(block)
    norm = parts.child(layout.norms.before)
    if not layout.post_norm:
        x = TORCH.layer_norm(x, norm.weight, norm.bias, norm.eps)
    query, key, _ = _project(parts, layout, TORCH, x, call)
    positions = _positions(parts, layout, call)
    if positions is not None:
        prepare = _rotated_plainly if _plainly(call) else TORCH.qk_norm_rope
        query, key = prepare(query, key, **positions)
    return query, key, _scale(parts.child(layout.attention.owner), query.shape[-1])


def _attention(parts: Parts, layout: Layout, ops: Any, x: Tensor, call: Call) -> Tensor:
    names = layout.attention
    owner = parts.child(names.owner)
    if layout.window is not None:
        return _project_out(parts, layout, ops, x, _image_attention(parts, layout, ops, x))
    query, key, value = _project(parts, layout, ops, x, call)
    keywords = {"attn_mask": call.attn_mask, "is_causal": call.is_causal, "scale": _scale(owner, query.shape[-1])}
    positions = _positions(parts, layout, call)
    if positions is not None and not _plainly(call):
        out = ops.rotary_attention(query, key, value, **positions, **keywords)
    else:
        if positions is not None:
            query, key = _rotated_plainly(query, key, **positions)
        out = ops.attention(query, key, value, **keywords)
    del query, key, value
    tokens_first = layout.multihead and multihead.tokens_first(owner, call.present)
    # Dropout draws in the order of memory, in which torch's attention leaves tokens first also where the batch comes first.
    turned = layout.multihead and not tokens_first and any(_active(parts.child(layout.residuals[0].drop)))
    out = (out.permute(2, 0, 1, 3) if tokens_first or turned else out.transpose(1, 2)).flatten(2)
    out = _project_out(parts, layout, ops, x, out)
    return out.transpose(0, 1) if turned else out


def _image_attention(parts: Parts, layout: Layout, ops: Any, x: Tensor) -> Tensor:
    """The attention's output (B, H, W, C) of a block whose normalized hidden states x are images."""
    names = layout.attention
    owner, path = parts.child(names.owner), names.qkv[0]
    norms = parts.part(names.query_norm), parts.part(names.key_norm)
    project = functools.partial(_linear, parts, layout, ops, path)
    bias = False if path in layout.called else parts.child(path).bias
    return grid.attention(parts.block, owner, ops, x, project, bias, norms, functools.partial(_scale, owner))


def _project_out(parts: Parts, layout: Layout, ops: Any, x: Tensor, out: Tensor) -> Tensor:
    """What the block's attention makes of its normalized hidden states x and the heads' output."""
    out_norm = parts.part(layout.attention.out_norm)
    if out_norm is not None:
        out = out_norm(out)
    if parts.child(layout.attention.gate) is not None:
        out = out * _linear(parts, layout, ops, layout.attention.gate, x).sigmoid()
    return _linear(parts, layout, ops, layout.attention.out, out)


def _project(parts: Parts, layout: Layout, ops: Any, x: Tensor, call: Call) -> list[Tensor]:
    """Query, key and value, (B, heads, N, D), without what ``_positions`` tells; norms without a fused form are applied."""
    names = layout.attention
    owner = parts.child(names.owner)
    if layout.multihead:
        return multihead.project(owner, ops, x, x, x, multihead.tokens_first(owner, call.present))
    heads = next(count for count in [attribute(owner, name) for name in layouts.HEAD_COUNTS] if count is not None)
    if len(names.qkv) == 1:
        packed = _linear(parts, layout, ops, names.qkv[0], x, bias=_separate_bias(owner))
        query, key, value = packed.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        key_heads = attribute(owner, layouts.KEY_HEAD_COUNT, heads)
        projected = [_linear(parts, layout, ops, path, x) for path in names.qkv]
        counts = (heads, key_heads, key_heads)
        query, key, value = (t.unflatten(2, (n, -1)).transpose(1, 2) for t, n in zip(projected, counts, strict=True))
    if layout.head_norm is None:
        norms = parts.part(names.query_norm), parts.part(names.key_norm)
        query, key = (t if n is None else n(t).to(value.dtype) for n, t in zip(norms, (query, key), strict=True))
    return [query, key, value]


def _positions(parts: Parts, layout: Layout, call: Call) -> dict[str, Any] | None:
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


def _plainly(call: Call) -> bool:
    """Whether the tables are learned, or each head's own, which only plain PyTorch operators rotate by."""
    cos = call.cos
    return cos is not None and (cos.requires_grad or (cos.dim() == 4 and cos.shape[1] != 1))


def _rotated_plainly(query: Tensor, key: Tensor, **positions: Any) -> tuple[Tensor, Tensor]:
    dtype = query.dtype
    query, key = reference.qk_norm_rope(query, key, **positions)
    return query.to(dtype), key.to(dtype)


def _interleaved(owner: Any, layout: Layout) -> bool:
    """Whether rotary positions pair neighbouring channels; transformers' pair channel d with d + D/2."""
    return layouts.SIN_COS in layout.arguments and not getattr(owner, layouts.ROTATES_HALVES, False)


def _separate_bias(owner: Any) -> Tensor | None:
    """The packed projection's bias where the owner keeps it in three (timm's EVA, whose keys have zeros)."""
    biases = []
    for name in layouts.SEPARATE_BIASES:
        bias = attribute(owner, name)
        if bias is None:
            return None
        biases.append(bias)
    return torch.cat(biases)


def _scale(owner: Any, head_dim: int) -> float:
    for name in layouts.SCALINGS:
        scaling = attribute(owner, name)
        if isinstance(scaling, float):
            return scaling
    return head_dim**-0.5


def _mlp(parts: Parts, layout: Any, ops: Any, x: Tensor) -> Tensor:
    if layout.mlp is None:
        return parts.block.get_submodule(layouts.OPAQUE_MLP)(x)
    names = layout.mlp
    hidden_norm = parts.part(names.hidden_norm)
    drops = list(_active(parts.child(names.hidden_drop)))
    own = names.fc1 in layout.called or names.fc2 in layout.called
    inference = ops is TRITON and not torch.is_grad_enabled()  # two linears below; the one operator is for backward
    if hidden_norm is None and not drops and layout.gating is None and not own and not inference:
        fc1, fc2 = parts.child(names.fc1), parts.child(names.fc2)
        weights = (parameter(fc, name) for fc in (fc1, fc2) for name in ("weight", "bias"))
        return ops.mlp(x, *weights, activation=layout.activation)
    if layout.gating is None:
        hidden = _linear(parts, layout, ops, names.fc1, x, layout.activation)
    else:
        hidden = _linear(parts, layout, ops, names.fc1, x)
        if layout.gating == "beside":
            gate, value = _linear(parts, layout, ops, names.gate, x), hidden
        else:
            first, last = hidden.chunk(2, dim=-1)
            gate, value = (first, last) if layout.gating == "first" else (last, first)
        hidden = ops.glu(gate, value, activation=layout.activation)
        del gate, value
    for module in drops:
        hidden = module(hidden)
    if hidden_norm is not None:
        hidden = hidden_norm(hidden)
    return _linear(parts, layout, ops, names.fc2, hidden)


def _linear(
    parts: Parts,
    layout: Layout,
    ops: Any,
    path: str | None,
    x: Tensor,
    activation: str | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """A plain linear with its epilogue; any other module (an adapter, a quantized linear) called as it is."""
    module = parts.child(path)
    if path not in layout.called:
        bias = parameter(module, "bias") if bias is None else bias
        if activation is None and ops is TRITON and backend.get_backend() == "auto":  # what the module itself would do
            return F.linear(x, parameter(module, "weight"), bias)
        return ops.linear(x, parameter(module, "weight"), bias, activation=activation)
    out = module(x) if bias is None else module(x) + bias
    return out if activation is None else _ACTIVATIONS[activation](out)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


def _active(*dropouts: Any) -> Iterator[nn.Module]:
    """The dropouts that drop something now."""
    return (module for module in dropouts if module is not None and module.training and getattr(module, "p", 0))


def _training(drop_path: Any) -> Any:
    return drop_path if drop_path is not None and drop_path.training else None


def _by_sample(drop_path: nn.Module) -> bool:
    """Whether all it does is to multiply each sample by a number that does not depend on the branch: the libraries' own, which
    no one watches or changed."""
    kind = type(drop_path)
    if kind.__module__.partition(".")[0] not in DROP_PATH_PACKAGES or not kind.__name__.endswith("DropPath"):
        return False
    return getattr(vars(kind).get("forward"), "__module__", None) == kind.__module__ and not _watched(drop_path)


def _watched(module: nn.Module) -> bool:
    """Whether somebody has to see what the module itself is given."""
    own = module.__dict__
    return bool("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"])


def _branch(
    parts: Parts, residual: layouts.Residual, drops: tuple[str, ...], branch: Tensor
) -> tuple[Tensor, Tensor | None, bool]:
    """The branch as it enters the sum, the LayerScale still to be applied to it, and whether no module touched it here."""
    owned = True
    for module in _active(*(parts.child(path) for path in drops), parts.child(residual.drop)):
        branch, owned = module(branch), False
    scale = _scale_of(parts, residual.scale)
    drop_path = parts.part(residual.drop_path)
    if drop_path is not None and drop_path.training:
        branch, owned = drop_path(branch if scale is None else branch * scale), False
        scale = None
    return branch, scale, owned


def _scale_of(parts: Parts, path: str | None) -> Any:
    """A LayerScale's one parameter, or the block's own of that name; in replicas of ``DataParallel`` a plain attribute."""
    layer_scale = parts.part(path)
    if layer_scale is None:
        return None if path is None or "." in path or parts.child(path) is not None else attribute(parts.block, path)
    for name in layouts.SCALE_PARAMETERS:
        if name in layer_scale._parameters or name in layer_scale._buffers or name in layer_scale.__dict__:
            return getattr(layer_scale, name)
    raise AttributeError(f"{type(layer_scale).__name__} has none of {', '.join(layouts.SCALE_PARAMETERS)}")


def _may_overwrite(branch: Tensor, *others: Tensor | None) -> bool:
    """Whether a sum may be written over a ``branch`` that nobody else holds: inference, one dtype, nothing traced or mapped."""
    if not may_write() or torch.is_grad_enabled() or type(branch) is not Tensor:
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
