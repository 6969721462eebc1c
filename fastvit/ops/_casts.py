"""Parameters in the dtype that autocast computes in: cast in one launch, and once as long as a graph keeps the casts.

Autocast's own cache is not to be looked into from Python; the rules here are its. A cast serves again within the outermost
``torch.autocast`` it was made in, unless caching is switched off, and nothing but graphs that need it for backward keeps it
(vectors, which are small, stay); leaves that want gradients alone are kept.
A parameter that was written to or given other memory is cast anew.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Cast(NamedTuple):
    parameter: weakref.ref
    cast: Callable[[], Tensor | None]
    memory: int  # the parameter's address and version when it was cast
    version: int
    region: Any


_casts: dict[tuple[int, torch.dtype], _Cast] = {}
_probes: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}


def _region(like: Tensor, dtype: torch.dtype) -> Any:
    """An object that is another one outside of the outermost autocast now in force: the node by which autocast has cast a
    leaf of ours, which it casts once."""
    key = like.device, dtype
    if key not in _probes:
        of: dict[str, Any] = {"device": like.device, "dtype": torch.float32}  # which is what autocast casts
        _probes[key] = torch.empty(0, 1, **of), torch.zeros(1, 1, **of).requires_grad_()
    with torch.enable_grad():
        return torch.mm(*_probes[key]).grad_fn.next_functions[1][0]  # type: ignore[union-attr]


def lowered(tensors: list[Any], places: list[int], dtype: torch.dtype) -> list[Any]:
    """The list with the tensors at these places, float32, in ``dtype``; None and what is of ``dtype`` stays. To be called
    under autocast, recording no gradients."""
    out, missing = list(tensors), []
    caching = torch.is_autocast_cache_enabled()
    region = _region(tensors[0], dtype) if caching else None
    for place in places:
        tensor = tensors[place]
        if tensor is None or tensor.dtype == dtype:
            continue
        known = _casts.get((id(tensor), dtype)) if caching and _is_kept(tensor) else None
        cast = known.cast() if known is not None and known.parameter() is tensor and known.region is region else None
        if cast is not None and (known.memory, known.version) == (tensor.data_ptr(), tensor._version):  # type: ignore[union-attr]
            out[place] = cast
        else:
            out[place] = torch.empty_like(tensor, dtype=dtype)
            missing.append(place)
    if missing:
        torch._foreach_copy_([out[place] for place in missing], [tensors[place] for place in missing])
    for place in missing if caching else ():
        tensor = tensors[place]
        if not _is_kept(tensor):
            continue
        key = id(tensor), dtype
        parameter = weakref.ref(tensor, lambda gone, key=key: _forget(key, gone))  # type: ignore[misc]
        kept = weakref.ref(out[place]) if tensor.dim() > 1 else lambda cast=out[place]: cast  # type: ignore[misc]
        _casts[key] = _Cast(parameter, kept, tensor.data_ptr(), tensor._version, region)
    return out


def _is_kept(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor.is_leaf and not tensor._is_view()


def _forget(key: tuple[int, torch.dtype], gone: weakref.ref) -> None:
    if key in _casts and _casts[key].parameter is gone:
        del _casts[key]
