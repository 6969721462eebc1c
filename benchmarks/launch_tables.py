"""Tuning tables as text, a row a line, as they are committed in ``kernels/tables``."""

import json
from typing import Any


def dump(table: dict[str, Any]) -> str:
    head = {name: value for name, value in table.items() if name != "ops"}
    entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in head.items())
    ops = []
    for op, rows in table["ops"].items():
        lines = ",\n".join(f"      {json.dumps(row)}" for row in rows)
        ops.append(f"    {json.dumps(op)}: [\n{lines}\n    ]")
    return "{\n" + entries + ',\n  "ops": {\n' + ",\n".join(ops) + "\n  }\n}\n"


def with_shared_memory(table: dict[str, Any], reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The table with the most shared memory (bytes) that any compiled launch of a row takes, as the row's "shared"."""
    ops = {op: [row | {"shared": 0} for row in rows] for op, rows in table["ops"].items()}
    for report in reports:
        for row in (ops[report["op"]][number] for number in report["rows"]):
            row["shared"] = max(row["shared"], report["shared"])
    return table | {"ops": ops}
