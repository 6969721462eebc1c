"""``fastvit segment``: masks of what is pointed at, of what words describe, or of everything, in pictures and folders."""

import math
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

import fastvit

from .inputs import open_model, takes_text, user_errors
from .options import DTYPES, Device, DeviceOption, Dtype, Interrupted, UserError, needs, pick_device, say, writing
from .pending import pictures_in, request_of, stamps_of, to_do

if TYPE_CHECKING:
    from ..pipelines import tasks

PUBLISHED = {"vit_b": "facebook/sam-vit-base", "vit_l": "facebook/sam-vit-large", "vit_h": "facebook/sam-vit-huge"}


class Model(str, Enum):
    vit_b = "vit_b"
    vit_l = "vit_l"
    vit_h = "vit_h"


def segment(
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE", help="Pictures, or folders of them.", show_default=False)],
    checkpoint: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="SAM's weights: a .pth or safetensors file, or a Hugging Face folder or id."),
    ] = None,
    model: Annotated[Model | None, typer.Option(help="Instead: the published weights of that size, from Hugging Face.")] = None,
    point: Annotated[
        list[str] | None, typer.Option(metavar="X,Y", help="A point, in pixels; may be given several times.")
    ] = None,
    label: Annotated[
        list[int] | None, typer.Option(min=0, max=1, help="For each --point in turn: 1 on the object (default), 0 beside it.")
    ] = None,
    box: Annotated[str | None, typer.Option(metavar="X0,Y0,X1,Y1", help="A box around the object, in pixels.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Masks of everything, found with a grid of points.")] = False,
    text: Annotated[str | None, typer.Option(help="Words; of everything, what fits them best. Needs --clip.")] = None,
    clip: Annotated[str | None, typer.Option(metavar="NAME", help="The CLIP for --text: a Hugging Face id or folder.")] = None,
    top: Annotated[int, typer.Option(min=1, help="With --text: how many masks to keep.")] = 3,
    points_per_side: Annotated[int, typer.Option(min=1, help="Of the grid, for --everything and --text.")] = 32,
    pred_iou_thresh: Annotated[float, typer.Option(help="Least quality of a mask, as the model estimates it.")] = 0.88,
    stability_score_thresh: Annotated[float, typer.Option(help="Least stability of a mask.")] = 0.95,
    crop_layers: Annotated[int, typer.Option(min=0, help="Layers of crops to search as well, for small things.")] = 0,
    min_area: Annotated[int, typer.Option(min=0, help="Remove holes and islands below this area in pixels.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder for results: a folder in it for each picture.")] = Path("out"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Do again what is finished, or was asked otherwise.")] = False,
    device: DeviceOption = Device.auto,
    dtype: Annotated[Dtype, typer.Option(help="What the image encoder computes in; the rest takes float32.")] = Dtype.fp32,
) -> None:
    """Segment pictures with Segment Anything: prompted with points or a box, with words, or everything at once.

    Each picture gets a folder of its name (a.jpg beside a.png: a_jpg and a_png): a PNG a mask, overlay.png, and masks.json with
    the masks as COCO's run-length encoding, their estimated IoU and stability. Pictures whose folder is finished are skipped,
    so that a run that was interrupted goes on; a picture that has changed since is done again.
    """
    console = Console(highlight=False)
    asked: dict[str, Any] = {
        "checkpoint": (weights := _weights(checkpoint, model)),
        "weights": stamps_of(weights),
        "dtype": dtype.value,
        "points": _points(point or [], label or []),
        "box": None if box is None else _corners(box),
        "grid": None,
        "text": text,
        "clip": clip,
    }
    _check_one_question(bool(asked["points"]) or box is not None, everything, text, clip)
    if everything or text is not None:
        asked["grid"] = {
            "points_per_side": points_per_side,
            "pred_iou_thresh": pred_iou_thresh,
            "stability_score_thresh": stability_score_thresh,
            "crop_n_layers": crop_layers,
            "min_mask_region_area": min_area,
        }
        for name, number in asked["grid"].items():
            if not math.isfinite(number):
                raise UserError(f"--{name.replace('_', '-')} {number}: expected a number")
    if text is not None:
        asked["top"] = top
        asked["clip_weights"] = stamps_of(clip or "")
    with needs("demo", "segment"):
        from ..pipelines import overlay  # noqa: F401
    target = pick_device(device)
    waiting, finished = to_do(pictures_in(pictures), out, asked, overwrite)
    if finished:
        say(console, f"{finished} of {finished + len(waiting)} pictures are finished already (--overwrite does them again)")
    if waiting:
        _segment_all(console, _task(asked, target, DTYPES[dtype]), waiting, finished, asked)


