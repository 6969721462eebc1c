"""Pictures of what a model knows of place and where it looks, layer by layer."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from torch import Tensor

from .plots import STYLE, _overlay, _panels, _save

LAYERS_SHOWN = 6


def positions_picture(path: Path, tables: dict[str, Tensor], grid: tuple[int, int], dpi: int = 110) -> Path:
    """How alike positions are, P·Pᵀ: ``tables`` by title, similarities (h·w, h·w) of the patches of a grid (h, w).

    Of every table the whole matrix, then the rows of three patches laid out on the grid, each patch marked.
    """
    height, width = grid
    places = [(height // 6, width // 6), (height // 2, width // 2), (height * 5 // 6, width * 2 // 3)]
    with plt.rc_context(STYLE):
        title = "How alike positions are, K = P·Pᵀ"
        subtitle = (
            f"all {height}×{width} patches in reading order; then one of them (○) against all, on the grid."
            " Dark low … bright high, each panel on its own scale"
        )
        figure, axes = _panels(len(tables), 1 + len(places), title, subtitle)
        for row, (name, similarity) in zip(axes, tables.items(), strict=True):
            values = similarity.float().cpu().numpy()
            row[0].imshow(values, cmap="viridis", interpolation="antialiased", interpolation_stage="data")
            row[0].set_title(name)
            for axis, (y, x) in zip(row[1:], places, strict=True):
                axis.imshow(values[y * width + x].reshape(grid), cmap="viridis", interpolation="nearest")
                axis.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor="white", markeredgewidth=1.6)
                axis.set_title(f"{name}: patch in row {y + 1}, column {x + 1}")
        return _save(figure, path, dpi)


def rollout_picture(
    path: Path, picture: Image.Image, layers: Sequence[Tensor], rollout: Tensor, label: str, dpi: int = 110
) -> Path:
    """Attention of the class token in some of the layers, (heads, h, w) each, and its rollout (h, w) over all of them."""
    steps = min(LAYERS_SHOWN, len(layers))
    shown = [len(layers) * step // steps - 1 for step in range(1, steps + 1)]
    with plt.rc_context(STYLE):
        title = f"Where the class token looks, layer by layer, and what reaches it over all · {label}"
        subtitle = (
            "mean of the heads; rollout: its row of Π ½(A + I) over all layers (Abnar & Zuidema 2020)."
            " Colours: up to each map's 99.5 % quantile"
        )
        figure, axes = _panels(2, 4, title, subtitle)
        panels = axes.flatten()
        panels[0].imshow(picture)
        panels[0].set_title("photograph")
        maps = [(f"layer {i + 1} of {len(layers)}", layers[i].mean(0)) for i in shown]
        for axis, (name, values) in zip(panels[1:], [*maps, ("rollout", rollout)], strict=False):
            heat = values.float().cpu().numpy()
            _overlay(axis, picture, heat, "inferno", 0, float(np.quantile(heat, 0.995)))
            axis.set_title(name)
        return _save(figure, path, dpi)
