"""The demo's pictures, drawn with matplotlib's file-only backend."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

PANEL = 3.1  # inches
INK, GREY = "#1b1b23", "#6b6b78"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 10.5,
    "axes.titlepad": 7,
    "axes.titlecolor": INK,
    "figure.facecolor": "white",
}


def _panels(rows: int, columns: int, title: str, subtitle: str) -> tuple[Figure, np.ndarray]:
    """A grid of square panels below a left-aligned title and subtitle, without axes."""
    header, footer, side, gap_x, gap_y = 0.85, 0.12, 0.15, 0.14, 0.36
    width = 2 * side + columns * PANEL + (columns - 1) * gap_x
    height = header + footer + rows * PANEL + rows * gap_y
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left=side / width,
        right=1 - side / width,
        bottom=footer / height,
        top=1 - (header + gap_y - 0.1) / height,
        wspace=gap_x / PANEL,
        hspace=gap_y / PANEL,
    )
    figure.text(side / width, 1 - 0.34 / height, title, fontsize=15, fontweight="bold", va="center")
    figure.text(side / width, 1 - 0.64 / height, subtitle, fontsize=10.5, color=GREY, va="center")
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, axes


def _overlay(axis: Axes, picture: Image.Image, heat: np.ndarray, colours: str, low: float, high: float) -> None:
    """``heat`` over a greyed picture: transparent where it is low, so that the subject stays recognisable."""
    grey = np.asarray(picture.convert("L"), dtype=np.float32) / 255
    strength = np.clip((heat - low) / max(high - low, 1e-12), 0, 1)
    strength = np.asarray(Image.fromarray(strength.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)
    colour = matplotlib.colormaps[colours](strength)[..., :3]
    alpha = (0.2 + 0.7 * strength)[..., None]
    shaded = colour * (0.55 + 0.45 * grey[..., None])  # the subject's own light and shade show through
    axis.imshow((grey * 0.7)[..., None] * (1 - alpha) + shaded * alpha)


def _save(figure: Figure, path: Path, dpi: int) -> Path:
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    return path


def _kind(values: np.ndarray) -> str:
    largest = float(values.max())
    return "nothing differs" if largest == 0 else f"largest {largest:.1e}"


def saliency_picture(
    path: Path, picture: Image.Image, original: Tensor, accelerated: Tensor, label: str, credit: str, dpi: int = 110
) -> Path:
    """Photograph, saliency by the original and by the accelerated model, and what differs, on its own scale."""
    before, after = (map.float().cpu().numpy() for map in (original, accelerated))
    difference = np.abs(after - before)
    with plt.rc_context(STYLE):
        subtitle = f"dark 0 … bright 1; the difference is drawn on its own scale{' · photograph: ' + credit if credit else ''}"
        figure, axes = _panels(1, 4, f"Saliency before and after fastvit.accelerate · {label}", subtitle)
        photo, left, right, last = axes[0]
        photo.imshow(picture)
        photo.set_title("photograph")
        for axis, heat, title in ((left, before, "original model"), (right, after, "accelerated model")):
            _overlay(axis, picture, heat, "inferno", 0, 1)
            axis.set_title(title)
        last.imshow(difference, cmap="bone", norm=PowerNorm(0.5, 0, max(float(difference.max()), 1e-12)))
        last.set_title(f"|difference|, {_kind(difference)}")
        return _save(figure, path, dpi)


def attention_picture(
    path: Path, picture: Image.Image, original: Tensor, accelerated: Tensor, label: str, dpi: int = 110
) -> Path:
    """Where each of the last layer's heads lets the class token look: (heads, h, w) of the accelerated model."""
    before, after = original.float().cpu().numpy(), accelerated.float().cpu().numpy()
    with plt.rc_context(STYLE):
        title = f"What the class token attends to, last layer · {label}"
        subtitle = f"accelerated model; against the original: {_kind(np.abs(after - before))}. Colours: up to each map's maximum"
        figure, axes = _panels(2, 4, title, subtitle)
        panels = axes.flatten()
        panels[0].imshow(picture)
        panels[0].set_title("photograph")
        mean = after.mean(0)
        _overlay(panels[4], picture, mean, "inferno", 0, float(np.quantile(mean, 0.995)))
        panels[4].set_title("mean of the heads")
        for head, axis in enumerate(panels[[1, 2, 3, 5, 6, 7]][: len(after)]):
            _overlay(axis, picture, after[head], "inferno", 0, float(np.quantile(after[head], 0.995)))
            axis.set_title(f"head {head + 1}")
        return _save(figure, path, dpi)


def tokens_picture(path: Path, picture: Image.Image, original: Tensor, accelerated: Tensor, label: str, dpi: int = 110) -> Path:
    """Patch tokens coloured by their three main directions, (h, w, 3) of either model."""
    with plt.rc_context(STYLE):
        title = f"Patch tokens as colours · {label}"
        difference = float((original.float() - accelerated.float()).abs().max())
        largest = "nothing differs" if difference == 0 else f"largest difference {difference:.1e} of the colour range"
        grid = f"{original.shape[0]}×{original.shape[1]}"
        subtitle = f"three main directions (PCA) of the {grid} tokens as red, green and blue; {largest}"
        figure, axes = _panels(1, 3, title, subtitle)
        axes[0, 0].imshow(picture)
        axes[0, 0].set_title("photograph")
        for axis, colours, name in ((axes[0, 1], original, "original model"), (axes[0, 2], accelerated, "accelerated model")):
            axis.imshow(colours.float().cpu().numpy(), interpolation="nearest")
            axis.set_title(name)
        return _save(figure, path, dpi)


def shrink(paths: Sequence[Path], folder: Path, limit: int = 200_000) -> list[Path]:
    """JPEG copies of the pictures in ``folder``, scaled down until each is below ``limit`` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in paths:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        target = folder / f"{path.stem}.jpg"
        width = min(1300, image.width)
        while True:
            small = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
            small.save(target, quality=90, subsampling=0)
            if target.stat().st_size <= limit or width <= 400:
                break
            width = int(width * 0.92)
        written.append(target)
    return written
