"""Result files: what one row holds, what the numbers depend on, where a file lies, and how two of them join or compare.

``{"gpu", "driver", "commit", "versions", "copy_gb_s", "gemm_tflop_s", "rows": [...]}``; a row: case, op, pass ("forward",
"backward", "step", "first_call"), dtype, shape, ours_ms, ours_spread, peers {name: ms}, floor_ms, gflop, mbyte, peak_mb,
peers_peak_mb, max_error, and ``unavailable`` {peer: reason}. Memory in MiB; mbyte: the 10⁶ bytes that must move. A row
without a time has an ``error``.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fastvit

ROOT = Path(__file__).resolve().parent.parent  # the checkout; as installed, the package fastvit
ROOT_OF_IMPORTS = Path(fastvit.__file__).resolve().parents[1]
NO_TIME = "left out: no time"
LOSS = 0.05
LIBRARIES = ("triton", "timm", "transformers", "segment-anything", "onnxruntime", "openvino", "xformers", "flash-attn")

Row = dict[str, Any]
Result = dict[str, Any]


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


def ratio(row: Row) -> float | None:
    """The fastest peer's time over ours: above 1 we win. None without a time on either side.

    Where both ran in turns, the median over the pairs (``paired_ratio``), which a busy machine leaves alone.
    """
    if not row["ours_ms"] or not row["peers"]:
        return None
    return row.get("paired_ratio") or min(row["peers"].values()) / row["ours_ms"]


def fastest_peer(row: Row) -> str | None:
    return min(row["peers"], key=row["peers"].get) if row["peers"] else None


def is_complete(row: Row) -> bool:
    """Nothing in it was left out for want of time, and nothing failed."""
    return "error" not in row and NO_TIME not in row["unavailable"].values()


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit() -> str:
    """Of the checkout this lies in; as installed, the version. ``FASTVIT_COMMIT`` names it where git cannot."""
    if os.environ.get("FASTVIT_COMMIT"):
        return os.environ["FASTVIT_COMMIT"]
    ours = output_of("git", "rev-parse", "--show-toplevel") == str(ROOT)
    return output_of("git", "rev-parse", "HEAD") if ours else f"v{fastvit.__version__}"


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
    return out / folder / f"{day.isoformat()}-{about['commit'][:7]}{'-quick' if quick else ''}.json"


def read(path: Path) -> Result:
    """A result file. Raises ``ValueError`` (``OSError`` where it cannot be read) for one that is none."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from None
    needed = {"case", "op", "pass", "dtype", "shape", "ours_ms"}
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise ValueError(f"{path}: is no result file of the benchmarks: expected rows with {', '.join(sorted(needed))}")
    return content


def write(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def merge(old: Result | None, new: Result) -> Result:
    """The new file with the rows of an older run of the same commit that were not measured again."""
    if old is None or old.get("commit") != new["commit"]:
        return new
    measured = {key(row) for row in new["rows"]}
    return new | {"rows": [row for row in old["rows"] if key(row) not in measured] + new["rows"]}


def compare(old: Result, new: Result, loss: float = LOSS) -> tuple[list[str], list[str]]:
    """(losses, notes), a line each: what takes more than ``loss`` longer than it did or fails now; what only one side has."""
    before, after = ({key(row): row for row in result["rows"]} for result in (old, new))
    losses, notes = [], []
    for at, row in after.items():
        if at not in before:
            notes.append(f"only in the new run: {name_of(row)}")
            continue
        was = before[at]["ours_ms"]
        if was is None:
            continue
        if row["ours_ms"] is None:
            losses.append(f"{name_of(row)}: {row.get('error', 'no time')} (was {was:.4g} ms)")
        elif row["ours_ms"] > (1 + loss) * was:
            losses.append(f"{name_of(row)}: {was:.4g} -> {row['ours_ms']:.4g} ms, {row['ours_ms'] / was - 1:+.0%}")
    notes += [f"only in the old run: {name_of(row)}" for at, row in before.items() if at not in after]
    for what in ("gpu", "cpu", "threads"):
        if old.get(what) != new.get(what):
            notes.insert(0, f"another machine: {what} was {old.get(what)}, is {new.get(what)}")
    return losses, notes
