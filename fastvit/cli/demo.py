"""``fastvit demo``."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .options import DTYPES, Device, DeviceOption, Dtype, DtypeOption, UserError, needs, pick_device, say, writing


class Model(str, Enum):
    """Whose model class to demonstrate."""

    hf = "hf"
    timm = "timm"
    both = "both"


def demo(
    image: Annotated[Path | None, typer.Option(help="A picture of your own; its centre square is used.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for pictures and numbers.")] = Path("out"),
    model: Annotated[Model, typer.Option(help="Hugging Face's class, timm's, or both.")] = Model.both,
    size: Annotated[int, typer.Option(min=14, max=2072, help="Side of the square in pixels, a multiple of 14.")] = 518,
    runs: Annotated[int, typer.Option(min=1, max=10_000, help="Timed pairs of runs, after a warm-up.")] = 7,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.fp32,
    docs: Annotated[Path | None, typer.Option(hidden=True, help="A folder for small copies of the pictures.")] = None,
) -> None:
    """Accelerate a real ViT on a real photograph: pictures, and a table of time, memory and error.

    The model is a trained DINOv2-S/14 with a saliency head, in Hugging Face's and in timm's implementation. It is run,
    accelerated, verified against the original, run again, timed and restored.
    """
    console = Console(highlight=False)
    target = pick_device(device)
    if size % 14:
        raise UserError(
            f"--size {size} is not a multiple of 14, the model's patch; the nearest is {max(14, round(size / 14) * 14)}"
        )
    with needs("demo", "the demo"):
        from ..checkpoints import CheckpointError
        from ..demo import Options, PictureError, run_demo
    libraries = ("hf", "timm") if model is Model.both else (model.value,)
    options = Options(
        image=image,
        out=out,
        libraries=libraries,  # type: ignore[arg-type]
        size=size,
        runs=runs,
        device=target,
        dtype=DTYPES[dtype],
        docs=docs,
    )
    try:
        with writing(out):
            passed = run_demo(options, console)
    except (PictureError, CheckpointError) as error:
        raise UserError(str(error)) from error
    say(console, f"\npictures, report.json and report.md written to {out}")
    if not passed:
        raise UserError("the accelerated model is not the original's equal; the table and out/report.json say by how much")