def _weights(checkpoint: str | None, model: Model | None) -> str:
    if (checkpoint is None) == (model is None):
        raise UserError("give SAM's weights, either --checkpoint FILE or --model vit_b, vit_l or vit_h")
    if model is not None:
        return PUBLISHED[model.value]
    assert checkpoint is not None
    return checkpoint


def _check_one_question(prompted: bool, everything: bool, text: str | None, clip: str | None) -> None:
    if prompted + everything + (text is not None) != 1:
        raise UserError("say what to segment: --point or --box, or --everything, or --text, and one of them alone")
    if (text is None) != (clip is None):
        raise UserError("--text and --clip belong together: --clip openai/clip-vit-base-patch32, or a folder")
    if text is not None and not text.strip():
        raise UserError("--text is empty; expected words")


def _points(points: list[str], labels: list[int]) -> list[tuple[float, float, int]]:
    if labels and len(labels) != len(points):
        raise UserError(f"{len(labels)} --label for {len(points)} --point; expected one each, or none")
    numbers = [_numbers("--point", given, "X,Y") for given in points]
    return [(x, y, label) for (x, y), label in zip(numbers, labels or [1] * len(points), strict=True)]


def _corners(box: str) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = _numbers("--box", box, "X0,Y0,X1,Y1")
    if x0 >= x1 or y0 >= y1:
        raise UserError(f"--box {box}: its first corner is to be above and to the left of its second")
    return x0, y0, x1, y1


def _numbers(option: str, given: str, layout: str) -> list[float]:
    try:
        numbers = [float(part) for part in given.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != layout.count(",") + 1 or not all(abs(number) < 1e9 for number in numbers):  # NaN is not
        raise UserError(f"{option} {given}: expected {layout} in pixels")
    return numbers


def _task(asked: dict[str, Any], target: torch.device, dtype: torch.dtype) -> "tasks.Prompt | tasks.Everything | tasks.Words":
    from ..models.sam.checkpoints import load_sam
    from ..pipelines import tasks
    from ..pipelines.text import clip_processor

    with user_errors():
        sam = load_sam(asked["checkpoint"], device=target, dtype=torch.float32).requires_grad_(False)
        sam.image_encoder.to(dtype)  # where the time goes; rounding in the mask decoder would show in the masks
        if asked["grid"] is None:
            return tasks.Prompt(fastvit.SamPredictor(sam), asked["points"], asked["box"])
        with needs("demo", "--min-area"):
            generator = fastvit.SamAutomaticMaskGenerator(sam, **asked["grid"], output_mode="coco_rle")
        if asked["text"] is None:
            return tasks.Everything(generator)
        compared = open_model(asked["clip"], target, dtype)
        if not takes_text(compared):
            raise UserError(f"--clip {asked['clip']}: {type(compared).__name__} does not compare pictures with texts")
        return tasks.Words(generator, asked["text"], fastvit.accelerate(compared), clip_processor(asked["clip"]), asked["top"])


def _segment_all(console: Console, task: Any, waiting: list[tuple[Path, Path]], finished: int, asked: dict[str, Any]) -> None:
    """A picture that cannot be used is passed over, and named when the others are done."""
    failed, total = [], finished + len(waiting)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("segmenting", total=len(waiting))
        for picture, home in waiting:
            try:
                count = _segment_one(task, picture, home, asked)
            except (UserError, ValueError) as error:
                failed.append(str(error))
            except KeyboardInterrupt:
                raise Interrupted(f"interrupted; {finished} of {total} done, run again to go on") from None
            else:
                finished += 1
                say(console, f"{picture}: {count} mask{'' if count == 1 else 's'} written to {home}")
            progress.advance(bar)
    if failed:
        before = f"{len(failed)} of {len(waiting)} pictures could not be segmented: " if len(waiting) > 1 else ""
        raise UserError(before + "; ".join(failed[:3]) + ("; …" if len(failed) > 3 else ""))


def _segment_one(task: Any, picture: Path, home: Path, asked: dict[str, Any]) -> int:
    from ..images import read_picture
    from ..pipelines.overlay import draw_masks
    from ..pipelines.results import write_result

    request = request_of(picture, asked)  # as it is before it is read
    image = read_picture(picture)
    try:
        records, panels = task.run(image)
    except ValueError as error:
        raise UserError(f"{picture}: {error}") from error
    title = "What is meant" if asked["grid"] is None else f"“{asked['text']}”" if asked["text"] else "Everything"
    with writing(home):
        write_result(
            home,
            request,
            (image.height, image.width),
            records,
            lambda path: draw_masks(path, image, panels, title, picture.name, asked["points"], asked["box"]),
        )
    return len(records)
