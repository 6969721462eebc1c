"""Drawings of masks over their picture, in the style of the demo's."""

import colorsys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

from ..demo import plots

DRAWN_SIDE = 1200  # pixels of the longest side of what is drawn: a panel shows no more
DPI = 200
GOLDEN = 0.618034  # of the circle of hues, from one mask to the next: neighbours never look alike


def draw_masks(
    path: Path,
    picture: Image.Image,
    panels: Sequence[tuple[str, Sequence[np.ndarray]]],
    title: str,
    subtitle: str,
    points: Sequence[tuple[float, float, int]] = (),
    box: Sequence[float] | None = None,
) -> Path:
    """The picture with its prompts, and a panel for each (title, masks (H, W) bool).

    ``points`` are (x, y, label) and ``box`` (x0, y0, x1, y1) in pixels.
    """
    panels = panels or [("nothing found", [])]
    width, height = picture.size
    scale = min(1.0, DRAWN_SIDE / max(width, height))
    small = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))))
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)  # in pixels of the picture, for prompts are
    with plots.plt.rc_context(plots.STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's font lacks most scripts' letters
        figure, axes = plots._panels(1, 1 + len(panels), _plain(title, 44), _plain(subtitle, 72))
        axes[0, 0].imshow(small, extent=extent)
        axes[0, 0].set_title("photograph" if box is None and not points else "prompt")
        _draw_prompts(axes[0, 0], points, box)
        for axis, (name, masks) in zip(axes[0, 1:], panels, strict=True):
            axis.imshow(_painted(small, masks), extent=extent)
            axis.set_title(name)
        for axis in axes.flat:
            axis.set_anchor("N")
        plots._save(figure, path, DPI)
    with Image.open(path) as drawn:
        below = max(0, round(plots.PANEL * DPI * (1 - height / width)))  # what a wide picture leaves of its square panel
        drawn.crop((0, 0, drawn.width, drawn.height - below)).save(path)
    return path


def _plain(text: str, limit: int) -> str:
    """At most ``limit`` characters, dollars no longer beginning a formula."""
    return (text if len(text) <= limit else text[: limit - 1] + "…").replace("$", r"\$")


def _draw_prompts(axis: Axes, points: Sequence[tuple[float, float, int]], box: Sequence[float] | None) -> None:
    for x, y, label in points:
        axis.plot(x, y, "o" if label else "X", color="#19a974" if label else "#e7040f", markeredgecolor="white", clip_on=False)
    if box is not None:
        x0, y0, x1, y1 = box
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor="#19a974", linewidth=1.6, clip_on=False))


def _painted(picture: Image.Image, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Masks in colours of their own over a greyed picture, the largest first, each with its outline."""
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None] / 255
    canvas = np.repeat(0.7 * grey, 3, axis=-1)
    numbered = sorted(enumerate(masks), key=lambda pair: -int(pair[1].sum()))
    for index, mask in numbered:
        colour = np.array(colorsys.hsv_to_rgb((0.08 + index * GOLDEN) % 1, 0.75, 1.0), dtype=np.float32)
        inside = np.asarray(Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST))
        canvas[inside] = 0.4 * canvas[inside] + 0.6 * (colour * (0.5 + 0.5 * grey))[inside]
        canvas[_outline(inside)] = colour
    return canvas


def _outline(mask: np.ndarray) -> np.ndarray:
    """The mask's pixels with a neighbour, above, below, left or right, that is none of its."""
    around = np.pad(mask, 1)
    return mask & ~(around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:])
