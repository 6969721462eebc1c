"""Pictures of a result: how near the floor (roofline), speed and memory against the number of tokens; of whole models, images a
second against the batch, and how many times as fast as the fastest peer. Needs matplotlib.
"""

from pathlib import Path
from typing import Any

from . import results, show
from .results import Result, Row

OURS, PEER, GREY = "#c2410c", "#1d4ed8", "#6b7280"
OTHERS = ("#1d4ed8", "#0f766e", "#7e22ce", "#4b5563", "#65a30d")
SWEEP = "ViT-B/16"  # attention cases of one model at growing resolution


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(True, which="major", color="#e5e7eb")
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _where(result: Result) -> str:
    return result["gpu"] if result["gpu"] != "none" else f"{result['threads']} threads of an {result['cpu']}"


def draw(result: Result, stem: Path) -> list[Path]:
    """Writes ``<stem>-roofline.png``, ``-tokens``, ``-memory``, ``-images`` and ``-ratios``, each where there are rows for it."""
    drawn = [roofline(result, stem.with_name(f"{stem.name}-roofline.png"))]
    drawn.append(against_tokens(result, stem.with_name(f"{stem.name}-tokens.png"), memory=False))
    drawn.append(against_tokens(result, stem.with_name(f"{stem.name}-memory.png"), memory=True))
    drawn.append(throughput(result, stem.with_name(f"{stem.name}-images.png")))
    drawn.append(ratios(result, stem.with_name(f"{stem.name}-ratios.png")))
    return [path for path in drawn if path is not None]


def roofline(result: Result, path: Path) -> Path | None:
    """Arithmetic per byte against speed, for every operator's forward pass, fastvit beside the fastest peer."""
    rows = [r for r in result["rows"] if r["ours_ms"] and r.get("mbyte") and r.get("gflop") and r["pass"] == "forward"]
    if not rows:
        return None
    tera = result["gpu"] != "none"
    unit, scale = ("TFLOP/s", 1.0) if tera else ("GFLOP/s", 1e3)
    title = f"Operators, forward, {rows[0]['dtype']}: {_where(result)}"
    figure, axes = _axes(title, "FLOP a byte that must move", unit)
    intensity = [1e3 * row["gflop"] / row["mbyte"] for row in rows]
    peak, copy = result["gemm_tflop_s"] * scale, result["copy_gb_s"] * 1e-3 * scale
    ends = sorted({min(intensity) / 2, peak / copy, max(intensity) * 2})
    axes.plot(ends, [min(peak, copy * x) for x in ends], color=GREY, lw=2)
    axes.annotate("large matrix product", (ends[-1], peak), ha="right", color=GREY, xytext=(0, -14), textcoords="offset points")
    axes.annotate(
        "large copy", (ends[0], copy * ends[0]), ha="left", va="bottom", color=GREY, xytext=(0, 8), textcoords="offset points"
    )
    for x, row in zip(intensity, rows, strict=True):
        ours = row["gflop"] / row["ours_ms"] * scale
        best = results.fastest_peer(row)
        if best:
            theirs = row["gflop"] / row["peers"][best] * scale
            axes.plot([x, x], [theirs, ours], color="#d1d5db", lw=1, zorder=1)
            axes.scatter([x], [theirs], color=PEER, s=22, zorder=2)
        axes.scatter([x], [ours], color=OURS, s=26, zorder=3)
    axes.scatter([], [], color=OURS, label="fastvit")
    axes.scatter([], [], color=PEER, label="fastest peer")
    axes.set(xscale="log", yscale="log")
    axes.legend(loc="lower right")
    return _save(figure, path)


def _sweep(result: Result) -> list[Row]:
    """Attention of one model in order of its tokens, forward."""
    chosen = [r for r in result["rows"] if r["op"] == "attention" and r["pass"] == "forward" and r["case"].startswith(SWEEP)]
    return sorted((row for row in chosen if row["ours_ms"]), key=lambda row: row["shape"][2])


