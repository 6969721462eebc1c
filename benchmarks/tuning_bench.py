"""One case in one direction, for the tuner: what it asks of the tables, what a candidate launches, if it is right, its time."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fastvit.kernels import _tuning
from fastvit.kernels._launch import Launch, record

import fastvit
from fastvit.ops import dispatch

from . import accuracy, cases, measure, operators, peers, results

BUDGET_S = 0.1  # of timing a candidate
DIRECTIONS = ("forward", "backward")
NOT_INSPECTED: dict[str, Any] = {"reason": None, "registers": 0, "stack": 0, "shared": 0, "launches": None}


class Broken(Exception):
    """The device is unusable for this process; where a candidate did that, its reason is in the log."""


@dataclass(frozen=True)
class Subject:
    """One case in one direction."""

    case: Any
    direction: str
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        return f"{self.case.op} {self.case.name} {self.direction}"


@dataclass
class Bench:
    """A subject's inputs on the device; its exact result once ``prepare`` was called."""

    subject: Subject
    device: str
    exact: list[torch.Tensor] | None = None
    standard: list[accuracy.Error] | None = None

    def __post_init__(self) -> None:
        case, direction = self.subject.case, self.subject.direction
        torch.manual_seed(0)
        self.dtype = cases.DTYPES[self.subject.dtype]
        element = torch.empty(0, dtype=self.dtype).element_size()
        cache = torch.cuda.get_device_properties(0).L2_cache_size if self.device == "cuda" else 0
        count = cases.sets_beyond_cache(case, element, cache)
        self.sets = [case.inputs(self.dtype, self.device, direction != "forward") for _ in range(count)]
        self.ours, self.reference, self.competing = contestants(case)
        self.upstream: tuple[torch.Tensor, ...] = ()
        if direction != "forward":
            with torch.no_grad(), fastvit.use_backend("triton"):
                self.upstream = tuple(torch.randn_like(out) for out in operators.outputs(self.ours(**self.sets[0])))

    def prepare(self) -> None:
        """What a candidate is held to: the float64 result, and eager's errors where eager serves. Raises ``Broken``."""
        if self.exact is not None:
            return
        doubles = tuple(tensor.double() for tensor in self.upstream)
        exact = operators.evaluate(self.reference, operators.double(self.sets[0]), doubles, self.subject.direction)
        self.exact = [t.cpu() for t in exact]
        try:
            self.standard = accuracy.errors(self._result_of(self.competing["eager"].build()), self.exact)
        except Exception as error:  # without eager, the dtype sets how much may be erred
            if results.is_sticky(results.describe(error)):
                raise Broken(f"eager PyTorch, {self.subject.name}: {results.describe(error)}") from error

    def _result_of(self, function: Callable) -> list[torch.Tensor]:
        return [t.cpu() for t in operators.evaluate(function, self.sets[0], self.upstream, self.subject.direction)]

    def run(self) -> list[torch.Tensor]:
        return self._result_of(self.ours)

    def check(self) -> None:
        self.prepare()
        accuracy.check("the candidate", self.run(), self.exact or [], self.dtype, self.standard)

    def time(self, step: bool = False) -> measure.Timing:
        """Of the subject's direction; ``step``: of forward, keeping what backward needs, and backward."""
        with measure.side_stream():  # where a graph can capture a backward pass too
            if step:
                timed = [functools.partial(operators.evaluate, self.ours, s, self.upstream, "backward") for s in self.sets]
            else:
                timed = operators.calls(self.ours, self.sets, self.upstream, self.subject.direction)
            return measure.measure(timed, BUDGET_S)


def contestants(case: Any) -> tuple[Callable, Callable, dict[str, Any]]:
    return case.contestants() if hasattr(case, "contestants") else peers.contestants(case)


def _evaluate(subject: Subject, device: str) -> None:
    """One run of the subject, of which somebody collects what it asks for."""
    dtype = cases.DTYPES[subject.dtype]
    inputs = subject.case.inputs(dtype, device, subject.direction != "forward")
    ours, _, _ = contestants(subject.case)
    out = operators.outputs(ours(**inputs))
    if subject.direction == "backward":
        torch.autograd.grad(out, [t for t in inputs.values() if t.requires_grad], [torch.zeros_like(o) for o in out])


