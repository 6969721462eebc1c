"""(operator, GPU, dtype, shape) → launch config, in plain Python over the committed tables in ``tables/``.

A table is ``{"target", "provenance", "shared_memory", "ops": {op: [{"when": {...}, "config": {...}, "shared": n}, ...]}}``.
``when`` holds upper bounds; the first row whose every bound holds, and whose ``shared`` bytes of shared memory the GPU has, is
taken. Beside "ops", "dispatch" has rules {"when", "serve", "why", "basis"} for the backend ``auto``: which of an operator's ways
(``WAYS``) serves a call, why, and whether that was "predicted" or "measured". Nothing is ever tuned at run time. A GPU without a
table uses its architecture's, and any other the table ``default``, which asks for little. ``FASTVIT_TABLES=DIR`` names a folder
of tables in the same format, as ``fastvit tune`` writes them: the rows of ``DIR/<target>.json`` come before the committed ones.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

TABLES = Path(__file__).parent / "tables"
USER_TABLES = "FASTVIT_TABLES"

# What serves an operator on ``auto``: the kernel; PyTorch's fused attention; the vendor's product, its activation in a pass
# afterwards, or (in inference, where that is the same function) in the product's own epilogue; in what ``torch.compile`` makes of
# a transformer block, our operators or the block's own forward.
WAYS = {
    "attention": ("kernel", "sdpa"),
    "rotary_attention": ("kernel", "sdpa"),
    "image_attention": ("kernel",),
    "linear": ("kernel", "vendor", "vendor_fused"),
    "linear_add_norm": ("kernel", "vendor"),
    "linear_8bit": ("kernel", "vendor"),
    "block": ("kernel", "original"),
}
UNTUNED = {"block"}  # compiling decides there, which nobody measures by the launch

OPTIONAL = {"HALVINGS", "PDL", "maxnreg"}  # knobs that a row may lack wherever the committed ones have them: as in older tables

Bound = int | str | list[int | None]

# GPUs whose table is another one's, of the same instructions. Rows that ask for more shared memory than there is are passed
# over. sm_86 and sm_89, whose memory is little beside sm_80's, have the default table, made for it.
NEAREST = {"sm_87": "sm_80", "gfx950": "gfx942", "gfx941": "gfx942", "gfx940": "gfx942", "gfx90a": "gfx942"}


def nearest(target: str) -> str:
    """Whose table serves ``target``: its own, its architecture's (sm_103: sm_100), or "default"."""
    architecture = f"{target[:-1]}0" if target.startswith(("sm_9", "sm_10", "sm_12")) else ""
    for name in (target, NEAREST.get(target, ""), architecture):
        if name and (TABLES / f"{name}.json").exists():
            return name
    return "default"


@cache
def committed(target: str) -> dict[str, Any]:
    """The committed table that serves ``target``."""
    try:
        return json.loads((TABLES / f"{nearest(target)}.json").read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"no launch configs at {TABLES}; reinstall fastvit") from None


@cache
def table(target: str) -> dict[str, Any]:
    """What configs are looked up in: the rows of the user's table for ``target``, if there is one, then the committed ones."""
    ours = committed(target)
    folder = os.environ.get(USER_TABLES)
    path = Path(folder or "") / f"{target}.json"
    if not folder or not path.exists():
        if folder and not Path(folder).is_dir():
            raise NotADirectoryError(f"{USER_TABLES}: got {folder!r}, which is no folder; expected one with <target>.json in it")
        return ours
    theirs = _checked(path, ours)
    return ours | {part: {op: theirs[part].get(op, []) + rows for op, rows in ours[part].items()} for part in ("ops", "dispatch")}


def _checked(path: Path, ours: dict[str, Any]) -> dict[str, dict[str, list]]:
    """The "ops" and "dispatch" of a user's table, with the operators, bounds, knobs and ways that the committed table has."""
    try:
        theirs = json.loads(path.read_text())
        ops, rules = theirs["ops"], theirs.get("dispatch", {})
        for op, rows in ops.items():
            configs = [row["config"] for row in ours["ops"][op]]
            needed = set(configs[0]).intersection(*configs) - OPTIONAL
            for row in rows:
                missing = sorted(needed - set(row["config"]))
                if missing:
                    raise ValueError(f"a row of {op} lacks {', '.join(missing)}")
                if not all(isinstance(value, int) for value in [*row["config"].values(), *row["when"].values()]):
                    raise ValueError(f"a row of {op} has bounds or knobs that are no integers")
        for op, row in ((op, row) for op, rows in rules.items() for row in rows):
            if row["serve"] not in WAYS[op]:
                raise ValueError(f"a rule of {op} serves {row['serve']!r}, which is none of {', '.join(WAYS[op])}")
            if not isinstance(row["why"] + row["basis"], str) or not all(map(_is_bound, row["when"].values())):
                raise ValueError(f"a rule of {op} has bounds that are no number, word or pair of numbers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no operator or entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{USER_TABLES}: {path} is not a tuning table: {what}") from None
    return {"ops": ops, "dispatch": rules}


