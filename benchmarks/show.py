"""Results as text: a table for the terminal, losses first, and a Markdown page that a stranger can read."""

import re
from collections.abc import Iterable
from typing import Any

from . import results
from .results import Result, Row

WHOLE = ("model", "sam", "training")
MAXIMUM_UP_TO, EXTREMES_UP_TO = 11, 3  # runs: so few have no 95th percentile and no quartiles but these (measure)


def duration(ms: float | None) -> str:
    """Three digits, in s, ms or µs."""
    if ms is None:
        return "–"
    value, unit = (ms / 1e3, "s") if ms >= 1e3 else (ms, "ms") if ms >= 1 else (ms * 1e3, "µs")
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def memory(mib: float | None) -> str:
    return "–" if mib is None else f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def by_ratio(rows: Iterable[Row]) -> list[Row]:
    """Losses first; what failed before them, what has no peer last."""
    return sorted(rows, key=lambda row: -1.0 if row.get("error") else results.ratio(row) or float("inf"))


def print_rows(rows: list[Row]) -> None:
    """A table, losses first."""
    print(f"{'case':40} {'op':16} {'pass':10} {'ours ms':>10} {'peer ms':>10} {'ratio':>6} {'of floor':>8}  fastest peer")
    for row in by_ratio(rows):
        name = f"{row['case'][:40]:40} {row['op']:16} {row['pass']:10}"
        if why := results.why_no_time(row):
            print(f"{name} {why}")
            continue
        best = results.fastest_peer(row)
        peer = f"{row['peers'][best]:10.4f} {results.ratio(row):6.2f}" if best else f"{'-':>10} {'-':>6}"
        floor = f"{row['floor_ms'] / row['ours_ms']:8.0%}" if row["floor_ms"] else f"{'-':>8}"
        print(f"{name} {row['ours_ms']:10.4f} {peer} {floor}  {best or 'none'}")


def machine(result: Result) -> str:
    """One sentence on what was measured where, of which commit and when."""
    versions = result["versions"]
    where = result["gpu"] if result.get("gpu", "none") != "none" else f"{result['threads']} threads of an {result['cpu']}"
    libraries = ", ".join(
        f"{name} {versions[name]}" for name in ("triton", "timm", "transformers", "onnxruntime", "openvino") if name in versions
    )
    ceilings = ""
    if result.get("gemm_tflop_s"):
        ceilings = (
            f"; a large copy reaches {result['copy_gb_s']:.0f} GB/s, a large matrix product {result['gemm_tflop_s']:.3g} TFLOP/s"
        )
    extra = f", {libraries}" if libraries else ""
    return (
        f"{where}, PyTorch {versions['torch']}{extra}; commit {results.short(result['commit'])}, {result['date'][:10]}{ceilings}."
    )


def quartiles(row: Row) -> str:
    low, high = row.get("ratio_quartiles") or (None, None)
    return "" if low is None else f" ({low:.2f}–{high:.2f})"


def runs(rows: Iterable[Row], how: str = "") -> str:
    """Of how many runs the rows' medians are, and what of them is an extreme where that is few; empty where no row says."""
    counts = sorted({row["rounds"] for row in rows if row.get("rounds")})
    if not counts:
        return ""
    limits = {MAXIMUM_UP_TO: "p95 is the longest", EXTREMES_UP_TO: "quartiles are the extremes"}
    few = "; ".join(f"of {limit} or fewer, {what}" for limit, what in limits.items() if counts[0] <= limit)
    return f" of {'–'.join(map(str, sorted({counts[0], counts[-1]})))} runs{how}" + (f" ({few})" if few else "")


def _cells(row: Row) -> list[str]:
    shape = "×".join(map(str, row["shape"]))
    label = [row["case"], row["pass"], shape]
    if why := results.why_no_time(row):
        return [*label, "**failed**" if row.get("error") else f"not run: {why}", "", "", "", ""]
    found, best = results.ratio(row), results.fastest_peer(row)
    against = "none" if best is None else f"{best}, {duration(row['peers'][best])}"
    speed = "–" if found is None else f"{found:.2f}{quartiles(row)}"
    floor = f"{row['floor_ms'] / row['ours_ms']:.0%}" if row["floor_ms"] else "–"
    theirs = row["peers_peak_mb"].get(best)
    peak = f"{memory(theirs)} → {memory(row['peak_mb'])}"
    return [*label, against, duration(row["ours_ms"]), speed, floor, peak]


