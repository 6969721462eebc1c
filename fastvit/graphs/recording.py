"""One call, recorded on inputs of its own: inputs are copied in; results are copied out: the next replay writes over them."""

import threading
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor

from .recorder import RECORDERS
from .signature import like, mapped


class Shared:
    """What the recordings of one model share: a lock, and a recorder (and so a pool of memory) per device."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._recorders: dict[torch.device, Any] = {}

    def __reduce__(self) -> tuple:
        return (Shared, ())  # copies begin with nothing

    def recorder(self, device: torch.device) -> Any:
        if device not in self._recorders:
            self._recorders[device] = RECORDERS[device.type](device)
        return self._recorders[device]


class Recording:
    """One recorded call. ``lasting``: storages that are neither its inputs' nor its own."""

    def __init__(
        self,
        recorder: Any,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        lasting: Container[int],
    ):
        self.recorder = recorder
        made = [like(tensor) for tensor in tensors]
        self.inputs, self.once = [static for static, _ in made], [once for _, once in made]
        places = {id(tensor): index for index, tensor in enumerate(tensors)}

        def static(tensor: Tensor) -> Tensor:
            return self.inputs[places[id(tensor)]]

        args, kwargs = mapped(args, static), mapped(kwargs, static)
        with recorder.turn(self.inputs):
            self._copy_in(tensors)
            self.replay, self.output = recorder.record(lambda: forward(*args, **kwargs))
        given = {id(tensor): index for index, tensor in enumerate(self.inputs)}
        self.given: dict[int, int] = {}  # of the tensors in the output, those that are an input
        self.fresh: set[int] = set()  # and those that a replay writes over

        def sort(tensor: Tensor) -> Tensor:
            if id(tensor) in given:
                self.given[id(tensor)] = given[id(tensor)]
            elif tensor.untyped_storage()._cdata not in lasting:
                self.fresh.add(id(tensor))
            return tensor

        mapped(self.output, sort)

    def _copy_in(self, tensors: list[Tensor]) -> None:
        for static, once, tensor in zip(self.inputs, self.once, tensors, strict=True):
            once(static).copy_(once(tensor))

    def run(self, tensors: list[Tensor], still_holds: Callable[[], bool] | None = None) -> tuple[bool, Any]:
        """(whether it holds, the output for these inputs in tensors of its own). ``still_holds`` is asked while the device is at
        work: a replay that should not have been is harmless, as it reads what is kept for it and writes what is its own."""
        copies: dict[int, Tensor] = {}

        def result(tensor: Tensor) -> Tensor:
            key = id(tensor)
            if key in self.given:
                return tensors[self.given[key]]
            if key not in self.fresh:
                return tensor
            if key not in copies:
                copies[key] = tensor.clone()
            return copies[key]

        with self.recorder.turn(self.inputs):
            self._copy_in(tensors)
            self.replay()
            holds = still_holds is None or still_holds()
            return holds, mapped(self.output, result) if holds else None