def _is_bound(bound: Any) -> bool:
    pair = isinstance(bound, list) and len(bound) == 2 and all(end is None or isinstance(end, int) for end in bound)
    return pair or isinstance(bound, int | str)


def sources(target: str) -> dict[str, str]:
    """Name of each table that rows for ``target`` come from → its provenance, the user's first."""
    ours = committed(target)
    path = Path(os.environ.get(USER_TABLES) or TABLES) / f"{target}.json"
    theirs = {str(path): json.loads(path.read_text())["provenance"]} if USER_TABLES in os.environ and path.exists() else {}
    return theirs | {f"table {ours['target']}": ours["provenance"]}


def targets() -> list[str]:
    """Every target with a committed table, the default left out."""
    return sorted(path.stem for path in TABLES.glob("*.json") if path.stem not in ("default", "interpreter"))


@cache
def shared_memory(target: str) -> int | None:
    """Bytes of shared memory that a program may take on the GPU ``target`` of this machine; None where there is none such."""
    if target.startswith("sm_") and torch.version.hip is None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            if f"sm_{properties.major}{properties.minor}" == target:
                return getattr(properties, "shared_memory_per_block_optin", None)
    return None


def first_fitting(rows: list[dict], shape: dict[str, int], limit: int | None) -> dict | None:
    """The first row whose upper bounds all hold and whose shared memory is within ``limit`` (None: any)."""
    for row in rows:
        fits = limit is None or row.get("shared", 0) <= limit
        if fits and all(shape[name] <= bound for name, bound in row["when"].items()):
            return row
    return None


def admits(when: dict[str, Bound], call: dict[str, Any]) -> bool:
    """Whether a rule's conditions hold for a call: a number bounds from above, a pair from both sides (None: no bound), a word
    has to be equal. What is bounded has to be there."""
    for name, bound in when.items():
        value = call.get(name)
        if value is None or isinstance(bound, str) or isinstance(value, str):
            if value != bound:
                return False
        elif isinstance(bound, int):
            if value > bound:
                return False
        else:
            low, high = bound
            if (low is not None and value < low) or (high is not None and value > high):
                return False
    return True


def rules(op: str, target: str) -> list[dict[str, Any]]:
    """The dispatch rules of ``op`` on ``target``, first come first served; the last has no conditions."""
    return table(target)["dispatch"][op]


_override: dict[str, dict[str, Any]] = {}
_asked: Callable[[str, dict[str, int]], None] | None = None


@lru_cache(maxsize=4096)
def config(op: str, target: str, **shape: int) -> dict[str, int]:
    """The launch config of ``op`` for these shape numbers."""
    if _asked is not None:
        _asked(op, shape)
    if op in _override:
        return _override[op]
    limit = shared_memory(target)
    row = first_fitting(table(target)["ops"][op], shape, limit)
    if row is None:
        within = "" if limit is None else f" within {limit} bytes of shared memory"
        raise LookupError(f"no row of {op} for {target} admits {shape}{within}: every table must end in a row without bounds")
    return row["config"]


def overridden(op: str) -> dict[str, Any] | None:
    """What ``override`` holds ``op`` to at the moment."""
    return _override.get(op)


def tuning() -> bool:
    """Whether configs are overridden or collected at the moment, so that none may be remembered."""
    return bool(_override) or _asked is not None


@contextmanager
def override(op: str, candidate: dict[str, Any]) -> Iterator[None]:
    """Inside, ``op`` is launched with ``candidate`` whatever its shape ("dispatch <op>": served as its "serve" says; "launch":
    every operator with its "PDL"): how candidates are measured. Not for several threads."""
    global _override
    previous, _override = _override, _override | {op: candidate}
    config.cache_clear()
    try:
        yield
    finally:
        _override = previous
        config.cache_clear()


@contextmanager
def asked() -> Iterator[list[tuple[str, dict[str, int]]]]:
    """Collects (operator, shape numbers) of the configs that are looked up inside."""
    global _asked
    found: list[tuple[str, dict[str, int]]] = []
    previous, _asked = _asked, lambda op, shape: found.append((op, dict(shape)))
    config.cache_clear()
    try:
        yield found
    finally:
        _asked = previous
        config.cache_clear()
