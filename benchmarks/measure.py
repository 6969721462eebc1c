"""Time and memory of functions on one device.

On a GPU: medians of CUDA events over inputs that rotate through more than the L2 cache, short calls as replays of a CUDA graph.
On a CPU: contestants in turns, so that whatever else the machine does hits all of them; wall time, CPU time, and the resident
memory that a call adds at its highest (``VmHWM``, reset before the call).
"""

import contextlib
import ctypes
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import energy

WARM_UP = 5
GRAPH_BELOW_MS = 1.0  # shorter than this, launching costs as much as running: a graph's replay is timed
MOST_ROUNDS = 50
MOST_CALLS = 5000
ROUNDS_IN_TURNS = 12  # on a GPU
GPU = torch.device("cuda")

Call = Callable[[], object]


@dataclass
class Timing:
    """Median in milliseconds, and the distance from the 20th to the 80th percentile as a share of it.

    ``timed``: "replay" of a CUDA graph, "events" around each call, or "turns" on a CPU; ``events_ms``: by events in any case.
    ``joules``: the GPU's for one call, where that was asked for.
    """

    ms: float
    spread: float
    peak_mb: float | None = 0.0
    p95_ms: float = 0.0
    cpu_ms: float | None = None
    timed: str = "turns"
    events_ms: float | None = None
    joules: float | None = None
    samples: list[float] = field(default_factory=list, repr=False)


def summarize(samples: Sequence[float]) -> Timing:
    """The median and spread of times in milliseconds."""
    ordered, last = sorted(samples), len(samples) - 1
    median = statistics.median(ordered)
    low, high, late = ordered[int(0.2 * last)], ordered[round(0.8 * last)], ordered[round(0.95 * last)]
    return Timing(median, (high - low) / median if median else 0.0, p95_ms=late, samples=list(samples))


def interleaved(calls: Mapping[str, Call], budget_s: float, least: int = 1) -> dict[str, Timing]:
    """Times the calls in turns on the CPU, forwards and backwards, for about ``budget_s`` seconds and ``least`` rounds.

    The ``samples`` of two of them belong together round by round: the ratios of rounds are what a busy machine leaves alone.
    """
    wall: dict[str, list[float]] = {name: [] for name in calls}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    end, number = time.perf_counter() + budget_s, 0
    while number < MOST_ROUNDS and (number < least or time.perf_counter() < end):
        for name in list(calls) if number % 2 == 0 else reversed(calls):
            start, start_cpu = time.perf_counter(), time.process_time()
            calls[name]()
            wall[name].append((time.perf_counter() - start) * 1e3)
            spent[name].append((time.process_time() - start_cpu) * 1e3)
        number += 1
    found = {name: summarize(samples) for name, samples in wall.items()}
    for name, timing in found.items():
        timing.cpu_ms = statistics.median(spent[name])
    return found


