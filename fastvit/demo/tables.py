"""The demo's numbers as a terminal table and as Markdown."""

from typing import Any

from rich.table import Table

HEADER = ("", "original", "accelerated", "accelerated / original")


def _rows(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    seconds, peak = result["seconds"], result["peak_bytes"]
    runs = len(seconds["original"])
    return [
        (
            f"time, median of {runs} paired runs",
            f"{seconds['median_original'] * 1e3:.1f} ms",
            f"{seconds['median_accelerated'] * 1e3:.1f} ms",
            f"{seconds['median_ratio']:.2f}",
        ),
        (
            "peak memory beyond the weights",
            f"{peak['original'] / 2**20:.1f} MiB",
            f"{peak['accelerated'] / 2**20:.1f} MiB",
            f"{peak['accelerated'] / max(peak['original'], 1):.2f}",
        ),
    ]


def _errors(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    names = {"tokens": "tokens", "saliency": "saliency map", "class_attention": "class-token attention"}
    return [
        (label, f"{error['max_abs']:.1e}", f"{error['relative']:.1e}", f"{error['cosine']:.7f}")
        for label, error in ((label, result["error"][key]) for key, label in names.items())
    ]


ERROR_HEADER = ("difference from the original", "largest", "relative", "cosine")
TITLES = {"hf": "Hugging Face Dinov2Model", "timm": "timm vit_small_patch14_dinov2"}


def _caption(report: dict[str, Any]) -> str:
    facts = report["environment"]
    return (
        f"DINOv2-S/14 at 518 px, {facts['dtype']}, backend {facts['backend']}, {facts['device']},"
        f" torch {facts['torch']}, fastvit {facts['fastvit']}"
    )


def terminal(report: dict[str, Any]) -> Table:
    table = Table(title="Before and after", caption=_caption(report), title_justify="left", caption_justify="left")
    for index, column in enumerate(HEADER):
        table.add_column(column, justify="right" if index else "left")
    for library, result in report["models"].items():
        table.add_row(f"[bold]{TITLES[library]}[/bold]")
        for row in _rows(result):
            table.add_row(*row)
        table.add_row(*(f"[dim]{name}[/dim]" for name in ERROR_HEADER))
        for row in _errors(result):
            table.add_row(*row)
        table.add_section()
    return table


def markdown(report: dict[str, Any]) -> str:
    lines = ["# fastvit demo", "", f"{_caption(report)}. Picture: `{report['picture']}`.", ""]
    for library, result in report["models"].items():
        verified = result["verified"]
        lines += [f"## {TITLES[library]}", ""]
        lines += _markdown_table(HEADER, _rows(result)) + _markdown_table(ERROR_HEADER, _errors(result))
        verdict = "passed" if verified["passed"] else "FAILED"
        restored = "gave back exactly the original" if result["restored_exactly"] else "did NOT give back the original"
        lines += [
            f"`fastvit.verify` {verdict} (fp32: relative error {verified['relative_error']:.1e},"
            f" largest {verified['max_abs_error']:.1e}); `fastvit.restore` {restored}.",
            f"{len(result['replaced'])} modules served by fastvit, {len(result['skipped'])} left as they were.",
            "",
            *(f"![{kind}]({kind}_{library}.png)" for kind in ("saliency", "attention", "tokens")),
            "",
        ]
    return "\n".join(lines)


def _markdown_table(header: tuple[str, ...], rows: list[tuple[str, str, str, str]]) -> list[str]:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cells) + " |"

    return [line(header), "|---|" + "---:|" * (len(header) - 1), *map(line, rows), ""]
