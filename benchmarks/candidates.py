"""Which launch configs are worth measuring beside a committed one, and what is made of the measurements: pure functions.

A candidate differs from the committed config in at most two knobs, each by a step or two on its ladder; the nearest come first.
A winner becomes a table row whose bounds are the shape it was measured at, the largest measured size being left unbounded.
"""

import itertools
from collections.abc import Iterable
from typing import Any

LADDERS: dict[str, tuple[int, ...]] = {
    "BLOCK_M": (16, 32, 64, 128, 256),
    "BLOCK_N": (16, 32, 64, 128, 256),
    "BLOCK_K": (16, 32, 64, 128),
    "BLOCK_ROWS": (1, 2, 4, 8, 16, 32, 64),
    "BLOCK_C": (64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "BLOCK": (256, 512, 1024, 2048, 4096),
    "GROUP_M": (1, 4, 8, 16),
    "HALVINGS": (0, 1, 2),
    "PROGRAMS": (128, 256, 512, 1024, 2048),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5),
}
MOST_CHANGES = 2
STEPS = 2  # on a ladder, for one knob alone; one each where two change
WORTH = 0.02  # a winner is this much faster than the committed config, or that stays

# Shape numbers that say how much there is to do, not how large a tile is: beyond the largest measured nothing changes.
SIZES = ("queries", "keys", "rows", "columns", "depth")

Config = dict[str, int]
Shape = dict[str, int]


def grid(committed: Config) -> list[Config]:
    """The committed config, then its neighbours, nearest first. Knobs without a ladder, or off theirs, stay."""
    knobs = [name for name, value in committed.items() if value in LADDERS.get(name, ())]
    found = []
    for changes in range(MOST_CHANGES + 1):
        steps = range(-STEPS, STEPS + 1) if changes == 1 else (-1, 1)
        for chosen in itertools.combinations(knobs, changes):
            for moves in itertools.product([step for step in steps if step], repeat=changes):
                places = [LADDERS[name].index(committed[name]) + step for name, step in zip(chosen, moves, strict=True)]
                if all(0 <= place < len(LADDERS[name]) for name, place in zip(chosen, places, strict=True)):
                    changed = {name: LADDERS[name][place] for name, place in zip(chosen, places, strict=True)}
                    found.append((changes, sum(map(abs, moves)), committed | changed))
    return [config for _, _, config in sorted(found, key=lambda entry: entry[:2])]


def winner(measured: list[dict[str, Any]], committed: Config) -> dict[str, Any] | None:
    """The measurement to keep: the fastest, unless the committed config is as fast but for ``WORTH``; None without times."""
    timed = [entry for entry in measured if entry["ms"] is not None]
    if not timed:
        return None
    fastest = min(timed, key=lambda entry: entry["ms"])
    stays = [entry for entry in timed if entry["config"] == committed and fastest["ms"] > (1 - WORTH) * entry["ms"]]
    return stays[0] if stays else fastest


def rows(winners: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Table rows of one operator from its winners ({"shape", "config", "shared"}), narrow ones first."""
    kept = list(winners)
    found: dict[str, dict[str, Any]] = {}
    for entry in kept:
        shape = entry["shape"]
        when = {name: value for name, value in shape.items() if not _is_largest(name, shape, kept)}
        found[str(sorted(when.items()))] = {"when": when, "config": entry["config"], "shared": entry["shared"]}
    return sorted(found.values(), key=lambda row: [row["when"].get(name, float("inf")) for name in _names(kept)])


def _names(entries: list[dict[str, Any]]) -> list[str]:
    """Kinds before sizes: a row for half precision comes before any for float32, however many queries that is for."""
    names = sorted({name for entry in entries for name in entry["shape"]})
    return [*(name for name in names if name not in SIZES), *(name for name in names if name in SIZES)]


def _is_largest(name: str, shape: Shape, entries: list[dict[str, Any]]) -> bool:
    if name not in SIZES:
        return False
    alike = [e["shape"] for e in entries if all(e["shape"].get(k) == v for k, v in shape.items() if k not in SIZES)]
    return shape[name] == max(other[name] for other in alike)
