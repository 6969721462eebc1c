"""The committed state of the machine code: one JSON a target in ``benchmarks/snapshots``, a kernel and table row a line.

It holds for the Triton it names; a change of kernels, tables or workloads shows as lines that differ. Rewritten by

    python -m benchmarks.static --target all --write
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "snapshots"
TRITON = "3.7.1"  # the Triton whose machine code is kept
COMMAND = "python -m benchmarks.static --target {} --write"


def path_of(target: str) -> Path:
    return FOLDER / f"{target}.json"


def lines_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is kept of each report, by its name: zeros and empty values left out, the hottest loop's counts under "loop".

    Of several variants of one name the first.
    """
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["name"] in kept:
            continue
        spills = row["counts"].get("spills", 0)
        values = {name: row[name] for name in ("registers", "stack", "shared", "occupancy")} | {"spills": spills}
        values |= {"instructions": row["counts"].get("instructions", 0)} | row["tensor_core"]
        values |= {"serialized": row["serialized"], "loop": row["loop"]}
        kept[row["name"]] = {name: value for name, value in values.items() if value}
    return kept


def dump(target: str, triton: str, lines: dict[str, dict[str, Any]]) -> str:
    rows = ",\n".join(f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(lines[name])}" for name in sorted(lines))
    return f'{{\n"target": "{target}",\n"triton": "{triton}",\n"rows": {{\n{rows}\n}}\n}}\n'


def load(target: str) -> dict[str, Any]:
    """The committed snapshot; one without rows where there is none yet."""
    path = path_of(target)
    return json.loads(path.read_text()) if path.exists() else {"target": target, "triton": TRITON, "rows": {}}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    loop = values.get("loop") or {}
    return {name: value for name, value in values.items() if name != "loop"} | {f"loop {k}": v for k, v in loop.items()}


def difference(old: dict[str, dict], new: dict[str, dict], all_names: list[str]) -> list[str]:
    """In words, what is not as it was: rows gone (of those in ``all_names``' place), rows new, and each number that changed."""
    found = [f"{name}: is gone" for name in old if name not in all_names]
    for name, values in new.items():
        if name not in old:
            found.append(f"{name}: is new")
            continue
        before, after = _flat(old[name]), _flat(values)
        keys = [key for key in before | after if before.get(key, 0) != after.get(key, 0)]
        if keys:
            found.append(f"{name}: " + ", ".join(f"{key} {before.get(key, 0)} → {after.get(key, 0)}" for key in keys))
    return found
