"""fastvit: Vision Transformers and Segment Anything, faster, without changing the model.

>>> import fastvit
>>> model = fastvit.accelerate(model)      # same object, in place
>>> print(fastvit.report(model))           # what was replaced, what was left alone and why

Importing this package touches no accelerator, no model library and no kernel: those load when first used.
"""

import os as _os

__version__ = "0.1.0"

# `kernels/` lies beside this package in a checkout and is installed as `fastvit.kernels`; the first needs this line.
if not _os.path.isdir(_os.path.join(__path__[0], "kernels")):
    __path__.append(_os.path.dirname(__path__[0]))

from . import functional, reference
from .backend import get_backend, use_backend

_LAZY = {
    "SamAutomaticMaskGenerator": "pipelines",
    "SamPredictor": "pipelines",
    "accelerate": "acceleration",
    "accelerated": "acceleration",
    "attention_maps": "maps",
    "attention_rollout": "maps",
    "load": "loading",
    "report": "acceleration",
    "restore": "acceleration",
    "verify": "acceleration",
}
_LAZY_MODULES = ("models", "nn", "quantization")

__all__ = [
    "SamAutomaticMaskGenerator",
    "SamPredictor",
    "__version__",
    "accelerate",
    "accelerated",
    "attention_maps",
    "attention_rollout",
    "functional",
    "get_backend",
    "load",
    "models",
    "nn",
    "quantization",
    "reference",
    "report",
    "restore",
    "use_backend",
    "verify",
]


def __getattr__(name):
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _LAZY_MODULES:
        import importlib

        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'fastvit' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
