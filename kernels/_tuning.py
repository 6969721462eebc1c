"""(operator, GPU, dtype, shape) → launch config, in plain Python over the committed tables in ``tables/``.

A table is ``{"target", "provenance", "shared_memory", "ops": {op: [{"when": {...}, "config": {...}}, ...]}}``. ``when`` holds
upper bounds; the first row whose every bound holds is taken. Nothing is ever tuned at run time. A GPU without a table uses
its architecture's nearest one, and any other the table ``default``, which asks for little.
"""

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "tables"

# GPUs that share another one's instructions and have at least its shared memory.
NEAREST = {
    "sm_87": "sm_80",
    "sm_103": "sm_100",
    "sm_121": "sm_120",
    "gfx950": "gfx942",
    "gfx941": "gfx942",
    "gfx940": "gfx942",
    "gfx90a": "gfx942",
}


@cache
def table(target: str) -> dict[str, Any]:
    """The table for ``target``, its nearest relative's, or the default's."""
    for name in (target, NEAREST.get(target, ""), "default"):
        path = TABLES / f"{name}.json"
        if name and path.exists():
            return json.loads(path.read_text())
    raise FileNotFoundError(f"no launch configs at {TABLES}; reinstall fastvit")


def targets() -> list[str]:
    """Every target with a committed table, the default left out."""
    return sorted(path.stem for path in TABLES.glob("*.json") if path.stem not in ("default", "interpreter"))


@lru_cache(maxsize=4096)
def config(op: str, target: str, **shape: int) -> dict[str, int]:
    """The launch config of ``op`` for these shape numbers: the first row whose upper bounds all hold."""
    for row in table(target)["ops"][op]:
        if all(shape[name] <= bound for name, bound in row["when"].items()):
            return row["config"]
    raise LookupError(f"no row of {op} for {target} admits {shape}: every table must end in a row without bounds")
