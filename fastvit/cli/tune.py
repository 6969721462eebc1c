"""``fastvit tune``."""

import fnmatch
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from .options import UserError, say, writing


class NoGpu(UserError):
    """There is nothing to measure on."""

    code = 2


def tune(
    op: Annotated[
        str, typer.Option(metavar="GLOB", help="Only operators of the tables, as 'attention_*', or choices, as 'dispatch *'.")
    ] = "*",
    case: Annotated[str, typer.Option(metavar="GLOB", help="Only cases of such names, as 'SAM-B*'.")] = "*",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The table to write [default: out/tables/<target>.json].")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="Then no other candidate is begun. Run it again to go on.")] = 8.0,
) -> None:
    """Measure launch configs and the vendor's operators on this GPU and write what wins as a table.

    Every candidate is compiled and checked against float64 before it is timed, the shapes that matter most first. What was
    measured is kept in a log beside the table and not measured again. FASTVIT_TABLES=out/tables makes the library use the table.
    """
    if not torch.cuda.is_available():
        raise NoGpu(f"PyTorch {torch.__version__} sees no GPU here; nothing was tuned")
    from fastvit.kernels import _launch, _tuning

    from ..benchmarks import tune as tuner

    if not any(fnmatch.fnmatch(name, op) for name in tuner.names()):
        raise UserError(f"--op {op}: no operator has such a name; there are {', '.join(tuner.names())}")
    chosen = tuner.subjects(case)
    if not chosen:
        raise UserError(f"--case {case}: no case has such a name")
    target = _launch.target_of(torch.empty(0, device="cuda"))
    limit = _tuning.shared_memory(target) or _tuning.committed(target)["shared_memory"]
    path = out or Path("out/tables") / f"{target}.json"
    console = Console(highlight=False)
    try:
        with writing(path):
            log = tuner.Log(path.with_suffix(".log.jsonl"), tuner.about(target))
            if log.dropped is not None:
                say(console, f"{log.path}: its last line is half written, as by a run that was ended; dropped it")
            pool, inspect_all = tuner.inspecting(target, limit, tuner.processes())
            try:
                complete = tuner.Run(chosen, target, log, lambda line: say(console, line), inspect_all, op, minutes)()
            finally:
                pool.close()
                if log.entries:
                    tuner.write(log, path, limit)
    except ValueError as error:
        raise UserError(str(error)) from error
    except tuner.Broken as error:
        raise UserError(
            f"the device failed and is unusable until the process ends; run it again to go on after {error}"
        ) from error
    for line in tuner.rejected(log):
        say(console, f"no time: {line}")
    say(console, f"wrote {path}; FASTVIT_TABLES={path.parent} uses it")
    if not complete:
        say(console, f"not everything was measured in {minutes:g} minutes; run it again to go on")
