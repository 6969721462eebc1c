"""docs/compatibility.md: every family that ``accelerate`` serves, with what is replaced, how far results differ, and CPU time.

    python -m benchmarks.compatibility                      # measures all families at full width; a few minutes
    python -m benchmarks.compatibility --family hf_vit      # only prints
    python -m benchmarks.compatibility --write-only FILE    # the page again from a result file, without measuring

Each family is a ViT-B of twelve blocks with random weights, in float32, inference, batch 1. Time: the original in each of its
own modes and the accelerated model run in turns in one process; reported is the median over the rounds of (fastest own mode /
accelerated), so 1.5 means one and a half times as fast. A model whose results differ gets no time but an error.
"""

import argparse
import datetime
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastvit
from benchmarks.cpu_models import machine
from benchmarks.families import BASE, FAMILIES, Size, output_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
ERROR_BOUND = 2e-5


def own_modes(model: nn.Module) -> dict[str, Callable[[], None]]:
    """The modes that a library offers for its own model: name → what switches it on."""
    if hasattr(model, "set_attn_implementation"):
        return {name: lambda name=name: model.set_attn_implementation(name) for name in ("sdpa", "eager")}
    if not hasattr(model, "blocks") and any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        switch = torch.backends.mha.set_fastpath_enabled
        return {"fast path": lambda: switch(True), "without fast path": lambda: switch(False)}
    switched = [module for module in model.modules() if hasattr(module, "fused_attn")]  # timm's

    def fuse(value: bool) -> None:
        for module in switched:
            module.fused_attn = value

    return {"fused": lambda: fuse(True), "unfused": lambda: fuse(False)} if switched else {"its only one": lambda: None}


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.inference_mode()
def measure(key: str, size: Size, rounds: int, batch: int = 1) -> dict[str, Any]:
    family = FAMILIES[key]
    torch.manual_seed(0)
    model, inputs = family.build(size), family.inputs(size, batch)
    modes = own_modes(model)
    expected = output_of(model(**inputs))
    fastvit.accelerate(model)
    found = error(output_of(model(**inputs)), expected)
    report = fastvit.report(model, **inputs)
    served = {name: text for name, text in report.replaced.items() if name not in report.fallbacks}
    row = {
        "title": family.title,
        "served": len(served),
        "skipped": report.skipped,
        "fallbacks": report.fallbacks,
        "serves": sorted(set(served.values())),
        "fused_share": report.fused_share,
        "relative_error": found,
    }
    if not found <= ERROR_BOUND:
        return row
    times: dict[str, list[float]] = {name: [] for name in (*modes, "accelerated")}

    def run(name: str) -> None:
        if name == "accelerated":
            next(iter(modes.values()))()
            fastvit.accelerate(model)
        else:
            fastvit.restore(model)
            modes[name]()
        model(**inputs)  # the first call after a change finds caches cold
        start = time.perf_counter()
        model(**inputs)
        times[name].append(time.perf_counter() - start)

    for number in range(rounds):
        for name in list(times) if number % 2 == 0 else reversed(times):
            run(name)
    next(iter(modes.values()))()
    best = min(modes, key=lambda name: statistics.median(times[name]))
    ratios = sorted(original / ours for original, ours in zip(times[best], times["accelerated"], strict=True))
    quarter = len(ratios) // 4
    row |= {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "best_own_mode": best,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
        "rounds": rounds,
    }
    return row


