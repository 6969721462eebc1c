"""What a graphed module carries: its recordings by signature, and what becomes of a call.

A signature that is new runs as ever; one that comes again is looked on at, until two runs of it have read the same tensors: the
first may make what later ones keep. The next call of it is recorded, and those after it are replayed. With all places taken,
another one is recorded once one of them has not been replayed for long: where more signatures come in turn than there are places,
recording each anew would cost more than it saves.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .inspection import Inspection
from .recorder import RECORDERS
from .recording import Recording, Shared
from .signature import Unknown, mapped, read, settings
from .watch import Reads, Watch

MAX_RECORDINGS = 16  # a module
PATIENCE = 1000  # calls without a replay after which a recording makes room for another signature's
MAX_LOOKS = 5  # a signature
MAX_SIGNATURES = 512  # a module, unrecorded ones too
REPLAYED = "its last call was replayed"
NEW = "its signature is new, and recorded when it comes for the fourth time"
GRADIENTS = "gradients are recorded for a tensor that is no parameter of it"
CHANGED = "since the call before, a child, a weight, a function, a setting or what was made of a weight has become another one"
WRITTEN = "since it was recorded, a buffer that it reads was written over: it is for this call to say what it should hold"

_thread = threading.local()


def inside() -> bool:
    """Whether a recording, or a run that is looked on at, is under way in this thread: modules within it are part of that."""
    return getattr(_thread, "inside", False)


@dataclass
class _Entry:
    """One signature. ``again``: it came more than once; ``looks``: how many of its runs were looked on at; ``read``: what the
    last of these read beside its inputs, by storage: kept from being freed, and its address from being given to others;
    ``reads``: what of that is looked at before a replay, once it is settled that it may be recorded; ``refused``: why it is not;
    ``used``: the number of the call that replayed it last."""

    again: bool = False
    looks: int = 0
    read: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    reads: Reads | None = None
    refused: str | None = None
    recording: Recording | None = None
    used: int = 0


class Graphs:
    """What a graphed module carries. ``outcome``: of its last call, as a sentence; empty before the first."""

    def __init__(self, shared: Shared):
        self.shared = shared
        self.outcome = ""
        self.watch: Watch | None = None
        self.calls = 0
        self.entries: dict[Hashable, _Entry] = {}  # those that came last, unless they were replayed, at the end

    def __reduce__(self) -> tuple:
        return (Graphs, (self.shared,))

    @property
    def recordings(self) -> list[_Entry]:
        return [entry for entry in self.entries.values() if entry.recording is not None]

    def forget(self) -> None:
        """Gives up all recordings, and their memory."""
        with self.shared.lock:
            self.entries.clear()
            self.watch = None

    def call(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """``forward(module, *args, **kwargs)``, replayed where it was recorded."""
        run, entry = functools.partial(forward, module), None
        tensors: list[Tensor] = []
        key, reason = _signature(module, args, kwargs, tensors)
        if reason is None:
            with self.shared.lock:
                holds, output = self._at_once(key, module, tensors)
                if holds:
                    return output
                changed, watch = self._look_at(module)
                reason = self._why_not_now(watch, tensors)
                if reason is None:
                    entry = self._entry(key)
                    if entry.reads is not None and entry.reads.replaced(watch):
                        self.entries[key] = entry = _Entry()
                        changed = True
                    reason = self._why_no_recording(entry, module, run, args, kwargs, tensors)
                    reason, loose = CHANGED if changed else reason, watch.loose()
                    if reason is None and entry.recording is not None:
                        entry.used, self.outcome = self.calls, REPLAYED
                        return entry.recording.run(tensors)[1]
        if entry is None or not entry.again or entry.reads is not None or entry.refused is not None:
            self.outcome = f"its last call ran without a graph: {reason}"
            self._let_go()
            return run(*args, **kwargs)
        inspection = Inspection(tensors[0].device, tensors)
        with _alone(), inspection:
            output = _uncached(run)(*args, **kwargs)
        with self.shared.lock:
            self._take_in(entry, watch, loose, inspection, _why_opaque(output, inspection))
            self.outcome = f"its last call ran without a graph: {entry.refused or reason}"
        return output

    def _take_in(self, entry: _Entry, watch: Watch, loose: list[Tensor], inspection: Inspection, reason: str | None) -> None:
        """What a run that was looked on at tells of its signature; ``reason``: why it cannot be recorded, or None."""
        settled = reason is None and entry.looks > 0 and inspection.read.keys() == entry.read.keys()
        entry.reads = Reads(watch, loose, inspection.read) if settled else None
        entry.looks, entry.read = entry.looks + 1, inspection.read
        if reason is None and entry.reads is None and entry.looks == MAX_LOOKS:
            reason = "every call reads other tensors, which calls before it left behind"
        entry.refused = reason
        if reason is not None:
            entry.read = {}
            self._let_go()

    def _let_go(self) -> None:
        """Frees what the last call left behind on the module as soon as the next one leaves something else there."""
        with self.shared.lock:
            if self.watch is not None:
                self.watch.attributes.let_go()

    def _at_once(self, key: Hashable, module: nn.Module, tensors: list[Tensor]) -> tuple[bool, Any]:
        """(whether the call was replayed, its output): what has not changed up to the last call has hardly changed since, so the
        module is looked at while the device is at work."""
        entry, watch = self.entries.get(key), self.watch
        reads = None if entry is None else entry.reads
        if entry is None or entry.recording is None or reads is None or watch is None or self.outcome is not REPLAYED:
            return False, None

        def still_holds() -> bool:
            if watch.replaced(module) or reads.replaced(watch) or reads.written():
                return False
            return (self._why_not_now(watch, tensors) or _why_gradients(entry.read)) is None

        holds, output = entry.recording.run(tensors, still_holds)
        if holds:
            self.calls += 1
            entry.used = self.calls
        return holds, output

    def _look_at(self, module: nn.Module) -> tuple[bool, Watch]:
        """(whether the module has become another one, what it is now); recordings of what it was are forgotten."""
        watch = self.watch
        changed = watch is not None and watch.replaced(module)
        if changed:
            self.forget()
        if watch is None or changed:
            watch = self.watch = Watch(module)
        return changed, watch

    def _why_not_now(self, watch: Watch, tensors: list[Tensor]) -> str | None:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *watch.tensors)):
            return "gradients are recorded: call it under torch.no_grad() or torch.inference_mode()"
        return watch.why_not_now()

    def _entry(self, key: Hashable) -> _Entry:
        self.calls += 1
        entry = self.entries.pop(key, None)
        if entry is None:
            entry = _Entry()
        else:
            entry.again = True
        if len(self.entries) >= MAX_SIGNATURES:
            del self.entries[next(key for key, entry in self.entries.items() if entry.recording is None)]
        self.entries[key] = entry
        return entry

    def _why_no_recording(
        self, entry: _Entry, module: nn.Module, run: Callable, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> str | None:
        """Why a signature has no recording, or None; one that comes again is given one."""
        reads = entry.reads
        if entry.refused is not None or reads is None:
            return entry.refused or NEW
        if entry.recording is not None:
            return _why_gradients(entry.read) or (WRITTEN if reads.written_anew() else None)
        if len(self.recordings) >= MAX_RECORDINGS:
            oldest = min(self.recordings, key=lambda entry: entry.used)
            if self.calls - oldest.used < PATIENCE:
                return f"{MAX_RECORDINGS} other signatures are recorded, and in use"
            oldest.recording = None
        recorder = self.shared.recorder(tensors[0].device)
        try:
            with _alone():
                entry.recording = Recording(recorder, _uncached(run), args, kwargs, tensors, entry.read)
            reads.written_anew()
        except Unknown as error:
            entry.refused = f"one of its arguments or results {error}"
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            entry.refused = f"it could not be recorded ({type(error).__name__}: {first_line})"
            warnings.warn(f"{type(module).__name__} runs without a CUDA graph: {entry.refused}", stacklevel=2)
        return entry.refused


def _why_gradients(read: dict[int, tuple[Tensor, Tensor]]) -> str | None:
    """Why a call must not be replayed: what it reads, and is no parameter of the module, wants a gradient, maybe only by now."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for _, tensor in read.values())
    return GRADIENTS if wanted else None


