"""``torch.nn.MultiheadAttention``: its packed projection, its masks (True forbids), and itself served as a module.

The fused attention holds no weights, so a call that asks for them (the default, ``need_weights=True``) runs the module's
own forward.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .._checks import MAX_HEAD_DIM

PLAIN_TENSORS = (Tensor, nn.Parameter)
PLAIN_LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)
ARGUMENTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")


@dataclass(frozen=True)
class MultiheadLayout:
    """A ``torch.nn.MultiheadAttention`` that is served as a module of its own. ``kinds``: as in ``parts.Layout``."""

    kinds: tuple[tuple[str, type], ...]
    called: tuple[str, ...] = ()

    def describe(self) -> str:
        return "fused attention (where no weights are asked for)"


@dataclass(frozen=True)
class MultiheadCall:
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    is_causal: bool


def find_layout(module: nn.MultiheadAttention) -> MultiheadLayout | str:
    reason = why_not(module)
    return reason if reason else MultiheadLayout((("out_proj", type(module.out_proj)),))


def why_not(module: Any, path: str = "") -> str | None:
    """Why a module is no multi-head attention that can be served; ``path``: its name, with a blank, for the reason."""
    if type(module) is not nn.MultiheadAttention:
        return f"{path}is a {type(module).__name__}, not torch's MultiheadAttention"
    if not module._qkv_same_embed_dim:
        return f"{path}projects keys and values of other widths than the queries'"
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return f"{path}adds keys and values of its own (add_bias_kv or add_zero_attn)"
    if type(module.out_proj) not in PLAIN_LINEARS:
        return f"{path}out_proj is a {type(module.out_proj).__name__}, not a plain Linear"
    for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight"):
        tensor = module.out_proj.weight if "." in name else getattr(module, name)
        if tensor is not None and type(tensor) not in PLAIN_TENSORS:
            return f"{path}{name} is a {type(tensor).__name__}, not a plain Parameter"
    if module.head_dim > MAX_HEAD_DIM:
        return f"head_dim is {module.head_dim}; the attention kernels serve up to {MAX_HEAD_DIM}"
    return None


def read_call(module: Any, args: tuple, kwargs: dict) -> MultiheadCall | str:
    """What the module was called with, its masks turned to True = attend; or why the fused path does not serve the call."""
    if len(args) > len(ARGUMENTS):
        return f"it was called with {len(args)} positional arguments"
    values = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
    query, key, value = (values.pop(name, None) for name in ARGUMENTS[:3])
    if not all(isinstance(t, Tensor) and t.dim() == 3 and not t.is_nested for t in (query, key, value)):
        return "query, key and value are not three tensors of shape (batch, tokens, channels)"
    if values.pop("need_weights", True):
        return "it was asked for the attention weights"
    masks = values.pop("attn_mask", None), values.pop("key_padding_mask", None)
    is_causal = bool(values.pop("is_causal", False))
    values.pop("average_attn_weights", None)
    if values:
        return f"it was called with {next(iter(values))}"
    if module.dropout and module.training:
        return "dropout of the attention weights is active"
    reason = why_not_given(module, query, key, value)
    if reason is not None:
        return reason
    read = read_masks(*masks, is_causal, module, query, key, tokens_first(module))
    return read if isinstance(read, str) else MultiheadCall(query, key, value, *read)


def why_not_given(module: Any, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why torch's attention refuses queries, keys and values of these shapes and dtypes, which is left to itself; or None."""
    batch = 1 if tokens_first(module) else 0
    if key.shape != value.shape or query.shape[batch] != key.shape[batch]:
        return "queries, keys and values are not of one batch, or keys and values not of one shape"
    if query.shape[2] != module.embed_dim or key.shape[2] != module.embed_dim:
        return f"queries, keys and values do not have {module.embed_dim} channels"
    dtype = module.in_proj_weight.dtype
    if any(t.dtype != dtype for t in (query, key, value)) and not torch.is_autocast_enabled(query.device.type):
        return f"queries, keys and values are not {dtype}, as the weights are"
    return None


