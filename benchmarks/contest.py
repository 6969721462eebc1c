"""Whole models against each other on one input: checked against float32, then timed; the faster of our variants counts.

How far bf16 may be from float32: ``accuracy``'s rule, held to what the eager peer errs.
"""

import copy
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from . import accuracy, measure, peers, results
from .settings import Settings

Call = Callable[[], Tensor]
Builders = Mapping[str, Callable[[], Call]]  # built when its turn comes; a name that says compile is compiled
SANE = 0.1  # a peer farther than this from float32 is wrong, and sets no standard
GRAPHED_UP_TO = 8  # images: beyond, launching costs nothing beside running


def twin(model: nn.Module) -> nn.Module:
    """Another module with the same weights in memory, for another way to run them."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def inference(function: Callable[..., Tensor], *inputs: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return call


def variants(name: str, build: Callable[[], Call], small: bool, max_autotune: bool = False) -> dict[str, Callable[[], Call]]:
    """What ``build`` gives as it is and compiled; for small batches as CUDA graphs too. It is built once."""
    build = functools.cache(build)
    found: dict[str, Callable[[], Call]] = {name: build, f"{name}_compile": lambda: peers.compiled(build())}
    if max_autotune:
        found[f"{name}_compile_max_autotune"] = lambda: peers.compiled(build(), "max-autotune-no-cudagraphs")
    if small:
        found[f"{name}_graph"] = lambda: measure.graphed(build())
        found[f"{name}_compile_graph"] = lambda: measure.graphed(peers.compiled(build()))
    return found


def run(row: results.Row, settings: Settings, exact: Tensor, others: Builders, ours: Builders) -> None:
    """Fills the row; the first of the others that runs sets how much may be erred, or bf16 does where none runs."""
    exact = exact.float().cpu()
    standard: accuracy.Error | None = None
    timed, events_ms = row.setdefault("timed", {}), row.setdefault("events_ms", {})

    def admit(name: str, build: Callable[[], Call]) -> tuple[float, measure.Timing]:
        nonlocal standard
        call = build()
        result = [call().float().cpu()]
        error = accuracy.worst(accuracy.errors(result, [exact]))
        if standard is None and name in others and error.overall <= SANE:
            standard = error
        accuracy.check(name, result, [exact], torch.bfloat16, standard and [standard])
        if settings.device == "cpu":
            return error.overall, measure.interleaved({"": call}, settings.budget_s(1.0))[""]
        return error.overall, measure.measure([call], settings.budget_s(1.0), graphs=False)

    def why_not(name: str) -> str | None:
        if "broke" in row:
            return f"not run: {row['broke']} broke the device"
        if "graph" in name and settings.device == "cpu":
            return "no CUDA graphs on a CPU"
        return settings.why_not_compiled() if "compile" in name else None

    def attempt(name: str, build: Callable[[], Call]) -> tuple[float, measure.Timing] | Exception | str:
        """(error, timing), what went wrong, or why it was left out."""
        reason = row["unavailable"].get(name) or why_not(name)
        if reason is not None:
            row["unavailable"][name] = reason
            return reason
        try:
            error, timing = admit(name, build)
        except Exception as caught:
            row["unavailable"][name] = results.describe(caught)
            if results.is_sticky(row["unavailable"][name]):
                row["broke"] = name if name in others else "fastvit"
            return caught
        timed[name] = timing.timed
        return error, timing

    for name, build in others.items():
        found = attempt(name, build)
        if isinstance(found, tuple):  # whatever a peer throws, it does not serve here
            row["peers"][name], row["peers_peak_mb"][name] = found[1].ms, found[1].peak_mb
            events_ms[name] = found[1].events_ms
    failures: dict[str, Exception] = {}
    for name, build in ours.items():
        found = attempt(name, build)
        if isinstance(found, Exception):
            failures[name] = found
        if not isinstance(found, tuple):
            continue
        error, timing = found
        row.setdefault("ours_variants", {})[name] = timing.ms
        if timing.events_ms:
            events_ms["fastvit"] = min(timing.events_ms, events_ms.get("fastvit", timing.events_ms))
        if row["ours_ms"] is None or timing.ms < row["ours_ms"]:
            row |= {"ours": name, "ours_ms": timing.ms, "ours_spread": timing.spread, "p95_ms": timing.p95_ms}
            row |= {"peak_mb": timing.peak_mb, "max_error": error}
            timed["fastvit"] = timing.timed
    if failures:  # a wrong or failing variant of ours is a defect, also where another one ran
        row |= results.failure(next(iter(failures.values())))
        row["error"] = "; ".join(f"{name}: {row['unavailable'][name]}" for name in failures)
    if row["ours_ms"]:
        row["mfu"] = row["gflop"] / row["ours_ms"] / settings.ceilings["gemm_tflop_s"]
