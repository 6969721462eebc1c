"""Compiles the launches of every operator for a target and prints what came out.

    python -m benchmarks.static --target sm_90 [--op attention] [--json] [--jobs 2]
    python -m benchmarks.static --target all --write        # rewrites benchmarks/snapshots and the tables' shared memory

Exit status 1: a row that no shape reaches, or a kernel that spills, does not compile, lacks tensor cores or waits for each of
their instructions; 2: wrong options.
"""

import argparse
import json
import os
import re
import sys

os.environ.pop("TRITON_INTERPRET", None)  # a Triton that interprets has nothing to compile
os.environ.pop("FASTVIT_TABLES", None)  # the committed tables are inspected

from collections.abc import Iterator
from typing import Any, NoReturn

import triton
from fastvit.kernels._tuning import TABLES, committed

from .. import launch_tables
from . import snapshot
from .compilation import TARGETS, jobs
from .inspection import inspect


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"{result['target']} compiled for {result['gpu']} by Triton {result['triton']}; loop: one round of the hottest loop"
    yield (
        f"{'kernel':34} {'dtype':5} {'regs':>5} {'stack':>5} {'spills':>6} {'shared':>7} {'occ':>4} {'instr':>6} {'wide/all':>8}"
        f" {'serial':>6}  tensor cores | loop: instr, tensor cores, exp2, conversions, mul/add/fma"
    )
    for row in result["rows"]:
        counts, loop = row["counts"], row["loop"] or {}
        occupancy = "" if row["occupancy"] is None else f"{row['occupancy']:.0%}"
        float32 = "/".join(str(loop.get(kind, 0)) for kind in ("multiplications", "additions", "fused"))
        inner = [_matrix(loop), f"exp2:{loop.get('exp2', 0)}", f"cvt:{loop.get('conversions', 0)}", float32]
        yield (
            f"{row['kernel']:34} {row['dtype']:5} {row['registers']:5} {row['stack']:5} {counts.get('spills', 0):6}"
            f" {row['shared']:7} {occupancy:>4} {counts.get('instructions', 0):6}"
            f" {counts.get('wide_loads', 0):>4}/{counts.get('loads', 0):<3} {row['serialized']:6}  {_matrix(counts)}"
            f" | {' '.join([str(loop['instructions']), *inner]) if loop else 'no loop'}  [{row['asked_by'][0]}]"
        )
    yield from (f"no shape reaches {row}" for row in result["uncovered"])
    yield from result["problems"]


def _matrix(counts: dict[str, int]) -> str:
    return " ".join(f"{name}:{number}" for name, number in counts.items() if name.isupper())


def _write(result: dict[str, Any]) -> None:
    target = result["target"]
    firsts = {job.name for job in jobs(target, one_a_row=True)[0]}
    lines = snapshot.lines_of([row for row in result["rows"] if row["name"] in firsts])
    snapshot.FOLDER.mkdir(exist_ok=True)
    snapshot.path_of(target).write_text(snapshot.dump(target, result["triton"], lines))
    measured = launch_tables.with_shared_memory(committed(target), result["rows"])
    (TABLES / f"{target}.json").write_text(launch_tables.dump(measured))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.static")
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="sm_90", help="the tuning table (default: %(default)s)")
    parser.add_argument("--op", default="", help="only operators whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--rows", action="store_true", help="of each kernel, table row and dtype only the hottest variant")
    parser.add_argument("--share", default="1/1", metavar="K/N", help="every N-th launch from the K-th on (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="rewrite the snapshot, and the shared memory in the table")
    options = parser.parse_args(arguments)

    def refuse(why: str) -> NoReturn:
        parser.exit(2, f"{parser.prog}: {why}\n")

    if options.write and (options.op or options.rows or options.share != "1/1"):
        refuse("--write needs every launch: leave out --op, --rows and --share")
    if options.write and triton.__version__ != snapshot.TRITON:
        refuse(f"--write: the snapshot is kept for Triton {snapshot.TRITON}, this is {triton.__version__}")
    share = re.fullmatch(r"(\d{1,6})/(\d{1,6})", options.share)
    first, every = map(int, share.groups()) if share else (0, 0)
    if not 1 <= first <= every:
        refuse(f"--share: got {options.share}, expected K/N with 1 ≤ K ≤ N")
    targets = list(TARGETS) if options.target == "all" else [options.target]
    ops = sorted({name for target in targets for name in committed(target)["ops"]})
    if not any(options.op in name for name in ops):
        refuse(f"--op: got {options.op}, expected a part of one of {', '.join(ops)}")
    status = 0
    for target in targets:
        result = inspect(target, options.op, options.jobs, options.rows, (first, every))
        if options.write:
            _write(result)
        if options.json:
            json.dump(result, sys.stdout, indent=1)
            print()
        else:
            print("\n".join(_lines(result)))
        status |= bool(result["uncovered"] or result["problems"])
    return status


if __name__ == "__main__":
    sys.exit(main())
