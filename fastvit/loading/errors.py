"""One kind of error for everything that keeps a model from being loaded."""

import importlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .. import _torchvision

BROUGHT = {"timm", "transformers", "huggingface_hub", "safetensors", "tokenizers", "torchvision", "yaml"}  # by fastvit[models]


class LoadError(ValueError):
    """A model that cannot be loaded; the message is one line that names it and the reason."""


@contextmanager
def explained(name: Any) -> Iterator[None]:
    """Within it, whatever a library raises over a name, a file or the network becomes a ``LoadError`` of one line."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:  # what libraries raise over damaged files and names has no common ancestor
        raise LoadError(f"{name}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    chain = [error]
    while (following := chain[-1].__cause__ or chain[-1].__context__) is not None and following not in chain:
        chain.append(following)
    if any(isinstance(link, pickle.UnpicklingError) for link in chain):
        return (
            "its weights are a damaged pickle, or one that holds more than tensors; loading that could run code,"
            " so it is refused (safetensors files hold tensors alone)"
        )
    if isinstance(error, ImportError):
        return _missing(error)
    if type(error).__name__ == "SafetensorError":  # raised by safetensors, which need not be installed here
        return f"its weights are damaged ({one_line(error)})"
    return f"cannot be loaded ({one_line(error)})"


def _missing(error: ImportError) -> str:
    """What to install; where a library checks for a package itself, as transformers for quantizers, its own words say it."""
    package = (error.name or "").partition(".")[0]
    if not package:
        return f"cannot be loaded with what is installed ({one_line(error)})"
    if package in BROUGHT:
        return f"{package} is missing: pip install 'fastvit[models]'"
    return f"it needs the package {package}, which fastvit does not bring: install it"


def one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit].rstrip() + " …"


def library(name: str) -> ModuleType:
    """timm, transformers or huggingface_hub. Raises ``LoadError`` that says what to install where it is missing."""
    _torchvision.ensure_importable()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LoadError(f"this model needs {error.name or name}: pip install 'fastvit[models]'") from error
