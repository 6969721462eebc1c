"""Input checks for the functional operators: every message names the argument, what it was, and what was expected."""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of any other, no operator computes
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu")


MAX_REMEMBERED = 4096

_passed: set[tuple] = set()


def remembered(check: Callable[..., None]) -> Callable[..., None]:
    """Lets a check pass without another look what it has passed before: plain tensors of the same shapes, dtypes and devices
    beside equal numbers and strings. The check may look at nothing else, and is called with positional arguments."""

    @functools.wraps(check)
    def checked(*args: Any) -> None:
        if torch.compiler.is_compiling():
            return check(*args)
        signature: list[Any] = [check]
        for arg in args:
            kind = arg.__class__
            if kind is Tensor or kind is nn.Parameter:
                signature += (arg.shape, arg.dtype, arg.device)
            elif kind in _REMEMBERED_KINDS:
                signature += (kind, arg)  # True == 1 == 1.0
            else:
                return check(*args)
        key = tuple(signature)
        if key in _passed:
            return None
        check(*args)
        if len(_passed) >= MAX_REMEMBERED:
            _passed.clear()
        _passed.add(key)

    return checked


_REMEMBERED_KINDS = (type(None), bool, int, float, str)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def check_tensors(like: str, required: Sequence[str] = (), **tensors: Tensor | None) -> None:
    """Every tensor is a floating-point tensor on the device of the one named ``like``; it and ``required`` are not None."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None and name != like and name not in required:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}; expected a torch.Tensor")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} of shape {_shape(tensor)} has dtype {tensor.dtype}; expected a floating-point tensor"
                " (float32, bfloat16 or float16)"
            )
        if name == like:
            device = tensor.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{name} of shape {_shape(tensor)} is on {tensor.device} while {like} is on {device}; expected one device"
            )


def check_same_dtype(like: str, **tensors: Tensor | None) -> None:
    dtype = tensors[like].dtype  # type: ignore[union-attr]
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(
                f"{name} of shape {_shape(tensor)} has dtype {tensor.dtype} while {like} has {dtype}; expected one dtype"
            )


def check_affine(like: str, **tensors: Tensor | None) -> None:
    """Norm parameters may be in the input's dtype or in float32 beside a lower-precision input."""
    dtype = tensors[like].dtype  # type: ignore[union-attr]
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (dtype, torch.float32):
            raise TypeError(
                f"{name} of shape {_shape(tensor)} has dtype {tensor.dtype} while {like} has {dtype};"
                f" expected {dtype} or torch.float32"
            )


def check_shape(name: str, tensor: Tensor | None, expected: Sequence[int], why: str, of: Tensor | None = None) -> None:
    """``why`` ends the message, followed by the shape of ``of``; nothing is formatted unless something is wrong, which is
    faster and lets torch.compile trace the check with symbolic sizes."""
    if tensor is not None and tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name} has shape {_shape(tensor)}; expected {tuple(expected)}: {why}{'' if of is None else ' ' + _shape(of)}"
        )


def check_rank(name: str, tensor: Tensor, rank: int, layout: str) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} has shape {_shape(tensor)}; expected {rank} dimensions {layout}")


def check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)) and not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; expected a number")


def check_eps(eps: Any) -> None:
    check_number("eps", eps)
    if not eps >= 0:  # nan too
        raise ValueError(f"eps is {eps!r}; expected a number of at least 0")


def check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)} or None")