def paired(theirs: Timing, ours: Timing) -> dict[str, object]:
    """``paired_ratio`` and ``ratio_quartiles`` of their time over ours, round by round."""
    ratios = sorted(a / b for a, b in zip(theirs.samples, ours.samples, strict=True))
    quarter = len(ratios) // 4
    return {"paired_ratio": statistics.median(ratios), "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]]}


def status_bytes(field_name: str) -> int:
    """A size that the kernel keeps of this process alone: ``VmRSS`` now, ``VmHWM`` at its highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field_name + ":"))
    return int(line.split()[1]) * 1024


def forget_peak() -> bool:
    """Lets ``VmHWM`` begin again at ``VmRSS``; False where the system does not allow that."""
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # pages freed before are given back, or a call would fill them unseen
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def resident_peak_mb(call: Call) -> float | None:
    """Resident memory that one call adds at its highest, in MiB; None where the system does not let that be asked."""
    if not forget_peak():
        return None
    before = status_bytes("VmRSS")
    call()
    return max(0.0, (status_bytes("VmHWM") - before) / 2**20)


def measure(calls: Sequence[Call], budget_s: float = 0.2, graphs: bool = True, counter: energy.Counter | None = None) -> Timing:
    """Times the calls in turn on the GPU, each on its own inputs, for about ``budget_s`` seconds; short ones as replays.

    All on the current stream. Calls that take long, as masks of a whole picture do, come less often, three times at least. Peak
    memory is of one call above what lay there; of a ``Replay`` that of its capture. With a ``counter``, which goes with events
    alone, the timed stretch lasts a second at least and has its energy.
    """
    calls[0]()
    once = max(_event_times(calls, 1)[0], 1e-3)

    def times(most: int, seconds: float, least: int = 3) -> int:
        return max(least, min(most, int(seconds * 1e3 / once)))

    for turn in range(times(max(WARM_UP, len(calls)), 1.0)):
        calls[turn % len(calls)]()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    calls[0]()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    first = summarize(_event_times(calls, times(20, 1.0)))
    replayed = _graph_times(calls, budget_s) if graphs and first.ms < GRAPH_BELOW_MS else None
    if replayed is None:
        repeats = max(times(20, 3.0), min(MOST_CALLS, int(budget_s * 1e3 / max(first.ms, 1e-3))))
        timing = _with_energy(calls, repeats, counter) if counter else summarize(_event_times(calls, repeats))
        timing.timed, timing.events_ms = "events", timing.ms
    else:
        timing = summarize(replayed)
        timing.timed, timing.events_ms = "replay", first.ms
    if isinstance(calls[0], Replay):
        timing.timed, timing.events_ms, peak = "replay", None, calls[0].peak_mb
    timing.peak_mb = peak
    return timing


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """A stream of its own: what autograd records there runs backward there, where a graph can capture it."""
    stream, outside = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(outside)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outside.wait_stream(stream)


@contextlib.contextmanager
def _capturing(graph: "torch.cuda.CUDAGraph") -> Iterator[None]:
    """Capture on the current stream (on one of its own where that is the default one), which is current again afterwards.

    PyTorch's own context leaves its stream current where the end of the capture fails.
    """
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=None if before == torch.cuda.default_stream() else before):
            yield
    finally:
        torch.cuda.set_stream(before)


def _event_times(calls: Sequence[Call], repeats: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for turn, (start, end) in enumerate(events):
        start.record()
        calls[turn % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _with_energy(calls: Sequence[Call], repeats: int, counter: energy.Counter) -> Timing:
    """Times by events, and the energy of a call from the counter before and after all of them."""
    samples: list[float] = []
    before, start = counter.joules(), time.perf_counter()
    while not samples or time.perf_counter() - start < energy.LEAST_S:
        samples += _event_times(calls, repeats)
    timing = summarize(samples)
    timing.joules = (counter.joules() - before) / len(samples)
    return timing


def in_turns(contestants: Mapping[str, Sequence[Call]], replays: bool) -> dict[str, Timing]:
    """Times contestants on the GPU in turns, as replays or by events, so that a clock that drifts hits all of them.

    A ``sample`` is of one call, the mean of a round. Raises ``RuntimeError`` where one is to be replayed and cannot be captured.
    """
    rounds: dict[str, tuple[Call, int]] = {}
    for name, calls in contestants.items():
        captured = _captured(calls) if replays else None
        if replays and captured is None:
            raise RuntimeError(f"{name} could not be captured again")
        rounds[name] = captured or (functools.partial(_each, calls), len(calls))
    samples: dict[str, list[float]] = {name: [] for name in rounds}
    for number in range(ROUNDS_IN_TURNS + 1):
        for name in list(rounds) if number % 2 == 0 else reversed(rounds):
            whole, count = rounds[name]
            samples[name].append(_event_times([whole], 1)[0] / count)
    return {name: summarize(found[1:]) for name, found in samples.items()}  # the first is a warm-up


def _each(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _graph_times(calls: Sequence[Call], budget_s: float) -> list[float] | None:
    """Times of one call, from replays of a graph of at least twenty; None where the calls cannot be captured."""
    captured = _captured(calls)
    if captured is None:
        return None
    replay, count = captured
    replay()
    torch.cuda.synchronize()
    first = _event_times([replay], 3)
    repeats = max(10, min(500, int(budget_s * 1e3 / max(statistics.median(first), 1e-3))))
    return [total / count for total in _event_times([replay], repeats)]


def _captured(calls: Sequence[Call]) -> tuple[Call, int] | None:
    """(a replay of at least twenty calls, how many); None where they cannot be captured."""
    rounds = -(-20 // len(calls))
    graph = torch.cuda.CUDAGraph()
    try:
        with _capturing(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
    except RuntimeError:
        torch.cuda.synchronize()  # raises where more is broken than the capture
        return None
    return graph.replay, rounds * len(calls)


@dataclass
class Replay:
    """A captured call: calling it fills ``result`` anew. ``peak_mb``: what the call allocates, which a replay does not show."""

    graph: Any
    result: object
    peak_mb: float

    def __call__(self) -> object:
        self.graph.replay()
        return self.result


def graphed(call: Call) -> Replay:
    """The call as one CUDA graph. Raises where it cannot be captured.

    Indices that a library makes on the CPU at every call, as SAM's do for relative positions, are made on the GPU here: a copy
    from the CPU cannot be captured. So it is while warming up, when what is compiled is compiled.
    """
    with side_stream(), GPU:
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with GPU, _capturing(graph):
        result = call()
    return Replay(graph, result, (torch.cuda.max_memory_allocated() - before) / 2**20)
