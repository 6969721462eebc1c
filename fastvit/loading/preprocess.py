"""From an RGB picture of any size to what a model takes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image  # loading a model needs no Pillow


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pictures: resized, the centre cut out, scaled and normalized.

    ``size``: (height, width) in pixels of what the model sees. ``resize``: the length that the shorter side is brought to
    before, or the exact (height, width). ``mean``, ``std``: per channel, of values multiplied by ``scale``.
    ``interpolation``: a name of ``PIL.Image.Resampling`` in lower case. ``source``: where these numbers come from.
    ``rounds_offset``: half a pixel of offset is rounded to even, as torchvision does, not down, as transformers does.
    Raises ``ValueError`` when what is cut out is larger than what it is cut from.
    """

    size: tuple[int, int]
    resize: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    scale: float = 1 / 255
    source: str = ""
    rounds_offset: bool = False

    def __post_init__(self) -> None:
        sides = self.resize if isinstance(self.resize, tuple) else (self.resize, self.resize)
        if min(self.size) < 1 or sides[0] < self.size[0] or sides[1] < self.size[1]:
            raise ValueError(f"pictures are resized to {self.resize}, and {self.size} cannot be cut out of that")

    def view(self, picture: "Image.Image") -> "Image.Image":
        """The part of an RGB picture that the model sees, at the size at which it sees it."""
        from PIL import Image

        if isinstance(self.resize, tuple):
            height, width = self.resize
        else:
            shorter = min(picture.size)
            width, height = (int(self.resize * side / shorter) for side in picture.size)
        resized = picture.resize((width, height), Image.Resampling[self.interpolation.upper()])
        offsets = (width - self.size[1]) / 2, (height - self.size[0]) / 2
        left, top = (round(offset) if self.rounds_offset else int(offset) for offset in offsets)
        return resized.crop((left, top, left + self.size[1], top + self.size[0]))

    def pixels(self, view: "Image.Image") -> Tensor:
        """A view as the model's input: float32 (1, 3, height, width)."""
        values = torch.from_numpy(np.array(view, dtype=np.float32)).permute(2, 0, 1).unsqueeze(0)
        mean, std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in (self.mean, self.std))
        return ((values * self.scale - mean) / std).contiguous()

    def __call__(self, picture: "Image.Image") -> Tensor:
        """An RGB picture of any size → float32 (1, 3, height, width)."""
        return self.pixels(self.view(picture))
