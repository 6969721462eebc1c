"""The tables in README.md and docs/, made from the newest result files; everything between two markers is replaced.

    python -m benchmarks.tables            # writes them
    python -m benchmarks.tables --check    # exits with 1, naming the files, where they do not agree
    python -m benchmarks.tables --goals FILE    # every goal (goals.py) with what a GPU's result file says of it

Markers: ``<!-- table: NAME -->`` and ``<!-- end of table -->``, NAME one of ``TABLES``.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from . import cpu_cases, goals, results, show
from .results import Result
from .settings import Settings

ROOT = results.ROOT
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/benchmarks.md")
MARKED = re.compile(r"(<!-- table: (?P<name>[a-z ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
UNMEASURED = (
    "**There was no GPU to measure on**: nothing here was timed on one, and the figures that follow are a compiler's or a CPU's.",
    "The kernels are compiled for five architectures and their machine code is inspected on every test run ([what was found, and",
    "what is predicted]({docs}performance.md)); `make gpu` measures them where there is a GPU.",
)
CPU = Settings("cpu", {})
SNAPSHOTS = ROOT / "benchmarks" / "snapshots"
NOT_TENSOR_CORE = {"registers", "stack", "shared", "occupancy", "spills", "instructions", "loop"}


def newest(folder: Path, has_models: bool | None = None) -> tuple[Path, Result] | None:
    """The result file in the folder that was made last; with or without whole models among its rows, where that is asked."""
    found = [(path, results.read(path)) for path in sorted(folder.glob("[0-9]*.json")) if not path.stem.endswith("-quick")]
    if has_models is not None:
        found = [
            (p, r) for p, r in found if any(_is_model(row) == has_models for row in r["rows"] if row["pass"] != "first_call")
        ]
    return max(found, key=lambda pair: pair[1]["date"], default=None)


def _is_model(row: results.Row) -> bool:
    return row["op"] in show.WHOLE


def whole_models(folder: Path) -> list[tuple[Path, Result]]:
    """The result files that have a row of a whole model newer than the others', each with those rows alone."""
    found = [(path, results.read(path)) for path in sorted(folder.glob("[0-9]*.json")) if not path.stem.endswith("-quick")]
    seen: set[tuple] = set()
    kept = []
    for path, result in sorted(found, key=lambda pair: pair[1]["date"], reverse=True):
        rows = [row for row in result["rows"] if _is_model(row) and results.key(row) not in seen]
        seen |= {results.key(row) for row in rows}
        if rows:
            kept.append((path, result | {"rows": rows}))
    return kept


def _caption(path: Path, result: Result, docs: bool) -> str:
    link = f"{'../' if docs else ''}{path.relative_to(ROOT)}"
    turns = " in turns" if result.get("gpu", "none") == "none" else ""
    return f"Medians{show.runs(result['rows'], turns)}; {show.machine(result)} [File]({link})."


def cpu_models(docs: bool) -> list[str]:
    """Every case's newest row; where they are from several runs, each with its commit."""
    found = whole_models(RESULTS / "cpu")
    if not found:
        return ["Not measured."]
    if len(found) > 1:
        found = [(path, result | {"rows": [_with_commit(row, result) for row in result["rows"]]}) for path, result in found]
    cases = [case.title for case in (*cpu_cases.small(CPU), *cpu_cases.large(CPU))]
    rows = [row for _, result in found for row in result["rows"]]
    place = {title: number for number, title in enumerate(cases)}
    rows.sort(key=lambda row: (show.WHOLE.index(row["op"]), place.get(row["case"], len(place))))
    captions = [line for path, result in found for line in ("", _caption(path, result, docs))]
    return [*show.model_table(show.by_batch(rows)), *_absent(rows), *captions]


def _absent(rows: list[results.Row]) -> list[str]:
    """Who was to run and could not."""
    reasons = {row["case"]: {k: v for k, v in row["unavailable"].items() if v != cpu_cases.NOT_HERE} for row in rows}
    said = [
        f"{case}: {'; '.join(f'{name}: {reason}' for name, reason in found.items())}" for case, found in reasons.items() if found
    ]
    return ["", f"Could not run: {'. '.join(said)}."] if said else []


def _with_commit(row: results.Row, result: Result) -> results.Row:
    return row | {"commit": results.short(result["commit"])}


def cpu_operators(docs: bool) -> list[str]:
    found = newest(RESULTS / "cpu", has_models=False)
    return ["Not measured."] if found is None else _operators(*found, docs)


def _operators(path: Path, result: Result, docs: bool) -> list[str]:
    rows = [row for row in result["rows"] if row["op"] not in show.WHOLE and row["pass"] != "first_call"]
    lines: list[str] = []
    for op in dict.fromkeys(row["op"] for row in rows):
        lines += [f"### {op}", "", *show.table(row for row in rows if row["op"] == op), ""]
    return [*lines, _caption(path, {**result, "rows": rows}, docs)]


