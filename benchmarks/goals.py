"""What the kernels are built to reach on one H100 (SXM) or H200, and how far a result file shows that they do.

    python -m benchmarks.tables --goals FILE

A goal asks one number of a row, at least or at most; ``GOALS`` is all of them. A ratio to peers is the slowest of ours against
the fastest of those named that computes the same. What a file has no row for is not measured, and what failed is missed.
``INFORMATION`` is shown beside them and asks nothing.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from . import results
from .results import Row

Value = Callable[[Row, list[Row]], float | None]


def over(*peers: str) -> Value:
    """The fastest of those peers over ours, like with like: replays with replays, events with events."""

    def value(row: Row, rows: list[Row]) -> float | None:
        found = [ratio for name, ratio in results.ratios(row).items() if any(fnmatch.fnmatch(name, peer) for peer in peers)]
        return min(found, default=None)

    return value


def over_as_called(*peers: str) -> Value:
    """The fastest of those peers over the fastest of ours, both as a user calls them."""

    def value(row: Row, rows: list[Row]) -> float | None:
        found = [row["peers"][name] / as_called(row, rows) for name in peers if name in row["peers"]]
        return min(found, default=None)

    return value


def as_called(row: Row, rows: list[Row]) -> float:
    """The fastest of ours in ms; ``cuda_graphs=True`` counts, a bare replay with no image copied in does not."""
    times = [ms for name, ms in row.get("ours_variants", {}).items() if not name.endswith("_graph")]
    return min(times, default=row["ours_ms"])


def kernel_over_all(row: Row, rows: list[Row]) -> float | None:
    """The fastest peer over the kernel, whatever dispatch chose."""
    found = results.ratio(row)
    return found * row["ours_ms"] / row["kernel_ms"] if found and row.get("kernel_ms") else None


def of_floor(row: Row, rows: list[Row]) -> float | None:
    return row["floor_ms"] / row["ours_ms"]


def against_case(op: str, case: str) -> Value:
    """Our time over our time in that other case."""

    def value(row: Row, rows: list[Row]) -> float | None:
        others = [r["ours_ms"] for r in rows if (r["op"], r["case"], r["pass"]) == (op, case, row["pass"])]
        return row["ours_ms"] / others[0] if others and others[0] else None

    return value


def variant_over(mine: str, other: str) -> Value:
    """The time of another contestant, a peer or a variant of ours, over that of one variant of ours."""

    def value(row: Row, rows: list[Row]) -> float | None:
        times = row["peers"] | row.get("ours_variants", {})
        return times[other] / times[mine] if mine in times and other in times else None

    return value


def field(name: str, scale: float = 1.0) -> Value:
    def value(row: Row, rows: list[Row]) -> float | None:
        return None if row.get(name) is None else row[name] * scale

    return value


def ratio(row: Row, rows: list[Row]) -> float | None:
    return results.ratio(row)


COMPILED = ("compile", "compile_max_autotune")
SET_FOR = "H200"  # images a second and milliseconds; an H100's memory is slower


@dataclass(frozen=True)
class Goal:
    """``cases``: globs of names; ``least`` or ``most``, neither for information, with the unit in ``unit``, empty for a ratio.

    ``level``: reached too where the upper quartile of paired runs reaches it, since there both may run the same kernel.
    ``predicted``: what docs/performance.md and docs/fp8.md count to, before anything was measured.
    """

    title: str
    op: str
    direction: str
    cases: tuple[str, ...]
    value: Value
    least: float | None = None
    most: float | None = None
    unit: str = ""
    predicted: str = ""
    level: bool = False

    def wanted(self) -> str:
        if self.least is None and self.most is None:
            return "–"
        bound = f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"
        return bound + (f" {self.unit}" if self.unit else "")

    def title_on(self, gpu: str) -> str:
        """The title; of a whole model's time or rate on another GPU than the one that its number was set for, with that one."""
        absolute = self.unit in ("images/s", "ms")
        return f"{self.title} (set for an {SET_FOR})" if absolute and gpu and SET_FOR not in gpu else self.title

    def met(self, value: float) -> bool:
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)

    def reached_by(self, row: Row) -> bool:
        """Whether the row's own quartiles reach a goal that is to be level."""
        quartiles = row.get("ratio_quartiles") if self.level else None
        return bool(quartiles) and self.met(max(quartiles))


