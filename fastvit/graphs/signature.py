"""What decides a call: its arguments, tensors by all but their values, and the settings in force; and containers of tensors."""

import copy
import dataclasses
import enum
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import get_backend

_CONSTANTS = (bool, int, str, bytes, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, range)


class Unknown(Exception):
    """A value that has no place in a signature; the message says what it is."""


def settings(device_type: str) -> tuple:
    """What decides beside the arguments: gradients, autocast, backends and precisions, all as this thread has them."""
    matmul = torch.backends.cuda.matmul
    return (
        get_backend(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        torch.get_default_dtype(),
        matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_accumulation,
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch._C._get_cudnn_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


def read(value: Any, key: list[Any], tensors: list[Tensor]) -> None:
    """Appends what ``value`` is to ``key``, and the tensors in it to ``tensors``, each once. Raises ``Unknown``."""
    kind = type(value)
    if isinstance(value, Tensor):
        for index, other in enumerate(tensors):
            if other is value:
                key.append(index)
                return
        if kind not in (Tensor, nn.Parameter) or value.is_nested or value.layout is not torch.strided:
            raise Unknown(f"is a {kind.__name__} other than a plain dense tensor")
        key += (kind, value.shape, value.stride(), value.dtype, value.device)
        tensors.append(value)
    elif kind is float:
        key += (kind, value.hex())  # 0.0 == -0.0, and NaN is not NaN
    elif kind in _CONSTANTS or isinstance(value, enum.Enum):
        key += (kind, value)
    else:
        names, values, _ = _contents(value)
        key += (kind, names)
        for inner in values:
            read(inner, key, tensors)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it exchanged for ``function`` of it. Raises ``Unknown``."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in _CONSTANTS or isinstance(value, float | enum.Enum):
        return value
    _, values, build = _contents(value)
    return build([mapped(inner, function) for inner in values])


def _contents(value: Any) -> tuple[tuple, list[Any], Callable[[list[Any]], Any]]:
    """(names, values, what builds the same kind of container of other values)."""
    kind = type(value)
    if kind in (tuple, list, torch.Size):
        return (len(value),), list(value), kind
    if isinstance(value, tuple) and hasattr(kind, "_make"):
        return (len(value),), list(value), kind._make
    if kind in (dict, OrderedDict) or (isinstance(value, dict) and dataclasses.is_dataclass(kind)):
        if all(type(name) in _CONSTANTS for name in value):
            # transformers' outputs, which are dataclasses as well, fill what is not given with None
            return (
                tuple(value),
                list(value.values()),
                lambda values: (
                    kind(**dict(zip(value, values, strict=True)))
                    if (dataclasses.is_dataclass(kind))
                    else kind(zip(value, values, strict=True))
                ),
            )
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value)]
        names = tuple(dict.fromkeys((*fields, *getattr(value, "__dict__", ()))))  # and what was set on it beside its fields
        return names, [getattr(value, name) for name in names], lambda values: _replaced(value, names, values)
    raise Unknown(f"is or holds a {kind.__name__}, which could change unseen")


def _replaced(value: Any, names: tuple[str, ...], values: list[Any]) -> Any:
    made = copy.copy(value)
    for name, inner in zip(names, values, strict=True):
        object.__setattr__(made, name, inner)  # frozen ones too
    return made


def like(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A new tensor of the same shape, strides, dtype and device, and what makes a view of it, or of ``tensor``, whose elements
    have each an address of their own, so that it can be written. Raises ``Unknown``."""
    repeated = [d for d, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)) if size > 1 and stride == 0]

    def once(full: Tensor) -> Tensor:
        for dim in repeated:
            full = full.narrow(dim, 0, 1)
        return full

    base = once(tensor)
    if torch._debug_has_internal_overlap(base):  # type: ignore[attr-defined]
        raise Unknown("overlaps itself in memory")
    made = torch.empty_strided(base.shape, base.stride(), dtype=tensor.dtype, device=tensor.device)
    return (made.expand(tensor.shape) if repeated else made), once
