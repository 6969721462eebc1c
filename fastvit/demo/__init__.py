"""The demonstration: a real ViT on a real photograph, accelerated, verified, timed and drawn (``fastvit demo``)."""

from .picture import PictureError
from .run import Options, run_demo

__all__ = ["Options", "PictureError", "run_demo"]
