"""The demo's numbers as terminal tables and as Markdown."""

from typing import Any

from rich import box
from rich.table import Table

TITLES = {"hf": "Hugging Face Dinov2Model", "timm": "timm vit_small_patch14_dinov2"}
SHORT = {"hf": "HF Dinov2Model", "timm": "timm's twin"}
COST_HEADER = ("model", "time before", "after", "ratio", "peak memory before", "after")
ERROR_HEADER = ("difference", "largest", "relative", "cosine")
DRAWN_ONCE = ("attention_rollout", "position_similarity")
OUTPUTS = {"tokens": "tokens", "saliency": "saliency map", "class_attention": "class-token attention"}

Row = tuple[str, ...]


def _cost(library: str, result: dict[str, Any]) -> Row:
    seconds, peak = result["seconds"], result["peak_bytes"]
    return (
        SHORT[library],
        f"{seconds['median_original'] * 1e3:.0f} ms",
        f"{seconds['median_accelerated'] * 1e3:.0f} ms",
        f"{seconds['median_ratio']:.2f}",
        f"{peak['original'] / 2**20:.1f} MiB",
        f"{peak['accelerated'] / 2**20:.1f} MiB",
    )


def _errors(library: str, result: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for key, name in OUTPUTS.items():
        error = result["error"][key]
        title = f"{SHORT[library]}, {name}"
        rows.append((title, f"{error['max_abs']:.1e}", f"{error['relative']:.1e}", f"{error['cosine']:.7f}"))
    return rows


def _table(header: Row, rows: list[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for index, column in enumerate(header):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def terminal(report: dict[str, Any]) -> list[Table]:
    """What it costs, and how far it is from the original."""
    models = report["models"].items()
    return [
        _table(COST_HEADER, [_cost(library, result) for library, result in models]),
        _table(ERROR_HEADER, [row for library, result in models for row in _errors(library, result)]),
    ]


def caption(report: dict[str, Any]) -> str:
    """What the numbers were measured on, and how."""
    facts = report["environment"]
    return (
        f"DINOv2-S/14 at {facts['size']} px, one picture, {facts['dtype']}, backend {facts['backend']}, {facts['device']},"
        f" torch {facts['torch']}, fastvit {facts['fastvit']}. Time: median of {facts['runs']} runs of each, interleaved;"
        " ratio: median over the pairs, below 1 is faster. Memory: what a run holds at its peak beyond the weights."
    )


def markdown(report: dict[str, Any]) -> str:
    models = report["models"].items()
    lines = ["# fastvit demo", "", f"Picture: {report['picture']}. {caption(report)}", ""]
    lines += _markdown_table(COST_HEADER, [_cost(library, result) for library, result in models])
    lines += _markdown_table(ERROR_HEADER, [row for library, result in models for row in _errors(library, result)])
    lines += [*(f"![{name}]({name}.png)" for name in DRAWN_ONCE), ""]
    for library, result in models:
        verified = result["verified"]
        verdict = "passed" if verified["passed"] else "FAILED"
        restored = "gave back exactly the original" if result["restored_exactly"] else "did NOT give back the original"
        lines += [
            f"## {TITLES[library]}",
            "",
            f"`fastvit.accelerate` serves {len(result['replaced'])} modules and left {len(result['skipped'])} as they were.",
            f"`fastvit.verify` {verdict}: in fp32, relative error {verified['relative_error']:.1e},"
            f" largest {verified['max_abs_error']:.1e}. `fastvit.restore` {restored}.",
            "",
            *(f"![{kind}]({kind}_{library}.png)" for kind in ("saliency", "attention", "tokens")),
            "",
        ]
    return "\n".join(lines)


def _markdown_table(header: Row, rows: list[Row]) -> list[str]:
    def line(cells: Row) -> str:
        return "| " + " | ".join(cells) + " |"

    return [line(header), "|---|" + "---:|" * (len(header) - 1), *map(line, rows), ""]