LENGTHS_64 = ("ViT-B/16 224", "ViT-L/14 224", "ViT-B/16 384", "ViT-L/14 518")  # N = 197, 257, 577, 1370
LENGTHS_80 = ("ViT-H/16 512", "latent diffusion, 32×32", "SAM-H global, no bias")  # N = 1024, 1024, 4096
GLOBAL = ("SAM-B global", "SAM-H global")
WINDOWS = ("SAM-? windows",)
MANY_ROWS = ("ViT-B/16 224, batch 256",)
MANY_ROWS_ADDED = ("ViT-L/16 224 add, batch 256",)

GOALS = [
    Goal(
        "attention, d = 64, N = 197 to 1370",
        "attention",
        "forward",
        LENGTHS_64,
        ratio,
        1.15,
        predicted="1.1–1.6 to 257, 0.8–1.05 beyond",
    ),
    Goal(
        "attention, d = 64, N = 4096, the kernel",
        "attention",
        "forward",
        ("SAM-B global, no bias",),
        kernel_over_all,
        0.95,
        predicted="0.75–1.0",
    ),
    Goal(
        "attention, d = 64, N = 4096, dispatched",
        "attention",
        "forward",
        ("SAM-B global, no bias",),
        ratio,
        1.0,
        predicted="0.95–1.0",
        level=True,
    ),
    Goal("attention, d = 80, N = 1024 and 4096", "attention", "forward", LENGTHS_80, ratio, 1.1, predicted="1.2–1.4"),
    Goal("attention, relative positions, 64×64", "attention", "forward", GLOBAL, ratio, 2.0, predicted="1.3–1.8"),
    Goal("image attention, global, 64×64", "image_attention", "forward", GLOBAL, ratio, 2.0, predicted="1.7–2.3"),
    *(
        Goal(
            f"{op.replace('_', ' ')}, {size} global, over our time without positions",
            op,
            "forward",
            (f"{size} global",),
            against_case("attention", f"{size} global, no bias"),
            most=1.25,
            predicted=predicted,
        )
        for op, predicted in (("attention", "1.2–1.5"), ("image_attention", "1.15–1.3"))
        for size in ("SAM-B", "SAM-H")
    ),
    Goal("attention, relative positions, 14×14", "attention", "forward", ("SAM-B window",), ratio, 2.5, predicted="1.5–2.5"),
    Goal("image attention, windows of 14×14", "image_attention", "forward", WINDOWS, ratio, 2.5, predicted="2–4"),
    Goal(
        "attention backward, d = 64, N = 197 to 1370",
        "attention",
        "backward",
        LENGTHS_64,
        ratio,
        1.1,
        predicted="1.5–2 to 257, 0.85–1.0 beyond",
    ),
    Goal(
        "attention backward, relative positions",
        "attention",
        "backward",
        (*GLOBAL, "SAM-B window"),
        ratio,
        2.0,
        predicted="0.9–1.3, windows 1.5–2.5",
    ),
    Goal(
        "image attention backward",
        "image_attention",
        "backward",
        ("SAM-B *", "SAM-H *"),
        ratio,
        2.0,
        predicted="0.9–1.3, windows 2–3.5",
    ),
    Goal(
        "SAM's decoder, 7 × 4096",
        "attention",
        "forward",
        ("SAM mask decoder, *",),
        ratio,
        1.5,
        predicted="2–4 at batch 1, 1.0–1.5 at 64",
    ),
    Goal("first call, empty caches", "*", "first_call", ("*",), field("ours_ms", 1e-3), most=3.0, unit="s", predicted="0.6–1.7"),
    Goal(
        "launch, on the CPU",
        "*",
        "launch",
        ("*",),
        field("ours_ms", 1e3),
        most=20.0,
        unit="µs",
        predicted="7–10",
    ),
    *(
        Goal(f"{name} {way}, {part}", op, way, cases, value, least, predicted=predicted)
        for op, name, cases in (
            ("layer_norm", "LayerNorm", MANY_ROWS),
            ("add_layer_norm", "residual + LayerNorm", MANY_ROWS_ADDED),
        )
        for way, share, counted, over_inductor in (
            ("forward", 0.9, "0.9–0.97", "1.0–1.1"),
            ("backward", 0.8, "0.81–0.93", "1.2–1.6"),
        )
        for part, value, least, predicted in (
            ("of copy bandwidth", of_floor, share, counted),
            ("over Inductor", over(*COMPILED), 1.0, over_inductor),
        )
    ),
    Goal("fc1 + GELU", "linear", "forward", ("ViT-?/* fc1", "SAM-H fc1"), ratio, 1.05, predicted="1.1–1.3"),
    Goal("linears, dispatched", "linear", "*", ("*",), ratio, 1.0, predicted="1.0", level=True),
    Goal(
        "ViT, batch 256, over max-autotune",
        "model",
        "forward",
        ("ViT-* batch 256",),
        over("compile_max_autotune"),
        1.1,
        predicted="1.05–1.15",
    ),
    *(
        Goal(f"{name}, batch 256", "model", "forward", cases, field("images_s"), least, unit="images/s", predicted=predicted)
        for name, least, predicted in (
            ("ViT-B/16", 14500, "14.4–16.1 k"),
            ("ViT-L/16", 4400, "4.3–4.8 k"),
            ("ViT-H/14", 1600, "1.6–1.8 k"),
        )
        for cases in [(f"{name} 224, batch 256",)]
    ),
    Goal(
        "ViT, batch 1, over compile as CUDA graphs",
        "model",
        "forward",
        ("ViT-* batch 1",),
        over("compile_graph", "compile_max_autotune"),
        1.2,
        predicted="1.04–1.4",
    ),
    Goal(
        "ViT, batch 1, over eager", "model", "forward", ("ViT-* batch 1",), over_as_called("eager", "sdpa"), 3.0, predicted="3–5"
    ),
    *(
        Goal(
            f"{name}, batch 1",
            "model",
            "forward",
            (f"{name} 224, batch 1",),
            as_called,
            most=most,
            unit="ms",
            predicted=counted,
        )
        for name, most, counted in (
            ("ViT-B/16", 0.3, "0.25–0.38"),
            ("ViT-L/16", 0.6, "0.42–0.67"),
            ("ViT-H/14", 1.0, "0.66–1.06"),
        )
    ),
    *(
        Goal(
            f"{name} encoder, batch 8",
            "sam",
            "forward",
            (f"{name} encoder, batch 8",),
            field("images_s"),
            least,
            unit="images/s",
            predicted=predicted,
        )
        for name, least, predicted in (("SAM-B", 520, "450–540"), ("SAM-L", 185, "165–195"), ("SAM-H", 97, "86–101"))
    ),
    Goal("FP8 over our bf16", "*", "forward", ("*, fp8",), field("vs_bf16"), 1.4, predicted="1.3–1.6, all in FP8"),
    Goal(
        "FP8, cosine of the features",
        "*",
        "forward",
        ("*, fp8",),
        field("cosine"),
        0.999,
        predicted="0.9990–0.9992, all in FP8, calibrated",
    ),
    Goal("training step, over torch.compile", "training", "step", ("*",), over(*COMPILED), 1.1, predicted="1.0–1.1"),
    *(
        Goal(
            f"{what}, compiled, over {name}",
            op,
            direction,
            cases,
            variant_over("accelerated_compile", other),
            least,
            predicted=predicted,
        )
        for what, op, direction, cases in (
            ("ViT-B/16", "model", "forward", ("ViT-B/16 224, batch 256", "ViT-B/16 224, batch 1")),
            ("training step", "training", "step", ("*",)),
        )
        for name, other, least, predicted in (
            ("the original compiled", "compile", 1.0, "1.0–1.15, 1.0 at batch 1"),
            ("not compiled", "accelerated", 0.98, "1.0, above at batch 1"),
        )
    ),
]
INFORMATION = [
    Goal("INT8 over our bf16", "*", "forward", ("*, int8",), field("vs_bf16"), predicted="1.2–1.5"),
    Goal("INT8, cosine of the features", "*", "forward", ("*, int8",), field("cosine"), predicted="0.9989–0.9999"),
]


