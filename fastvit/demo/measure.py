"""Time, memory and error of an accelerated model beside its original."""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass
class Error:
    """How far ``actual`` is from ``expected``."""

    max_abs: float
    relative: float  # ‖actual − expected‖ / ‖expected‖
    cosine: float  # of the two as vectors

    @classmethod
    def between(cls, actual: Tensor, expected: Tensor) -> "Error":
        actual, expected = actual.double().flatten(), expected.double().flatten()
        norms = float(actual.norm() * expected.norm())
        return cls(
            max_abs=float((actual - expected).abs().max()),
            relative=float((actual - expected).norm() / expected.norm().clamp_min(1e-300)),
            cosine=float(actual @ expected) / norms if norms else 1.0,
        )


@dataclass
class Times:
    """Seconds of each run; run i of the one model was timed next to run i of the other."""

    original: list[float]
    accelerated: list[float]

    @property
    def median_original(self) -> float:
        return statistics.median(self.original)

    @property
    def median_accelerated(self) -> float:
        return statistics.median(self.accelerated)

    @property
    def median_ratio(self) -> float:
        """Median over the pairs of accelerated / original: below 1 is faster. Drifts of the machine cancel in a pair."""
        return statistics.median(b / a for a, b in zip(self.original, self.accelerated, strict=True))

    def summary(self) -> dict:
        return asdict(self) | {
            "median_original": self.median_original,
            "median_accelerated": self.median_accelerated,
            "median_ratio": self.median_ratio,
        }


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def paired_times(
    original: Callable[[], object],
    accelerated: Callable[[], object],
    runs: int,
    device: torch.device,
    progress: Callable[[int], None] = lambda done: None,
) -> Times:
    """Times both ``runs`` times, alternating which goes first, after one warm-up of each."""
    _seconds(original, device), _seconds(accelerated, device)
    times = Times([], [])
    for index in range(runs):
        pair = [(original, times.original), (accelerated, times.accelerated)]
        for run, results in pair if index % 2 == 0 else reversed(pair):
            results.append(_seconds(run, device))
        progress(index + 1)
    return times


@contextmanager
def _without_profiler_log() -> Iterator[None]:
    """Keeps the profiler's start and stop lines (``USDT:…``) from the terminal; everything else on stderr passes."""
    with tempfile.TemporaryFile() as log:
        sys.stderr.flush()
        terminal = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            log.seek(0)
            os.write(2, b"".join(line for line in log if not line.startswith(b"USDT:")))


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``run`` holds at its peak beyond what was allocated before: activations and scratch, not the weights.

    On a GPU by PyTorch's counter. On a CPU by adding up the profiler's record of every allocation and release; a library's
    internal scratch (inside a matrix product, say) is not in that record.
    """
    run()  # lazily made buffers are not this run's
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _without_profiler_log(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        run()
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