@contextmanager
def _alone() -> Iterator[None]:
    """Modules inside are not recorded by themselves, and no cast of a weight is taken from, or left in, autocast's cache, which
    lives no longer than the outermost autocast."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    _thread.inside = True
    try:
        yield
    finally:
        _thread.inside = False
        torch.set_autocast_cache_enabled(cached)


def _uncached(function: Callable) -> Callable:
    """``function`` without casts that were cached: an autocast that a module made beforehand, as a decorator, turns it on."""

    def run(*args: Any, **kwargs: Any) -> Any:
        torch.clear_autocast_cache()
        try:
            return function(*args, **kwargs)
        finally:
            torch.clear_autocast_cache()

    return run


_modes_and_the_like = (
    torch._C._len_torch_dispatch_stack,
    torch._C._are_functorch_transforms_active,
    lambda: torch._C._get_tracing_state() is not None,
    lambda: forward_ad._current_level >= 0,
)


def _signature(module: nn.Module, args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> tuple[Hashable, str | None]:
    """(the signature of a call, why it has none), the tensors among its arguments being appended to ``tensors``."""
    key: list[Any] = []
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else ()
    if any(stands() for stands in _modes_and_the_like) or any(type(mode) is not DeviceContext for mode in modes):
        return None, "a mode, a transform or a trace stands around the call"
    key += [mode.device for mode in modes]  # where tensors are made: torch.set_default_device
    if module.training:
        return None, "it is in training mode: call model.eval()"
    if "_is_replica" in module.__dict__:
        return None, "it is a replica that DataParallel makes anew for every call"
    try:
        read(args, key, tensors)
        read(kwargs, key, tensors)
    except Unknown as error:
        return None, f"an argument {error}"
    devices = {tensor.device for tensor in tensors}
    kinds = {device.type for device in devices}
    if len(devices) != 1 or not kinds <= RECORDERS.keys():
        found = " and ".join(sorted(map(str, devices))) or "none"
        return None, f"CUDA graphs need a CUDA device, one for all tensors among the arguments; theirs is {found}"
    kind = kinds.pop()
    if RECORDERS[kind].busy():
        return None, "the caller is recording a graph"
    return (settings(kind), *key), None


def _why_opaque(output: Any, inspection: Inspection) -> str | None:
    """Why the call that was looked on at cannot be replayed, its result included, or None."""
    if inspection.reason is not None:
        return inspection.reason
    try:
        mapped(output, inspection.result)
    except Unknown as error:
        return f"its result {error}"
    return _why_gradients(inspection.read)
