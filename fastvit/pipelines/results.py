"""What a picture's masks are on disk: a folder with a PNG a mask, a drawing, and ``masks.json``, written last.

A folder whose ``masks.json`` is there is complete; everything is written beside its place and moved there, so that an interrupted
run leaves no half of anything.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .rle import decode_rle

DESCRIPTION, DRAWING = "masks.json", "overlay.png"
MASK_FILE = re.compile(r"mask_\d+\.png")


def finished_request(folder: Path) -> Any:
    """The request whose complete result the folder holds, as ``write_result`` was given it; None where it holds none."""
    try:
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        files = [record["file"] for record in described["masks"]] + [DRAWING]
        return described["request"] if all((folder / name).is_file() for name in files) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_result(
    folder: Path,
    request: Mapping[str, Any],
    size: Sequence[int],
    records: Sequence[Mapping[str, Any]],
    draw: Callable[[Path], Any],
) -> None:
    """Writes the records of a picture of ``size`` (H, W), each with an RLE under "segmentation", in place of what was there.
    A score that is no number (the stability of an empty mask) becomes null.

    ``draw`` is called with the path that it is to write a PNG to. Raises ``OSError`` for what the file system refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).unlink(missing_ok=True)
    names = [f"mask_{index:03d}.png" for index in range(len(records))]
    for name, record in zip(names, records, strict=True):
        picture = Image.fromarray(decode_rle(record["segmentation"]).astype(np.uint8) * 255)
        _replace(folder / name, lambda path, picture=picture: picture.save(path, optimize=True))  # type: ignore[misc]
    _replace(folder / DRAWING, draw)
    for path in folder.iterdir():
        if MASK_FILE.fullmatch(path.name) and path.name not in names:
            path.unlink()
    described = {
        "request": request,
        "height": size[0],
        "width": size[1],
        "overlay": DRAWING,
        "masks": [{"file": name, **_plain(record)} for name, record in zip(names, records, strict=True)],
    }
    text = json.dumps(described, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    _replace(folder / DESCRIPTION, lambda path: path.write_text(text, encoding="utf-8"))


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has neither NaN nor infinity."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """``write`` into a file beside ``path``, which then takes its place: a reader sees all of it or nothing."""
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
