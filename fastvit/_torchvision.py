"""Lets a torchvision whose compiled operators cannot load be imported all the same.

A torchvision built for another PyTorch (a CUDA build beside a CPU one) dies on import with "operator torchvision::nms
does not exist", and takes timm, transformers and segment_anything with it, although none of them needs the operator to
build a model. Declaring the two schemas is enough for the import; calling the operators still refuses, as it should.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # the schemas live as long as this object


def ensure_importable() -> None:
    """Makes ``import torchvision`` possible where it is installed with compiled operators that cannot load.

    Call it before importing a library that imports torchvision. Does nothing where torchvision is absent, already
    imported, or in working order. Never raises.
    """
    global _library
    if _library is not None or "torchvision" in sys.modules:
        return
    try:
        spec = importlib.util.find_spec("torchvision")
    except (ImportError, ValueError):
        return
    if spec is None or not spec.submodule_search_locations or _operators_load(Path(spec.submodule_search_locations[0])):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        try:
            library.define(schema)
        except RuntimeError:  # somebody declared it before us
            continue
    _library = library


def _operators_load(folder: Path) -> bool:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = folder / f"_C{suffix}"
        if path.exists():
            try:
                torch.ops.load_library(path)
            except (ImportError, OSError, RuntimeError):
                return False
            return True
    return False