def read_masks(
    forbidding: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
    module: Any,
    query: Tensor,
    key: Tensor,
    tokens_first: bool,
) -> tuple[Tensor | None, bool] | str:
    """(attn_mask, is_causal) of the fused attention from torch's masks: (N, M) or (B·heads, N, M), and of keys (B, M).

    Boolean ones forbid where they are True; ``is_causal`` says that ``forbidding`` is the causal mask. Masks that torch
    would refuse, though they broadcast, are left to it.
    """
    heads, (axis, of_batch) = module.num_heads, (0, 1) if tokens_first else (1, 0)
    batch, queries, keys = query.shape[of_batch], query.shape[axis], key.shape[axis]
    shapes = ((queries, keys), (batch * heads, queries, keys)), ((batch, keys),)
    for name, mask, fitting in zip(("attn_mask", "key_padding_mask"), (forbidding, padding), shapes, strict=True):
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.is_nested or mask.dim() not in map(len, fitting):
            return f"it was called with a {name} of an unknown kind"
        if mask.shape not in fitting:
            return f"it was called with {name} {tuple(mask.shape)} for {queries} queries and {keys} keys in a batch of {batch}"
        if mask.dtype not in (torch.bool, torch.float32, query.dtype) and not _autocast_takes(mask, query):
            return f"it was called with a {mask.dtype} {name}"
    if is_causal and forbidding is None:
        return "it was called with is_causal and without the mask that is meant"
    if is_causal and padding is None:
        return None, True
    if forbidding is not None and forbidding.dim() == 3:
        forbidding = forbidding.unflatten(0, (batch, heads))
    if padding is not None:
        padding = padding[:, None, None, :]
    if forbidding is None or padding is None:
        mask = padding if forbidding is None else forbidding
        return mask.logical_not() if mask is not None and mask.dtype == torch.bool else mask, False
    if forbidding.dtype == padding.dtype == torch.bool:
        return (forbidding | padding).logical_not(), False
    return _additive(forbidding) + _additive(padding), False


def _autocast_takes(mask: Tensor, query: Tensor) -> bool:
    return mask.is_floating_point() and torch.is_autocast_enabled(query.device.type)


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(mask, float("-inf"))


def tokens_first(module: Any, present: Tensor | None = None) -> bool:
    """Whether what a module is given is (N, B, C); ``present``: what was a nested tensor is (B, N, C)."""
    return not module.batch_first and present is None


def project(module: Any, ops: Any, query: Tensor, key: Tensor, value: Tensor, tokens_first: bool) -> list[Tensor]:
    """Query, key and value, (B, N, C) or (N, B, C), as (B, heads, N, D): one product where they are one tensor."""
    weight, bias, dim = module.in_proj_weight, module.in_proj_bias, module.embed_dim
    order = (2, 1, 3, 0, 4) if tokens_first else (2, 0, 3, 1, 4)

    def product(x: Tensor, first: int, last: int) -> list[Tensor]:
        rows = slice(first * dim, last * dim)
        parts = (weight, bias) if last - first == 3 else (weight[rows], None if bias is None else bias[rows])
        packed = ops.linear(x, *parts)
        return list(packed.unflatten(2, (last - first, module.num_heads, -1)).permute(order).unbind(0))

    if query is key and key is value:
        return product(query, 0, 3)
    if key is value:
        return [*product(query, 0, 1), *product(key, 1, 3)]
    return [*product(query, 0, 1), *product(key, 1, 2), *product(value, 2, 3)]


def compute(module: Any, ops: Any, call: MultiheadCall) -> tuple[Tensor, None]:
    """(output of the queries' shape, None) as the module's own forward without weights."""
    given = tokens_first(module)
    heads = project(module, ops, call.query, call.key, call.value, given)
    out = ops.attention(*heads, call.attn_mask, is_causal=call.is_causal)
    turned = given or module.training  # the module's own result lies in memory tokens first: dropout after it draws in that order
    out = (out.permute(2, 0, 1, 3) if turned else out.transpose(1, 2)).flatten(2)
    out = ops.linear(out, module.out_proj.weight, module.out_proj.bias)
    return (out.transpose(0, 1) if turned and not given else out), None
