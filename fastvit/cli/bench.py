"""``fastvit bench``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import Device, DeviceOption, UserError, pick_device, say, writing


def bench(
    device: DeviceOption = Device.auto,
    part: Annotated[list[str] | None, typer.Option(help="Only this part; may be given again. An unknown one lists them.")] = None,
    case: Annotated[str, typer.Option(metavar="GLOB", help="Only cases of such names, as 'SAM-B*'.")] = "*",
    out: Annotated[Path, typer.Option(help="The folder for the JSON, the Markdown page and the plots.")] = Path("out/bench"),
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An older JSON: exit with 1 if anything takes over 5 % longer.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repetitions; nothing is compiled.")] = False,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds; then nothing more is begun. Run it again to go on.")] = 560.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Walk through on tiny shapes and write nothing.")] = False,
) -> None:
    """Time the operators and whole models on this machine against what else computes the same.

    Every result is checked before it is timed. On a GPU: bfloat16, forward and backward, SDPA's backends, FlexAttention and
    torch.compile; on a CPU: float32, forward, fewer images. Losses are listed first.
    """
    from ..benchmarks import plots, results, show, suite

    target = pick_device(device).type
    whole_run = suite.PARTS if target == "cuda" or dry_run else suite.CPU_PARTS
    allowed = whole_run if target == "cuda" else (*whole_run, suite.LARGE)
    parts = tuple(part or whole_run)
    for name in parts:
        if name not in allowed:
            raise UserError(f"--part {name}: expected one of {', '.join(allowed)}")
    console = Console(highlight=False)
    older = _read(compare) if compare else None
    job = suite.Run(target if not dry_run else "cpu", parts, out, case, deadline, dry=dry_run, quick=quick)
    try:
        with writing(out):
            result, path = suite.run(job, lambda line: say(console, line))
            measured = result["rows"]
            show.print_rows(measured)
            if path is not None and path.exists():
                pictures = _draw(plots, result, path, console)
                path.with_suffix(".md").write_text(show.page(result, [picture.name for picture in pictures]))
                say(console, f"wrote {path}, {path.with_suffix('.md').name} and {len(pictures)} plots beside it")
    except ValueError as error:  # a file in the way that is no result
        raise UserError(str(error)) from error
    if older is not None:
        older["rows"] = [row for row in older["rows"] if job.matches(row)]
        kinds = {row["op"] for row in measured}  # what other parts hold was not to be measured
        older["rows"] = [row for row in older["rows"] if row["op"] in kinds]
        losses, notes, compared = results.compare(older, result)
        rule = "time over eager's of the same run" if target == "cpu" else "time"
        say(console, f"{compared} compared by {rule}: a loss is over 5 % more, beyond both spreads")
        for line in (*notes, *losses):
            say(console, line)
        if not compared:
            raise UserError(f"--compare {compare}: nothing in it was measured in this run")
        if losses:
            raise UserError(f"{len(losses)} of {compared} are over 5 % slower than in {compare}, or fail now")
    if result.get("broken"):
        raise UserError(f"the device was left unusable by {result['broken']}")
    failed = [row for row in measured if row.get("error")]
    if failed:
        raise UserError(f"{len(failed)} of {len(measured)} failed; the first: {results.name_of(failed[0])}: {failed[0]['error']}")


def _read(path: Path):
    from ..benchmarks import results

    try:
        with writing(path):
            return results.read(path)
    except ValueError as error:
        raise UserError(f"--compare {error}") from error


def _draw(plots, result, path: Path, console: Console) -> list[Path]:
    try:
        return plots.draw(result, path.with_suffix(""))
    except ModuleNotFoundError as error:
        say(console, f"no plots: they need {error.name}: pip install 'fastvit[pictures]'")
        return []
