"""What can be asked of a picture: the object that a prompt means, everything, or what words describe.

``run`` gives the records of one picture as JSON holds them ("segmentation" as COCO's compressed RLE, "area", "bbox",
"predicted_iou", "stability_score", …), and the panels of a drawing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from .automatic import SamAutomaticMaskGenerator
from .boxes import boxes_of_masks, to_xywh
from .predictor import SamPredictor
from .regions import stability_score
from .rle import area_of_rle, compress_rle, decode_rle, encode_rle
from .text import rank_by_text

Record = dict[str, Any]
Panel = tuple[str, list[np.ndarray]]
PANELS = 4  # a drawing shows no more masks side by side


@dataclass
class Prompt:
    """Points and a box, in pixels: one object, three masks for a single point (it may mean a part as well), else one."""

    predictor: SamPredictor
    points: Sequence[tuple[float, float, int]] = ()  # (x, y, label)
    box: tuple[float, float, float, float] | None = None

    def run(self, picture: Image.Image) -> tuple[list[Record], list[Panel]]:
        """Best first. Raises ``ValueError`` for a prompt outside of the picture."""
        self._check(*picture.size)
        self.predictor.set_image(picture)
        options: dict[str, Any] = {"box": self.box}
        if self.points:
            options["point_coords"] = [point[:2] for point in self.points]
            options["point_labels"] = [point[2] for point in self.points]
        several = len(self.points) == 1 and self.box is None
        with _numbers_only(self.predictor.model):
            logits, quality, _ = self.predictor.predict(**options, multimask_output=several, return_logits=True)
        self.predictor.reset_image()
        order = np.argsort(-quality, kind="stable")
        records = _described(torch.from_numpy(logits[order]), quality[order], self.predictor.model.mask_threshold)
        return records, [(_scores(record), [decode_rle(record["segmentation"])]) for record in records]

    def _check(self, width: int, height: int) -> None:
        for x, y, _ in self.points:
            if not (0 <= x <= width and 0 <= y <= height):
                raise ValueError(f"the point {x:g},{y:g} is outside of its {width}×{height} pixels")
        if self.box is not None and not (min(self.box[:2]) >= 0 and self.box[2] <= width and self.box[3] <= height):
            raise ValueError(f"the box {','.join(f'{side:g}' for side in self.box)} reaches beyond its {width}×{height} pixels")


@dataclass
class Everything:
    """All that a grid of points finds, the largest first."""

    generator: SamAutomaticMaskGenerator  # with output_mode "coco_rle"

    def run(self, picture: Image.Image) -> tuple[list[Record], list[Panel]]:
        with _numbers_only(self.generator.predictor.model):
            records = sorted(self.generator.generate(picture), key=lambda record: -record["area"])
        masks = [decode_rle(record["segmentation"]) for record in records]
        return records, [(f"{len(masks)} mask{'' if len(masks) == 1 else 's'}", masks)]


@dataclass
class Words:
    """Of everything, what fits a text best."""

    generator: SamAutomaticMaskGenerator  # with output_mode "coco_rle"
    text: str
    clip_model: nn.Module
    clip_processor: Any
    top: int

    def run(self, picture: Image.Image) -> tuple[list[Record], list[Panel]]:
        with _numbers_only(self.generator.predictor.model):
            found = self.generator.generate(picture)
        matches = rank_by_text(picture, found, self.text, self.clip_model, self.clip_processor)[: self.top]
        records = [{**found[match.mask], "similarity": match.similarity} for match in matches]
        panels = [(f"similarity {record['similarity']:.3f}", [decode_rle(record["segmentation"])]) for record in records]
        return records, panels[:PANELS]


@contextmanager
def _numbers_only(sam: nn.Module) -> Iterator[None]:
    """Within it, ``ValueError`` where the mask decoder gives what is no number: filters would only find nothing."""

    def check(module: nn.Module, arguments: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        masks, quality = output
        if not quality.isfinite().all() or masks.isnan().any():
            dtype = str(masks.dtype).removeprefix("torch.")
            raise ValueError(f"the model gives no numbers (NaN); its weights are damaged, or {dtype} is too small for it")

    handle = sam.mask_decoder.register_forward_hook(check)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()


def _described(logits: torch.Tensor, quality: np.ndarray, threshold: float) -> list[Record]:
    masks = logits > threshold
    rows = zip(encode_rle(masks), boxes_of_masks(masks).tolist(), quality, stability_score(logits, threshold, 1.0), strict=True)
    return [
        {
            "segmentation": compress_rle(rle),
            "area": area_of_rle(rle),
            "bbox": to_xywh(box),
            "predicted_iou": float(iou),
            "stability_score": float(stability.nan_to_num(0.0)),  # two empty masks: JSON has no NaN
        }
        for rle, box, iou, stability in rows
    ]


def _scores(record: Record) -> str:
    return f"IoU {record['predicted_iou']:.2f}, stability {record['stability_score']:.2f}"
