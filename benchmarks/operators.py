"""One operator on one case: our result and every peer's checked against float64, then timed, in forward or in backward."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

import fastvit

from . import accuracy, cases, measure, peers, results
from .problems import Attention, Problem
from .settings import Settings, Task

Function = Callable[..., Any]
FORWARD_ONLY = "timed in forward only"
LEVEL = 0.05  # a ratio so near 1 is measured again, in turns
CPU_PEERS = ("eager", "sdpa", "sdpa_dense_bias", "bias_folded", "segment_anything", "transformers_sdpa", "compile")


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }


def _leaves(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for tensor in inputs.values() if tensor.requires_grad]


def evaluate(function: Function, inputs: dict[str, Tensor], upstream: tuple[Tensor, ...], direction: str) -> tuple[Tensor, ...]:
    """What is checked: the outputs, or every gradient."""
    if direction == "forward":
        with torch.no_grad():
            return outputs(function(**inputs))
    return torch.autograd.grad(outputs(function(**inputs)), _leaves(inputs), upstream)


def calls(function: Function, sets: list[dict[str, Tensor]], upstream: tuple[Tensor, ...], direction: str) -> list[Callable]:
    """What is timed, once for every set of inputs. Backward is timed alone, on graphs recorded beforehand."""
    if direction == "forward":

        def forward(inputs):
            with torch.no_grad():
                return function(**inputs)

        return [functools.partial(forward, inputs) for inputs in sets]
    recorded = [(outputs(function(**inputs)), _leaves(inputs)) for inputs in sets]
    return [functools.partial(torch.autograd.grad, outs, leaves, upstream, retain_graph=True) for outs, leaves in recorded]


def subject(case: Problem, settings: Settings) -> Any:
    """The case as the device takes it."""
    kind: Any = case
    return kind.small() if settings.dry else kind.on_cpu() if settings.device == "cpu" else kind


def tasks(part: str, settings: Settings) -> Iterator[Task]:
    """Forward and backward of every case of the part, at most one row for one shape; on a CPU forward alone."""
    seen = set()
    for case in cases.ALL[part]:
        sized = subject(case, settings)
        for direction in ("forward",) if settings.device == "cpu" and not settings.dry else case.directions:
            row = results.new_row(case.name, case.op, direction, settings.dtype, sized.shape)
            if results.key(row) not in seen:
                seen.add(results.key(row))
                yield Task(row, functools.partial(run_case, sized), contestants=tuple(peers.contestants(sized)[2]))


def _why_not(case: Problem, name: str, peer: peers.Peer, direction: str, settings: Settings) -> str | None:
    if settings.device == "cpu" and not settings.dry:
        if name not in CPU_PEERS:
            return "not run on a CPU"
        if name == "compile" and isinstance(case, Attention) and case.rel is None:
            return "compiled, it is sdpa again"
    if settings.why_not(name):
        return settings.why_not(name)
    if peer.mode is None:
        return None
    if peer.mode.startswith("max-autotune") and direction == "backward":
        return FORWARD_ONLY
    return settings.why_not_compiled()


def run_case(case: Any, row: results.Row, settings: Settings) -> None:
    """Fills the row. Whatever goes wrong is in it: a wrong kernel gets an ``error`` and no time."""
    device, direction, dtype = settings.device, row["pass"], cases.DTYPES[row["dtype"]]
    element = torch.empty(0, dtype=dtype).element_size()
    row |= {"gflop": case.flops(direction) / 1e9, "mbyte": case.bytes(direction, element) / 1e6}
    row["floor_ms"] = settings.floor_ms(row["gflop"], row["mbyte"])
    torch._functorch.config.donated_buffer = False  # backward is timed alone, on one recorded graph
    torch.manual_seed(0)
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    sets = [case.inputs(dtype, device, direction != "forward") for _ in range(cases.sets_beyond_cache(case, element, cache))]
    ours, exact_function, competing = peers.contestants(case)
    with torch.no_grad():
        upstream = tuple(torch.randn_like(out) for out in outputs(exact_function(**sets[0])))
    exact = [t.cpu() for t in evaluate(exact_function, double(sets[0]), tuple(u.double() for u in upstream), direction)]
    standard: list[accuracy.Error] | None = None
    waiting: dict[str, list[Callable]] = {}  # on a CPU: what is timed in turns, at the end
    admitted: dict[str, Callable[[], list[Callable]]] = {}  # on a GPU: what can be timed again

    def result_of(function: Function) -> list[Tensor]:
        return [t.cpu() for t in evaluate(function, sets[0], upstream, direction)]

    def admit(name: str, function: Function) -> tuple[float, measure.Timing | None]:
        """Checks; on a GPU times too."""
        error = accuracy.check(name, result_of(function), exact, dtype, standard)
        if device == "cpu":
            waiting[name] = calls(function, sets, upstream, direction)
            return error, None
        with measure.side_stream():  # where a graph can capture a backward pass too
            timing = measure.measure(calls(function, sets, upstream, direction), settings.budget_s(0.2))
        row.setdefault("timed", {})[name] = timing.timed
        row.setdefault("events_ms", {})[name] = timing.events_ms
        admitted[name] = functools.partial(calls, function, sets, upstream, direction)
        return error, timing

    if "eager" not in row["unavailable"]:  # who sets how much may be erred; without it, the dtype does
        try:
            standard = accuracy.errors(result_of(competing["eager"].build()), exact)
            row["eager_error"] = accuracy.worst(standard).overall
        except Exception as error:  # told of again where eager's turn comes, unless nothing has a turn any more
            if results.is_sticky(results.describe(error)):
                row["unavailable"]["eager"] = results.describe(error)
                row |= results.failure(error) | {"broke": "eager"}
                return
    try:
        with fastvit.use_backend("auto"):  # what a user gets, dispatch included
            row["max_error"], timing = admit("fastvit", ours)
        if timing:
            row |= {"ours_ms": timing.ms, "ours_spread": timing.spread, "peak_mb": timing.peak_mb}
            with fastvit.use_backend("triton"):  # the kernel alone
                _, kernel = admit("kernel", ours)
                row["kernel_ms"] = kernel.ms if kernel else None
    except Exception as error:  # a failing kernel is a result too
        row |= results.failure(error)
        if results.is_sticky(row["error"]):
            row["broke"] = "fastvit"
    for name, peer in competing.items():
        if name in row["unavailable"]:  # an earlier run knows why
            continue
        reason = f"not run: {row['broke']} broke the device" if "broke" in row else None
        reason = reason or _why_not(case, name, peer, direction, settings)
        if reason is None:
            try:
                function = peer.build()
                _, timing = admit(name, function if peer.mode is None else peers.compiled(function, peer.mode))
                if timing:
                    row["peers"][name], row["peers_peak_mb"][name] = timing.ms, timing.peak_mb
            except Exception as error:  # whatever a peer throws, it does not serve this case
                reason = results.describe(error)
                if results.is_sticky(reason):
                    row["broke"] = name
        if reason is not None:
            row["unavailable"][name] = reason
    _settle(row, admitted)
    if waiting:
        with fastvit.use_backend("auto"):
            _time_in_turns(row, {name: timed[0] for name, timed in waiting.items()}, settings)


def _settle(row: results.Row, admitted: dict[str, Callable[[], list[Callable]]]) -> None:
    """GPU: where ours and the fastest peer are as good as level, both again in turns, for ``paired_ratio`` and its quartiles.

    There both are often the same kernel, and two times one after the other differ by what the clock did between them.
    """
    best, found, timed = results.fastest_peer(row), results.ratio(row), row.get("timed", {})
    if best is None or found is None or abs(found - 1) > LEVEL or timed[best] != timed["fastvit"] or "broke" in row:
        return
    name = f"{best} in turns"
    if name in row["unavailable"]:  # an earlier run knows why
        return
    try:
        with measure.side_stream(), fastvit.use_backend("auto"):
            timings = measure.in_turns({name: admitted[name]() for name in (best, "fastvit")}, timed[best] == "replay")
        row |= measure.paired(timings[best], timings["fastvit"])
    except Exception as error:  # both have their times
        row["unavailable"][name] = results.describe(error)
        if results.is_sticky(row["unavailable"][name]):
            row["broke"] = name


def _time_in_turns(row: results.Row, contestants: dict[str, Callable], settings: Settings) -> None:
    """CPU: medians of interleaved calls, their ratios round by round, CPU time and the memory that a call adds.

    All are warm: each was called to be checked.
    """
    timings = measure.interleaved(contestants, settings.budget_s(0.6), least=1 if settings.dry else 4)
    peaks = {name: None if settings.dry else measure.resident_peak_mb(call) for name, call in contestants.items()}
    mine = timings.pop("fastvit", None)
    row["peers"] = {name: timing.ms for name, timing in timings.items()}
    row["peers_spread"] = {name: timing.spread for name, timing in timings.items()}
    row["peers_cpu_ms"] = {name: timing.cpu_ms for name, timing in timings.items()}
    row["peers_peak_mb"] = {name: peaks[name] for name in timings}
    if mine is None:
        return
    row |= {"ours_ms": mine.ms, "ours_spread": mine.spread, "ours_cpu_ms": mine.cpu_ms, "peak_mb": peaks["fastvit"]}
    row["rounds"] = len(mine.samples)
    best = results.fastest_peer(row)
    if best:
        row |= measure.paired(timings[best], mine)
