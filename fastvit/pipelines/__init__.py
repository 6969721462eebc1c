"""From pictures to masks: prompts, everything at once, and words, on top of SAM."""

from .automatic import SamAutomaticMaskGenerator
from .predictor import SamPredictor
from .text import rank_by_text
from .transforms import ResizeLongestSide

__all__ = ["ResizeLongestSide", "SamAutomaticMaskGenerator", "SamPredictor", "rank_by_text"]
