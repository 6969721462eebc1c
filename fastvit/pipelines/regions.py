"""How firm a mask is, and what is left of it without its crumbs."""

import numpy as np
import torch
from torch import Tensor

EIGHT = np.ones((3, 3), dtype=bool)  # neighbours also across corners


def stability_score(logits: Tensor, threshold: float, offset: float) -> Tensor:
    """(…, H, W) → (…,) float32: IoU of the masks above ``threshold + offset`` and above ``threshold - offset``.

    The first lies within the second, so their areas are the intersection and the union. NaN where both are empty.
    """
    inner, outer = ((logits > level).flatten(-2).sum(-1, dtype=torch.int32) for level in (threshold + offset, threshold - offset))
    return inner / outer


def fill_small_holes(mask: np.ndarray, min_area: float) -> tuple[np.ndarray, bool]:
    """(H, W) bool with holes below ``min_area`` pixels filled, and whether there were any."""
    labels, areas = _regions(~mask)
    small = areas < min_area
    return (mask | small[labels], True) if small.any() else (mask, False)


def remove_small_islands(mask: np.ndarray, min_area: float) -> tuple[np.ndarray, bool]:
    """(H, W) bool without its parts below ``min_area`` pixels, and whether there were any; the largest part always stays."""
    labels, areas = _regions(mask)
    small = areas < min_area
    if not small.any():
        return mask, False
    kept = ~small
    kept[0] = False
    if not kept.any():
        kept[1 + areas[1:].argmax()] = True
    return kept[labels], True


def _regions(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of every pixel's region, 0 outside of all, and the regions' areas: infinite for what is outside."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask, EIGHT)
    areas = np.bincount(labels.ravel()).astype(np.float64)
    areas[0] = np.inf
    return labels, areas
