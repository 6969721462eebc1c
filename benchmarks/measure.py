"""Time and correctness of one function on one device. A result is checked before it is timed: wrong gets an error, no time."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WARM_UP = 5
GRAPH_BELOW_MS = 1.0  # shorter than this, launching costs as much as running: a graph's replay is timed


class WrongResult(Exception):
    """A function's result is farther from float64 than it may be."""


@dataclass
class Timing:
    """Median in milliseconds, and the distance from the 20th to the 80th percentile as a share of it."""

    ms: float
    spread: float
    peak_mb: float = 0.0


def summarize(samples: Sequence[float]) -> Timing:
    """The median and spread of times in milliseconds."""
    ordered = sorted(samples)
    median = statistics.median(ordered)
    low, high = ordered[int(0.2 * (len(ordered) - 1))], ordered[int(0.8 * (len(ordered) - 1))]
    return Timing(median, (high - low) / median if median else 0.0)


def relative_error(result: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest ‖result − exact‖ / ‖exact‖ over the tensors; infinite for NaN, which passes no comparison."""
    worst = 0.0
    for ours, true in zip(result, exact, strict=True):
        error = (ours.double() - true.double()).norm() / true.double().norm().clamp_min(1e-30)
        worst = max(worst, error.item() if error.isfinite() else float("inf"))
    return worst


def allowed_error(dtype: torch.dtype) -> float:
    """Eight roundings of the dtype, and no less than float32 sums of thousands of terms need."""
    return max(8 * torch.finfo(dtype).eps, 1e-4)


def check(name: str, result: Sequence[Tensor], exact: Sequence[Tensor], dtype: torch.dtype) -> float:
    """The relative error; raises ``WrongResult`` where it is more than ``allowed_error``."""
    error = relative_error(result, exact)
    if not error <= allowed_error(dtype):
        raise WrongResult(f"{name} errs by {error:.2g}, allowed {allowed_error(dtype):.2g}")
    return error


def measure(calls: Sequence[Callable[[], object]], device: str, budget_s: float = 0.2, graphs: bool = True) -> Timing:
    """Times the calls in turn, each on its own inputs, for about ``budget_s`` seconds; short ones as a graph's replays."""
    if device == "cpu":
        return _measure_cpu(calls, budget_s)
    return _measure_cuda(calls, budget_s, graphs)


def _measure_cpu(calls: Sequence[Callable[[], object]], budget_s: float) -> Timing:
    samples, end, turn = [], time.perf_counter() + budget_s, 0
    while not samples or time.perf_counter() < end:
        start = time.perf_counter()
        calls[turn % len(calls)]()
        samples.append((time.perf_counter() - start) * 1e3)
        turn += 1
    return summarize(samples)


def _measure_cuda(calls: Sequence[Callable[[], object]], budget_s: float, graphs: bool) -> Timing:
    for turn in range(max(WARM_UP, len(calls))):
        calls[turn % len(calls)]()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    calls[0]()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    estimate = summarize(_event_times(calls, 10)).ms
    replayed = _graph_times(calls, budget_s) if graphs and estimate < GRAPH_BELOW_MS else None
    repeats = max(20, min(1000, int(budget_s * 1e3 / max(estimate, 1e-3))))
    timing = summarize(_event_times(calls, repeats) if replayed is None else replayed)
    timing.peak_mb = peak
    return timing


def _event_times(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for turn, (start, end) in enumerate(events):
        start.record()
        calls[turn % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _graph_times(calls: Sequence[Callable[[], object]], budget_s: float) -> list[float] | None:
    """Times of one call, from replays of a graph of at least twenty; None where the calls cannot be captured."""
    rounds = -(-20 // len(calls))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    count = rounds * len(calls)
    first = _event_times([graph.replay], 3)
    repeats = max(10, min(500, int(budget_s * 1e3 / max(statistics.median(first), 1e-3))))
    return [total / count for total in _event_times([graph.replay], repeats)]
