"""What ``fastvit tune`` has measured, on disk as soon as it is made, so that a run goes on where another was ended.

The first line says what the measurements depend on; then a measurement a line: op, shape, config, case, committed, reason, ms,
spread, registers, stack, shared.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEPENDS = ("target", "gpu", "driver", "torch", "triton", "commit")  # measurements of which a log mixes no two


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


@dataclass
class Log:
    """The measurements of one GPU, its software and one commit, a line each, on disk as soon as they are made.

    ``dropped``: a last line that a run was ended in the middle of; it is taken off the file. Raises ``ValueError`` for a file
    that is no log, and for the log of another GPU, driver, torch, Triton or commit.
    """

    path: Path
    about: dict[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)
    dropped: str | None = None

    def __post_init__(self) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        half = lines.pop() if lines and not _is_whole(lines[-1]) else None
        try:
            header, *self.entries = map(json.loads, lines) if lines else [self.about]
            [(entry["op"], entry["shape"], entry["config"], entry["ms"]) for entry in self.entries]
            if not isinstance(header, dict) or (half and not lines and not half.startswith(b'{"target"')):
                raise ValueError
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{self.path}: is not a tuning log; give another --out") from None
        for key in DEPENDS:
            if header.get(key) != self.about[key]:
                differs = f"was measured with {key} {header.get(key)}, this is {self.about[key]}"
                raise ValueError(f"{self.path}: {differs}; give another --out, or delete the file to measure all of it again")
        if half is not None:
            self.dropped = half.decode(errors="replace").strip()
            os.truncate(self.path, sum(map(len, lines)))
        if not lines:
            self._append(self.about)

    def _append(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        self._append(entry)

    def of(self, op: str, shape: dict[str, int]) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if (entry["op"], entry["shape"]) == (op, shape)]
