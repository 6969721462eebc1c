"""Which launch configs are worth measuring beside a committed one, and what is made of the measurements: pure functions.

A candidate differs from the committed config in at most two knobs, each by a step or two on its ladder; the nearest come first.
Every integer of a config is a knob; of those without a ladder halves and doubles are taken. A winner becomes a table row whose
bounds are the shape it was measured at, the largest measured size being left unbounded; ways become dispatch rules (``rules``).
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
    "PERSISTENT": (0, 1, 2),
    "PROGRAMS": (128, 256, 512, 1024, 2048),
    "SHORT_KEYS": (0, 208, 272),
    "MAX_TOKENS": (0, 64, 128, 192, 256, 384, 512, 1024),
    "maxnreg": (96, 128, 168, 232, 255),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": (1, 2, 3, 4, 5, 6, 8),
}
# What a kernel computes with, not how: TABLE rows of positions fit, partial sums are promoted, the GPU has so many processors;
# and which launches are dependent, for it takes other kernels around to say what that is worth (``chains``).
FIXED = ("TABLE", "PROMOTE", "MULTIPROCESSORS", "PDL")

# Configs that are worth a look wherever the committed one lies.
KNOWN: dict[str, tuple[dict[str, int], ...]] = {
    "attention_forward": (
        {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
        {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    ),
    "image_attention_global": ({"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3, "maxnreg": 168},),
    "linear": (
        {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "PERSISTENT": 1, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    ),
}
MOST_CHANGES = 2
STEPS = 2  # on a ladder, for one knob alone; one each where two change
WORTH = 0.02  # a winner is this much faster than the committed config, or that stays

# Shape numbers that say how much there is to do, not how large a tile is: beyond the largest measured nothing changes.
SIZES = ("queries", "keys", "rows", "columns", "depth")

Config = dict[str, int]
Shape = dict[str, int]


def ladder(name: str, value: int) -> list[int]:
    """The values of a knob, the present one among them: its own, or halves and doubles where it has none."""
    if name in FIXED or (name not in LADDERS and value < 2):
        return [value]
    return sorted({value, *LADDERS.get(name, (value // 4, value // 2, 2 * value, 4 * value))})


def grid(committed: Config, op: str = "") -> list[Config]:
    """The committed config, what is known to be good elsewhere, then its neighbours, nearest first."""
    knobs = {name: ladder(name, value) for name, value in committed.items()}
    known = [committed | {name: value for name, value in good.items() if name in committed} for good in KNOWN.get(op, ())]
    found: list[tuple[int, int, Config]] = [(0, 0, committed), *((0, 1, config) for config in known)]
    for changes in range(1, MOST_CHANGES + 1):
        steps = range(-STEPS, STEPS + 1) if changes == 1 else (-1, 1)
        for chosen in itertools.combinations(knobs, changes):
            for moves in itertools.product([step for step in steps if step], repeat=changes):
                places = [knobs[name].index(committed[name]) + step for name, step in zip(chosen, moves, strict=True)]
                if all(0 <= place < len(knobs[name]) for name, place in zip(chosen, places, strict=True)):
                    changed = {name: knobs[name][place] for name, place in zip(chosen, places, strict=True)}
                    found.append((changes, sum(map(abs, moves)), committed | changed))
    configs = [config for _, _, config in sorted(found, key=lambda entry: entry[:2])]
    return [config for place, config in enumerate(configs) if config not in configs[:place]]


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


def rules(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dispatch rules of one operator from measurements of its ways: the fastest, or the kernel where it is as fast but for
    ``WORTH``. Words and widths are those that were measured; a shape of other sizes goes by the next larger measured one."""
    calls = list({str(sorted(entry["shape"].items())): entry["shape"] for entry in entries}.values())
    found = []
    for call in calls:
        timed = [entry for entry in entries if entry["shape"] == call and entry["ms"] is not None]
        if not timed:
            continue
        best = {way: min((e for e in timed if e["config"]["serve"] == way), key=lambda e: e["ms"]) for way in _ways(timed)}
        fastest = min(best.values(), key=lambda entry: entry["ms"])
        kernel = best.get("kernel", fastest)
        chosen = kernel if fastest["ms"] > (1 - WORTH) * kernel["ms"] else fastest
        times = ", ".join(f"{way} {entry['ms']:.4g} ms" for way, entry in best.items())
        alike = [other for other in calls if all(other.get(k) == v for k, v in call.items() if k not in SIZES)]
        when = {name: _bound(name, value, [other[name] for other in alike]) for name, value in call.items()}
        rule = {"when": when, "serve": chosen["config"]["serve"], "why": f"{times}: {chosen['case']}", "basis": "measured"}
        found.append(([call.get(name, 0) for name in SIZES], rule))
    return [rule for _, rule in sorted(found, key=lambda entry: entry[0])]


def _bound(name: str, value: Any, measured: list[Any]) -> Any:
    """Sizes reach down to a quarter of the least that was measured, below which nothing is known, and beyond the largest."""
    if name not in SIZES:
        return value if isinstance(value, str) else [value, value]
    return [min(measured) // 4, None if value == max(measured) else value]


def _ways(entries: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(entry["config"]["serve"] for entry in entries))


def _names(entries: list[dict[str, Any]]) -> list[str]:
    """Kinds before sizes: a row for half precision comes before any for float32, however many queries that is for."""
    names = sorted({name for entry in entries for name in entry["shape"]})
    return [*(name for name in names if name not in SIZES), *(name for name in names if name in SIZES)]


def _is_largest(name: str, shape: Shape, entries: list[dict[str, Any]]) -> bool:
    if name not in SIZES:
        return False
    alike = [e["shape"] for e in entries if all(e["shape"].get(k) == v for k, v in shape.items() if k not in SIZES)]
    return shape[name] == max(other[name] for other in alike)
