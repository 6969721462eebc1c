"""From a name and a picture on the command line to a model and what it is called with."""

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import loading
from .._torchvision import ensure_importable
from .options import UserError, needs

if TYPE_CHECKING:
    from PIL import Image


@contextmanager
def user_errors() -> Iterator[None]:
    """Names, pictures and patterns that cannot be used (each a ``ValueError`` of one line) become a ``UserError``."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def open_model(name: str, device: torch.device, dtype: torch.dtype, weights: bool = True) -> nn.Module:
    """The model, not accelerated; without weights it stays on the ``meta`` device. Libraries' own messages are muted."""
    _mute()
    with user_errors():
        model = loading.load_original(name, weights=weights)
    return model.requires_grad_(False).to(device=device if weights else None, dtype=dtype)


def _mute() -> None:
    for name in ("timm", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the refusal that follows says enough
    ensure_importable()
    try:
        from transformers.utils import logging as transformers_logging
    except ImportError:
        return
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@dataclass
class Call:
    """A picture as a model is called with it."""

    view: "Image.Image"  # the part that the model sees
    pixels: Tensor
    keywords: dict[str, Any]
    title: str  # what the picture is
    prepared: str  # and how it was brought into shape

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return () if self.keywords else (self.pixels,)

    def run(self, model: nn.Module) -> Any:
        with torch.inference_mode():
            return model(*self.arguments, **self.keywords)


def picture_for(model: nn.Module, image: Path | None, exact: bool = False) -> Call:
    """The picture, or the sample photograph, for ``model`` on its device and in its dtype.

    A model that does not say how its pictures are normalized gets ImageNet's numbers, and ``prepared`` says so; with
    ``exact`` it is refused. Raises ``UserError`` for a picture that cannot be used and a model that takes none.
    """
    with needs("pictures", "a picture"):
        from ..images import read_picture
    path, title = image, str(image)
    if path is None:
        with needs("demo", "the sample photograph"):
            from ..demo.picture import SAMPLE_CREDIT, sample_picture
        title = f"sample photograph ({SAMPLE_CREDIT})"
    with user_errors():
        picture = read_picture(sample_picture() if path is None else path)
        recipe = _recipe(model, exact)
    view = recipe.view(picture)
    parameter = next(model.parameters())
    pixels = recipe.pixels(view).to(parameter.device, parameter.dtype)
    height, width = recipe.size
    return Call(view, pixels, _keywords(model, pixels), title, f"{width}×{height} pixels, normalization: {recipe.source}")


def blank_for(model: nn.Module) -> tuple[tuple, dict[str, Any]] | None:
    """Arguments and keywords of a call with an empty picture, for counting; None where the model takes none of known size."""
    try:
        recipe = _recipe(model, exact=False)
    except loading.LoadError:
        return None
    parameter = next(model.parameters())
    pixels = torch.zeros(1, 3, *recipe.size, device=parameter.device, dtype=parameter.dtype)
    keywords = _keywords(model, pixels)
    return (() if keywords else (pixels,)), keywords


def _recipe(model: nn.Module, exact: bool) -> loading.Preprocessing:
    try:
        return loading.preprocessing(model)
    except loading.LoadError:
        if exact:
            raise
    return loading.assumed_preprocessing(model)


def _keywords(model: nn.Module, pixels: Tensor) -> dict[str, Any]:
    """Hugging Face's models take pictures by name; one of pictures and texts gets a text of two tokens as well."""
    parameters = inspect.signature(model.forward).parameters
    if "pixel_values" not in parameters:
        if not hasattr(model, "pretrained_cfg"):
            raise UserError(f"{type(model).__name__} is no model of pictures")
        return {}
    text = {"input_ids": torch.zeros(1, 2, dtype=torch.long, device=pixels.device)} if takes_text(model) else {}
    return {"pixel_values": pixels, **text}


def takes_text(model: nn.Module) -> bool:
    return "input_ids" in inspect.signature(model.forward).parameters
