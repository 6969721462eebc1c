"""Every kernel at every row of a table, compiled in several processes, and what of it must not be."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import torch
import triton
from fastvit.kernels._tuning import table

from .compilation import TARGETS, Job, Report, compile_job, jobs

MAX_STACK = 32  # bytes a thread: what the compiler sets aside for calls, as against spilled tiles

# Rows are chosen by what the snapshot's Triton makes of them; (release, table) → bytes of stack a thread that other releases
# are known to keep, at most, by operator.
KNOWN_STACK: dict[tuple[str, str], dict[str, int]] = {
    ("3.6", "sm_80"): {"layer_norm_backward": 168},
    ("3.6", "sm_90"): {"layer_norm_backward": 192},
    ("3.6", "sm_100"): {"attention_backward_mask": 48, "attention_forward": 8, "layer_norm_backward": 216},
    ("3.6", "sm_120"): {"layer_norm_backward": 56},
    ("3.6", "gfx942"): {"attention_backward_key": 64, "rotary_attention": 60},
    ("3.6", "default"): {"layer_norm_backward": 144},
    ("3.9", "sm_80"): {"attention_backward_mask": 88, "attention_backward_query": 192, "image_attention_window": 1880},
    ("3.9", "sm_90"): {
        "attention_backward_query": 168,
        "attention_backward_short": 56,
        "attention_forward": 112,
        "image_attention_global": 16,
    },
    ("3.9", "sm_100"): {"attention_backward_mask": 56},
    ("3.9", "sm_120"): {"attention_backward_mask": 40, "attention_backward_query": 48},
    ("3.9", "gfx942"): {"attention_backward_key": 140},
    ("3.9", "default"): {"attention_forward": 8},
}


def known_stack(target: str, op: str) -> int:
    """Of ``KNOWN_STACK``, for this release of Triton; 0 where nothing is known."""
    release = ".".join(triton.__version__.split(".")[:2])
    return KNOWN_STACK.get((release, target), {}).get(op, 0)


@cache
def capacities() -> list[int]:
    """The bytes of shared memory that a program may take on NVIDIA's GPUs, by which alone a row is passed over."""
    return sorted({table(target)["shared_memory"] for target in TARGETS if not target.startswith("gfx")})


def problems(report: Report, shared_limit: int, rows: list[dict[str, Any]], known: int = 0) -> list[str]:
    """What must not be, in words: too much stack or shared memory, no tensor cores, products in turn, narrow loads, atomics, and
    of dependent launches (``undisciplined``).

    ``rows``: the operator's in the table; no GPU's shared memory may lie between what they state and what the launch takes.
    ``known``: bytes of stack that it may keep.
    """
    if report.error:
        return [f"{report.name} does not compile: {report.error}"]
    found = []
    exact = report.matrix and report.dtype == "fp32"  # exact products have no tensor-core instruction; their tiles are narrow
    spills = report.counts.get("spills", 0)
    if report.stack > max(MAX_STACK, known) or (report.forward and spills and not known):
        found.append(f"spills: {report.stack} bytes of stack, {spills} spill instructions")
    if report.shared > shared_limit:
        found.append(f"takes {report.shared} bytes of shared memory of {shared_limit}")
    stated = min((rows[number].get("shared", shared_limit) for number in report.rows), default=shared_limit)
    if any(stated <= capacity < report.shared for capacity in capacities()) and report.shared <= shared_limit:
        found.append(f"takes {report.shared} bytes of shared memory, more than its row's {stated}")
    if report.matrix and not exact and not report.tensor_core:
        found.append("uses no tensor cores")
    if report.serialized:
        found.append(f"waits for each of its {report.serialized} tensor-core instructions (ptxas: serialized)")
    if not exact and not report.counts.get("wide_loads"):
        found.append(f"has no 16-byte load among its {report.counts.get('loads', 0)}")
    if report.atomics:
        found.append(f"has {report.atomics} atomics, whose order is not the same twice")
    return [f"{report.name} {problem}" for problem in (*found, *undisciplined(report))]


def undisciplined(report: Report) -> Iterator[str]:
    """Where a kernel does not keep to what makes dependent launches safe: every way through it waits for the kernels ahead before
    it reads or writes memory, only then does it let the next one begin, and a launch that is not dependent does neither."""
    waits, triggers = report.counts.get("waits", 0), report.counts.get("triggers", 0)
    if not report.dependent:
        if waits or triggers:
            yield "waits for kernels ahead or lets the next begin, and is no dependent launch"
        return
    if report.unwaited:
        yield f"has not waited for the kernels ahead before: {', '.join(report.unwaited)}"
    if waits != 1 or triggers != 1:
        yield f"waits {waits} times for the kernels ahead and lets the next begin {triggers} times, not once each"


@cache
def _jobs_of_this_process(target: str, op: str, one_a_row: bool) -> list[Job]:
    return jobs(target, op, one_a_row)[0]


def _compile_numbered(target: str, op: str, one_a_row: bool, number: int) -> Report:
    torch.set_num_threads(1)
    return compile_job(_jobs_of_this_process(target, op, one_a_row)[number], TARGETS[target])


def inspect(
    target: str, op: str = "", processes: int = 1, one_a_row: bool = False, share: tuple[int, int] = (1, 1)
) -> dict[str, Any]:
    """{"target", "gpu", "triton", "shared_memory", "uncovered", "names", "problems", "rows": [Report, …]} of a table.

    ``share``: (k, n) compiles every n-th of the launches from the k-th on; "names" are those of all.
    """
    todo, uncovered = jobs(target, op, one_a_row)
    numbers = range(share[0] - 1, len(todo), share[1])
    if processes > 1:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            reports = list(pool.map(partial(_compile_numbered, target, op, one_a_row), numbers))
    else:
        reports = [compile_job(todo[number], TARGETS[target]) for number in numbers]
    limit, ops = table(target)["shared_memory"], table(target)["ops"]
    return {
        "target": target,
        "gpu": TARGETS[target],
        "triton": triton.__version__,
        "torch": torch.__version__,
        "shared_memory": limit,
        "uncovered": uncovered,
        "names": [job.name for job in todo],
        "problems": [
            problem for report in reports for problem in problems(report, limit, ops[report.op], known_stack(target, report.op))
        ],
        "rows": [asdict(report) for report in reports],
    }