@remembered
def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    is_causal: Any,
    scale: Any,
) -> None:
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal is {is_causal!r}; expected True or False")
    if scale is not None:
        check_number("scale", scale)
    mask_is_bool = isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool
    floats = None if mask_is_bool else attn_mask
    required = ("key", "value")
    check_tensors("query", required, query=query, key=key, value=value, attn_mask=floats, rel_h=rel_h, rel_w=rel_w)
    if mask_is_bool and attn_mask.device != query.device:  # type: ignore[union-attr]
        raise ValueError(
            f"attn_mask of shape {_shape(attn_mask)} is on {attn_mask.device} while query is on {query.device};"  # type: ignore[arg-type,union-attr]
            " expected one device"
        )
    check_same_dtype("query", query=query, key=key, value=value)
    check_rank("query", query, 4, "(batch, heads, queries, head_dim)")
    check_rank("key", key, 4, "(batch, key heads, keys, head_dim)")
    check_rank("value", value, 4, "(batch, key heads, keys, value head_dim)")
    batch, heads, queries, dim = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    check_shape("key", key, (batch, key_heads, keys, dim), "query has shape", query)
    check_shape("value", value, (batch, key_heads, keys, value.shape[3]), "key has shape", key)
    if key_heads == 0 or heads % key_heads:
        raise ValueError(f"key has shape {_shape(key)}; expected a number of heads that divides query's {heads}")
    for name, tensor in (("query", query), ("value", value)):
        if not 1 <= tensor.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has shape {_shape(tensor)}; expected a head_dim from 1 to {MAX_HEAD_DIM}")
    if queries < 1 or keys < 1:
        raise ValueError(f"query has shape {_shape(query)} and key {_shape(key)}; expected at least one query and one key")
    if attn_mask is not None:
        full = (batch, heads, queries, keys)
        padded = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
        if attn_mask.dim() > 4 or any(have not in (1, want) for have, want in zip(padded, full, strict=False)):
            raise ValueError(
                f"attn_mask has shape {_shape(attn_mask)}; expected one that broadcasts to (batch, heads, queries, keys) = {full}"
            )
    if (rel_h is None) != (rel_w is None):
        missing = "rel_h" if rel_h is None else "rel_w"
        raise ValueError(f"{missing} is None; expected rel_h and rel_w together or neither")
    if rel_h is not None and rel_w is not None:
        for name, tensor in (("rel_h", rel_h), ("rel_w", rel_w)):
            check_rank(name, tensor, 4, "(batch, heads, queries, key rows or columns)")
            check_shape(name, tensor, (batch, heads, queries, tensor.shape[3]), "query has shape", query)
        if rel_h.shape[3] * rel_w.shape[3] != keys:
            raise ValueError(
                f"rel_h has shape {_shape(rel_h)} and rel_w {_shape(rel_w)}; expected key rows × key columns = {keys} keys"
            )


