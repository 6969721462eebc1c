"""Whole models on the CPU, float32: the accelerated model against the unchanged one and what else computes the same.

The models are ``cpu_cases``, their contestants ``cpu_contestants``. Time: all on the same weights in one process, in turns, so
that whatever else the machine does hits all of them; reported are medians, and the ratios of rounds. Memory: ours and the fastest
peer's, each in a process of its own: peak resident size (``VmHWM``) above the model loaded, the highest of a few calls; of a
training step above the optimizer's state too. Results are checked first: of training the gradients of all parameters.
"""

import argparse
import functools
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from . import accuracy, cpu_cases, measure, results
from .cpu_cases import Case
from .cpu_contestants import COMPILED, OURS, PEERS
from .settings import Settings, Task

ALLOWED_ERROR = 1e-4  # relative, float32, between implementations; as fastvit.verify allows
NEEDED = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx")}  # to be importable


def tasks(settings: Settings, large: bool = False) -> Iterator[Task]:
    for case in (cpu_cases.large if large else cpu_cases.small)(settings):
        row = results.new_row(case.title, case.op, case.direction, "fp32", case.shape)
        yield Task(row, functools.partial(run, case))


def run(case: Case, row: results.Row, settings: Settings) -> None:
    """Fills the row: everything checked against the first peer, then timed in turns, then the memory of two.

    A peer that cannot run is in the row with its reason.
    """
    torch._dynamo.reset()  # or sizes that an earlier case's peers compiled become dynamic here, which is slower or fails
    row |= {"gflop": case.gflop, "floor_ms": case.gflop and settings.floor_ms(case.gflop), "took_s": {}}
    row["unavailable"] |= dict.fromkeys(PEERS, cpu_cases.NOT_HERE)
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], Tensor]] = {}
        exact: Tensor | None = None
        for kind, build in case.contestants(row, Path(folder)).items():
            start, reason = time.perf_counter(), _why_not(kind, settings)
            try:
                if reason is None:
                    call = build()
                    result = getattr(call, "check", call)()
                    if exact is None and kind in PEERS:
                        exact = result.clone()
                    error = _error(kind, result, exact)
                    if hasattr(call, "check"):
                        call()  # the rest of it, to warm it too
                    calls[kind] = call
                    if kind == OURS:
                        row["max_error"] = error
            except Exception as caught:
                if kind in (OURS, COMPILED):
                    raise
                reason = results.describe(caught)  # whatever a peer throws, it does not serve this case
            row["unavailable"].pop(kind, None)
            if reason is not None:
                row["unavailable"][kind] = reason
            row["took_s"][kind] = round(time.perf_counter() - start, 1)
        least = 1 if settings.quick or settings.dry else case.rounds
        _fill(row, measure.interleaved(calls, settings.budget_s(case.seconds), least))
        calls.clear()  # the memory is the others' now
        if not settings.dry:
            start = time.perf_counter()
            _measure_memory(case, row, folder)
            row["took_s"]["memory"] = round(time.perf_counter() - start, 1)


def _why_not(kind: str, settings: Settings) -> str | None:
    absent = [module for module in NEEDED.get(kind, ()) if importlib.util.find_spec(module) is None]
    if absent:
        return f"{absent[0]} is not installed"
    return settings.why_not_compiled() if kind in ("compile", COMPILED) else None


def _error(kind: str, result: Tensor, exact: Tensor | None) -> float:
    """How far it is off; raises where that is too far, or unknown."""
    if exact is None:
        raise RuntimeError("there is nothing to hold the result to: no peer ran")
    error = accuracy.relative_error([result], [exact])
    if not error <= ALLOWED_ERROR:
        raise accuracy.WrongResult(f"{kind} errs by {error:.2g}, allowed {ALLOWED_ERROR:.2g}")
    return error


def _fill(row: results.Row, timings: dict[str, measure.Timing]) -> None:
    mine, compiled = timings.pop(OURS), timings.pop(COMPILED, None)
    if compiled is not None:
        row["ours_variants"] = {OURS: mine.ms, COMPILED: compiled.ms}
    row["peers"] = {kind: timing.ms for kind, timing in timings.items()}
    row["peers_spread"] = {kind: timing.spread for kind, timing in timings.items()}
    row["peers_cpu_ms"] = {kind: timing.cpu_ms for kind, timing in timings.items()}
    row["peers_p95_ms"] = {kind: timing.p95_ms for kind, timing in timings.items()}
    row["peers_peak_mb"] = dict.fromkeys(timings)
    row |= {"ours_ms": mine.ms, "ours_spread": mine.spread, "ours_cpu_ms": mine.cpu_ms, "p95_ms": mine.p95_ms}
    row |= {"rounds": len(mine.samples), "images_s": 1e3 * row["shape"][0] / mine.ms}
    row["energy_absent"] = "not counted on a CPU"
    row["mfu"] = row["floor_ms"] and row["floor_ms"] / mine.ms
    best = results.fastest_peer(row)
    if best:
        row |= measure.paired(timings[best], mine)


def _measure_memory(case: Case, row: results.Row, folder: str) -> None:
    """Ours and the fastest peer's; where that fails, the row says why."""
    peaks: dict[str, float] = {}
    for kind in filter(None, (OURS, results.fastest_peer(row))):
        try:
            peaks[kind] = peak_memory_of(case, kind, folder)
        except RuntimeError as error:
            row["unavailable"][f"memory of {kind}"] = results.describe(error)
    row["peak_mb"] = peaks.pop(OURS, None)
    row["peers_peak_mb"] |= peaks


def peak_memory_of(case: Case, kind: str, folder: str) -> float:
    """MiB that calls add to the loaded model at their highest, in a process of its own. Raises ``RuntimeError`` if it fails."""
    command = [sys.executable, "-m", f"{__name__.rpartition('.')[0]}.cpu_models", case.title, kind, folder]
    path = os.pathsep.join(filter(None, [str(results.ROOT_OF_IMPORTS), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if ran.returncode:
        raise RuntimeError(f"exit status {ran.returncode}: {(ran.stderr.strip().splitlines() or [''])[-1]}")
    return int(ran.stdout.splitlines()[-1]) / 2**20


def peak_memory(case: Case, kind: str, folder: Path) -> int:
    """Bytes of peak resident size above the loaded model, in this process."""
    row = results.new_row(case.title, case.op, case.direction, "fp32", case.shape)
    call = case.contestants(row, folder)[kind]()
    if kind == "compile" or case.op == "training":
        call()  # what the compiler itself takes is not the model's, nor an optimizer's state a step's
    measure.forget_peak()  # loading's own; where that is refused, loading's peak may hide the calls'
    before = measure.status_bytes("VmRSS")
    for _ in range(3 if (case.gflop or 0) < 500 else 2 if (case.gflop or 0) < 2000 else 1):
        call()
    return measure.status_bytes("VmHWM") - before


def machine() -> dict:
    """What the numbers depend on, in the form of the file of families."""
    return {
        "commit": results.short(results.commit()),
        "cpu": results.cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    settings = Settings("cpu", {})
    known = {case.title: case for case in (*cpu_cases.small(settings), *cpu_cases.large(settings))}
    parser = argparse.ArgumentParser(description="Peak memory of one contestant in a case, in bytes")
    parser.add_argument("case", choices=known)
    parser.add_argument("kind")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(peak_memory(known[options.case], options.kind, options.folder))
