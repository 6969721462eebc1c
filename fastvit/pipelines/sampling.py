"""Where an automatic generator looks: grids of points, and crops of the picture in layers."""

import math
from itertools import product

import numpy as np

Box = tuple[int, int, int, int]


def point_grid(points_per_side: int) -> np.ndarray:
    """(n², 2) float64 points as (x, y) in the unit square, row by row: the centres of n×n equal cells."""
    margin = 1 / (2 * points_per_side)
    ticks = np.linspace(margin, 1 - margin, points_per_side)
    return np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)


def point_grids(points_per_side: int, crop_layers: int, downscale: float) -> list[np.ndarray]:
    """A grid for the whole picture and one for every layer of crops, each with fewer points a side than the one before.

    Raises ``ValueError`` where no points are left.
    """
    sides = [int(points_per_side / downscale**layer) for layer in range(crop_layers + 1)]
    if min(sides) < 1:
        raise ValueError(
            f"points_per_side is {points_per_side}, crop_n_points_downscale_factor {downscale}; expected at least one point"
            f" a side in each of {crop_layers + 1} layers, not {', '.join(map(str, sides))}"
        )
    return [point_grid(side) for side in sides]


def crop_boxes(height: int, width: int, layers: int, overlap_ratio: float) -> list[tuple[Box, int]]:
    """(box, layer) of the whole picture, layer 0, and of 2ⁱ × 2ⁱ crops in every layer i, columns before rows.

    Neighbours in the first layer share ``overlap_ratio`` of the picture's short side, in each further layer half of that before.
    Crops that a small picture has no pixels for are left out.
    """
    found: list[tuple[Box, int]] = [((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / count))
        spans_x, spans_y = (_spans(side, count, overlap) for side in (width, height))
        for (x0, x1), (y0, y1) in product(spans_x, spans_y):
            if x0 < x1 and y0 < y1:
                found.append(((x0, y0, x1, y1), layer))
    return found


def _spans(side: int, count: int, overlap: int) -> list[tuple[int, int]]:
    """``count`` pieces of equal length that cover ``side`` pixels, the last cut at the end."""
    length = math.ceil((overlap * (count - 1) + side) / count)
    starts = [index * (length - overlap) for index in range(count)]
    return [(start, min(start + length, side)) for start in starts]