def against_tokens(result: Result, path: Path, memory: bool) -> Path | None:
    """Attention of ViT-B at growing resolution: speed, or memory of one image's head, against N."""
    rows = _sweep(result)
    if len(rows) < 2:
        return None
    tera = result["gpu"] != "none"
    unit, scale = ("TFLOP/s", 1.0) if tera else ("GFLOP/s", 1e3)
    what = "peak memory of a head of an image, MiB" if memory else unit
    figure, axes = _axes(f"{SWEEP}'s attention, forward, {rows[0]['dtype']}: {_where(result)}", "tokens N", what)

    def value(row: Row, ms: float | None, peak: float | None) -> float | None:
        if memory:
            return None if peak is None else peak / (row["shape"][0] * row["shape"][1])
        return None if not ms else row["gflop"] / ms * scale

    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    lines = {name: [value(r, r["peers"].get(name), r["peers_peak_mb"].get(name)) for r in rows] for name in names}
    kept = sorted(names, key=lambda name: -sum(v is not None for v in lines[name]))[: len(OTHERS)]
    tokens = [row["shape"][2] for row in rows]
    for name, colour in zip(kept, OTHERS, strict=False):
        values = [float("nan") if v is None else v for v in lines[name]]
        axes.plot(tokens, values, marker="o", ms=4, lw=1.2, color=colour, label=name, zorder=5)
    mine = [value(row, row["ours_ms"], row["peak_mb"]) for row in rows]
    axes.plot(
        tokens, [float("nan") if v is None else v for v in mine], marker="o", ms=8, color=OURS, lw=4, alpha=0.6, label="fastvit"
    )
    axes.set(xscale="log", yscale="log" if memory else "linear")
    axes.set_xticks(tokens, [str(count) for count in tokens], minor=False)
    axes.minorticks_off()
    if not memory:
        axes.set_ylim(bottom=0)
    axes.legend()
    return _save(figure, path)


def _whole(result: Result) -> list[Row]:
    return [row for row in result["rows"] if row["op"] in show.WHOLE and row["ours_ms"]]


def throughput(result: Result, path: Path) -> Path | None:
    """Images a second of every model that was measured at several batch sizes, of everyone that ran at most of them."""
    models: dict[str, list[tuple[int, Row]]] = {}
    for row in _whole(result):
        named = show.BATCH.fullmatch(row["case"])
        if named:
            models.setdefault(named["model"] + named["rest"], []).append((int(named["batch"]), row))
    models = {name: sorted(rows, key=lambda pair: pair[0]) for name, rows in models.items() if len(rows) > 1}
    if not models:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(models))
    lines = -(-len(models) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(5.5 * columns, 4.5 * lines), layout="constrained", squeeze=False)
    figure.suptitle(f"Images a second: {_where(result)}")
    for axes in grid.flat[len(models) :]:
        axes.axis("off")
    for axes, (name, rows) in zip(grid.flat, models.items(), strict=False):
        batches = [batch for batch, _ in rows]
        ran = [peer for _, row in rows for peer in row["peers"]]
        kept = sorted(dict.fromkeys(ran), key=lambda peer: -ran.count(peer))[: len(OTHERS)]
        for peer, colour in zip(kept, OTHERS, strict=False):
            values = [1e3 * row["shape"][0] / row["peers"][peer] if peer in row["peers"] else float("nan") for _, row in rows]
            axes.plot(batches, values, marker="o", ms=4, lw=1.2, color=colour, label=peer)
        ours = [show.images_s(row) for _, row in rows]
        axes.plot(batches, ours, marker="o", ms=8, color=OURS, lw=4, alpha=0.6, label="fastvit")
        axes.set(title=name, xlabel="batch", xscale="log", ylim=(0, None))
        axes.set_xticks(batches, [str(batch) for batch in batches], minor=False)
        axes.minorticks_off()
        axes.grid(True, color="#e5e7eb")
        axes.legend(fontsize=8)
    return _save(figure, path)


def ratios(result: Result, path: Path) -> Path | None:
    """How many times as fast as the fastest peer, a bar a model; what is below 1 is a loss, and grey."""
    rows = [(row, found) for row in _whole(result) if (found := results.ratio(row))]
    if not rows:
        return None
    figure, axes = _axes(f"Whole models: {_where(result)}", "times as fast as the fastest peer", "")
    figure.set_size_inches(9, 1.5 + 0.4 * len(rows))
    rows.reverse()  # bars are drawn from below
    labels = [f"{row['case']}" for row, _ in rows]
    axes.barh(labels, [found for _, found in rows], color=[OURS if found >= 1 else GREY for _, found in rows], height=0.6)
    for place, (row, found) in enumerate(rows):
        axes.annotate(
            f"{found:.2f} × {results.fastest_peer(row)}", (found, place), xytext=(4, 0), textcoords="offset points", va="center"
        )
    axes.axvline(1.0, color="black", lw=1)
    axes.set_xlim(0, 1.35 * max(1.0, *(found for _, found in rows)))
    return _save(figure, path)
