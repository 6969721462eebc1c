"""On a GPU: the test suite, then every benchmark, in parts that fit into some minutes each.

    python -m benchmarks.gpu [--part tests|tests1..tests4|attention|linear|models|sam|...] [--out DIR]

Writes ``DIR/<gpu>/<date>-<commit>.json`` after every row, so that a run cut short keeps what it measured, and a run of the same
day and commit goes on where it stopped (``FASTVIT_COMMIT`` names the commit where git cannot). After ``--deadline`` seconds
nothing more is begun; shortly before, torch.compile is left out. Without a GPU: one sentence and exit status 2. ``--dry-run``
walks through the same code on a CPU with tiny shapes, measures nothing worth keeping and writes nothing.
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

from . import results, show, suite

TEST_PARTS = tuple(f"tests{number}" for number in range(1, 5))
PARTS = ("tests", *TEST_PARTS, *suite.PARTS)
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], prog="python -m benchmarks.gpu")
    parser.add_argument("--part", choices=PARTS, help="one part instead of all")
    parser.add_argument("--case", default="*", metavar="GLOB", help="only cases of such names")
    parser.add_argument("--out", type=Path, default=results.ROOT / "benchmarks" / "results", help="folder (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds a run (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; writes nothing")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print(f"benchmarks.gpu: PyTorch {torch.__version__} sees no GPU here; nothing was run", file=sys.stderr)
        return 2
    parts = (options.part,) if options.part else ("tests", *suite.PARTS)
    status = 0
    for part in parts:
        if part.startswith("tests") and not options.dry_run:
            status |= run_tests(options.out, part)
    timed = tuple(part for part in parts if not part.startswith("tests"))
    if not timed:
        return status
    device = "cpu" if options.dry_run else "cuda"
    job = suite.Run(device, timed, options.out, options.case, options.deadline, dry=options.dry_run)
    try:
        result, path = suite.run(job)
    except (ValueError, OSError) as error:  # no such case, or a file in the way that is no result
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 1
    show.print_rows(result["rows"])
    print(f"ceilings: {result['copy_gb_s']:.0f} GB/s copy, {result['gemm_tflop_s']:.3g} TFLOP/s matrix product")
    if options.dry_run:
        print("a dry run on the CPU: these are no measurements, and nothing was written")
    elif path is not None and path.exists():
        print(f"wrote {path}")
    return 1 if status or result.get("broken") or any(row.get("error") for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
