"""How a run measures: where, how long, whom, and whether it only walks through the code."""

import fnmatch
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .results import NO_TIME, Row


@dataclass
class Settings:
    """``dry``: tiny shapes, one call each, nothing compiled. ``quick``: fewer repetitions, nothing compiled.
    ``late()``: compiling would cost rows. ``ceilings``: ``copy_gb_s`` and ``gemm_tflop_s`` of the device. ``only``: globs of the
    contestants that have a turn, the others left for another run; ``limit_s``: a contestant's time, compiling included;
    ``ends``: when, by ``time.monotonic``, nobody has a turn any more."""

    device: str
    ceilings: dict[str, float]
    dry: bool = False
    quick: bool = False
    late: Callable[[], bool] = lambda: False
    only: tuple[str, ...] = ("*",)
    limit_s: float | None = None
    ends: float = math.inf

    @property
    def dtype(self) -> str:
        """bf16 on a GPU; on a CPU float32, and bf16 in a dry run, which walks a GPU's way."""
        return "fp32" if self.device == "cpu" and not self.dry else "bf16"

    def budget_s(self, full: float) -> float:
        """Seconds to time for."""
        return 0.0 if self.dry else full / 4 if self.quick else full

    def why_not(self, name: str) -> str | None:
        """Why that contestant has no turn in this run."""
        wanted = any(fnmatch.fnmatch(name, glob) for glob in self.only)
        return None if wanted and time.monotonic() < self.ends else NO_TIME

    def run_left_s(self) -> float | None:
        """How long the run may take from now on; None: as long as it likes."""
        return None if math.isinf(self.ends) else max(1.0, self.ends - time.monotonic())

    def left_s(self) -> float | None:
        """The same of a contestant."""
        return min((left for left in (self.limit_s, self.run_left_s()) if left is not None), default=None)

    def why_not_compiled(self) -> str | None:
        if self.dry:
            return "not compiled in a dry run"
        if self.quick:
            return "not compiled in a quick run"
        return NO_TIME if self.late() else None

    def floor_ms(self, gflop: float, mbyte: float = 0.0) -> float:
        return max(gflop / self.ceilings["gemm_tflop_s"], mbyte / self.ceilings["copy_gb_s"])


@dataclass(frozen=True)
class Task:
    """A row to measure: ``row`` as it is before, ``measure(row, settings)`` fills it.

    ``only``: globs of the contestants that are wanted; ``contestants``: an operator's peers; ``seconds``: an estimate.
    """

    row: Row
    measure: Callable[[Row, Settings], None] = field(compare=False)
    only: tuple[str, ...] = ("*",)
    contestants: tuple[str, ...] = ()
    seconds: float = 0.0