@remembered
def check_image_attention(
    qkv: Tensor,
    num_heads: Any,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    window_size: Any,
    pad_qkv: Tensor | None,
    scale: Any,
) -> None:
    for name, value, least in (("num_heads", num_heads, 1), ("window_size", window_size, 0)):
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; expected an integer")
        if value < least:
            raise ValueError(f"{name} is {value!r}; expected at least {least}")
    if scale is not None:
        check_number("scale", scale)
    tensors = {"qkv": qkv, "rel_pos_h": rel_pos_h, "rel_pos_w": rel_pos_w, "pad_qkv": pad_qkv}
    check_tensors("qkv", (), **tensors)
    check_same_dtype("qkv", **tensors)
    check_rank("qkv", qkv, 4, "(batch, height, width, 3 · channels)")
    _, height, width, channels = qkv.shape
    if height < 1 or width < 1:
        raise ValueError(f"qkv has shape {_shape(qkv)}; expected at least one row and one column of tokens")
    if channels == 0 or channels % (3 * num_heads):
        raise ValueError(f"qkv has shape {_shape(qkv)}; expected 3 · num_heads = {3 * num_heads} to divide its channels")
    dim = channels // (3 * num_heads)
    if dim > MAX_HEAD_DIM:
        raise ValueError(
            f"qkv has shape {_shape(qkv)}, a head_dim of {dim} with {num_heads} heads; expected one from 1 to {MAX_HEAD_DIM}"
        )
    check_shape("pad_qkv", pad_qkv, (channels,), "qkv has shape", qkv)
    if (rel_pos_h is None) != (rel_pos_w is None):
        missing = "rel_pos_h" if rel_pos_h is None else "rel_pos_w"
        raise ValueError(f"{missing} is None; expected rel_pos_h and rel_pos_w together or neither")
    for name, table in (("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w)):
        if table is not None:
            check_rank(name, table, 2, "(2·size − 1, head_dim)")
            check_shape(name, table, (max(1, table.shape[0]), dim), "the head_dim of qkv with shape", qkv)


@remembered
def check_layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: Any, statistics: str, name: str = "input"
) -> None:
    check_eps(eps)
    tensors = {name: input, "weight": weight, "bias": bias}
    check_tensors(name, (), **tensors)
    check_affine(name, **tensors)
    if statistics not in ("token", "image"):
        raise ValueError(f"statistics is {statistics!r}; expected 'token' or 'image'")
    if statistics == "image":
        check_rank("input", input, 3, "(batch, tokens, channels) for statistics='image'")
    if input.dim() < 1 or input.shape[-1] == 0:
        raise ValueError(f"{name} has shape {_shape(input)}; expected at least one channel in the last dimension")
    channels = (input.shape[-1],)
    check_shape("weight", weight, channels, f"{name} has shape", input)
    check_shape("bias", bias, channels, f"{name} has shape", input)


@remembered
def check_add_layer_norm(
    residual: Tensor, branch: Tensor, weight: Tensor | None, bias: Tensor | None, eps: Any, layer_scale: Tensor | None
) -> None:
    check_tensors("residual", ("branch",), residual=residual, branch=branch, layer_scale=layer_scale)
    check_layer_norm(residual, weight, bias, eps, "token", "residual")
    if branch.dtype != residual.dtype and torch.float32 not in (branch.dtype, residual.dtype):
        raise TypeError(
            f"branch of shape {_shape(branch)} has dtype {branch.dtype} while residual has {residual.dtype};"
            " expected one dtype, or torch.float32 for one of them"
        )
    check_shape("branch", branch, residual.shape, "the shape of residual")
    check_shape("layer_scale", layer_scale, (residual.shape[-1],), "residual has shape", residual)
    if layer_scale is not None and layer_scale.dtype not in (residual.dtype, branch.dtype, torch.float32):
        raise TypeError(
            f"layer_scale of shape {_shape(layer_scale)} has dtype {layer_scale.dtype} while residual has {residual.dtype}"
            f" and branch {branch.dtype}; expected one of theirs or torch.float32"
        )


@remembered
def check_linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, prefix: str = "") -> None:
    names = {"input": input, f"{prefix}weight": weight, f"{prefix}bias": bias}
    check_activation(activation)
    check_tensors("input", (f"{prefix}weight",), **names)
    check_same_dtype("input", **names)
    check_rank(f"{prefix}weight", weight, 2, "(out features, in features)")
    if input.dim() < 1 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input has shape {_shape(input)}; expected {weight.shape[1]} channels last,"
            f" as {prefix}weight has shape {_shape(weight)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"{prefix}weight has shape {_shape(weight)}; expected at least one feature on either side")
    check_shape(f"{prefix}bias", bias, (weight.shape[0],), f"{prefix}weight has shape", weight)


@remembered
def check_mlp(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None,
) -> None:
    check_linear(input, fc1_weight, fc1_bias, activation, "fc1_")
    names = {"input": input, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    check_tensors("input", ("fc2_weight",), **names)
    check_same_dtype("input", **names)
    check_rank("fc2_weight", fc2_weight, 2, "(out features, hidden features)")
    out_features = fc2_weight.shape[0]
    if out_features == 0:
        raise ValueError(f"fc2_weight has shape {_shape(fc2_weight)}; expected at least one output feature")
    check_shape("fc2_weight", fc2_weight, (out_features, fc1_weight.shape[0]), "fc1_weight's outputs are its inputs")
    check_shape("fc2_bias", fc2_bias, (out_features,), "one value an output of fc2_weight")


GLU_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "sigmoid")


