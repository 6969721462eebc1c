"""The commands, and how each of them ends: in silence, or in one line on stderr and a non-zero exit."""

import os
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from .bench import bench
from .classify import classify
from .demo import demo
from .models import accelerate, verify
from .options import Interrupted, UserError, plain
from .segment import segment
from .tune import tune

app = typer.Typer(
    name="fastvit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Vision Transformers, faster, without changing the model. (Not Apple's FastViT.)",
)
app.command(epilog="Example: `fastvit demo --image photo.jpg --out out`")(demo)
app.command(epilog="Example: `fastvit accelerate --dry-run timm/vit_base_patch16_224`")(accelerate)
app.command(epilog="Example: `fastvit verify google/vit-base-patch16-224 --image photo.jpg`")(verify)
app.command(epilog="Example: `fastvit classify photo.jpg --model timm/vit_base_patch16_224`")(classify)
app.command(epilog="Example: `fastvit segment photo.jpg --checkpoint sam_vit_b_01ec64.pth --point 320,240 --out out`")(segment)
app.command(epilog="Example: `fastvit bench --part attention --case 'SAM*' --out out/bench`")(bench)
app.command(epilog="Example: `fastvit tune --op 'attention_*' --case 'ViT*' --minutes 8`")(tune)


def run() -> None:
    """Runs the command line; what the user can mend ends in one line on stderr, without a traceback."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error), error.code)
    except BrokenPipeError:  # `fastvit doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", Interrupted.code)
    except Exception as error:
        if not (hasattr(error, "format_message") and hasattr(error, "exit_code")):
            raise
        _fail(error.format_message(), error.exit_code)  # an option or command that does not exist, or a value that does not fit
    if code == Interrupted.code:  # Typer 0.29 makes this of a KeyboardInterrupt, and says nothing
        _fail("interrupted", code)
    raise SystemExit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    line = plain(" ".join(message.split()))
    if line:
        print(f"fastvit: {line}", file=sys.stderr)
    raise SystemExit(code) from None


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
