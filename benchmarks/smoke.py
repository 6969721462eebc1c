"""Every kernel compiled and checked once, at the sizes of the models, before anything is timed: minutes, by several processes.

    python -m benchmarks.gpu --part smoke

Forward and backward of every case on the Triton backend, and the 8-bit kernels, held to float64 as the benchmarks hold them; and
chains of dependent launches, held to the same kernels one after the other. Each process has a GPU context of its own: one that a
kernel breaks, or that hangs, is replaced, and the rest goes on. The first case of every operator comes first, then chains, 8 bits
last. Compiled kernels stay in Triton's cache, so that the parts that time them need not
wait for them again.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import fastvit

from . import accuracy, cases, chains, first_call, operators, peers, results, smoke_8bit
from .settings import Settings

PROCESSES = 6  # what the float64 references take beside each other fits a GPU of 80 GB
LIMIT_S = 120.0  # one item, compiling included
OUT_OF_MEMORY = "out of memory"
IN_8_BITS, CHAINS = "8 bits", "chains"

ALONE = {CHAINS: chains, IN_8_BITS: smoke_8bit}  # parts whose cases check themselves


@dataclass(frozen=True)
class Item:
    """The case of that number in a part, in one direction."""

    part: str
    index: int
    direction: str

    @property
    def case(self) -> Any:
        return ALONE[self.part].CASES[self.index] if self.part in ALONE else cases.ALL[self.part][self.index]

    @property
    def name(self) -> str:
        what = self.case.precision if self.part in ALONE else self.direction
        return f"{self.case.op} {self.case.name} {what}"


@dataclass(frozen=True)
class Outcome:
    """``error``: how far off, None where it failed and ``why`` says how."""

    item: Item
    error: float | None
    why: str = ""
    seconds: float = 0.0


def items(matches: Callable[[str], bool] = lambda name: True, settings: Settings | None = None) -> list[Item]:
    """All there are, those left out whose format, or whose kind of launch, the device of ``settings`` has not."""
    places = [(part, index) for part, group in cases.ALL.items() for index in range(len(group))]
    firsts = first_call.one_of_each()
    ordered = firsts + [place for place in places if place not in firsts]
    both = [[Item(*place, direction) for direction in cases.ALL[place[0]][place[1]].directions] for place in ordered]
    found = [item for items in both[: len(firsts)] for item in items]
    found += _of(CHAINS, settings) + [item for items in both[len(firsts) :] for item in items] + _of(IN_8_BITS, settings)
    return [item for item in found if matches(item.case.name)]


def _of(part: str, settings: Settings | None) -> list[Item]:
    held = ALONE[part]
    return [Item(part, n, "forward") for n, case in enumerate(held.CASES) if settings is None or not held.why_not(case, settings)]


def check(item: Item, settings: Settings) -> float:
    """The error of the kernel, against float64. Raises ``WrongResult``, or whatever compiling and launching raise."""
    torch.manual_seed(0)
    if item.part in ALONE:
        with torch.no_grad():
            return item.case.check(settings)
    case, dtype = operators.subject(item.case, settings), cases.DTYPES[settings.dtype]
    inputs = case.inputs(dtype, settings.device, item.direction != "forward")
    ours, exact_function, competing = peers.contestants(case)
    with torch.no_grad():
        upstream = tuple(torch.randn_like(out) for out in operators.outputs(exact_function(**inputs)))
    double = tuple(tensor.double() for tensor in upstream)
    exact = [t.cpu() for t in operators.evaluate(exact_function, operators.double(inputs), double, item.direction)]
    eager = [t.cpu() for t in operators.evaluate(competing["eager"].build(), inputs, upstream, item.direction)]
    with fastvit.use_backend("triton" if settings.device == "cuda" else "auto"):
        result = [t.cpu() for t in operators.evaluate(ours, inputs, upstream, item.direction)]
    return accuracy.check("the kernel", result, exact, dtype, accuracy.errors(eager, exact))


def outcome(item: Item, settings: Settings) -> Outcome:
    start = time.perf_counter()
    try:
        error, why = check(item, settings), ""
    except Exception as caught:
        error, why = None, results.describe(caught)
    if settings.device == "cuda" and not results.is_sticky(why):
        torch.cuda.empty_cache()
    return Outcome(item, error, why, round(time.perf_counter() - start, 2))


def serve(settings: Settings) -> None:
    """A process's work: an item a line from standard input, its outcome a line on standard output, and nobody else's lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(asdict(outcome(Item(**json.loads(line)), settings))), file=answers, flush=True)


class Process:
    """One that checks items, replaced by another where it dies, hangs or has lost its GPU context."""

    def __init__(self, settings: Settings):
        self.settings, self.child = settings, self._start(settings)

    @staticmethod
    def _start(settings: Settings) -> subprocess.Popen:
        package = __name__.rpartition(".")[0]
        path = os.pathsep.join(filter(None, [str(results.ROOT_OF_IMPORTS), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", f"{package}.smoke", settings.device, *(["--dry"] if settings.dry else [])]
        where = os.environ | {"PYTHONPATH": path}
        return subprocess.Popen(command, env=where, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, item: Item) -> Outcome:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        start, child = time.perf_counter(), self.child
        alarm = threading.Timer(LIMIT_S, child.kill)
        alarm.start()
        try:
            child.stdin.write(json.dumps(asdict(item)) + "\n")
            child.stdin.flush()
            found = json.loads(child.stdout.readline() or "null")
        except (OSError, ValueError):
            found = None
        alarm.cancel()
        seconds = time.perf_counter() - start
        if found is None:
            child.kill()
            late = f", stopped after {LIMIT_S:.0f} s" if seconds >= LIMIT_S else ""
            told = Outcome(item, None, f"the process died with status {child.wait()}{late}", round(seconds, 2))
        else:
            told = Outcome(**(found | {"item": item}))
        if found is None or results.is_sticky(told.why):
            self.close()
            self.child = self._start(self.settings)
        return told

    def close(self) -> None:
        self.child.kill()
        self.child.wait()


def run(chosen: list[Item], settings: Settings, deadline_s: float, say: Callable[[str], None] = print) -> list[Outcome]:
    """Outcomes in the order they came; what did not fit the GPU's memory beside others is asked again alone."""
    end = time.monotonic() + deadline_s
    found: list[Outcome] = []

    def round_of(asked: list[Item], processes: int) -> None:
        waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
        for item in asked:
            waiting.put(item)

        def work() -> None:
            process = Process(settings)
            while time.monotonic() < end:
                try:
                    told = process.ask(waiting.get_nowait())
                except queue.Empty:
                    break
                found.append(told)
                say(line(told))
            process.close()

        threads = [threading.Thread(target=work) for _ in range(min(processes, len(asked)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    round_of(chosen, 1 if settings.device == "cpu" else PROCESSES)
    again = [told for told in found if OUT_OF_MEMORY in told.why]
    for told in again:
        found.remove(told)
    round_of([told.item for told in again], 1)
    done = {told.item for told in found}
    return found + [Outcome(item, None, results.NO_TIME) for item in chosen if item not in done]


def line(told: Outcome) -> str:
    return f"{told.item.name}: {told.why or f'right, error {told.error:.2g}'} ({told.seconds:.1f} s)"


def write(path: Path, found: list[Outcome], device: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [asdict(told) | {"name": told.item.name} for told in found]
    path.write_text(json.dumps(results.environment(device) | {"checked": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    serve(Settings(sys.argv[1], {}, dry="--dry" in sys.argv))
