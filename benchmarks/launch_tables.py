"""Tuning tables as text, a row a line, as they are committed in ``kernels/tables``."""

import json
from typing import Any


def dump(table: dict[str, Any]) -> str:
    entries = [_sections(name, value) if isinstance(value, dict) else _entry(name, value) for name, value in table.items()]
    return "{\n" + ",\n".join(entries) + "\n}\n"


def _entry(name: str, value: Any) -> str:
    return f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"


def _sections(name: str, value: dict[str, list]) -> str:
    sections = []
    for op, rows in value.items():
        lines = ",\n".join(f"      {json.dumps(row, ensure_ascii=False)}" for row in rows)
        sections.append(f"    {json.dumps(op)}: [\n{lines}\n    ]")
    return f"  {json.dumps(name)}: {{\n" + ",\n".join(sections) + "\n  }"


def with_shared_memory(table: dict[str, Any], reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The table with the most shared memory (bytes) that any compiled launch of a row takes, as the row's "shared"."""
    ops = {op: [row | {"shared": 0} for row in rows] for op, rows in table["ops"].items()}
    for report in reports:
        for row in (ops[report["op"]][number] for number in report["rows"]):
            row["shared"] = max(row["shared"], report["shared"])
    return table | {"ops": ops}
