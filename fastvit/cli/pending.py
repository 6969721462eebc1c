"""Which pictures ``fastvit segment`` has still to do: each has a folder of its own, and what is finished there says for which
picture, which weights and which question."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from .options import UserError, writing

WEIGHTS = (".safetensors", ".bin", ".json")  # in a model's folder


def pictures_in(given: list[Path]) -> list[Path]:
    """The pictures, a folder's sorted by name."""
    from PIL import Image

    found: list[Path] = []
    for path in given:
        suffixes = Image.registered_extensions()
        with writing(path):  # what may not be looked into is refused as what may not be written
            if not path.is_dir():
                found.append(path)
                continue
            inside = sorted(file for file in path.iterdir() if _visible(file) and file.suffix.lower() in suffixes)
        if not inside:
            raise UserError(f"{path}: no pictures in this folder")
        found += inside
    return list(dict.fromkeys(found))


def _visible(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def to_do(pictures: list[Path], out: Path, asked: dict[str, Any], overwrite: bool) -> tuple[list[tuple[Path, Path]], int]:
    """(picture, its folder) of those that are to be done, and how many are finished."""
    from ..pipelines.results import finished_request

    waiting, finished = [], 0
    for home, picture in _homes(pictures, out).items():
        before = None if overwrite else finished_request(home)
        request = json.loads(json.dumps(request_of(picture, asked)))
        if before == request:
            finished += 1
        elif not isinstance(before, dict) or {**before, "stamp": request["stamp"]} == request:  # the picture is another now
            waiting.append((picture, home))
        else:
            raise UserError(
                f"{home} holds what was asked otherwise, or with weights that have changed since;"
                " give another --out, or --overwrite to replace it"
            )
    return waiting, finished


def _homes(pictures: list[Path], out: Path) -> dict[Path, Path]:
    """Each picture by its folder, which has its name, and its suffix where that tells pictures apart."""
    stems = Counter(picture.stem for picture in pictures)
    homes: dict[Path, Path] = {}
    for picture in pictures:
        alone = stems[picture.stem] == 1
        home = out / (picture.stem if alone else f"{picture.stem}_{picture.suffix.removeprefix('.')}")
        if home in homes:
            raise UserError(f"{homes[home]} and {picture} would both be written to {home}; segment them with another --out")
        homes[home] = picture
    return homes


def request_of(picture: Path, asked: dict[str, Any]) -> dict[str, Any]:
    return {"picture": os.path.realpath(picture), "stamp": _stamp(picture), **asked}


def _stamp(path: Path) -> list[int] | None:
    """Bytes and time of the last change: what is enough to see that a file is another. None for one that cannot be seen."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def stamps_of(name: str) -> dict[str, list[int] | None]:
    """The stamp of a file, or of the files in a folder; nothing for an id, whose weights lie elsewhere."""
    try:
        path = Path(name).expanduser()
        inside = sorted(path.iterdir()) if path.is_dir() else []
        files = [path] if path.is_file() else [file for file in inside if file.suffix in WEIGHTS]
    except (OSError, RuntimeError):  # what opens it says why it cannot be had
        return {}
    return {file.name: _stamp(file) for file in files}
