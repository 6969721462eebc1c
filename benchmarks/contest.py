"""Whole models against each other on one input: checked against float32, then timed; the faster of our variants counts.

How far a lower precision may be from float32: at most twice what the eager peer errs in that precision, plus 1e-3.
"""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from . import measure, peers, results
from .settings import Settings

Call = Callable[[], Tensor]
Builders = Mapping[str, Callable[[], Call]]  # built when its turn comes; a name that says compile is compiled
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


def variants(name: str, call: Call, small: bool, max_autotune: bool = False) -> dict[str, Callable[[], Call]]:
    """The call as it is and compiled; for small batches as CUDA graphs too."""
    found: dict[str, Callable[[], Call]] = {name: lambda: call}
    found[f"{name}_compile"] = lambda: peers.compiled(call)
    if max_autotune:
        found[f"{name}_compile_max_autotune"] = lambda: peers.compiled(call, "max-autotune-no-cudagraphs")
    if small:
        found[f"{name}_graph"] = lambda: measure.graphed(call)
        found[f"{name}_compile_graph"] = lambda: measure.graphed(peers.compiled(call))
    return found


def run(row: results.Row, settings: Settings, exact: Tensor, others: Builders, ours: Builders) -> None:
    """Fills the row; the first of the others sets how much may be erred."""
    exact = exact.float().cpu()
    allowed: float | None = None

    def admit(build: Callable[[], Call]) -> tuple[float, measure.Timing]:
        nonlocal allowed
        call = build()
        error = measure.relative_error([call().float().cpu()], [exact])
        if allowed is None:
            allowed = 2 * error + 1e-3
        if not error <= allowed:
            raise measure.WrongResult(f"errs by {error:.2g} of float32's result, allowed {allowed:.2g}")
        if settings.device == "cpu":
            return error, measure.interleaved({"": call}, settings.budget_s(1.0))[""]
        return error, measure.measure([call], settings.budget_s(1.0), graphs=False)

    def why_not(name: str) -> str | None:
        if "graph" in name and settings.device == "cpu":
            return "no CUDA graphs on a CPU"
        return settings.why_not_compiled() if "compile" in name else None

    for name, build in others.items():
        reason = why_not(name)
        if reason is None:
            try:
                _, timing = admit(build)
                row["peers"][name], row["peers_peak_mb"][name] = timing.ms, timing.peak_mb
            except Exception as error:  # whatever a peer throws, it does not serve here
                reason = results.describe(error)
        if reason is not None:
            row["unavailable"][name] = reason
    if allowed is None:
        row["error"] = f"{next(iter(others))} did not run, so that nothing can be checked"
        return
    failed = []
    for name, build in ours.items():
        reason = why_not(name)
        if reason is None:
            try:
                error, timing = admit(build)
            except Exception as caught:
                failed.append(name)
                reason = results.describe(caught)
        if reason is not None:
            row["unavailable"][name] = reason
            continue
        row.setdefault("ours_variants", {})[name] = timing.ms
        if row["ours_ms"] is None or timing.ms < row["ours_ms"]:
            row |= {"ours": name, "ours_ms": timing.ms, "ours_spread": timing.spread, "p95_ms": timing.p95_ms}
            row |= {"peak_mb": timing.peak_mb, "max_error": error}
    if failed:  # a wrong or failing variant of ours is a defect, also where another one ran
        row |= {"error": "; ".join(f"{name}: {row['unavailable'][name]}" for name in failed), "ours_ms": None}
    if row["ours_ms"]:
        row["mfu"] = row["gflop"] / row["ours_ms"] / settings.ceilings["gemm_tflop_s"]
