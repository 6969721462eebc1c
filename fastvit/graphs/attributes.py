"""What the attributes of an object say, and whether they still say it: those of a graphed module itself, and of configs.

Numbers, strings and small containers of them are compared by value, all else by identity: a function that was set on a model, or
a dtype. Tensors are gathered in ``tensors`` instead: one that ``forward`` leaves behind at every call decides nothing.
"""

import marshal
import operator
from collections import OrderedDict
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (list, tuple, dict, set, frozenset, OrderedDict, torch.Size)
_TABLES = frozenset(nn.Module().__dict__)  # tensors, children, hooks and the mode: others look at them
OURS = "_fastvit"
LARGEST = 2048  # bytes of numbers and strings
MOST = 32  # entries, where not all are numbers and strings
DEEPEST = 2
FORMAT = 2  # of marshal: later ones write also how often an object is referred to


class Attributes:
    """What ``own``, the ``__dict__`` of an object, says. ``tensors``: those in it, in order."""

    def __init__(self, own: dict[str, Any]):
        self.names = list(own)
        self.mine = [name not in _TABLES and not name.startswith(OURS) for name in own]
        self.values = list(compress(own.values(), self.mine))
        self.tensors: list[Tensor] = []
        said = [_said(value, self.tensors) for value in self.values]
        self.said = list(zip(compress(own, self.mine), said, strict=True))
        containers = [(value, kept) for value, kept in zip(self.values, said, strict=True) if type(value) in _CONTAINERS]
        self.plain = [value for value, kept in containers if type(kept) is bytes]
        self.mixed = [value for value, kept in containers if type(kept) is tuple]
        self.inside = self._inside()

    def changed(self, own: dict[str, Any]) -> bool:
        """Whether ``own`` says something else now. Only what has become another object is read again, and containers."""
        values = compress(own.values(), self.mine)
        if list(own) == self.names and all(map(operator.is_, values, self.values)) and self._inside() == self.inside:
            return False
        now = Attributes(own)
        if now.said != self.said:
            return True
        self.__dict__ = now.__dict__
        return False

    def let_go(self) -> None:
        """Refers to no value any more, tensors among them, until it is asked again."""
        self.names, self.values, self.tensors, self.plain, self.mixed, self.inside = [], [], [], [], [], None

    def _inside(self) -> Any:
        """What the containers hold, which may change in place."""
        try:
            written = marshal.dumps(self.plain, FORMAT) if self.plain else b""
        except ValueError:  # by now there is more than numbers and strings
            return None
        return written, [_said(value) for value in self.mixed]


class _Same:
    """Equal where it is the same object."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _said(value: Any, tensors: list[Tensor] | None = None, depth: int = DEEPEST) -> Any:
    """What is equal while ``value`` says the same; tensors are gathered in ``tensors``, if given."""
    kind = type(value)
    if isinstance(value, Tensor) and tensors is not None:
        tensors.append(value)
        return Tensor
    if kind in _NUMBERS or kind in _CONTAINERS:
        try:
            written = marshal.dumps(value, FORMAT)
        except ValueError:  # it holds something else
            if depth and len(value) <= MOST:
                inner = [*value, *value.values()] if isinstance(value, dict) else value
                return (kind, *(_said(each, tensors, depth - 1) for each in inner))
        else:
            if len(written) <= LARGEST or kind in _NUMBERS:
                return written
    return _Same(value)