def gpu(docs: bool) -> list[str]:
    """Every GPU there are results of: whole models, and in docs/ the operators too."""
    lines: list[str] = []
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir() and path.name != "cpu"):
        whole, operators = (newest(folder, has_models=has) for has in (True, False if docs else None))
        name = next((result["gpu"] for _, result in filter(None, (whole, operators))), None)
        lines += [f"**{name}**", ""] if name else []
        if whole is not None:
            path, result = whole
            rows = [row for row in result["rows"] if row["op"] in show.WHOLE]
            table = show.model_section(rows, result) if docs else show.model_table(show.by_batch(rows), everyone=False)
            lines += [*table, "", _caption(path, {**result, "rows": rows}, docs), ""]
        if operators is not None and docs:
            lines += [*_operators(*operators, docs), ""]
    return lines or [*(line.format(docs="" if docs else "docs/") for line in UNMEASURED), "", *compiled()]


def compiled() -> list[str]:
    """What the committed machine code amounts to, a line an architecture."""
    lines = [
        "| compiled for | kernels × launch configurations | on tensor cores | that spill registers | shared memory, at most |"
    ]
    lines += ["|---|---|---|---|---|"]
    for path in sorted(SNAPSHOTS.glob("*[0-9].json"), key=lambda path: (path.stem[:3] == "gfx", len(path.stem), path.stem)):
        snapshot = json.loads(path.read_text())
        rows = snapshot["rows"].values()
        products = [row for row in rows if row.keys() - NOT_TENSOR_CORE]
        kinds = sorted({kind for row in products for kind in row.keys() - NOT_TENSOR_CORE})
        spilling = sum("stack" in row or "spills" in row for row in rows)
        shared = max((row.get("shared", 0) for row in rows), default=0) / 1024
        cells = [snapshot["target"], str(len(rows)), f"{len(products)} ({', '.join(kinds)})", str(spilling), f"{shared:.0f} KiB"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def goal_table(docs: bool) -> list[str]:
    """The goals by the newest result of each GPU; without one, what is asked."""
    folders = sorted(path for path in RESULTS.iterdir() if path.is_dir() and path.name != "cpu")
    found = [(path, result) for folder in folders if (pair := newest(folder)) for path, result in [pair]]
    lines: list[str] = []
    for path, result in found:
        lines += [f"**{result['gpu']}**", "", *goals.table(result["rows"], result["gpu"]), "", _caption(path, result, docs), ""]
    return lines or goals.table([])


TABLES: dict[str, Callable[[bool], list[str]]] = {
    "cpu models": cpu_models,
    "cpu operators": cpu_operators,
    "gpu": gpu,
    "goals": goal_table,
}


def filled(text: str, docs: bool) -> str:
    """The page with its tables made anew. Raises ``ValueError`` for a marker of no table."""

    def fill(match: re.Match) -> str:
        if match["name"] not in TABLES:
            raise ValueError(f"there is no table {match['name']!r}; expected one of {', '.join(TABLES)}")
        return match[1] + "\n".join(["", *TABLES[match["name"]](docs), ""]) + "\n" + match[3]

    return MARKED.sub(fill, text)


def stale() -> list[tuple[Path, str]]:
    """(page, what it should say) of every page that does not agree with the result files."""
    found = []
    for name in PAGES:
        path = ROOT / name
        expected = filled(path.read_text(), docs=name.startswith("docs/"))
        if path.read_text() != expected:
            found.append((path, expected))
    return found


def print_goals(path: Path) -> int:
    """Exit status 2 for what is no result file of a GPU."""
    try:
        result = results.read(path)
        if result.get("gpu", "none") == "none":
            raise ValueError(f"{path}: was measured on a CPU; the goals are a GPU's")
    except (OSError, ValueError) as error:
        print(f"benchmarks.tables: {error}", file=sys.stderr)
        return 2
    print("\n".join([*goals.listed(result["rows"], result["gpu"]), show.machine(result)]))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], prog="python -m benchmarks.tables")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is not up to date")
    parser.add_argument("--goals", type=Path, metavar="FILE", help="print the goals with what this result file says of them")
    options = parser.parse_args(arguments)
    if options.goals:
        return print_goals(options.goals)
    check = options.check
    pages = stale()
    for path, text in pages:
        if not check:
            path.write_text(text)
        print(f"{'not up to date' if check else 'written'}: {path.relative_to(ROOT)}", file=sys.stderr if check else sys.stdout)
    return 1 if check and pages else 0


if __name__ == "__main__":
    sys.exit(main())
