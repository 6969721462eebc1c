"""Whole models against each other on one input: checked against float32, then timed; the faster of our variants counts.

How far bf16 may be from float32: ``accuracy``'s rule, held to what the first peer errs; what is in FP8 by the cosine of its
features. Of everyone the row has the median, the 95th percentile, memory, and on a GPU the energy of an image.
"""

import copy
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import fastvit

from . import accuracy, energy, limits, measure, peers, results
from .settings import Settings

Call = Callable[[], Tensor]
Builders = Mapping[str, Callable[[], Call]]  # built when its turn comes; a name that says compile is compiled
Rule = Callable[[str, Tensor, Tensor, bool], float]  # (name, result, exact, of a peer) -> error; raises WrongResult
SANE = 0.1  # a peer farther than this from float32 is wrong, and sets no standard
SANE_COSINE = 0.99  # features in FP8 below this are wrong
UNTIL_REPLAYED = 8  # calls, after which accelerate's graphs replay, or say why not
GRAPHED_UP_TO = 8  # images: beyond, launching costs nothing beside running


def twin(model: Any) -> Any:
    """Another module with the same weights in memory, for another way to run them."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def inference(function: Callable[..., Tensor], *inputs: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return call


class Captured:
    """A call that a library captures and replays by itself, out of its own memory; ``refused()``: it ran without, after all."""

    def __init__(self, call: Call, refused: Callable[[], bool] = lambda: False):
        self.call, self.refused = call, refused

    def __call__(self) -> Tensor:
        return self.call()


def replayed(model: Any, call: Call) -> Captured:
    """The call of a model accelerated with ``cuda_graphs=True``. Raises ``results.NotRun`` where nothing of it is replayed."""
    for _ in range(UNTIL_REPLAYED):
        call()
    outcomes = fastvit.report(model).graphs
    if not any(outcome.endswith("its last call was replayed") for outcome in outcomes.values()):
        raise results.NotRun(f"no replay: {'; '.join(outcomes.values()) or 'nothing of it is graphed'}")
    return Captured(call)


def max_autotune(call: Call) -> Captured:
    """``torch.compile`` with everything that it has for inference, CUDA graphs included."""
    counted = torch._dynamo.utils.counters["inductor"]
    before = counted["cudagraph_skips"]
    return Captured(peers.compiled(call, "max-autotune"), lambda: counted["cudagraph_skips"] > before)


def variants(
    name: str, build: Callable[[], Call], small: bool, autotuned: bool = False, compiled: str = ""
) -> dict[str, Callable[[], Call]]:
    """What ``build`` gives as it is and compiled (named ``compiled``); for small batches as CUDA graphs too. It is built once."""
    build, compiled = functools.cache(build), compiled or f"{name}_compile"
    found: dict[str, Callable[[], Call]] = {name: build, compiled: lambda: peers.compiled(build())}
    if small:
        found[f"{name}_graph"] = lambda: measure.graphed(build())  # type: ignore[dict-item,return-value]
        found[f"{compiled}_graph"] = lambda: measure.graphed(peers.compiled(build()))  # type: ignore[dict-item,return-value]
    if autotuned:
        found[f"{compiled}_max_autotune"] = lambda: max_autotune(build())
    return found


class Rounding:
    """``accuracy``'s rule for bf16: what the first peer that is sane errs sets how much the others may.

    It stays in the row as ``standard``, so that who has a turn in another run is held to the same.
    """

    def __init__(self, row: results.Row) -> None:
        self.row = row

    def __call__(self, name: str, result: Tensor, exact: Tensor, of_peer: bool) -> float:
        error = accuracy.worst(accuracy.errors([result], [exact]))
        if "standard" not in self.row and of_peer and error.overall <= SANE:
            self.row["standard"] = {"of": name, "overall": error.overall, "row": error.row}
        kept = self.row.get("standard")
        standard = [accuracy.Error(kept["overall"], kept["row"])] if kept else None
        accuracy.check(name, [result], [exact], torch.bfloat16, standard)
        return error.overall


class Cosine:
    """The rule for FP8: the mean cosine of the features with float32's. ``found`` remembers everyone's."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def __call__(self, name: str, result: Tensor, exact: Tensor, of_peer: bool) -> float:
        features = (exact.shape[0], -1) if exact.dim() == 4 else (-1, exact.shape[-1])
        pairs = (t.double().reshape(features) for t in (result, exact))
        cosine = torch.nn.functional.cosine_similarity(*pairs, dim=-1).mean().item()
        if not cosine >= SANE_COSINE:
            raise accuracy.WrongResult(f"{name}'s features have cosine {cosine:.4g} with float32's, expected {SANE_COSINE:.4g}")
        self.found[name] = cosine
        return accuracy.relative_error([result], [exact])


