"""Records a function's launches on a GPU, for them to be made again all at once: ``torch.cuda.CUDAGraph``."""

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

WARM_UP = 2  # runs beforehand: kernels are compiled, launch plans made and libraries set up outside the recording

STREAMS = 32  # that PyTorch has a device; asked for one more, it hands out the first again

_recorders: "weakref.WeakSet[CudaRecorder]" = weakref.WeakSet()
_failed: list[torch.cuda.CUDAGraph] = []
_recording = threading.Lock()  # PyTorch's allocator takes one recording at a time


class CudaRecorder:
    """Recordings on one device. They share one pool of memory, so they run one at a time: within ``turn``."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream: torch.cuda.Stream
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph]  # those that use the pool
        self.last: torch.cuda.Stream | None = None  # the stream of the turn before
        self._start_afresh()
        _recorders.add(self)

    def _start_afresh(self) -> None:
        """One stream for all recordings, within which memory of a pool is reused; and no other recorder's, as matrix products
        recorded on one stream share a workspace, and replays of two models may run at the same time."""
        taken = {recorder.stream for recorder in list(_recorders)}
        streams = [torch.cuda.Stream(self.device) for _ in range(STREAMS)]
        self.stream = next((stream for stream in streams if stream not in taken), streams[0])
        self._start_pool()

    def _start_pool(self) -> None:
        self.pool, self._graphs = torch.cuda.graph_pool_handle(), weakref.WeakSet()

    @staticmethod
    def busy() -> bool:
        """Whether the caller records what it calls himself."""
        return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def turn(self, tensors: list[torch.Tensor]) -> Iterator[None]:
        """On the caller's current stream, after all that was done in the turn before, on whichever stream that was.

        ``tensors``, which were allocated on another stream maybe, are kept from being reused before this one is done with them
        (which is nothing to do, and takes no time, where it is the same).
        """
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self.last is not None and self.last != stream:
                stream.wait_stream(self.last)
            self.last = stream
            for tensor in tensors:
                tensor.record_stream(stream)
            yield

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(what replays ``function``, its result, to be found in the same place after every replay); within ``turn``.

        Raises what ``function`` raises while it is recorded, ``RuntimeError`` where it waits for the device; the device and its
        allocator are then as they were before.
        """
        for _ in range(WARM_UP):  # on the caller's stream, so that what products need on the recording's lies in the pool
            function()
        if not self._graphs:  # a pool ends with the last graph that used it
            self._start_pool()
        outside, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            # Other threads may go on allocating and launching meanwhile: only this one's mistakes count.
            with (
                _recording,
                _no_collector(),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                result = function()
        except BaseException:
            torch.cuda.set_stream(outside)  # PyTorch's own context leaves its stream current where the end of the capture fails
            self._give_up(graph)
            raise
        self._graphs.add(graph)
        return graph.replay, result

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """A capture that fails at its end goes on taking memory from its pool, and its allocators refer to its graph for good."""
        _failed.append(graph)
        with contextlib.suppress(RuntimeError):  # it had not begun, or has ended
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        torch.cuda.synchronize(self.device)
        self._start_afresh()


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Other graphs that are garbage are not destroyed within it, which would spoil a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


RECORDERS: dict[str, Any] = {"cuda": CudaRecorder}  # by device type