def page(results: dict[str, Any]) -> str:
    """docs/compatibility.md as text."""
    machine, rows = results["machine"], results["families"].values()
    lines = [
        "# What is served, and what it gives",
        "",
        "Made by `make compatibility`, which measures every row on the machine at hand. Each family is built as a ViT-B of",
        "twelve blocks (224 px, patch 16, batch 1; torch's modules on 197 tokens), no weight left at a trivial value.",
        "",
        f"Machine: {machine['threads']} threads of {machine['cpu']}, PyTorch {machine['torch']}, float32, inference; commit"
        f" {machine['commit']}, {results['date']}. **Not measured on a GPU.**",
        "",
        "| family | blocks served | fused FLOPs | relative error | own best mode | before | after | times as fast (quartiles) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]
        before, after = (f"{1e3 * row['seconds'][name]:.0f} ms" for name in (row["best_own_mode"], "accelerated"))
        lines.append(
            f"| {row['title']} | {row['served']} | {row['fused_share']:.1%} | {row['relative_error']:.1e}"
            f" | {row['best_own_mode']} | {before} | {after} | {row['ratio']:.2f} ({low:.2f}–{high:.2f}) |"
        )
    lines += [
        "",
        "- **fused FLOPs**: the share of the model's matrix products, convolutions and attention that runs in fused operators,",
        "  counted by `fastvit.report(model, **inputs)`; the rest is the patch embedding and the head.",
        "- **relative error**: the largest difference to the original's output, over its largest value, in float32.",
        "- **own best mode**: the fastest that the library offers for this model: SDPA or eager attention, torch's fast path.",
        "- **times as fast**: median over paired runs of the original's time in that mode over the accelerated model's.",
        "",
        "Most of it is oneDNN, with bias and activation in its epilogue, where PyTorch calls MKL, which is slow on AMD; on Intel",
        "expect less.",
        "",
        "What serves a block, as its report says:",
        "",
        *[f"- {row['title']}: {'; '.join(row['serves'])}" for row in rows],
        "",
        "What runs its own forward, and why:",
        "",
        *_left(rows),
        "",
    ]
    return "\n".join(lines)


def _left(rows: Iterable[dict[str, Any]]) -> list[str]:
    """One line for each reason of a family."""
    lines = []
    for row in rows:
        reasons: dict[str, list[str]] = {}
        for name, reason in {**row["skipped"], **row["fallbacks"]}.items():
            reasons.setdefault(reason, []).append(name or "the model")
        lines += [f"- {row['title']}: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return lines or ["- nothing"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only these, and only print")
    parser.add_argument("--rounds", type=int, default=9, help="paired runs a family")
    parser.add_argument("--write-only", type=Path, metavar="FILE", help="write the page from this result file")
    options = parser.parse_args()
    if options.write_only:
        PAGE.write_text(page(json.loads(options.write_only.read_text())))
        return
    results: dict[str, Any] = {"machine": machine(), "date": datetime.date.today().isoformat(), "families": {}}
    failed, slower = [], []
    for key in options.family or FAMILIES:
        row = results["families"][key] = measure(key, BASE, options.rounds)
        gc.collect()
        if "ratio" not in row:
            failed.append(f"{key}: relative error {row['relative_error']:.1e}, not timed")
            print(failed[-1], file=sys.stderr)
            continue
        low, high = row["ratio_quartiles"]
        print(
            f"{row['title']:<42} {row['served']:>2} served, {row['fused_share']:.1%} fused, error {row['relative_error']:.1e},"
            f" {row['seconds'][row['best_own_mode']] * 1e3:6.1f} ms ({row['best_own_mode']}) ->"
            f" {row['seconds']['accelerated'] * 1e3:6.1f} ms: {row['ratio']:.2f} ({low:.2f}-{high:.2f})",
            flush=True,
        )
        if row["ratio"] < 1:
            slower.append(f"{key}: accelerated it takes 1/{row['ratio']:.2f} of its time")
    if failed:
        sys.exit("\n".join(failed))
    if options.family is None:
        RESULTS.mkdir(parents=True, exist_ok=True)
        name = f"compatibility-{results['date']}-{results['machine']['commit']}.json"
        (RESULTS / name).write_text(json.dumps(results, indent=2) + "\n")
        PAGE.write_text(page(results))
        print(f"Written: {PAGE.relative_to(ROOT)}, {(RESULTS / name).relative_to(ROOT)}")
    if slower:
        sys.exit("slower than the original:\n" + "\n".join(slower))


if __name__ == "__main__":
    main()