@dataclass(frozen=True)
class Finding:
    """What one row says of a goal; without a row, or a value in it, why."""

    goal: Goal
    case: str
    value: float | None
    why: str = ""
    level: bool = False

    @property
    def verdict(self) -> str:
        if self.value is None:
            return self.why
        if self.goal in INFORMATION:
            return "information"
        return "met" if self.goal.met(self.value) else "met, within its quartiles" if self.level else "missed"


def findings(rows: list[Row], goals: Iterable[Goal] = GOALS) -> Iterator[Finding]:
    """Of every goal in every row that it asks; at least one a goal."""
    for goal in goals:
        asked = [row for row in rows if _asks(goal, row)]
        for row in asked:
            label = row["case"] + ("" if goal.direction != "*" else f", {row['pass']}")
            if row.get("error"):
                yield Finding(goal, label, None, f"missed: {row['error']}")
                continue
            if row["ours_ms"]:
                yield Finding(goal, label, goal.value(row, rows), "not measured", goal.reached_by(row))
                continue
            reason = row["unavailable"].get("fastvit")
            yield Finding(goal, label, None, f"not measured: {reason}" if reason else "not measured")
        seen = {row["case"] for row in asked}
        for case in goal.cases:
            if not any(fnmatch.fnmatch(name, case) for name in seen):
                yield Finding(goal, case, None, "not measured")


