"""Result files: what one row holds, what the numbers depend on, where a file lies, and how two of them join or compare.

``{"gpu", "driver", "commit", "versions", "copy_gb_s", "gemm_tflop_s", "rows": [...]}``; a row: case, op, pass ("forward",
"backward", "step", "first_call", "launch"), dtype, shape, ours_ms, ours_spread, peers {name: ms}, floor_ms, gflop, mbyte,
peak_mb, peers_peak_mb, max_error, and ``unavailable`` {peer: reason}. Memory in MiB; mbyte: the 10⁶ bytes that must move;
``rate``: how many times the large product's the floor takes for arithmetic in 8 bits. Whole models besides: p95_ms, images_s,
mfu, joules_an_image (or ``energy_absent``, why not), the peers' as peers_p95_ms and peers_joules_an_image, and ``took_s``
{name: seconds} of everyone's turn, compiling and checking included. A row without a time has an ``error`` and its
``traceback``. ``standard`` {"of", "overall", "row"}: the peer by whose error the others of a whole model are judged. On a GPU
``timed`` {name: "replay" or "events"} says how each was timed and ``events_ms`` {name: ms} has everyone's time by events;
``broke`` names who left the device unusable.
"""

import contextlib
import datetime
import fnmatch
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

import fastvit

ROOT = Path(__file__).resolve().parent.parent  # the checkout; as installed, the package fastvit
ROOT_OF_IMPORTS = Path(fastvit.__file__).resolve().parents[1]
NO_TIME = "left out: no time"
LOSS = 0.05
SOURCES = ("fastvit", "kernels", "benchmarks", ":!benchmarks/results")  # what a measurement depends on
ANCHORS = ("original", "eager", "sdpa")  # peers that stay as they are while we change
LIBRARIES = ("triton", "timm", "transformers", "segment-anything", "onnxruntime", "openvino", "xformers", "flash-attn")

Row = dict[str, Any]
Result = dict[str, Any]


class NotRun(Exception):
    """Why a contestant, or a whole row, has no time, which is no defect of ours."""


def new_row(case: str, op: str, direction: str, dtype: str, shape: list[int]) -> Row:
    """A row before anything is measured."""
    label = {"case": case, "op": op, "pass": direction, "dtype": dtype, "shape": shape}
    numbers = dict.fromkeys(("ours_ms", "ours_spread", "floor_ms", "gflop", "mbyte", "peak_mb", "max_error"))
    return {**label, **numbers, "peers": {}, "peers_peak_mb": {}, "unavailable": {}}


def key(row: Row) -> tuple:
    """What makes two rows the same measurement."""
    return row["case"], row["op"], row["pass"], row["dtype"], tuple(row["shape"])


def name_of(row: Row) -> str:
    return f"{row['op']} {row['case']} {row['pass']} {row['dtype']} {'×'.join(map(str, row['shape']))}"


def why_no_time(row: Row) -> str | None:
    """What failed, or why ours does not run on that device; None where the row has our time."""
    if row.get("error"):
        return row["error"]
    return None if row["ours_ms"] else row["unavailable"].get("fastvit", "not measured")


def ratio(row: Row) -> float | None:
    """The fastest peer's time over ours: above 1 we win. None without a time on either side.

    Where both ran in turns, the median over the pairs (``paired_ratio``), which a busy machine leaves alone.
    """
    if not row["ours_ms"] or not row["peers"]:
        return None
    return row.get("paired_ratio") or min(ratios(row).values())


def ratios(row: Row) -> dict[str, float]:
    """Each peer's time over ours, like with like: where one was timed by replays and the other was not, both by events.

    A peer that has its own time as a graph beside it is represented by that.
    """
    timed, events = row.get("timed", {}), row.get("events_ms", {})
    found = {}
    for name, ms in row["peers"].items():
        if timed.get(name) == timed.get("fastvit"):
            found[name] = ms / row["ours_ms"]
        elif f"{name}_graph" not in row["peers"] and events.get(name) and events.get("fastvit"):
            found[name] = events[name] / events["fastvit"]
    return found or {name: ms / row["ours_ms"] for name, ms in row["peers"].items()}


def fastest_peer(row: Row) -> str | None:
    if not row["peers"]:
        return None
    found = ratios(row) if row["ours_ms"] else row["peers"]
    return min(found, key=lambda name: found[name])


