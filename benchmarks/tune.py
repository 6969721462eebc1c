"""Launch configs measured on the GPU that is present: each candidate compiled and read, checked against float64, then timed.

A candidate that does not compile, spills, asks for more shared memory than there is, or errs, gets its reason and no time. Every
result is appended to a log at once, and what the log holds is not done again: a run that a deadline (or a kernel that broke
the device) ended goes on where it was. A compiler that aborts or hangs is a result too: it works in a process of its own.
The table is written from the whole log, in the format of ``kernels/tables``.
"""

import fnmatch
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastvit.kernels import _tuning
from fastvit.kernels._launch import Launch, record

import fastvit

from . import accuracy, candidates, cases, launch_tables, measure, operators, peers, results, workers
from .tuning_log import Log

BUDGET_S = 0.1  # of timing a candidate
COMPILE_S = 120.0  # a candidate's kernels take a few seconds; one that takes longer than this is stuck
DIRECTIONS = ("forward", "backward")


class Broken(Exception):
    """The device is unusable for this process; where a candidate did that, its reason is in the log."""


@dataclass(frozen=True)
class Subject:
    """One case in one direction."""

    case: Any
    direction: str
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        return f"{self.case.op} {self.case.name} {self.direction}"


def subjects(pattern: str = "*") -> list[Subject]:
    """The cases whose names match, best first: forward before backward, ViT and SAM before the rest."""
    found = [Subject(case, direction) for part in cases.ALL.values() for case in part for direction in DIRECTIONS]
    matching = [subject for subject in found if fnmatch.fnmatch(subject.case.name, pattern)]
    return sorted(matching, key=lambda s: (s.direction != "forward", not s.case.name.startswith(("ViT", "SAM-"))))


@dataclass
class Bench:
    """A subject's inputs on the device; its exact result once ``prepare`` was called."""

    subject: Subject
    device: str
    exact: list[torch.Tensor] | None = None
    standard: list[accuracy.Error] | None = None

    def __post_init__(self) -> None:
        case, direction = self.subject.case, self.subject.direction
        torch.manual_seed(0)
        self.dtype = cases.DTYPES[self.subject.dtype]
        element = torch.empty(0, dtype=self.dtype).element_size()
        cache = torch.cuda.get_device_properties(0).L2_cache_size if self.device == "cuda" else 0
        count = cases.sets_beyond_cache(case, element, cache)
        self.sets = [case.inputs(self.dtype, self.device, direction != "forward") for _ in range(count)]
        self.ours, self.reference, self.competing = peers.contestants(case)
        with torch.no_grad(), fastvit.use_backend("triton"):
            self.upstream = tuple(torch.randn_like(out) for out in operators.outputs(self.ours(**self.sets[0])))

    def prepare(self) -> None:
        """What a candidate is held to: the float64 result, and eager's errors where eager serves. Raises ``Broken``."""
        if self.exact is not None:
            return
        doubles = tuple(tensor.double() for tensor in self.upstream)
        exact = operators.evaluate(self.reference, operators.double(self.sets[0]), doubles, self.subject.direction)
        self.exact = [t.cpu() for t in exact]
        try:
            self.standard = accuracy.errors(self._result_of(self.competing["eager"].build()), self.exact)
        except Exception as error:  # without eager, the dtype sets how much may be erred
            if results.is_sticky(results.describe(error)):
                raise Broken(f"eager PyTorch, {self.subject.name}: {results.describe(error)}") from error

    def _result_of(self, function: Callable) -> list[torch.Tensor]:
        return [t.cpu() for t in operators.evaluate(function, self.sets[0], self.upstream, self.subject.direction)]

    def run(self) -> list[torch.Tensor]:
        with fastvit.use_backend("triton"):
            return self._result_of(self.ours)

    def asked(self) -> list[tuple[str, dict[str, int]]]:
        """The operators of this direction and the shape numbers that their configs go by."""
        with _tuning.asked() as forward, fastvit.use_backend("triton"):
            operators.evaluate(self.ours, self.sets[0], self.upstream, "forward")
        if self.subject.direction == "forward":
            return forward
        with _tuning.asked() as both:
            self.run()
        return [entry for entry in both if entry not in forward]

    def check(self) -> None:
        self.prepare()
        accuracy.check("the candidate", self.run(), self.exact or [], self.dtype, self.standard)

    def time(self) -> measure.Timing:
        with fastvit.use_backend("triton"):
            timed = operators.calls(self.ours, self.sets, self.upstream, self.subject.direction)
            return measure.measure(timed, BUDGET_S, graphs=self.subject.direction == "forward")


def launches(subject: Subject, op: str, config: dict[str, int], target: str, device: str) -> list[Launch]:
    """What the candidate would launch for the operator; nothing runs."""
    dtype = cases.DTYPES[subject.dtype]
    inputs = subject.case.inputs(dtype, device, subject.direction != "forward")
    ours, _, _ = peers.contestants(subject.case)
    with _tuning.override(op, config), record(target) as made, fastvit.use_backend("triton"):
        out = operators.outputs(ours(**inputs))
        if subject.direction == "backward":
            torch.autograd.grad(out, [t for t in inputs.values() if t.requires_grad], [torch.zeros_like(o) for o in out])
    return [launch for launch in made if launch.op == op]