def table(rows: Iterable[Row]) -> list[str]:
    """Lines of a Markdown table, losses first."""
    head = ["case", "pass", "shape", "fastest peer", "fastvit", "times as fast", "of the floor", "peak memory"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(_cells(row)) + " |" for row in by_ratio(rows)]


BATCH = re.compile(r"(?P<model>.*), batch (?P<batch>\d+)(?P<rest>.*)")


def by_batch(rows: Iterable[Row]) -> list[Row]:
    """Rows of one model together, in order of their batch; models as they first came, those in 8 bits behind the others."""
    rows = list(rows)
    found = [BATCH.fullmatch(row["case"]) for row in rows]
    names = [
        (match["model"] + match["rest"], int(match["batch"])) if match else (row["case"], 0)
        for match, row in zip(found, rows, strict=True)
    ]
    first = list(dict.fromkeys(name for name, _ in names))
    return [row for _, row in sorted(zip(names, rows, strict=True), key=lambda pair: (first.index(pair[0][0]), pair[0][1]))]


def images_s(row: Row) -> float | None:
    return 1e3 * row["shape"][0] / row["ours_ms"] if row["ours_ms"] else None


def rate(per_second: float | None) -> str:
    """Images a second, three digits."""
    return "–" if per_second is None else f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def model_table(rows: Iterable[Row], everyone: bool = True) -> list[str]:
    """Whole models: ``everyone`` a column for each contestant that was timed in any row, or else the fastest peer alone, and
    which variant of ours it is.

    A column of commits where rows have theirs.
    """
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row["peers"])) if everyone else []
    mfu, joules, commits = (any(row.get(key) for row in rows) for key in ("mfu", "joules_an_image", "commit"))
    compiled = everyone and any("accelerated_compile" in row.get("ours_variants", {}) for row in rows)
    head = ["model", *(names or ["fastest peer"]), "fastvit (p95)", *["fastvit compiled"] * compiled, "images/s", "times as fast"]
    head += ["MFU"] * mfu + ["peak memory"] + ["J an image"] * joules + ["commit"] * commits
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        best = results.fastest_peer(row)
        peers = [duration(row["peers"].get(name)) for name in names]
        if not names:
            peers = ["none" if best is None else f"{best}, {duration(row['peers'][best])}"]
        if why := results.why_no_time(row):
            cell = f"{'**failed**' if row.get('error') else 'not run'}: {why}"
            lines.append("| " + " | ".join([row["case"], *peers, cell]) + " |" * (len(head) - len(peers) - 1))
            continue
        found, late = results.ratio(row), row.get("p95_ms")
        mine = duration(row["ours_ms"]) + (f" ({duration(late)})" if late else "")
        cells = [row["case"], *peers, f"{mine}, {row['ours']}" if not everyone and row.get("ours") else mine]
        cells += [duration(row.get("ours_variants", {}).get("accelerated_compile"))] * compiled
        cells += [rate(images_s(row)), f"{found:.2f}{quartiles(row)}" if found else "–"]
        cells += [f"{row['mfu']:.0%}" if row.get("mfu") else "–"] * mfu
        cells += [f"{memory(row['peers_peak_mb'].get(best))} → {memory(row['peak_mb'])}"]
        if joules:
            theirs = row.get("peers_joules_an_image", {}).get(best)
            cells += [" → ".join("–" if energy is None else f"{energy:.3g}" for energy in (theirs, row.get("joules_an_image")))]
        cells += [row.get("commit", "–")] * commits
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def table_in_8_bits(rows: Iterable[Row]) -> list[str]:
    """What FP8 and INT8 give over fastvit's own bf16, and what they cost; nothing where no row is in 8 bits."""
    rows = [row for row in rows if row.get("vs_bf16")]
    lines = [
        "| in 8 bits | fastvit in bf16 | fastvit in 8 bits | times as fast | cosine of the features |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["case"], duration(row["bf16_ms"]), duration(row["ours_ms"]), f"{row['vs_bf16']:.2f}", f"{row['cosine']:.5f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines if rows else []


def everyone_table(rows: Iterable[Row]) -> list[str]:
    """Everybody's median and 95th percentile in each row, ours by variant, and who did not run and why."""
    lines = ["| model | median (p95) of everyone | not run |", "|---|---|---|"]
    for row in rows:
        late = row.get("peers_p95_ms", {})
        times = [
            f"{name} {duration(ms)}" + (f" ({duration(late[name])})" if name in late else "") for name, ms in row["peers"].items()
        ]
        times += [f"**{name}** {duration(ms)}" for name, ms in row.get("ours_variants", {}).items()]
        absent = [f"{name}: {reason}" for name, reason in row["unavailable"].items()]
        absent += [f"energy: {row['energy_absent']}"] if row.get("energy_absent") else []
        lines.append(f"| {row['case']} | {', '.join(times) or '–'} | {'; '.join(absent).replace('|', '/') or '–'} |")
    return lines


def model_section(rows: list[Row], result: Result) -> list[str]:
    """The tables of whole models: on a GPU, where contestants are many, the fastest peer's, 8 bits, and then everyone's."""
    if result.get("gpu", "none") == "none":
        return model_table(rows)
    rows = by_batch(rows)
    parts = [model_table(rows, everyone=False), table_in_8_bits(rows), everyone_table(rows)]
    return [line for part in parts if part for line in (*part, "")]


def page(result: Result, pictures: Iterable[str] = ()) -> str:
    """The whole result as Markdown."""
    rows = result["rows"]
    lost = [row for row in rows if (results.ratio(row) or 1.0) < 1.0]
    failed = [row for row in rows if row.get("error")]
    lines = [
        "# fastvit's benchmarks",
        "",
        machine(result),
        "",
        "Every result was checked against a reference before it was timed: a wrong one gets an error and no time.",
        "*Times as fast*: the fastest peer that computes the same, over fastvit, so above 1 fastvit is faster; in brackets the",
        "quartiles of paired runs. *Of the floor*: the time that arithmetic and bytes cannot do without, at the two rates above,",
        "over fastvit's; *MFU*: the same of a whole model, by arithmetic alone. *p95*: the 95th percentile of latency.",
        "*Peak memory*: what a call adds, that peer's → fastvit's. Where only one of the two could be a CUDA graph, *times as",
        "fast* goes by both without one. Of a model's variants `_cuda_graphs` is what `accelerate(cuda_graphs=True)` gives, and",
        f"`_graph`, ours as a peer's, a bare replay: no image is copied in and no result out. Times are medians{runs(rows)}.",
        "",
        f"{len(rows)} measurements; fastvit is slower in {len(lost)}, failed in {len(failed)}.",
        "",
    ]
    if result.get("quick"):
        lines += ["**A quick run: few repetitions, nothing compiled.**", ""]
    lines += [f"![{name}]({name})" for name in pictures]
    for op in dict.fromkeys(row["op"] for row in rows):
        chosen = [row for row in rows if row["op"] == op]
        firsts = [row for row in chosen if row["pass"] == "first_call"]
        timed = [row for row in chosen if row["pass"] != "first_call"]
        if timed:
            lines += ["", f"## {op}", "", *(model_section(timed, result) if op in WHOLE else table(timed))]
        if firsts:
            lines += ["", f"## {op}: first call", "", *_first_calls(firsts)]
    errors = [f"- {results.name_of(row)}: {row['error']}" for row in failed]
    return "\n".join([*lines, *(["", "## Failed", "", *errors] if errors else []), ""])


def _first_calls(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| case | cold caches | warm caches | second call | torch.compile, cold |", "|---|---|---|---|---|"]
    for row in rows:
        times = [row["ours_ms"], row.get("warm_cache_ms"), row.get("second_call_ms"), row["peers"].get("compile")]
        lines.append(f"| {row['case']} | " + " | ".join(map(duration, times)) + " |")
    return lines
