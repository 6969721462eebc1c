"""The one door through which every kernel is launched.

``launch`` sets the device, and ``target_of`` names the GPU that launch configs are looked up for. Under ``record`` nothing
runs: each launch is handed over as it would have been made, which is how kernels are compiled and inspected for GPUs that
are not present.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

INTERPRETED_TARGET = "interpreter"


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
    if not tensor.is_cuda:
        return INTERPRETED_TARGET
    index = tensor.device.index
    if index not in _targets:
        if torch.version.hip is not None:
            _targets[index] = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
        else:
            major, minor = torch.cuda.get_device_capability(index)
            _targets[index] = f"sm_{major}{minor}"
    return _targets[index]


def launch(op: str, kernel: Any, grid: tuple[int, ...], tensor: torch.Tensor, row: dict[str, Any], **arguments: Any) -> None:
    """Launches ``kernel`` on ``tensor``'s device with the launch options and tile sizes of the tuning-table row ``row``.

    ``row``: every key in capitals is a constexpr of the kernel where the kernel has it; ``num_warps`` and ``num_stages``
    are launch options. An empty grid launches nothing.
    """
    if 0 in grid:
        return
    options: dict[str, int] = {name: row[name] for name in ("num_warps", "num_stages") if name in row}
    names = kernel.arg_names
    arguments |= {name: value for name, value in row.items() if name in names and name not in arguments}
    if _recorder is not None:
        _recorder(Launch(kernel, grid, arguments, options, op, dict(row)))
        return
    if not tensor.is_cuda:
        kernel[grid](**arguments, **options)
    elif tensor.device.index == torch.cuda.current_device():
        kernel[grid](**arguments, **options, enable_fp_fusion=True)
    else:
        with torch.cuda.device(tensor.device):
            kernel[grid](**arguments, **options, enable_fp_fusion=True)
