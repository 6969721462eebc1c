"""A run of the benchmarks: parts, one row after another, against a deadline, each row saved as it comes.

A part is what its name says of ``PARTS``; ``first`` is a choice out of all of them (``plan``). Rows that a file of the same day
and commit has already are not measured again, unless something in them failed or was left out for want of time. After the
deadline nothing more is begun. On a CPU nothing is compiled from a share of a part's time on, and the rows say so; on a GPU a row
that would not be done in time, by its estimate, is left to the next run, and a whole model's that was cut short is gone on
with, contestant by contestant.
"""

import copy
import datetime
import fnmatch
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import (
    cases,
    chains,
    cpu_models,
    first_call,
    launches,
    limits,
    linear_8bit,
    measure,
    models,
    operators,
    plan,
    results,
    sam,
    show,
    training,
)
from .settings import Settings, Task

OPERATORS = tuple(cases.ALL)
WHOLE = ("models", "sam", "training", "linear_8bit", "chains", "launches", "first_call")
PARTS = (*OPERATORS, *WHOLE)
FIRST = "first"
CPU_PARTS = ("models", *OPERATORS)
LARGE = "large"  # whole models that take a CPU minutes each: a part that has to be asked for
COMPILING_SHARE = 0.75  # of a part's share of the time; after it torch.compile is left out
LIMIT_S = 150.0  # a whole model's contestant on a GPU, compiling included
LEAST_S = 90.0  # a row of a whole model is not begun with less left
GRACE_S = 40.0  # what was begun on a GPU ends so long after the deadline at the latest
CPU_MODELS_SHARE = 0.6  # of the whole time on a CPU goes to whole models


def tasks(part: str, settings: Settings) -> Iterator[Task]:
    """The rows of a part. Raises ``ValueError`` for one that the device does not have."""
    if part == FIRST:
        return plan.first(lambda name: tasks(name, settings))
    if part in cases.ALL:
        return operators.tasks(part, settings)
    if part == LARGE and settings.device == "cpu":
        return cpu_models.tasks(settings, large=True)
    if settings.device == "cpu" and not settings.dry:
        if part != "models":
            raise ValueError(f"part {part!r} is for a GPU; on a CPU there are {', '.join((*CPU_PARTS, LARGE))}")
        return cpu_models.tasks(settings)
    whole = {"models": models, "sam": sam, "training": training, "launches": launches, "first_call": first_call}
    whole |= {"linear_8bit": linear_8bit, "chains": chains}
    return whole[part].tasks(settings)