def inspect(subject: Subject, op: str, config: dict[str, int], target: str, limit: int) -> dict[str, Any]:
    """{"reason": why it is not worth running or None, "registers", "stack", "shared"} of the compiled candidate."""
    from .static import compilation, inspection

    found: dict[str, Any] = {"reason": None, "registers": 0, "stack": 0, "shared": 0}
    try:
        for launch in launches(subject, op, config, target, "cuda"):
            job = compilation.Job(launch, *compilation.specialize(launch, target), asked_by=[subject.name])
            report = compilation.compile_job(job, target)
            for name in ("registers", "stack", "shared"):
                found[name] = max(found[name], getattr(report, name))
            wrong = inspection.problems(report, limit, [])
            if wrong and found["reason"] is None:
                found["reason"] = wrong[0].removeprefix(report.name).strip()
    except Exception as error:  # a config that a launcher cannot use is a result too
        return found | {"reason": results.describe(error)}
    return found


Inspect = Callable[[Subject, str, list[dict[str, int]], float], Iterator[dict[str, Any] | None]]


def run(
    chosen: list[Subject],
    target: str,
    log: Log,
    say: Callable[[str], None],
    inspect_all: Inspect,
    op: str = "*",
    minutes: float = 8.0,
    device: str = "cuda",
    make_bench: Callable[[Subject, str], Any] = Bench,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Measures what the log does not hold, until ``minutes`` are over; whether everything has been measured.

    ``inspect_all`` gives ``inspect``'s answer for each of the configs, or None after the seconds that it is given. Raises
    ``Broken`` after a candidate that broke the device.
    """
    end = clock() + 60 * minutes
    begun: set[str] = set()
    for subject in chosen:
        if clock() > end:
            return False
        bench = make_bench(subject, device)
        for name, shape in bench.asked():
            place = f"{name} {shape}"
            if not fnmatch.fnmatch(name, op) or place in begun:
                continue
            begun.add(place)
            committed = _tuning.config(name, target, **shape)
            done = [entry["config"] for entry in log.of(name, shape)]
            todo = [config for config in candidates.grid(committed) if config not in done]
            for config, found in zip(todo, inspect_all(subject, name, todo, end - clock()), strict=True):
                if found is None or clock() > end:
                    return False
                if found["reason"] is None:
                    bench.prepare()
                entry = _measure(bench, name, config, found)
                log.add({"op": name, "shape": shape, "config": config, "case": subject.name, "committed": committed} | entry)
                if entry["reason"] and results.is_sticky(entry["reason"]):
                    raise Broken(f"{name} {config}: {entry['reason']}")
            best = candidates.winner(log.of(name, shape), committed)
            fate = "no candidate passes" if best is None else f"{best['ms']:.4f} ms with {best['config']}"
            say(f"{subject.name}: {place}: {fate}, committed {committed}")
    return True


def _measure(bench: Any, op: str, config: dict[str, int], found: dict[str, Any]) -> dict[str, Any]:
    """What inspection found, and the time or the reason that there is none."""
    timing = None
    if found["reason"] is None:
        try:
            with _tuning.override(op, config):
                bench.check()
                timing = bench.time()
        except Exception as error:  # a candidate that fails is a result too
            found = found | {"reason": results.describe(error)}
    return found | {"ms": timing and timing.ms, "spread": timing and timing.spread}


def inspecting(
    target: str, limit: int, processes: int, work: Callable = inspect, compile_s: float = COMPILE_S
) -> tuple[workers.Workers, Inspect]:
    """Compiles ahead of the measurements in processes of their own; Triton's cache hands the result over.

    A candidate whose compilation aborts, or takes longer than ``compile_s``, gets that for its reason.
    """
    pool = workers.Workers(processes, work, compile_s)

    def inspect_all(subject: Subject, op: str, configs: list[dict[str, int]], seconds: float) -> Iterator[dict | None]:
        end = time.monotonic() + seconds
        pending = [pool.submit(subject, op, config, target, limit) for config in configs]
        try:
            for future in pending:
                try:
                    yield future.result(max(0.0, end - time.monotonic()))
                except workers.Lost as lost:
                    yield {"reason": f"its compilation {lost}", "registers": 0, "stack": 0, "shared": 0}
                except NotYet:
                    yield None
        finally:
            for future in pending:
                future.cancel()

    return pool, inspect_all


def table_of(log: Log, shared_memory: int) -> dict[str, Any]:
    """The table that the log amounts to."""
    about = log.about
    ops: dict[str, list] = {}
    places = {(entry["op"], json.dumps(entry["shape"])): entry for entry in log.entries}
    for op in dict.fromkeys(name for name, _ in places):
        here = [entry for (name, _), entry in places.items() if name == op]
        best = [candidates.winner(log.of(op, entry["shape"]), entry["committed"]) for entry in here]
        if rows := candidates.rows([entry for entry in best if entry is not None]):
            ops[op] = rows
    provenance = f"measured on {about['gpu']}, driver {about['driver']}, torch {about['torch']}, triton {about['triton']}"
    provenance += f", {about['date']}, commit {about['commit']}"
    return {"target": about["target"], "provenance": provenance, "shared_memory": shared_memory, "ops": ops}


def rejected(log: Log) -> list[str]:
    """A line for each candidate without a time."""
    return [f"{e['op']} {e['shape']} {e['config']}: {e['reason']}" for e in log.entries if e["ms"] is None]


def write(log: Log, path: Path, shared_memory: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(launch_tables.dump(table_of(log, shared_memory)))


def about(target: str) -> dict[str, Any]:
    """The log's first line: what the measurements depend on."""
    found = results.environment("cuda")
    kept = {name: found[name] for name in ("gpu", "driver", "commit", "date")}
    return {"target": target} | kept | {name: found["versions"].get(name, "unknown") for name in ("torch", "triton")}


def processes() -> int:
    return max(1, min(8, (os.cpu_count() or 2) // 2))
