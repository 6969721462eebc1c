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

from fastvit.kernels import _tuning

import fastvit

from . import candidates, cases, launch_tables, results, tuning_cases, workers
from .tuning_bench import DIRECTIONS, NOT_INSPECTED, Bench, Broken, Subject, asked, decisions, inspect, served, ways
from .tuning_log import Log

COMPILE_S = 120.0  # a candidate's kernels take a few seconds; one that takes longer than this is stuck
FIRST = ("ViT-B/16 224", "ViT-L/16 224", "ViT-H/14 224", "SAM-B", "SAM-L", "SAM-H")
CEILINGS = (790.0, 4300.0)  # TFLOP/s and GB/s, to tell which case takes longer
TWIN = "launches the same as"
NEAR = 24  # candidates of a place that come before all the others
# (what is led by, candidates of a place): first what leads, forward in the models that most is asked of, then everything.
ROUNDS = ((True, 1), (True, NEAR), (False, 1), (False, NEAR), (False, None))


def leads(subject: Subject) -> bool:
    return subject.direction == "forward" and subject.case.name.startswith(FIRST)


def subjects(pattern: str = "*") -> list[Subject]:
    """The cases whose names match, those that matter most first: forward before backward, the models that most is asked of
    before other ViTs and SAMs before the rest, and among equals what takes longest."""
    every = [*(case for part in cases.ALL.values() for case in part), *tuning_cases.CASES]
    found = [Subject(case, direction) for case in every for direction in getattr(case, "directions", DIRECTIONS)]
    matching = [subject for subject in found if fnmatch.fnmatch(subject.case.name, pattern)]

    def rank(subject: Subject) -> tuple:
        known = subject.case.name.startswith(("ViT", "SAM-"))
        return (
            subject.direction != "forward",
            not leads(subject),
            not known,
            -cases.floor_ms(subject.case, subject.direction, 2, *CEILINGS),
        )

    return sorted(matching, key=rank)


Inspect = Callable[[Subject, str, list[dict[str, int]], float], Iterator[dict[str, Any] | None]]


def names() -> list[str]:
    """What ``--op`` may name: the operators of the tables, and "dispatch" of those that have more than one way."""
    launched = sorted({op for target in (*_tuning.targets(), "default") for op in _tuning.committed(target)["ops"]})
    return [*launched, *(f"dispatch {op}" for op, found in _tuning.WAYS.items() if len(found) > 1 and op not in _tuning.UNTUNED)]


