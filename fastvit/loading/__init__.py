"""``fastvit.load``: a trained Vision Transformer by its name or from a folder, or Segment Anything from its checkpoint file,
ready to run and accelerated.

``load_original`` gives the same model before acceleration, ``preprocessing`` how its pictures are cut and normalized, and
``labels`` what its classes are called. Nothing that is read may run code: weights are safetensors, or pickles of tensors
alone, and code that comes with a repository is never imported.
"""

from .errors import LoadError
from .names import load, load_original
from .pictures import assumed_preprocessing, class_count, labels, preprocessing
from .preprocess import Preprocessing

__all__ = [
    "LoadError",
    "Preprocessing",
    "assumed_preprocessing",
    "class_count",
    "labels",
    "load",
    "load_original",
    "preprocessing",
]
