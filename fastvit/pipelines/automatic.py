"""Masks of everything in a picture: SAM is prompted with a grid of points, and what is doubtful or found twice is left out.

Kirillov et al., "Segment Anything" (2023), section 4 and appendix B. The calls and results are those of the class of that
name in segment_anything 1.0: the same records in the same order.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from .boxes import boxes_of_masks, near_crop_edge, nms, to_xywh
from .predictor import SamPredictor
from .regions import fill_small_holes, remove_small_islands, stability_score
from .rle import area_of_rle, compress_rle, decode_rle, encode_rle
from .sampling import Box, crop_boxes, point_grids
from .transforms import as_pixels

OUTPUT_MODES = ("binary_mask", "uncompressed_rle", "coco_rle")
LOGITS_AT_ONCE = 2**26  # float32 logits at full resolution that exist at a time: 256 MiB


@dataclass
class _Proposals:
    """Masks found so far, one a row, on the CPU."""

    rles: list[dict[str, Any]]
    boxes: Tensor  # (N, 4) int64, in the picture's coordinates
    quality: Tensor  # (N,) float32, as the model estimates it
    stability: Tensor  # (N,) float32
    points: Tensor  # (N, 2) float64, the prompts
    crops: Tensor  # (N, 4) int64

    @classmethod
    def none(cls) -> "_Proposals":
        box, score = torch.empty(0, 4, dtype=torch.int64), torch.empty(0)
        return cls([], box, score, score, torch.empty(0, 2, dtype=torch.float64), box)

    @classmethod
    def joined(cls, parts: Sequence["_Proposals"]) -> "_Proposals":
        if not parts:
            return cls.none()
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)}
        rles = [rle for part in columns.pop("rles") for rle in part]
        return cls(rles, **{name: torch.cat(values) for name, values in columns.items()})

    def take(self, index: Tensor) -> "_Proposals":
        columns = {field.name: getattr(self, field.name)[index] for field in fields(self) if field.name != "rles"}
        return _Proposals([self.rles[row] for row in index.tolist()], **columns)


class SamAutomaticMaskGenerator:
    """Finds the masks of everything in a picture.

    >>> generator = fastvit.SamAutomaticMaskGenerator(sam)
    >>> records = generator.generate(photograph)

    Args:
        model: as for ``SamPredictor``.
        points_per_side: points along either side of the grid of prompts; None where ``point_grids`` are given.
        points_per_batch: prompts that the mask decoder sees at once.
        pred_iou_thresh: masks stay whose quality, as the model estimates it, is above this (0: all of them).
        stability_score_thresh: masks stay whose ``regions.stability_score`` is at least this (0: all of them).
        stability_score_offset: how far the cutoff moves for that score.
        box_nms_thresh: of two masks of one crop whose boxes have a larger IoU, the one of better quality stays.
        crop_n_layers: layers of crops, 2ⁱ×2ⁱ in the i-th, that are searched besides the whole picture.
        crop_nms_thresh: as ``box_nms_thresh``, between masks of different crops, of which those of smaller crops stay.
        crop_overlap_ratio: how much crops of the first layer overlap, of the picture's short side.
        crop_n_points_downscale_factor: points a side go down by this factor with every layer.
        point_grids: instead of ``points_per_side``, a grid a layer: (N, 2) points as (x, y) in the unit square.
        min_mask_region_area: islands and holes below this area in pixels are removed (0: none; needs SciPy).
        output_mode: "binary_mask" (H, W) bool, "uncompressed_rle", or "coco_rle" with the counts as a string.

    Raises ``ValueError`` for arguments that do not fit, ``ImportError`` where SciPy is needed and missing.
    """

    def __init__(
        self,
        model: Any,
        points_per_side: int | None = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        point_grids: list[np.ndarray] | None = None,
        min_mask_region_area: int = 0,
        output_mode: str = "binary_mask",
    ) -> None:
        if (points_per_side is None) == (point_grids is None):
            given = "neither is" if points_per_side is None else "both are"
            raise ValueError(f"points_per_side, point_grids: {given} given; expected one (points_per_side=None for own grids)")
        if output_mode not in OUTPUT_MODES:
            raise ValueError(f"output_mode is {output_mode!r}; expected one of {', '.join(OUTPUT_MODES)}")
        for name, value, least in (
            ("points_per_batch", points_per_batch, 1),
            ("crop_n_layers", crop_n_layers, 0),
            ("min_mask_region_area", min_mask_region_area, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        if min_mask_region_area > 0 and importlib.util.find_spec("scipy") is None:
            raise ModuleNotFoundError("min_mask_region_area needs SciPy: pip install 'fastvit[pictures]'", name="scipy")
        self.predictor = SamPredictor(model)
        self.point_grids = _grids(points_per_side, point_grids, crop_n_layers, crop_n_points_downscale_factor)
        self.points_per_batch = points_per_batch
        self.pred_iou_thresh = pred_iou_thresh
        self.stability_score_thresh = stability_score_thresh
        self.stability_score_offset = stability_score_offset
        self.box_nms_thresh = box_nms_thresh
        self.crop_n_layers = crop_n_layers
        self.crop_nms_thresh = crop_nms_thresh
        self.crop_overlap_ratio = crop_overlap_ratio
        self.crop_n_points_downscale_factor = crop_n_points_downscale_factor
        self.min_mask_region_area = min_mask_region_area
        self.output_mode = output_mode

    @torch.no_grad()
    def generate(self, image: Any) -> list[dict[str, Any]]:
        """Records of the masks in a picture, (H, W, 3) in RGB, uint8 or floats from 0 to 1, or a Pillow picture.

        A record has "segmentation" (as ``output_mode`` says), "area" in pixels, "bbox" and "crop_box" as [x, y, width, height],
        "predicted_iou", "stability_score" and "point_coords", [[x, y]], the prompt that the mask was found with.
        """
        pixels = as_pixels(image)
        height, width = pixels.shape[:2]
        crops = crop_boxes(height, width, self.crop_n_layers, self.crop_overlap_ratio)
        try:
            parts = [self._search(pixels, box, self.point_grids[layer]) for box, layer in crops]
        finally:
            self.predictor.reset_image()
        found = _Proposals.joined(parts)
        if not all(part.rles for part in parts):  # then segment_anything's crop_box are floats
            found.crops = found.crops.float()
        if len(crops) > 1:
            low, high = found.crops.split(2, dim=-1)
            found = found.take(nms(found.boxes, 1 / (high - low).prod(-1), self.crop_nms_thresh))
        if self.min_mask_region_area > 0:
            found = _cleaned(found, self.min_mask_region_area, max(self.box_nms_thresh, self.crop_nms_thresh))
        return [self._record(found, row) for row in range(len(found.rles))]

    def _record(self, found: _Proposals, row: int) -> dict[str, Any]:
        rle = found.rles[row]
        segmentation: Any = rle
        if self.output_mode != "uncompressed_rle":
            segmentation = (decode_rle if self.output_mode == "binary_mask" else compress_rle)(rle)
        return {
            "segmentation": segmentation,
            "area": area_of_rle(rle),
            "bbox": to_xywh(found.boxes[row].tolist()),
            "predicted_iou": found.quality[row].item(),
            "point_coords": [found.points[row].tolist()],
            "stability_score": found.stability[row].item(),
            "crop_box": to_xywh(found.crops[row].tolist()),
        }

    def _search(self, pixels: np.ndarray, crop: Box, grid: np.ndarray) -> _Proposals:
        """What is found in one crop, best first, duplicates left out."""
        x0, y0, x1, y1 = crop
        self.predictor.set_image(pixels[y0:y1, x0:x1])
        points = grid * np.array([x1 - x0, y1 - y0])
        batches = (points[start : start + self.points_per_batch] for start in range(0, len(points), self.points_per_batch))
        found = _Proposals.joined([part for batch in batches for part in self._decode(batch, crop, pixels.shape[:2])])
        return found.take(nms(found.boxes, found.quality, self.box_nms_thresh))

    def _decode(self, points: np.ndarray, crop: Box, image_size: tuple[int, ...]) -> Iterator[_Proposals]:
        """The masks for a batch of points, only those that are scaled up whose estimated quality suffices: scaling costs most."""
        predictor = self.predictor
        scaled = torch.as_tensor(predictor.transform.apply_coords(points, predictor.original_size), device=predictor.device)
        labels = torch.ones(len(points), 1, dtype=torch.int, device=predictor.device)
        low_res, quality = predictor.predict_low_res(scaled[:, None], labels)
        prompts = torch.as_tensor(points).repeat_interleave(quality.shape[1], dim=0) + torch.tensor(crop[:2])
        low_res, quality = low_res.flatten(0, 1), quality.flatten()
        good = quality > self.pred_iou_thresh if self.pred_iou_thresh > 0 else torch.ones_like(quality, dtype=torch.bool)
        side = predictor.model.image_encoder.img_size
        at_once = max(1, LOGITS_AT_ONCE // max(side**2, image_size[0] * image_size[1]))
        for rows in good.nonzero()[:, 0].split(at_once):
            yield self._keep(low_res[rows], quality[rows], prompts[rows.cpu()], crop, image_size)

    def _keep(self, low_res: Tensor, quality: Tensor, points: Tensor, crop: Box, image_size: tuple[int, ...]) -> _Proposals:
        """Those of the masks (N, h, w) that are stable and end within the crop."""
        threshold = self.predictor.model.mask_threshold
        logits = self.predictor.upscale(low_res[:, None])[:, 0]
        stability = stability_score(logits, threshold, self.stability_score_offset)
        if self.stability_score_thresh > 0:
            stable = stability >= self.stability_score_thresh
            logits, quality, stability, points = logits[stable], quality[stable], stability[stable], points[stable.cpu()]
        masks = logits > threshold
        x0, y0, x1, y1 = crop
        height, width = image_size
        boxes = boxes_of_masks(masks) + torch.tensor([x0, y0, x0, y0], device=masks.device)
        whole = ~near_crop_edge(boxes, crop, image_size)
        rles = encode_rle(pad(masks[whole], (x0, width - x1, y0, height - y1)))
        boxes, quality, stability = (tensor[whole].cpu() for tensor in (boxes, quality, stability))
        return _Proposals(rles, boxes, quality, stability, points[whole.cpu()], torch.tensor([crop]).expand(len(rles), 4))


def _grids(side: int | None, grids: list[np.ndarray] | None, layers: int, downscale: int) -> list[np.ndarray]:
    if side is not None:
        return point_grids(side, layers, downscale)
    assert grids is not None
    if len(grids) <= layers:
        raise ValueError(
            f"point_grids holds {len(grids)} grids; expected {layers + 1}: one for the picture and one a layer of crops"
        )
    for grid in grids:
        if np.ndim(grid) != 2 or np.shape(grid)[1] != 2:
            raise ValueError(f"point_grids holds an array of shape {np.shape(grid)}; expected (N, 2)")
    return [np.asarray(grid, dtype=np.float64) for grid in grids]


def _cleaned(found: _Proposals, min_area: int, nms_threshold: float) -> _Proposals:
    """Without small holes and islands, and without what became a duplicate; masks that needed no change come first."""
    changed = []
    for row, rle in enumerate(found.rles):
        mask, filled = fill_small_holes(decode_rle(rle), min_area)
        mask, removed = remove_small_islands(mask, min_area)
        changed.append(filled or removed)
        if changed[-1]:
            found.boxes[row] = boxes_of_masks(torch.as_tensor(mask))
            found.rles[row] = encode_rle(torch.as_tensor(mask)[None])[0]
    return found.take(nms(found.boxes, 1.0 - torch.tensor(changed, dtype=torch.float32), nms_threshold))
