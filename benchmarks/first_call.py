"""What the first call of an operator costs: in a fresh process with empty compiler caches, and in another that finds them full.

A child process imports the library, makes the inputs, wakes the device, and times one call: ``ours_ms`` cold, ``warm_cache_ms``
from the cache that the cold one left, ``peers["compile"]`` what torch.compile of the same operator takes cold.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import cases, operators, peers, results
from .settings import Settings, Task

TIMEOUT_S = 300


def one_of_each() -> list[tuple[str, int]]:
    """(part, index) of the first case of every operator."""
    found: dict[str, tuple[str, int]] = {}
    for part, group in cases.ALL.items():
        for index, case in enumerate(group):
            found.setdefault(case.op, (part, index))
    return list(found.values())


def tasks(settings: Settings) -> Iterator[Task]:
    for part, index in one_of_each()[: 1 if settings.dry else None]:
        sized = operators.subject(cases.ALL[part][index], settings)
        row = results.new_row(sized.name, sized.op, "first_call", settings.dtype, sized.shape)
        yield Task(row, functools.partial(run, part, index), contestants=("compile",))


def run(part: str, index: int, row: results.Row, settings: Settings) -> None:
    def ask(who: str, caches: Path) -> dict[str, Any]:
        package = __name__.rpartition(".")[0]
        command = [sys.executable, "-m", f"{package}.first_call", part, str(index), who, settings.device, row["dtype"]]
        command += ["--dry"] if settings.dry else []
        places = {"TRITON_CACHE_DIR": str(caches / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
        path = os.pathsep.join(filter(None, [str(results.ROOT_OF_IMPORTS), os.environ.get("PYTHONPATH")]))
        environment = os.environ | places | {"PYTHONPATH": path}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if ran.returncode:
            raise RuntimeError((ran.stderr.strip().splitlines() or ["no message"])[-1])
        return json.loads(ran.stdout.splitlines()[-1])

    with tempfile.TemporaryDirectory() as folder:
        cold = ask("ours", Path(folder))
        row |= {"ours_ms": cold["first_ms"], "second_call_ms": cold["second_ms"]}
        row["warm_cache_ms"] = ask("ours", Path(folder))["first_ms"]
    reason = settings.why_not("compile") or settings.why_not_compiled()
    if reason is None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                row["peers"]["compile"] = ask("compile", Path(folder))["first_ms"]
        except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:  # a peer's failure is not ours
            reason = results.describe(error)
    if reason is not None:
        row["unavailable"]["compile"] = reason


def child(part: str, index: int, who: str, device: str, dtype: str, dry: bool) -> dict[str, float]:
    settings = Settings(device, {}, dry=dry)
    case = operators.subject(cases.ALL[part][index], settings)
    inputs = case.inputs(cases.DTYPES[dtype], device, requires_grad=False)
    function, _, competing = peers.contestants(case)
    if who == "compile":
        function = torch.compile(competing["compile"].build(), fullgraph=True)
    times = []
    for _ in range(2):
        _wait(device)
        start = time.perf_counter()
        with torch.no_grad():
            function(**inputs)
        _wait(device)
        times.append((time.perf_counter() - start) * 1e3)
    return {"first_ms": times[0], "second_ms": times[1]}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part")
    parser.add_argument("index", type=int)
    parser.add_argument("who", choices=("ours", "compile"))
    parser.add_argument("device")
    parser.add_argument("dtype")
    parser.add_argument("--dry", action="store_true")
    print(json.dumps(child(**vars(parser.parse_args()))))