@dataclass
class Run:
    """Measures what the log does not hold, best first, until ``minutes`` are over.

    Round by round: what is committed and the vendor's ways, then near candidates, first for the subjects that lead, then for
    all; then the rest. A subject that cannot be set up here (too little memory, no such format) is said and left out.
    ``inspect_all`` gives ``inspect``'s answer for each of the configs, or None after the seconds that it is given.
    """

    chosen: list[Subject]
    target: str
    log: Log
    say: Callable[[str], None]
    inspect_all: Inspect
    op: str = "*"
    minutes: float = 8.0
    device: str = "cuda"
    make_bench: Callable[[Subject, str], Any] = Bench
    clock: Callable[[], float] = time.monotonic

    def __call__(self) -> bool:
        """Whether everything has been measured. Raises ``Broken`` after a candidate that broke the device, ``ValueError`` where
        no chosen case has anything to do with the operators."""
        self.end = self.clock() + 60 * self.minutes
        self.known: dict[Subject, tuple[list, list]] = {}
        left_out: set[Subject] = set()
        for leading, limit in ROUNDS:
            begun: set[str] = set()
            for subject in self.chosen:
                if subject in left_out or (leading and not leads(subject)):
                    continue
                try:
                    if self.clock() > self.end or not self._subject(subject, limit, begun):
                        return False
                except Broken:
                    raise
                except Exception as error:
                    reason = results.describe(error)
                    if results.is_sticky(reason):
                        raise Broken(f"{subject.name}: {reason}") from error
                    self.say(f"{subject.name}: left out: {reason}")
                    left_out.add(subject)
            if not (begun or leading or left_out):
                raise ValueError(f"no chosen case asks for an operator {self.op}; give another --case or --op")
        return True

    def _subject(self, subject: Subject, limit: int | None, begun: set[str]) -> bool:
        """One round of the subject; False when the time was over before its end."""
        if subject not in self.known:
            made = asked(subject, self.target, self.device), decisions(subject, self.target, self.device)
            self.known[subject] = made
        places, choices = self.known[subject]
        bench: Any = None
        for name, shape in places:
            place = f"{name} {shape}"
            if not fnmatch.fnmatch(name, self.op) or place in begun:
                continue
            begun.add(place)
            committed = _tuning.config(name, self.target, **shape)
            done = [entry["config"] for entry in self.log.of(name, shape)]
            todo = [config for config in candidates.grid(committed, name)[:limit] if config not in done]
            for config, found in zip(todo, self.inspect_all(subject, name, todo, self.end - self.clock()), strict=True):
                if found is None or self.clock() > self.end:
                    return False
                twin = next((e for e in self.log.of(name, shape) if found.get("launches") and _same(e, found)), None)
                if twin is not None and found["reason"] is None:
                    found = found | {"reason": f"{TWIN} {twin['config']}"}
                bench = bench or self.make_bench(subject, self.device)
                with _tuning.override(name, config), fastvit.use_backend("triton"):
                    self._add(bench, name, shape, config, committed, found)
            if todo:
                best = candidates.winner(self.log.of(name, shape), committed)
                fate = "no candidate passes" if best is None else f"{best['ms']:.4f} ms with {best['config']}"
                self.say(f"{subject.name}: {place}: {fate}, committed {committed}")
        for name, call, way in choices:
            place = f"dispatch {name}"
            if not fnmatch.fnmatch(place, self.op) or f"{place} {call}" in begun:
                continue
            begun.add(f"{place} {call}")
            for config in self._ways(name, call, places):
                if self.clock() > self.end:
                    return False
                bench = bench or self.make_bench(subject, self.device)
                with served(name, config):
                    self._add(bench, place, call, config, {"serve": way}, dict(NOT_INSPECTED), "pass" in call)
            for rule in candidates.rules([entry for entry in self.log.of(place, call)]):
                self.say(f"{subject.name}: {place}: {rule['serve']} ({rule['why']})")
        return True

    def _ways(self, op: str, call: dict[str, Any], places: list) -> list[dict[str, Any]]:
        """The ways that are not in the log: the kernel's with the best configs so far."""
        best = {name: self._best(name, shape) for name, shape in places}
        found = [{"serve": way} if way != "kernel" else {"serve": way, "with": best} for way in ways(op, call)]
        done = [entry["config"] for entry in self.log.of(f"dispatch {op}", call)]
        return [config for config in found if config not in done]

    def _best(self, name: str, shape: dict[str, int]) -> dict[str, int]:
        committed = _tuning.config(name, self.target, **shape)
        found = candidates.winner(self.log.of(name, shape), committed)
        return committed if found is None else found["config"]

    def _add(self, bench: Any, op: str, shape: dict, config: dict, committed: dict, found: dict, choice: bool = False) -> None:
        """Logs what was found out, and the time or the reason that there is none."""
        timing = None
        if found["reason"] is None:
            bench.prepare()
            try:
                bench.check()
                timing = bench.time(step=choice and bench.subject.direction == "backward")
            except Exception as error:  # a candidate that fails is a result too
                found = found | {"reason": results.describe(error)}
        entry = {"op": op, "shape": shape, "config": config, "case": bench.subject.name, "committed": committed} | found
        self.log.add(entry | {"ms": timing and timing.ms, "spread": timing and timing.spread})
        if found["reason"] and results.is_sticky(found["reason"]):
            raise Broken(f"{op} {config}: {found['reason']}")


def _same(entry: dict[str, Any], found: dict[str, Any]) -> bool:
    return entry["ms"] is not None and entry.get("launches") == found["launches"]


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
                    yield NOT_INSPECTED | {"reason": f"its compilation {lost}"}
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
    dispatched: dict[str, list] = {}
    places = {(entry["op"], json.dumps(entry["shape"])): entry for entry in log.entries}
    for op in dict.fromkeys(name for name, _ in places):
        here = [entry for (name, _), entry in places.items() if name == op]
        if op.startswith("dispatch "):
            dispatched[op.removeprefix("dispatch ")] = candidates.rules([entry for entry in log.entries if entry["op"] == op])
            continue
        best = [candidates.winner(log.of(op, entry["shape"]), entry["committed"]) for entry in here]
        if rows := candidates.rows([entry for entry in best if entry is not None]):
            ops[op] = rows
    provenance = f"measured on {about['gpu']}, driver {about['driver']}, torch {about['torch']}, triton {about['triton']}"
    provenance += f", {about['date']}, commit {about['commit']}"
    head = {"target": about["target"], "provenance": provenance, "shared_memory": shared_memory}
    return head | {"ops": ops, "dispatch": dispatched}


def rejected(log: Log) -> list[str]:
    """A line for each candidate without a time, those left out that make no difference at their shape."""
    failed = [entry for entry in log.entries if entry["ms"] is None and not entry["reason"].startswith(TWIN)]
    return [f"{e['op']} {e['shape']} {e['config']}: {e['reason']}" for e in failed]


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
