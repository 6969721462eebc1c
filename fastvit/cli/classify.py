"""``fastvit classify``: what a model takes a picture for, and where it looked."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import fastvit

from .. import loading
from .inputs import Call, open_model, picture_for, takes_text, user_errors
from .options import (
    DTYPES,
    NAMES,
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    UserError,
    check_target,
    needs,
    pick_device,
    plain,
    say,
    writing,
)

FORMATS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", ".svg", ".eps")  # of those that matplotlib writes


def classify(
    image: Annotated[Path, typer.Argument(metavar="PICTURE", help="Any picture that Pillow reads.", show_default=False)],
    model: Annotated[str, typer.Option(metavar="NAME", help=NAMES, show_default=False)],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    out: Annotated[Path, typer.Option(help="The file for the picture of the class token's attention.")] = Path("overlay.png"),
    rollout: Annotated[
        bool, typer.Option("--rollout", help="Attention through all layers (rollout) instead of the last layer's.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="A file for the classes as JSON.")] = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.fp32,
) -> None:
    """Classify a picture with an accelerated model, and draw what its class token attends to."""
    console = Console(highlight=False)
    check_target(out, FORMATS, makes_folders=True)
    if json_file is not None:
        check_target(json_file)
    target = pick_device(device)
    with needs("demo", "the overlay"):
        from ..demo import plots
    network = open_model(model, target, DTYPES[dtype])
    if takes_text(network):
        raise UserError(f"{model}: {type(network).__name__} compares pictures with texts and has no classes of its own")
    classes = loading.class_count(network)
    call = picture_for(network, image, exact=True)
    fastvit.accelerate(network)
    ranked = _rank(network, call, min(top, classes)) if classes else []
    _print_classes(console, model, ranked)
    grid = _grid(network, call.pixels)
    heat = None if grid is None else _heat(network, call, grid, rollout)
    if heat is None:
        if not ranked:
            raise UserError(f"{model}: neither a classification head nor a class token whose attention could be drawn")
        console.print("no overlay: the model has no class token over a grid of patches, whose attention could be drawn")
    else:
        with writing(out):
            _draw(plots, out, call, heat, model, ranked, rollout)
        say(console, f"attention written to {out}")
    if json_file is not None:
        content = {"model": model, "picture": str(image), "classes": ranked, "overlay": None if heat is None else str(out)}
        with writing(json_file):
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            json_file.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character, as JSON escapes it
        say(console, f"classes written to {json_file}")


def _rank(model: nn.Module, call: Call, top: int) -> list[dict[str, Any]]:
    """The most probable classes: [{"index", "label", "probability"}, …]."""
    output = call.run(model)
    logits = (output if isinstance(output, Tensor) else output.logits)[0].float()
    several = getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification"
    probabilities = torch.sigmoid(logits) if several else torch.softmax(logits, dim=-1)
    names = loading.labels(model) or {}
    found = zip(*(tensor.tolist() for tensor in probabilities.topk(top)), strict=True)
    return [{"index": index, "label": names.get(index, f"class {index}"), "probability": p} for p, index in found]


def _print_classes(console: Console, model: str, ranked: list[dict[str, Any]]) -> None:
    if not ranked:
        say(console, f"{model} has no classification head: it gives features, and no classes")
        return
    table = Table(box=None, padding=(0, 2), show_header=False)
    for entry in ranked:
        table.add_row(f"{entry['probability']:.1%}", Text(plain(entry["label"])))
    console.print(table)


def _grid(model: Any, pixels: Tensor) -> tuple[int, int] | None:
    """Rows and columns of patches; None for a model that has no class token or is not made of one size of patches."""
    if getattr(model, "cls_token", True) is None:  # timm's, which may have registers and no class token
        return None
    config = getattr(model, "config", None)
    size = getattr(getattr(config, "vision_config", config), "patch_size", None)
    size = size or getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return pixels.shape[2] // height, pixels.shape[3] // width


def _heat(model: nn.Module, call: Call, grid: tuple[int, int], rollout: bool) -> Tensor | None:
    """How the class token attends to the patches, (h, w) on the CPU; None where no token precedes the patches."""
    from ..maps import attention_maps, attention_rollout

    with user_errors():
        if rollout:
            attention = attention_rollout(model, *call.arguments, **call.keywords)[0]
        else:
            attention = attention_maps(model, *call.arguments, **call.keywords)[-1][0].mean(0)
    before = attention.numel() - grid[0] * grid[1]  # the class token, and registers where there are any
    return attention[before:].unflatten(0, grid).float().cpu() if before > 0 else None


def _draw(plots: Any, out: Path, call: Call, heat: Tensor, model: str, ranked: list[dict[str, Any]], rollout: bool) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    values = heat.numpy()
    how = "rollout through all layers" if rollout else "last layer, mean of the heads"
    classes = " · ".join(f"{_short(entry['label'])} {entry['probability']:.0%}" for entry in ranked[:2])
    with plots.plt.rc_context({**plots.STYLE, "text.parse_math": False}):  # names may have dollar signs
        name = plain(model if len(model) <= 40 else Path(model).name)
        figure, axes = plots._panels(1, 2, "What the class token attends to", f"{name} · {how}")
        photo, overlay = axes[0]
        photo.imshow(call.view)
        photo.set_title(classes or "picture")
        plots._overlay(overlay, call.view, values, "inferno", 0, float(torch.quantile(heat, 0.995)))
        overlay.set_title(f"largest share of one patch: {values.max():.1%}")
        plots._save(figure, out, dpi=110)


def _short(label: str, limit: int = 20) -> str:
    """ImageNet's names list synonyms: the first says enough below a picture."""
    first = plain(label).partition(",")[0]
    return first if len(first) <= limit else first[: limit - 1] + "…"
