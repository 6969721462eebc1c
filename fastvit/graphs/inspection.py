"""Looks on while a call runs as ever: whether it could be replayed, and which tensors it reads that were there before it.

A replay repeats kernels with the addresses and numbers of the recording. So nothing that is recorded may draw random numbers,
read a value back, compute on another device, or write over what outlives the call.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

SYNCHRONIZES = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero"}
COPIES = {"aten::to", "aten::_to_copy", "aten::copy_"}
PICKS = {"aten::index", "aten::index_put", "aten::index_put_"}


class Inspection(TorchDispatchMode):
    """``reason``: why the call that ran within it cannot be replayed, or None. ``read``: of what the call read and did not make
    itself (weights, buffers and whatever else Python held) storage → (what holds it, the tensor, which may get another)."""

    def __init__(self, device: torch.device, inputs: list[Tensor]):
        super().__init__()
        self.device = device
        self.reason: str | None = None
        self.read: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()
        self._inputs = {_storage(tensor) for tensor in inputs}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while this looks on, and to say so would import the compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        if self.reason is None:
            self.reason = self._why_not(func, args, kwargs, given)
        output = func(*args, **kwargs)
        if self.reason is None:
            self.reason = self._look_at(func, given, list(_tensors(output)))
        return output

    def result(self, tensor: Tensor) -> Tensor:
        """Takes note of a tensor that the call returned, which no operator need have read."""
        if _plain(tensor):
            self._know(tensor, made=False)
        return tensor

    def _why_not(self, func: Any, args: tuple, kwargs: dict[str, Any], given: list[Tensor]) -> str | None:
        name, tags = func._schema.name, func.tags
        if not all(map(_plain, given)):
            return f"it computes with more than plain dense tensors ({name})"
        for tensor in given:
            self._know(tensor, made=name == "aten::lift_fresh")  # lift_fresh: a constant that the call has just written down
        arguments = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
        arguments |= {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        if torch.Tag.nondeterministic_seeded in tags and _draws(arguments):
            return f"it draws random numbers ({name})"
        if name in SYNCHRONIZES or torch.Tag.data_dependent_output in tags or _selects(name, tags, arguments):
            return f"it waits for a value from the device ({name})"
        lasting = self._inputs | self.read.keys()
        written = [arguments.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if any(_storage(tensor) in lasting for tensor in _tensors(written)):
            return f"it writes over a tensor that outlives the call ({name})"
        return None

    def _look_at(self, func: Any, given: list[Tensor], made: list[Tensor]) -> str | None:
        name = func._schema.name
        if not all(map(_plain, made)):
            return f"it computes with more than plain dense tensors ({name})"
        for tensor in made:
            self._know(tensor, made=True)
        copied = [*given, *(made if name in COPIES else [])]
        across = name in COPIES and len({tensor.device for tensor in copied}) > 1
        if name == "aten::lift_fresh" and self.device.type != "cpu" and given[0].device == self.device:
            return "it writes numbers down on the device (torch.tensor), which waits for it"
        for tensor in copied:
            constant = not across and tensor.dim() == 0 and tensor.device.type == "cpu" and _storage(tensor) in self._made
            if tensor.device != self.device and not constant:
                return f"it computes on {tensor.device} as well ({name})"
        return None

    def _know(self, tensor: Tensor, made: bool) -> None:
        storage = _storage(tensor)
        if storage in self._inputs or storage in self.read:
            return
        if made:
            self._made.add(storage)
        elif storage not in self._made:
            self.read[storage] = tensor.data, tensor  # detach() would refer to it, which torch.utils.swap_tensors refuses


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_nested and tensor.layout is torch.strided


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in _pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _draws(arguments: dict[str, Any]) -> bool:
    """Whether an operator that may draw random numbers does: dropout that drops nothing does not."""
    return not (arguments.get("dropout_p") == 0 or arguments.get("p") == 0 or arguments.get("train") is False)


def _selects(name: str, tags: list[Any], arguments: dict[str, Any]) -> bool:
    """Whether the size of the result, or of what is written, depends on values."""
    if name in PICKS:  # by numbers it does not, by a mask it does
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(arguments.get("indices")))
    return torch.Tag.dynamic_output_shape in tags