def is_complete(row: Row, only: tuple[str, ...] = ("*",)) -> bool:
    """Nothing failed, nobody broke the device under it, and none of the contestants asked for was left out for want of time."""
    left = [name for name, reason in row["unavailable"].items() if reason == NO_TIME]
    return not {"error", "broke"} & row.keys() and not any(fnmatch.fnmatch(name, glob) for name in left for glob in only)


def resumed(row: Row) -> Row:
    """What another run goes on from: who was timed, and none of those left out for want of time. Empty where anything failed."""
    late = row.get("error", NO_TIME).endswith(NO_TIME)
    if not late or "broke" in row:
        return {}
    kept = {key: value for key, value in row.items() if key not in ("error", "traceback")}
    return kept | {"unavailable": {name: reason for name, reason in row["unavailable"].items() if reason != NO_TIME}}


def describe(error: BaseException) -> str:
    """One line: the first of the message, or the last of one that quotes source code, then what lies at the bottom of it."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    quotes = type(error).__name__ == "CompilationError" or lines[0].startswith("at ")
    text = f"{type(error).__name__}: {lines[-1 if quotes else 0].strip()}"[:200]
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    return text if root is error else f"{text} (from {type(root).__name__}: {str(root).partition(chr(10))[0]})"[:400]


def failure(error: BaseException) -> Row:
    """What a row without a time says: the error in a line, and the end of its traceback."""
    tail = "".join(traceback.format_exception(error)).splitlines()[-20:]
    return {"error": describe(error), "traceback": tail, "ours_ms": None}


def is_sticky(text: str) -> bool:
    """Whether the error is one after which the process can launch nothing more: a fault on the device, not a refused call."""
    refused = ("captur", "out of memory", "invalid argument", "invalid configuration", "out of resources")
    faults = ("CUDA error", "AcceleratorError", "HIP error", "Triton Error [CUDA]", "Triton Error [HIP]")
    return any(word in text for word in faults) and not any(word in text for word in refused)


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit() -> str:
    """What was measured: the checkout's commit, and ``+dirty-`` with a hash where the sources are not the committed ones.

    Without git, or as installed: the version and a hash of all sources. ``FASTVIT_COMMIT`` names it instead.
    """
    if os.environ.get("FASTVIT_COMMIT"):
        return os.environ["FASTVIT_COMMIT"]
    if output_of("git", "rev-parse", "--show-toplevel") != str(ROOT):
        return f"v{fastvit.__version__}-{_hash(_sources(Path(fastvit.__file__).parent, ROOT / 'kernels', ROOT / 'benchmarks'))}"
    changed = output_of("git", "diff", "--name-only", "HEAD", "--", *SOURCES).splitlines()
    changed += output_of("git", "ls-files", "--others", "--exclude-standard", "--", *SOURCES).splitlines()
    dirty = f"+dirty-{_hash([ROOT / name for name in sorted(changed)])}" if changed else ""
    return output_of("git", "rev-parse", "HEAD") + dirty


def _sources(*folders: Path) -> list[Path]:
    """Python and tables below the folders, in order, none twice and no result."""
    found = {path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".json")}
    return sorted(path for path in found if ROOT / "benchmarks" / "results" not in path.parents)


def _hash(files: list[Path]) -> str:
    """Eight digits of the files' names and content; a file that is gone has none."""
    found = hashlib.sha256()
    for path in files:
        found.update(str(path.name).encode() + b"\0" + (path.read_bytes() if path.is_file() else b"gone") + b"\0")
    return found.hexdigest()[:8]


def short(commit: str) -> str:
    """Seven digits of a commit's, and what follows them."""
    return re.sub(r"^([0-9a-f]{7})[0-9a-f]+\b", r"\1", commit)


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(device: str) -> Result:
    """What the numbers depend on."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "fastvit": fastvit.__version__}
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    about: Result = {"device": device, "gpu": "none", "driver": "none", "clocks": [], "commit": commit()}
    about |= {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }
    if device == "cuda":
        versions["cuda"] = str(torch.version.cuda or torch.version.hip)
        query = ("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.sm,power.limit", "--format=csv,noheader")
        driver, *clocks = (part.strip() for part in output_of(*query).partition("\n")[0].split(","))
        about |= {"gpu": torch.cuda.get_device_name(0), "driver": driver, "clocks": clocks}
    return about | {"versions": versions}


def path_of(out: Path, about: Result, day: datetime.date, quick: bool = False) -> Path:
    folder = "cpu" if about["gpu"] == "none" else re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    name = re.sub(r"[^\w.+-]", "-", short(about["commit"]))
    return out / folder / f"{day.isoformat()}-{name}{'-quick' if quick else ''}.json"


def read(path: Path) -> Result:
    """A result file. Raises ``ValueError`` (``OSError`` where it cannot be read) for one that is none."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not isinstance(content.get("commit"), str) or not all(map(_is_row, rows)):
        expected = ", ".join(_FIELDS)
        raise ValueError(f"{path}: is no result file of the benchmarks: expected a commit and rows with {expected}")
    return content