class Contest:
    """One row being filled: everyone is checked by ``rule`` against ``exact``, then timed, within the settings' limits."""

    def __init__(self, row: results.Row, settings: Settings, exact: Tensor, rule: Rule | None = None):
        self.row, self.settings, self.exact, self.rule = row, settings, exact.float().cpu(), rule or Rounding(row)
        self.counter = energy.counter() if settings.device == "cuda" and not settings.dry else "no GPU"
        if isinstance(self.counter, str):
            row["energy_absent"] = self.counter

    def attempt(self, name: str, build: Callable[[], Call], of_peer: bool) -> tuple[float, measure.Timing] | Exception | str:
        """(error, timing), what went wrong, or why it was left out; the latter two are in the row too."""
        row = self.row
        reason = row["unavailable"].get(name) or self._why_not(name)
        start = time.perf_counter()
        found: tuple[float, measure.Timing] | Exception | str = reason or ""
        if reason is None:
            try:
                with limits.limited(self.settings.left_s()):
                    found = self._admit(name, build, of_peer)
            except limits.TooSlow as slow:
                found = str(slow) if of_peer or "compile" in name else RuntimeError(str(slow))
                if self.settings.why_not(name):  # the run is over, not the contestant's time
                    found = results.NO_TIME
            except results.NotRun as why:
                found = str(why)
            except Exception as caught:
                found = caught
            row.setdefault("took_s", {})[name] = round(time.perf_counter() - start, 2)
        if isinstance(found, tuple):
            row.setdefault("timed", {})[name] = found[1].timed
            return found
        row["unavailable"][name] = found if isinstance(found, str) else results.describe(found)
        if isinstance(found, Exception) and results.is_sticky(row["unavailable"][name]):
            row["broke"] = name if of_peer else "fastvit"
        return found

    def _why_not(self, name: str) -> str | None:
        if "broke" in self.row:
            return f"not run: {self.row['broke']} broke the device"
        if "graph" in name and self.settings.device == "cpu":
            return "no CUDA graphs on a CPU"
        return self.settings.why_not(name) or (self.settings.why_not_compiled() if "compile" in name else None)

    def _admit(self, name: str, build: Callable[[], Call], of_peer: bool) -> tuple[float, measure.Timing]:
        call, settings = build(), self.settings
        error = self.rule(name, getattr(call, "check", call)().float().cpu(), self.exact, of_peer)
        if settings.device == "cpu":
            return error, measure.interleaved({"": call}, settings.budget_s(1.0))[""]
        counter = None if isinstance(self.counter, str) else self.counter
        timing = measure.measure([call], settings.budget_s(1.0), graphs=False, counter=counter)
        if isinstance(call, Captured) and not call.refused():
            timing.timed, timing.peak_mb = "replay", None  # its memory lies in a pool of its own
        return error, timing

    def peers(self, builders: Builders) -> None:
        """The first of them sets how much the others may be off, and runs again where a row that is gone on with does not say."""
        row = self.row
        row.setdefault("events_ms", {})
        for name, build in builders.items():
            judged = "standard" in row or not isinstance(self.rule, Rounding)
            if name in row["peers"] and judged:  # timed in the run that this one goes on from
                continue
            found = self.attempt(name, build, of_peer=True)
            if isinstance(found, tuple):  # whatever a peer throws, it does not serve here
                timing = found[1]
                row["peers"][name], row["peers_peak_mb"][name] = timing.ms, timing.peak_mb
                row.setdefault("peers_p95_ms", {})[name] = timing.p95_ms
                row["events_ms"][name] = timing.events_ms
                if timing.joules is not None:
                    row.setdefault("peers_joules_an_image", {})[name] = timing.joules / row["shape"][0]

    def ours(self, builders: Builders) -> None:
        """The fastest counts; one that fails or is wrong fails the row, also where another one ran."""
        row, failures = self.row, {}
        events = row.setdefault("events_ms", {})
        for name, build in builders.items():
            if name in row.get("ours_variants", {}):
                continue
            found = self.attempt(name, build, of_peer=False)
            if isinstance(found, Exception):
                failures[name] = found
            if not isinstance(found, tuple):
                continue
            error, timing = found
            row.setdefault("ours_variants", {})[name] = timing.ms
            if timing.events_ms and timing.timed == "events":
                events["fastvit"] = min(timing.events_ms, events.get("fastvit", timing.events_ms))
            if row["ours_ms"] is None or timing.ms < row["ours_ms"]:
                row |= {"ours": name, "ours_ms": timing.ms, "ours_spread": timing.spread, "p95_ms": timing.p95_ms}
                row["rounds"] = len(timing.samples)
                row |= {"peak_mb": timing.peak_mb, "max_error": error}
                row["joules_an_image"] = None if timing.joules is None else timing.joules / row["shape"][0]
                row["timed"]["fastvit"] = timing.timed
        if failures:
            row |= results.failure(next(iter(failures.values())))
            row["error"] = "; ".join(f"{name}: {row['unavailable'][name]}" for name in failures)
        elif not row["ours_ms"]:
            row["error"] = f"fastvit: {results.NO_TIME}"
        if row["ours_ms"]:
            row["images_s"] = 1e3 * row["shape"][0] / row["ours_ms"]
            row["mfu"] = row["gflop"] / row["ours_ms"] / self.settings.ceilings["gemm_tflop_s"]


def run(
    row: results.Row, settings: Settings, exact: Tensor, others: Builders, ours: Builders, rule: Rule | None = None
) -> Contest:
    """Fills the row; the first of the others that runs sets how much may be erred, or bf16 does where none runs."""
    contest = Contest(row, settings, exact, rule)
    contest.peers(others)
    contest.ours(ours)
    return contest
