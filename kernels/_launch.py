"""The one door through which every kernel is launched.

``launch`` sets the device, and ``target_of`` names the GPU that launch configs are looked up for. Under ``record`` nothing
runs: each launch is handed over as it would have been made, which is how kernels are compiled and inspected for GPUs that
are not present. ``_plans`` repeats launches that were made here, without deciding anything again.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ._tuning import overridden

INTERPRETED_TARGET = "interpreter"
OPTIONS = ("num_warps", "num_stages") if torch.version.hip else ("num_warps", "num_stages", "maxnreg")


@dataclass
class Launch:
    """One recorded launch: the ``@triton.jit`` function, its grid, its arguments by name, and the launch options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]
    op: str
    row: dict[str, Any] = field(default_factory=dict)


_recorder: Callable[[Launch], None] | None = None
_recorded_target: str | None = None


@contextmanager
def record(target: str) -> Iterator[list[Launch]]:
    """Collects the launches made inside, configured for ``target`` ("sm_90", "gfx942", …), and runs none of them.

    Tensors may live anywhere, ``meta`` included. Outputs are left unwritten.
    """
    global _recorder, _recorded_target
    launches: list[Launch] = []
    previous = _recorder, _recorded_target
    _recorder, _recorded_target = launches.append, target
    try:
        yield launches
    finally:
        _recorder, _recorded_target = previous


def recording() -> bool:
    return _recorder is not None


_targets: dict[int, str] = {}


def target_of(tensor: torch.Tensor) -> str:
    """The target that ``tensor``'s device compiles for: "sm_90", "gfx942", …, or "interpreter" for a CPU tensor."""
    if _recorded_target is not None:
        return _recorded_target
    return target_of_device(tensor.device.index) if tensor.is_cuda else INTERPRETED_TARGET


def target_of_device(index: int) -> str:
    """``target_of`` for GPU ``index``; for -1, what a CPU tensor's ``get_device()`` says, "interpreter"."""
    if index < 0:
        return INTERPRETED_TARGET
    if index not in _targets:
        if torch.version.hip is not None:
            _targets[index] = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        else:
            major, minor = torch.cuda.get_device_capability(index)
            _targets[index] = f"sm_{major}{minor}"
    return _targets[index]


def launch(op: str, kernel: Any, grid: tuple[int, ...], tensor: torch.Tensor, row: dict[str, Any], **arguments: Any) -> None:
    """Launches ``kernel`` on ``tensor``'s device with the launch options and tile sizes of the tuning-table row ``row``.

    ``row``: every key in capitals is a constexpr of the kernel where the kernel has it; ``num_warps``, ``num_stages`` and, on
    NVIDIA's GPUs, ``maxnreg`` (registers a thread at most) are launch options. PDL is how many programs a launch may have at
    most to be a dependent one (``_pdl``). An empty grid launches nothing.
    """
    if 0 in grid:
        return
    options: dict[str, Any] = {name: row[name] for name in OPTIONS if name in row}
    names = kernel.arg_names
    if "PDL" in names:
        arguments["PDL"] = dependent(grid, tensor, row)
        if arguments["PDL"]:
            options["launch_pdl"] = True
    arguments |= {name: value for name, value in row.items() if name in names and name not in arguments}
    if _recorder is not None:
        _recorder(Launch(kernel, grid, arguments, options, op, dict(row)))
        return
    if not tensor.is_cuda:
        kernel[grid](**arguments, **options)
        return
    options["enable_fp_fusion"] = True
    if tensor.get_device() == torch.cuda.current_device():
        compiled = kernel[grid](**arguments, **options)
    else:
        with torch.cuda.device(tensor.device):
            compiled = kernel[grid](**arguments, **options)
    note((kernel, grid, arguments, compiled))


def dependent(grid: tuple[int, ...], tensor: torch.Tensor, row: dict[str, Any]) -> bool:
    """Whether a launch begins before the kernel ahead of it ends: a small one, where a row of the tables (or
    ``override("launch", {"PDL": …})``, before any row) says what is small, on a GPU that can."""
    most, target = (row | (overridden("launch") or {})).get("PDL", 0), target_of(tensor)
    return math.prod(grid) <= most and target.startswith("sm_") and int(target[3:]) >= 90


def as_matrix(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(rows, channels, row stride) of a matrix, or of a contiguous (..., channels) seen as one."""
    channels = tensor.shape[-1]
    if tensor.dim() == 2:
        return tensor.shape[0], channels, tensor.stride(0)
    return tensor.numel() // channels, channels, channels


def row_stride(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else as_matrix(tensor)[2]


class _Observer(threading.local):
    made: list[Any] | None = None


_observer = _Observer()


@contextmanager
def observe() -> Iterator[list[Any]]:
    """Collects (kernel, grid, arguments by name, compiled kernel) of the launches that this thread makes on a GPU inside, and
    what is noted among them."""
    outer = _observer.made
    made: list[Any] = []
    _observer.made = made
    try:
        yield made
    finally:
        _observer.made = outer
        if outer is not None:
            outer += made


def note(what: Any) -> None:
    """Tells an observer, if there is one."""
    if _observer.made is not None:
        _observer.made.append(what)


def observed() -> bool:
    return _observer.made is not None


def input_precision(dtype: torch.dtype) -> str:
    """Exact float32 products unless the user has allowed PyTorch's own matrix products to use TF32."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # The newer setting where PyTorch has it: once a user has set that one, reading the older one raises.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"
