"""A ViT's blocks for one image on a GPU: dependent launches against the same kernels one after the other.

``check``: over many runs, as called and as a CUDA graph, the bits of the kernels one after the other. Each run has another input
than the one before, so that whoever reads what was in memory too early reads something else. ``run`` times both as graphs, ours
and ``serial``; on the backend ``triton``, where every kernel is ours, and on ``auto``, where the vendor's products stand between
them and are launched as ever. Rows say how many launches there are and how many of them are dependent ones. docs/performance.md
says what that means.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvit.ops import dispatch, quantized
from fastvit.ops._state import kernels

from . import accuracy, contest, measure, models, results
from .settings import Settings, Task

RUNS = 300
INPUTS = 3


@contextlib.contextmanager
def one_after_the_other() -> Iterator[None]:
    """Inside, the kernels of a call are what they are outside, and none is launched before the one ahead has ended. Decisions are
    collected so that a block runs whole, as in a first call: where launches are tuned it would be made of its operators'."""
    with kernels._tuning.override("launch", {"PDL": 0}), dispatch.collect():
        yield


@dataclass(frozen=True)
class Case:
    model: str
    backend: str
    precision: str
    op = "chain"

    @property
    def name(self) -> str:
        return f"{self.model} blocks, batch 1, {self.backend}"

    def check(self, settings: Settings) -> float:
        """0, or ``WrongResult``."""
        chain = Chain(self, settings)
        with chain.serial():
            serial = chain.way()
            expected = [chain.result(serial, tokens).clone() for tokens in chain.inputs]
        if not settings.dry and not chain.launches()[1]:
            raise accuracy.WrongResult("none of the launches is a dependent one")
        for how, way in (("as called", chain.call), ("as a graph", chain.way())):
            wrong = torch.zeros((), dtype=torch.int64, device=settings.device)
            for number in range(INPUTS if settings.dry else RUNS):
                out = chain.result(way, chain.inputs[number % INPUTS])
                wrong += (out != expected[number % INPUTS]).any()
            if wrong:
                raise accuracy.WrongResult(f"{how}, {int(wrong)} of {RUNS} runs are not those of the kernels one after the other")
        return 0.0


class Chain:
    """The blocks of a case on the device, which read ``given``."""

    def __init__(self, case: Case, settings: Settings):
        self.settings = settings
        options: dict[str, Any] = {} if settings.dry else {"backend": case.backend}
        if case.precision in quantized.FORMATS and not settings.dry:
            options["precision"] = case.precision
        model = models.build(case.model, settings).to(settings.device, torch.bfloat16)
        self.blocks = models.accelerated(model, {}, **options).blocks
        self.shape = [1, model.patch_embed.num_patches + 1, model.embed_dim]
        self.inputs = [torch.randn(self.shape, dtype=torch.bfloat16, device=settings.device) for _ in range(INPUTS)]
        self.given = self.inputs[0].clone()
        self.call = contest.inference(self.blocks, self.given)

    def serial(self) -> contextlib.AbstractContextManager:
        """Within it no launch is a dependent one."""
        return contextlib.nullcontext() if self.settings.dry else one_after_the_other()

    def way(self) -> Callable[[], Any]:
        """The call as a graph, whose launches are what they are where it is made."""
        if self.settings.dry:
            return self.call
        with dispatch.collect():
            return measure.graphed(self.call)

    def result(self, way: Callable[[], Any], tokens: Tensor) -> Tensor:
        self.given.copy_(tokens)
        return way()

    def launches(self) -> tuple[int, int]:
        """Of Triton's kernels in a call: (all, the dependent ones)."""
        with kernels._launch.observe() as made, dispatch.collect():
            self.call()
        found = [entry[3].metadata.launch_pdl for entry in made if type(entry) is tuple]
        return len(found), sum(found)


CASES = [Case(name, backend, "bf16") for name in models.SIZES for backend in ("triton", "auto")]
CASES += [Case("ViT-L/16", "auto", precision) for precision in quantized.FORMATS]


def why_not(case: Case, settings: Settings) -> str | None:
    """Why there is nothing to check on the device, or None."""
    if settings.dry:
        return None
    if torch.version.hip is not None or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return "dependent launches are for sm_90 and later"
    return quantized.why_not(case.precision, torch.device(settings.device)) if case.precision in quantized.FORMATS else None


def tasks(settings: Settings) -> Iterator[Task]:
    for case in CASES:
        yield Task(results.new_row(case.name, case.op, "forward", case.precision, []), functools.partial(run, case))


def run(case: Case, row: results.Row, settings: Settings) -> None:
    if reason := why_not(case, settings):
        raise results.NotRun(reason)
    chain = Chain(case, settings)
    row["shape"] = chain.shape
    row["mbyte"] = sum(p.numel() * (1 if case.precision in quantized.FORMATS else 2) for p in chain.blocks.parameters()) / 1e6
    row["floor_ms"] = settings.floor_ms(0.0, row["mbyte"])
    if settings.dry:
        timed = measure.interleaved({"fastvit": chain.call, "serial": chain.call}, 0.0, least=2)
    else:
        row["launches"], row["dependent_launches"] = chain.launches()
        ours = chain.way()
        with chain.serial():
            serial = chain.way()
        timed = {name: measure.measure([way], 0.3) for name, way in (("serial", serial), ("fastvit", ours))}
    row |= {"ours_ms": timed["fastvit"].ms, "ours_spread": timed["fastvit"].spread, "p95_ms": timed["fastvit"].p95_ms}
    row["peers"]["serial"] = timed["serial"].ms
    row["timed"] = {name: timing.timed for name, timing in timed.items()}
