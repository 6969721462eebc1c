"""On a GPU: the kernels checked, the benchmarks and the test suite, in parts that fit into some minutes each.

    python -m benchmarks.gpu [--part smoke|first|attention|linear|models|sam|...|tests|tests1..tests4] [--out DIR]
    python -m benchmarks.gpu --plan [--part PART]    # which rows, and how long they may take; needs no GPU

``smoke`` checks every kernel once, ``first`` measures what matters most of all parts; without a part: smoke, the tests and
everything. Writes ``DIR/<gpu>/<date>-<commit>.json`` after every row, so that a run cut short keeps what it measured, and a run
of the same day and commit goes on where it stopped (``FASTVIT_COMMIT`` names the commit where git cannot). After ``--deadline``
seconds nothing more is begun, nor before what would not be done by then. Without a GPU: one sentence and exit status 2.
``--dry-run`` walks through the same code on a CPU with tiny shapes, measures nothing worth keeping and writes nothing.
"""

import argparse
import collections
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from . import goals, plan, results, show, smoke, suite
from .settings import Settings

TEST_PARTS = tuple(f"tests{number}" for number in range(1, 5))
SMOKE = "smoke"
PARTS = (SMOKE, suite.FIRST, *suite.PARTS, "tests", *TEST_PARTS)
DEADLINE_S = 440.0  # from here on nothing is begun
MARKED = "not aot and not full"  # what only concerns compiling for absent GPUs is left out


def balanced(counts: dict[str, int], groups: int) -> list[list[str]]:
    """Files in groups of about as many tests each: the largest first, each to the group that has least."""
    shares: list[tuple[int, list[str]]] = [(0, []) for _ in range(groups)]
    for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        least = min(range(groups), key=lambda index: shares[index][0])
        shares[least] = (shares[least][0] + count, [*shares[least][1], name])
    return [sorted(names) for _, names in shares]


def count_tests(listing: str) -> dict[str, int]:
    """Tests a file, from what ``pytest --collect-only -q`` prints: a line ``path::name`` for each."""
    return dict(collections.Counter(re.findall(r"^(\S+?\.py)::", listing, flags=re.MULTILINE)))


def run_tests(out: Path, part: str) -> int:
    """The test suite, or one of its parts, on the GPU; the log in JUnit's form goes to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", MARKED]
    files = ["tests"]
    if part != "tests":
        listed = subprocess.run(
            [*pytest, "--collect-only", "tests"], cwd=results.ROOT, capture_output=True, text=True, check=False
        )
        counts = count_tests(listed.stdout)
        if not counts:
            print(f"benchmarks.gpu: no tests were found\n{listed.stdout}{listed.stderr}", file=sys.stderr)
            return 1
        files = balanced(counts, len(TEST_PARTS))[TEST_PARTS.index(part)]
    command = [*pytest, "--tb=short", f"--junitxml={out / f'gpu-{part}.xml'}", *files]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling, which the processes share out
        command += ["-n", str(min(16, os.cpu_count() or 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout=120"]
    return subprocess.run(command, cwd=results.ROOT, check=False).returncode


def run_smoke(job: suite.Run) -> int:
    """Every kernel once; the outcomes go to ``gpu-smoke.json`` in the folder."""
    settings = Settings(job.device, {}, dry=job.dry)
    chosen = smoke.items(lambda name: job.matches({"case": name}), settings)
    found = smoke.run(chosen, settings, job.deadline_s)
    wrong = [told for told in found if told.error is None]
    print(f"{len(found) - len(wrong)} of {len(found)} right")
    for told in wrong:
        print(f"benchmarks.gpu: {smoke.line(told)}", file=sys.stderr)
    if not job.dry:
        smoke.write(job.out / "gpu-smoke.json", found, job.device)
    return 1 if wrong or not found else 0


def print_plan(parts: tuple[str, ...], case: str) -> int:
    """The rows of the parts with estimates, as a GPU would have them."""
    settings = Settings("cuda", {})
    job = suite.Run("cuda", parts, Path(), case)
    planned = {part: [task for task in suite.tasks(part, settings) if job.matches(task.row)] for part in parts}
    for line in plan.lines(plan.estimated(planned, settings)):
        print(line)
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], prog="python -m benchmarks.gpu")
    parser.add_argument("--part", choices=PARTS, help="one part instead of all")
    parser.add_argument("--case", default="*", metavar="GLOB", help="only cases of such names")
    parser.add_argument("--out", type=Path, default=results.ROOT / "benchmarks" / "results", help="folder (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds a run (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; writes nothing")
    parser.add_argument("--plan", action="store_true", help="print rows and estimated seconds; run nothing")
    options = parser.parse_args(arguments)
    parts = (options.part,) if options.part else (SMOKE, "tests", *suite.PARTS)
    timed = tuple(part for part in parts if part != SMOKE and not part.startswith("tests"))
    if options.plan:
        return print_plan(timed, options.case)
    if not options.dry_run and not torch.cuda.is_available():
        print(f"benchmarks.gpu: PyTorch {torch.__version__} sees no GPU here; nothing was run", file=sys.stderr)
        return 2
    device = "cpu" if options.dry_run else "cuda"
    job = suite.Run(device, timed, options.out, options.case, options.deadline, dry=options.dry_run)
    status = 0
    for part in parts:
        if part == SMOKE:
            status |= run_smoke(job)
        elif part.startswith("tests") and not options.dry_run:
            status |= run_tests(options.out, part)
    return status | (run_benchmarks(job) if timed else 0)


def run_benchmarks(job: suite.Run) -> int:
    try:
        result, path = suite.run(job)
    except (ValueError, OSError) as error:  # no such case, or a file in the way that is no result
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 1
    show.print_rows(result["rows"])
    print(f"ceilings: {result['copy_gb_s']:.0f} GB/s copy, {result['gemm_tflop_s']:.3g} TFLOP/s matrix product")
    if job.dry:
        print("a dry run on the CPU: these are no measurements, and nothing was written")
    elif path is not None and path.exists():
        print("\n".join(line for line in goals.listed(result["rows"], result["gpu"]) if not line.endswith("not measured")))
        print(f"wrote {path}")
    return 1 if result.get("broken") or any(row.get("error") for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