@remembered
def check_glu(gate: Tensor, value: Tensor, activation: str) -> None:
    if activation not in GLU_ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(GLU_ACTIVATIONS)}")
    check_tensors("gate", ("value",), gate=gate, value=value)
    check_same_dtype("gate", gate=gate, value=value)
    if gate.dim() < 1 or gate.shape[-1] == 0:
        raise ValueError(f"gate has shape {_shape(gate)}; expected at least one channel in the last dimension")
    check_shape("value", value, gate.shape, "the shape of gate")


def check_constant(**tables: Tensor | None) -> None:
    """To be called at every call, after ``check_qk_norm_rope``: whether a gradient is wanted is no part of a signature."""
    if not torch.is_grad_enabled():
        return
    for name, table in tables.items():
        if table is not None and table.requires_grad:
            raise ValueError(
                f"{name} of shape {_shape(table)} requires a gradient; expected a constant: qk_norm_rope is not"
                f" differentiable in its tables (use {name}.detach(), or fastvit.reference)"
            )


def _check_tables(query: Tensor, cos: Tensor, sin: Tensor) -> None:
    batch, _, tokens, dim = query.shape
    for name, table in (("cos", cos), ("sin", sin)):
        lead = tuple(table.shape[:-2])
        fits = 2 <= table.dim() <= 4 and lead in ((), (1,), (batch,), (1, 1), (batch, 1))
        if not fits or table.shape[-1] != dim or not 1 <= table.shape[-2] <= tokens:
            raise ValueError(
                f"{name} has shape {_shape(table)}; expected (T, D), (B or 1, T, D) or (B or 1, 1, T, D) with 1 ≤ T ≤ tokens:"
                f" query has shape {_shape(query)}"
            )
    check_shape("sin", sin, cos.shape, "the shape of cos")
    if dim % 2:
        raise ValueError(f"query has shape {_shape(query)}; expected an even head_dim for rotary positions")


@remembered
def check_qk_norm_rope(
    query: Tensor,
    key: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: Any,
    norm: str | None,
    eps: Any,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    key_weight: Tensor | None,
    key_bias: Tensor | None,
) -> None:
    params = {"query_weight": query_weight, "query_bias": query_bias, "key_weight": key_weight, "key_bias": key_bias}
    if not isinstance(interleaved, bool):
        raise TypeError(f"interleaved is {interleaved!r}; expected True or False")
    if norm not in (None, "layer", "rms"):
        raise ValueError(f"norm is {norm!r}; expected 'layer', 'rms' or None")
    check_eps(eps)
    check_tensors("query", ("key",), query=query, key=key, cos=cos, sin=sin, **params)
    check_same_dtype("query", query=query, key=key)
    check_affine("query", query=query, **params)
    check_rank("query", query, 4, "(batch, heads, tokens, head_dim)")
    check_rank("key", key, 4, "(batch, key heads, tokens, head_dim)")
    batch, heads, tokens, dim = query.shape
    check_shape("key", key, (batch, key.shape[1], tokens, dim), "query has shape", query)
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"query has shape {_shape(query)}; expected a head_dim from 1 to {MAX_HEAD_DIM}")
    if heads < 1 or key.shape[1] < 1 or tokens < 1:
        raise ValueError(f"query has shape {_shape(query)} and key {_shape(key)}; expected at least one head and one token")
    if (cos is None) != (sin is None):
        raise ValueError(f"{'cos' if cos is None else 'sin'} is None; expected cos and sin together or neither")
    if cos is None and norm is None:
        raise ValueError("cos, sin and norm are None; expected rotary positions, a norm, or both")
    if cos is not None and sin is not None:
        _check_tables(query, cos, sin)
    for name, parameter in params.items():
        if parameter is not None and (norm is None or (norm == "rms" and name.endswith("bias"))):
            needed = "'layer'" if name.endswith("bias") else "'layer' or 'rms'"
            raise ValueError(
                f"{name} of shape {_shape(parameter)} is given and norm is {norm!r}; expected norm {needed} beside it"
            )
        check_shape(name, parameter, (dim,), "query has shape", query)
