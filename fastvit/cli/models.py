"""``fastvit accelerate`` and ``fastvit verify``: what the library does with a model that has a name."""

import copy
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

import fastvit

from ..ops.quantized import why_not
from .inputs import blank_for, open_model, picture_for, user_errors
from .options import (
    DTYPES,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    ImageOption,
    NameArgument,
    Precision,
    UserError,
    check_target,
    needs,
    pick_device,
    plain,
    say,
    writing,
)

Patterns = Annotated[list[str] | None, typer.Option(help="A glob pattern on module names; may be given several times.")]


def accelerate(
    name: NameArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be done: no weights, no download of any.")
    ] = False,
    include: Patterns = None,
    exclude: Patterns = None,
    html: Annotated[Path | None, typer.Option(help="A file for the report as a web page.")] = None,
    image: ImageOption = None,
    runs: Annotated[int, typer.Option(min=1, max=10_000, help="Timed pairs of runs, after a warm-up.")] = 5,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.fp32,
    precision: Annotated[Precision | None, typer.Option(help="Linears in 8 bits, for inference on a GPU that has them.")] = None,
) -> None:
    """Report which blocks of a model fastvit serves, and time the model before and after.

    With --dry-run the model is built from its config alone, and nothing is run.
    """
    console = Console(highlight=False)
    if html is not None:
        check_target(html)
    model = open_model(name, pick_device(device), DTYPES[dtype], weights=not dry_run)
    original = None if dry_run else copy.deepcopy(model)
    with user_errors():
        in_8_bits = precision and precision.value
        fastvit.accelerate(model, include=include, exclude=exclude, precision=in_8_bits, dry_run=dry_run)
    arguments, keywords = blank_for(model) or ((), {})
    report = fastvit.report(model, *arguments, **keywords)
    say(console, report)
    if in_8_bits and (reason := why_not(in_8_bits, pick_device(device))):
        say(console, f"{in_8_bits.upper()} does not run here: {reason}")
    if html is not None:
        with writing(html):
            html.write_text(report.to_html(), encoding="utf-8")
        say(console, f"report written to {html}")
    if original is not None and report.replaced:
        _time(console, original, model, image, runs)


def _time(console: Console, original: nn.Module, model: nn.Module, image: Path | None, runs: int) -> None:
    with needs("demo", "timing"):
        from ..demo.measure import paired_times
    call = picture_for(model, image)
    with console.status(f"timing {runs} pairs of runs"):
        times = paired_times(lambda: call.run(original), lambda: call.run(model), runs, call.pixels.device)
    say(
        console,
        f"time: {times.median_original * 1e3:.1f} → {times.median_accelerated * 1e3:.1f} ms, ratio {times.median_ratio:.2f}"
        f" (below 1 is faster; median of {runs} interleaved pairs, one picture, {call.prepared.partition(',')[0]},"
        f" {str(call.pixels.dtype).removeprefix('torch.')} on {call.pixels.device.type})",
    )


def verify(
    name: NameArgument,
    image: ImageOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.fp32,
) -> None:
    """Compare a model accelerated with its original on a picture, in float32, layer by layer."""
    console = Console(highlight=False)
    model = open_model(name, pick_device(device), DTYPES[dtype])
    call = picture_for(model, image)
    fastvit.accelerate(model)
    say(console, f"picture: {call.title}, {call.prepared}")
    with user_errors():
        verdict = fastvit.verify(model, *call.arguments, **call.keywords)
    if verdict.trace:
        console.print(_trace(verdict))
    say(console, verdict)
    if not verdict.passed:
        raise UserError(f"{name}: the accelerated model is not the original's equal")


def _trace(verdict: Any) -> Table:
    """The error of every call of a block, in order."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("block")
    table.add_column("relative error", justify="right")
    table.add_column("of its own doing", justify="right")
    for block in verdict.trace:
        colour = "" if block.own_error <= verdict.tolerance else "red"
        name = Text(plain(block.name or "(the model)"))
        table.add_row(name, f"{block.relative_error:.1e}", Text(f"{block.own_error:.1e}", colour))
    return table
