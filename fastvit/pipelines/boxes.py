"""Boxes as (x0, y0, x1, y1): around masks, near the edges of a crop, and without duplicates."""

from collections.abc import Sequence

import torch
from torch import Tensor


def boxes_of_masks(masks: Tensor) -> Tensor:
    """(…, H, W) bool → (…, 4) int64: first and last column and row with a pixel of the mask; zeros for an empty mask."""
    columns, rows = masks.any(-2), masks.any(-1)
    x0, x1 = _first_and_last(columns)
    y0, y1 = _first_and_last(rows)
    return torch.stack([x0, y0, x1, y1], dim=-1) * rows.any(-1, keepdim=True)


def _first_and_last(present: Tensor) -> tuple[Tensor, Tensor]:
    size = present.shape[-1]
    index = torch.arange(size, device=present.device)
    return torch.where(present, index, size).amin(-1), torch.where(present, index, -1).amax(-1)


def to_xywh(box: Sequence[int]) -> list[int]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


def near_crop_edge(boxes: Tensor, crop_box: Sequence[int], image_size: Sequence[int], within: float = 20.0) -> Tensor:
    """Which of the boxes (N, 4) end within some pixels of an edge of the crop that is no edge of the picture, (N,) bool.

    What they are around goes on beyond the crop. Boxes, crop and ``image_size`` (H, W) are in the picture's coordinates.
    """
    height, width = image_size
    crop, image = (torch.as_tensor(box, device=boxes.device) for box in (crop_box, [0, 0, width, height]))
    return (((boxes - crop).abs() <= within) & ((boxes - image).abs() > within)).any(-1)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: the boxes (N, 4) that are kept, as indices by falling score, ties in order of index.

    A box goes when its IoU with a box kept before it is above the threshold. IoU is computed in float32 and compared in
    float64, as torchvision's operator does, so that both keep the same boxes. Runs on the CPU: every step needs the one before.
    """
    boxes = boxes.detach().to("cpu", torch.float32)
    order = scores.detach().cpu().sort(descending=True, stable=True).indices
    low, high = boxes[order].split(2, dim=-1)
    area = (high - low).prod(-1)
    alive = torch.ones(len(order), dtype=torch.bool)
    kept = []
    for rank in range(len(order)):
        if not alive[rank]:
            continue
        kept.append(rank)
        rest = slice(rank + 1, None)
        overlap = (torch.minimum(high[rank], high[rest]) - torch.maximum(low[rank], low[rest])).clamp(min=0).prod(-1)
        iou = overlap / (area[rank] + area[rest] - overlap)  # NaN between boxes without area, which is above nothing
        alive[rest] &= ~(iou.double() > iou_threshold)
    return order[kept].to(scores.device)