_TIME = (int, float, type(None))
_FIELDS: dict[str, Any] = dict.fromkeys(("case", "op", "pass", "dtype"), str) | {"shape": list, "ours_ms": _TIME}
_FIELDS |= dict.fromkeys(("peers", "unavailable"), dict)


def _is_row(row: Any) -> bool:
    """Of the fields that are read before anything is measured, each of its kind."""
    if not isinstance(row, dict) or not all(name in row and isinstance(row[name], kind) for name, kind in _FIELDS.items()):
        return False
    return all(isinstance(size, int) for size in row["shape"]) and all(isinstance(ms, _TIME) for ms in row["peers"].values())


def write(path: Path, result: Result) -> None:
    """All of it or nothing: a run that is killed leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)


def merge(old: Result | None, new: Result) -> Result:
    """The new file with the rows of an older run of the same commit that were not measured again, held to the new one's rates."""
    if old is None or old.get("commit") != new["commit"]:
        return new
    measured = {key(row) for row in new["rows"]}
    return new | {"rows": [held_to(row, new) for row in old["rows"] if key(row) not in measured] + new["rows"]}


def held_to(row: Row, rates: Result) -> Row:
    """The row with its floor and its MFU by a file's ``gemm_tflop_s`` and ``copy_gb_s``, which every run measures anew."""
    if not row.get("floor_ms") or not rates.get("gemm_tflop_s"):
        return row
    arithmetic = (row.get("gflop") or 0.0) / rates["gemm_tflop_s"]
    row = row | {"floor_ms": max(arithmetic / row.get("rate", 1), (row.get("mbyte") or 0.0) / rates["copy_gb_s"])}
    return row | {"mfu": arithmetic / row["ours_ms"]} if row.get("mfu") and row["ours_ms"] else row


def compare(old: Result, new: Result, loss: float = LOSS) -> tuple[list[str], list[str], int]:
    """(losses, notes, rows compared): what takes longer than it did or fails now, a line each; what only one side has.

    Judged on a CPU by our time over the anchor's (the original's or eager's) of the same run, where both runs have it, since a
    machine is not equally busy twice; elsewhere by our time. A loss is more than ``loss`` longer, and the two intervals
    (median ± spread) do not overlap.
    """
    before, after = ({key(row): row for row in result["rows"]} for result in (old, new))
    losses, notes, compared = [], [], 0
    for at, row in after.items():
        if at not in before:
            notes.append(f"only in the new run: {name_of(row)}")
            continue
        if before[at]["ours_ms"] is None:
            continue
        compared += 1
        if row["ours_ms"] is None:
            losses.append(f"{name_of(row)}: {row.get('error', 'no time')} (was {before[at]['ours_ms']:.4g} ms)")
            continue
        anchor = _anchor(before[at], row) if old.get("gpu") == new.get("gpu") == "none" else None
        (was, was_spread), (now, spread) = _judged(before[at], anchor), _judged(row, anchor)
        if now > (1 + loss) * was and now * (1 - spread) > was * (1 + was_spread):
            unit = f"of {anchor}'s time" if anchor else "ms"
            losses.append(f"{name_of(row)}: {was:.4g} -> {now:.4g} {unit}, {now / was - 1:+.0%}")
    notes += [f"only in the old run: {name_of(row)}" for at, row in before.items() if at not in after]
    for what in ("gpu", "cpu", "threads"):
        if old.get(what) != new.get(what):
            notes.insert(0, f"another machine: {what} was {old.get(what)}, is {new.get(what)}")
    return losses, notes, compared


def _anchor(*rows: Row) -> str | None:
    return next((name for name in ANCHORS if all(row["peers"].get(name) for row in rows)), None)


def _judged(row: Row, anchor: str | None) -> tuple[float, float]:
    """(time, in milliseconds or of the anchor's, and its spread as a share of it)."""
    spread = row.get("ours_spread") or 0.0
    if anchor is None:
        return row["ours_ms"], spread
    return row["ours_ms"] / row["peers"][anchor], spread + row.get("peers_spread", {}).get(anchor, 0.0)
