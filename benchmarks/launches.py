"""CPU time of one call of an operator, until its kernels are enqueued: on small inputs, so that the GPU is never waited for.

Peers: the operator written in PyTorch, and PyTorch's fused attention. Without a GPU ``overhead`` counts the same, the
driver left out.
"""

import functools
import time
from collections.abc import Callable, Iterator

import torch

import fastvit

from . import cases, first_call, measure, peers, results
from .settings import Settings, Task

CALLS = 100  # a round: some hundreds of launches, which the driver takes without waiting
ROUNDS = 20
PEERS = ("eager", "sdpa")


def tasks(settings: Settings) -> Iterator[Task]:
    for case in first_call.one_of_each():
        small = cases.ALL[case[0]][case[1]].small()
        row = results.new_row(small.name, small.op, "launch", settings.dtype, small.shape)
        yield Task(row, functools.partial(run, small), contestants=PEERS)


def run(case: cases.Case, row: results.Row, settings: Settings) -> None:
    inputs = case.inputs(cases.DTYPES[row["dtype"]], settings.device, requires_grad=False)
    ours, _, competing = peers.contestants(case)
    with fastvit.use_backend("auto"):
        timing = host_time(functools.partial(ours, **inputs), settings)
    row |= {"ours_ms": timing.ms, "ours_spread": timing.spread, "p95_ms": timing.p95_ms}
    for name in PEERS:
        if settings.why_not(name):
            row["unavailable"][name] = str(settings.why_not(name))
        elif name in competing:
            try:
                row["peers"][name] = host_time(functools.partial(competing[name].build(), **inputs), settings).ms
            except Exception as error:  # a peer that does not run here is no result of ours
                row["unavailable"][name] = results.describe(error)


def host_time(call: Callable[[], object], settings: Settings) -> measure.Timing:
    """Of one call, by rounds; whatever is enqueued has run before a round begins."""
    wait = torch.cuda.synchronize if settings.device == "cuda" else lambda: None
    calls, rounds = (1, 2) if settings.dry else (CALLS, ROUNDS)
    samples = []
    with torch.no_grad():
        for _ in range(rounds + 1):
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            samples.append((time.perf_counter() - start) * 1e3 / calls)
    wait()
    return measure.summarize(samples[1:])  # the first compiles