def _asks(goal: Goal, row: Row) -> bool:
    return fnmatch.fnmatch(row["op"], goal.op) and named(row, goal.cases, goal.direction)


def named(row: Row, cases: Iterable[str], direction: str) -> bool:
    """Whether a row is of one of the cases and of that pass (globs; any pass is forward or backward)."""
    passes = ("forward", "backward") if direction == "*" else (direction,)
    return row["pass"] in passes and any(fnmatch.fnmatch(row["case"], case) for case in cases)


def listed(rows: list[Row], gpu: str = "") -> list[str]:
    """A line a finding, and a count of them; ``gpu``: what was measured."""
    found = [*findings(rows), *findings(rows, INFORMATION)]
    lines = [f"{'goal':58} {'case':36} {'wanted':>16} {'found':>9}  verdict"]
    for one in found:
        value = "-" if one.value is None else f"{one.value:.4g}"
        lines.append(f"{one.goal.title_on(gpu)[:58]:58} {one.case[:36]:36} {one.goal.wanted():>16} {value:>9}  {one.verdict}")
    found = [one for one in found if one.goal not in INFORMATION]
    count = {what: sum(one.verdict.startswith(what) for one in found) for what in ("met", "missed", "not measured")}
    return [*lines, ", ".join(f"{number} {what}" for what, number in count.items())]


def table(rows: list[Row], gpu: str = "") -> list[str]:
    """A line of Markdown a goal: the worst of its rows; ``gpu``: what was measured."""
    lines = ["| goal | wanted | predicted | worst | |", "|---|---|---|---|---|"]
    for goal in (*GOALS, *INFORMATION):
        found = list(findings(rows, [goal]))
        valued = [one for one in found if one.value is not None]
        failed = [one for one in found if one.verdict.startswith("missed: ")]
        missed = [one for one in valued if one.verdict == "missed"]
        worst = (max if goal.most is not None else min)(missed or valued, key=lambda one: one.value or 0.0, default=None)
        missing = len(found) - len(valued)
        says = "missed" if failed else worst.verdict if worst else "not measured"
        if missing and worst and not failed:
            says += f" ({missing} not measured)"
        shown = "–" if worst is None else f"{worst.value:.4g}, {worst.case}"
        lines.append(f"| {goal.title_on(gpu)} | {goal.wanted()} | {goal.predicted or '–'} | {shown} | {says} |")
    return lines