def ceilings_of(device: str, dry: bool = False, quick: bool = False) -> dict[str, float]:
    """The two rates everything is held against: a large copy (bytes read plus written) and a large matrix product.

    bf16 on a GPU; float32 on a CPU, by the faster of PyTorch's own product and oneDNN's, which on AMD's CPUs are far apart.
    """
    size, side = (1 << 30, 8192) if device == "cuda" else (1 << 20, 64) if dry else (1 << 26, 1024) if quick else (1 << 28, 2048)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device) for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    if device == "cpu" and torch.backends.mkldnn.is_available():
        calls["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    if device == "cuda":
        timings = {name: measure.measure([call]) for name, call in calls.items()}
    else:
        timings = measure.interleaved(calls, 0.0 if dry else 0.2 if quick else 2.0)
    copy_ms = timings.pop("copy").ms
    return {"copy_gb_s": 2 * size / copy_ms / 1e6, "gemm_tflop_s": 2 * side**3 / min(t.ms for t in timings.values()) / 1e9}


@dataclass(frozen=True)
class Run:
    """What to run: ``case`` a glob on case names; ``dry`` walks through with tiny shapes and writes nothing."""

    device: str
    parts: tuple[str, ...]
    out: Path
    case: str = "*"
    deadline_s: float = 440.0
    dry: bool = False
    quick: bool = False

    def matches(self, row: results.Row) -> bool:
        return fnmatch.fnmatch(row["case"].lower(), self.case.lower())


class Broken(Exception):
    """A kernel has left the device unusable for this process."""


def _fill(task: Task, settings: Settings) -> results.Row:
    """The row; whatever is raised around its measurement is in it. Where the run's time is over, those who had no turn say so:
    an operator is stopped here, a whole model's contestants one by one."""
    row = task.row
    try:
        with limits.limited(None if row["op"] in show.WHOLE else settings.run_left_s()):
            task.measure(row, settings)
    except limits.TooSlow:
        met = {*row["peers"], *row["unavailable"]}
        row["unavailable"] |= {name: results.NO_TIME for name in task.contestants if name not in met}
        if not row["ours_ms"]:
            row["error"] = f"fastvit: {results.NO_TIME}"
    except results.NotRun as why:
        row["unavailable"]["fastvit"] = str(why)
    except Exception as error:
        row |= results.failure(error)
    if results.is_sticky(row.get("error") or ""):
        row.setdefault("broke", "fastvit")
    return row


def _without_who_broke(task: Task, older: results.Row | None) -> None:
    """Leaves out the peer that broke the device in an earlier run, so that the others get their turn."""
    name = (older or {}).get("broke")
    if older and name in older["unavailable"]:
        task.row["unavailable"][name] = older["unavailable"][name]


def run(job: Run, say: Callable[[str], None] = print) -> tuple[results.Result, Path | None]:
    """(the result file's content, the file): ``say`` is told of every row. Nothing is written in a dry run.

    After a kernel of anyone's that left the device unusable nothing more is begun, and the result says so as ``broken``.
    Raises ``ValueError`` for a part or case that there is none of, and for a file in the way that is no result.
    """
    begun = time.monotonic()
    about = results.environment(job.device)
    path = None if job.dry else results.path_of(job.out, about, datetime.date.today(), job.quick)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written is better known now
    older = results.read(path) if path is not None and path.exists() else None
    if older is not None and older["commit"] != about["commit"]:
        older = None
    base = Settings(job.device, {}, dry=job.dry, quick=job.quick, limit_s=LIMIT_S if job.device == "cuda" else None)
    planned = {part: [task for task in tasks(part, base) if job.matches(task.row)] for part in job.parts}
    if job.device == "cuda":
        planned = plan.estimated(planned, base)
    if not any(planned.values()):
        raise ValueError(f"case {job.case!r} is the name of none in the parts {', '.join(job.parts)}")
    ceilings = ceilings_of(job.device, job.dry, job.quick)
    result = about | ceilings | {"quick": job.quick, "rows": [], "not_begun": []}
    tried = {results.key(row): row for row in older["rows"]} if older else {}  # again, but after what was never begun
    try:
        for index, part in enumerate(planned):
            left = job.deadline_s - (time.monotonic() - begun)
            share = left / (len(planned) - index)
            if job.device == "cpu" and part == "models" and len(planned) > 1:
                share = left * CPU_MODELS_SHARE
            ends = time.monotonic() + COMPILING_SHARE * max(share, 0)
            settings = replace(base, ceilings=ceilings)
            if job.device == "cuda":
                settings.ends = begun + job.deadline_s + GRACE_S
            elif part != FIRST:
                settings.late = functools.partial(lambda at: time.monotonic() > at, ends)
            for task in sorted(planned[part], key=lambda task: results.key(task.row) in tried):
                before = tried.get(results.key(task.row))
                if before and results.is_complete(before, task.only):
                    continue
                now = time.monotonic() - begun
                whole = task.row["op"] in show.WHOLE  # which another run can go on from, contestant by contestant
                takes = min(task.seconds, LEAST_S) if whole else task.seconds
                too_long = result["rows"] and now + takes > job.deadline_s + GRACE_S
                if now > job.deadline_s or too_long:
                    result["not_begun"].append(results.name_of(task.row))
                    continue
                _without_who_broke(task, before)
                if whole and before:
                    task.row.update(copy.deepcopy(results.resumed(before)))
                row = _fill(task, replace(settings, only=task.only))
                result["rows"].append(row)
                say(progress(row))
                if path is not None:
                    results.write(path, results.merge(older, result))
                if "broke" in row:
                    told = row["unavailable"].get(row["broke"]) or row.get("error")
                    raise Broken(f"{results.name_of(row)}: {row['broke']}: {told}")
                if job.device == "cuda":
                    torch.cuda.empty_cache()
    except Broken as error:
        result["broken"] = str(error)
        print(f"benchmarks: the device is unusable after {error}; stopped there", file=sys.stderr)
    if result["not_begun"]:
        print(f"benchmarks: no time left for {len(result['not_begun'])} rows; run it again to go on", file=sys.stderr)
    return results.merge(older, result), path


def progress(row: results.Row) -> str:
    """One line of a row that was just measured."""
    if why := results.why_no_time(row):
        return f"{results.name_of(row)}: {why}"
    found = results.ratio(row)
    against = f", {found:.2f} times as fast as {results.fastest_peer(row)}" if found else ""
    return f"{results.name_of(row)}: {row['ours_ms']:.4g} ms{against}"