def asked(subject: Subject, target: str, device: str) -> list[tuple[str, dict[str, int]]]:
    """The operators of this direction and the shape numbers that their configs go by; nothing is launched."""
    forward: list[tuple[str, dict[str, int]]] = []
    for direction in ("forward", "backward")[: DIRECTIONS.index(subject.direction) + 1]:
        before = forward
        with _tuning.asked() as forward, record(target), fastvit.use_backend("triton"):
            _evaluate(Subject(subject.case, direction, subject.dtype), device)
    found = forward if subject.direction == "forward" else [entry for entry in forward if entry not in before]
    return list({str(entry): entry for entry in found}.values())


def decisions(subject: Subject, target: str, device: str) -> list[tuple[str, dict[str, Any], str]]:
    """(operator, what its dispatch rules go by, the way they take) where there is a choice; nothing is launched of ours."""
    with dispatch.taken() as taken, record(target), fastvit.use_backend("auto"):
        _evaluate(subject, device)
    wanted = "inference" if subject.direction == "forward" else "training"
    found = [entry for entry in taken if entry[0] == subject.case.op and len(_tuning.WAYS[entry[0]]) > 1]
    alike = [entry for entry in found if entry[1].get("pass", "inference") == wanted]
    return list({str(entry): entry for entry in alike}.values())


def ways(op: str, call: dict[str, Any]) -> list[str]:
    """The ways that can serve the call, the kernel first."""
    fused = call.get("activation") in dispatch.FUSED_BY_VENDOR and call.get("pass") == "inference"
    return [way for way in _tuning.WAYS[op] if way != "vendor_fused" or fused]


@contextlib.contextmanager
def served(op: str, config: dict[str, Any]) -> Iterator[None]:
    """Inside, ``op`` is served as "serve" says, its kernels launched as "with" says."""
    with contextlib.ExitStack() as stack:
        if config["serve"] == "kernel":
            stack.enter_context(fastvit.use_backend("triton"))
            for name, launched in config["with"].items():
                stack.enter_context(_tuning.override(name, launched))
        else:
            stack.enter_context(fastvit.use_backend("auto"))
            for name in dict.fromkeys((op, "attention") if config["serve"] == "sdpa" else (op,)):
                stack.enter_context(_tuning.override(f"dispatch {name}", {"serve": config["serve"]}))
        yield


def launches(subject: Subject, op: str, config: dict[str, int], target: str, device: str) -> list[Launch]:
    """What the subject would launch with the candidate for the operator; nothing runs."""
    with _tuning.override(op, config), record(target) as made, fastvit.use_backend("triton"):
        _evaluate(subject, device)
    return made


def digest(made: list[Launch]) -> str:
    """Equal for the same launches: of two candidates that make no difference at a shape, one is measured."""
    plain = [
        (launch.kernel.__name__, launch.grid, sorted(launch.options.items()), sorted(_plain(launch.arguments))) for launch in made
    ]
    return hashlib.sha256(repr(plain).encode()).hexdigest()[:16]


def _plain(arguments: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, repr(value)) for name, value in arguments.items() if not isinstance(value, torch.Tensor)]


def inspect(subject: Subject, op: str, config: dict[str, int], target: str, limit: int) -> dict[str, Any]:
    """{"reason": why it is not worth running or None, "registers", "stack", "shared", "launches"} of the compiled candidate."""
    from .static import compilation, inspection

    found = dict(NOT_INSPECTED)
    try:
        made = launches(subject, op, config, target, "cuda")
        found["launches"] = digest(made)
        for launch in made:
            if launch.op != op:
                continue
            job = compilation.Job(launch, *compilation.specialize(launch, target), asked_by=[subject.name])
            report = compilation.compile_job(job, target)
            for name in ("registers", "stack", "shared"):
                found[name] = max(found[name], getattr(report, name))
            wrong = inspection.problems(report, limit, [])
            if wrong and found["reason"] is None:
                found["reason"] = wrong[0].removeprefix(report.name).strip()
    except Exception as error:  # a config that a launcher cannot use is a result too
        return found | {"reason": results.describe(error)}
    return found
