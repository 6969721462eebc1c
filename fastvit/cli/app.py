"""The commands and their options. Work is done elsewhere; here is only what a user types and reads."""

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console

app = typer.Typer(
    name="fastvit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Vision Transformers, faster, without changing the model. (Not Apple's FastViT.)",
)


class Model(str, Enum):
    """Whose model class to demonstrate."""

    hf = "hf"
    timm = "timm"
    both = "both"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}


class UserError(Exception):
    """One line for stderr; the command ends with exit code 1."""


def run() -> None:
    """Runs the command line; what the user can mend ends in one line on stderr, without a traceback."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error), 1)
    except BrokenPipeError:  # `fastvit doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        if not (hasattr(error, "format_message") and hasattr(error, "exit_code")):
            raise
        _fail(error.format_message(), error.exit_code)  # an option or command that does not exist, or a value that does not fit
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    if line:
        print(f"fastvit: {line}", file=sys.stderr)
    raise SystemExit(code) from None


def pick_device(device: Device) -> torch.device:
    """The device asked for, or the best one present. Raises ``UserError`` for a GPU that PyTorch does not see."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU (fastvit doctor says why)")
    return torch.device("cuda" if device is not Device.cpu and torch.cuda.is_available() else "cpu")


@app.command(epilog="Example: `fastvit demo --image photo.jpg --out out`")
def demo(
    image: Annotated[Path | None, typer.Option(help="A picture of your own; its centre square is used.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for pictures and numbers.")] = Path("out"),
    model: Annotated[Model, typer.Option(help="Hugging Face's class, timm's, or both.")] = Model.both,
    size: Annotated[int, typer.Option(min=14, max=2072, help="Side of the square in pixels, a multiple of 14.")] = 518,
    runs: Annotated[int, typer.Option(min=1, max=10_000, help="Timed pairs of runs, after a warm-up.")] = 7,
    device: Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")] = Device.auto,
    dtype: Annotated[Dtype, typer.Option(help="What the models compute in.")] = Dtype.fp32,
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
    try:
        from ..checkpoints import CheckpointError
        from ..demo import Options, PictureError, run_demo
    except ModuleNotFoundError as error:
        raise UserError(f"the demo needs {error.name}: pip install 'fastvit[demo]'") from error
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
        passed = run_demo(options, console)
    except (PictureError, CheckpointError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from error
    if not passed:
        raise UserError("the accelerated model is not the original's equal; the table and out/report.json say by how much")


@app.command(epilog="Example: `fastvit doctor --kernels`")
def doctor(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Without a GPU: check the Triton kernels in Triton's interpreter, on tiny shapes.")
    ] = False,
) -> None:
    """Say what is installed, what serves the operators and why, and check every operator against its definition."""
    from . import doctor as checkup

    if not checkup.run(Console(highlight=False), kernels=kernels):
        raise UserError("a self-check failed: results of that operator cannot be trusted on this machine")


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if show:
        import fastvit

        print(fastvit.__version__)
        raise typer.Exit
