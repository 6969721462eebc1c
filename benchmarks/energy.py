"""Joules that a GPU has taken, as its driver counts them: NVML's total since the driver was loaded, in millijoules.

Asked of the driver's own library, so that no package is needed. Volta and later count; MIG slices and some virtual GPUs do not,
and then ``counter()`` gives the reason in place of a counter.
"""

import ctypes
import functools

import torch

LIBRARY = "libnvidia-ml.so.1"
LEAST_S = 1.0  # the counter moves some ten times a second: shorter stretches say little


class Absent(Exception):
    """There is no energy counter, and why."""


class Counter:
    """The energy counter of the current CUDA device. Raises ``Absent`` where it has none."""

    def __init__(self) -> None:
        try:
            self._nvml = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise Absent(f"{LIBRARY}: {error}") from None
        self._nvml.nvmlErrorString.restype = ctypes.c_char_p
        self._device = ctypes.c_void_p()
        self._ask("nvmlInit_v2")
        self._ask("nvmlDeviceGetHandleByUUID", _uuid().encode(), ctypes.byref(self._device))
        self.joules()

    def _ask(self, function: str, *arguments: object) -> None:
        code = getattr(self._nvml, function)(*arguments)
        if code:
            raise Absent(f"{function}: {self._nvml.nvmlErrorString(code).decode()}")

    def joules(self) -> float:
        total = ctypes.c_ulonglong()
        self._ask("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(total))
        return total.value / 1e3


def _uuid() -> str:
    """As NVML writes it; an index would count GPUs that CUDA_VISIBLE_DEVICES hides."""
    found = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return found if found.startswith(("GPU-", "MIG-")) else f"GPU-{found}"


@functools.cache
def counter() -> Counter | str:
    """The counter, opened once; or why there is none."""
    if not torch.cuda.is_available():
        return "no GPU"
    try:
        return Counter()
    except Absent as error:
        return str(error)
