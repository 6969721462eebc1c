"""Launch plans: what a ``launch_*`` function decided for arguments of one signature, kept for the next ones like them.

A signature is all that a kernel is chosen, compiled and configured by: the shapes, strides, dtypes, device and 16-byte alignment
of the tensors, and every other argument. A plan holds the compiled kernels, their grids and their scalar arguments; a call
with a signature that has one puts its own pointers in and goes to Triton's launcher, past Triton's argument binder.

Without a plan, the ordinary way: the first call of a signature, the interpreter, ``record``, AMD (whose compiler also goes by
the size of the memory behind a tensor), a release of Triton whose launcher is not known to take these arguments, and
any time at which a launch hook is registered, one of Triton's knobs is set, or configs are being measured.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs

from ._launch import input_precision, observe, observed, recording
from ._tuning import tuning

KNOWN = ("3.6", "3.7", "3.8", "3.9")  # releases whose CompiledKernel.run takes what ``_run`` hands over
MAX_PLANS = 4096  # a function; all are forgotten beyond, where every call brings another shape

_known = ".".join(triton.__version__.split(".")[:2]) in KNOWN and torch.version.hip is None
_runtime, _compilation = knobs.runtime, knobs.compilation
_enter, _exit = _runtime.launch_enter_hook, _runtime.launch_exit_hook


class Plan:
    """Launches to be made again, each with the places of its pointers among those that it is run with."""

    def __init__(self, device: int, launches: list[tuple]):
        self.device = device
        self.launches = launches
        self.stream = triton.runtime.driver.active.get_current_stream

    def run(self, pointers: list[int]) -> None:
        if torch.cuda.current_device() == self.device:
            self._run(pointers)
        else:
            with torch.cuda.device(self.device):
                self._run(pointers)

    def _run(self, pointers: list[int]) -> None:
        stream = self.stream(self.device)
        for run, (x, y, z), function, metadata, arguments, places in self.launches:
            values = arguments.copy()
            for place, pointer in places:
                values[place] = pointers[pointer]
            run(x, y, z, stream, function, metadata, None, None, None, *values)


def undisturbed() -> bool:
    """Whether plans may be used now: a Triton that is known, no hook that has to see a launch, no knob set, no tuning."""
    hooked = _enter.calls or _exit.calls
    return _known and not (_runtime.__dict__ or _compilation.__dict__ or hooked or recording() or tuning())


def plan_of(device: int, made: list[tuple], place_of: Callable[[Tensor], int | None]) -> Plan | None:
    """The plan of observed launches, ``place_of`` telling which pointer a tensor's is; None where they cannot be repeated."""
    launches = []
    for kernel, grid, arguments, compiled in made:
        values = [arguments.get(param.name, param.default) for param in kernel.params]
        if compiled is None or inspect.Parameter.empty in values or kernel.used_global_vals or kernel.pre_run_hooks:
            return None
        places = [(index, place_of(value)) for index, value in enumerate(values) if isinstance(value, Tensor)]
        if any(place is None for _, place in places):
            return None
        values = [0 if isinstance(value, Tensor) else value for value in values]
        launches.append((compiled.run, (*grid, 1, 1)[:3], compiled.function, compiled.packed_metadata, values, places))
    return Plan(device, launches)


def planned(function: Callable[..., None]) -> Callable[..., None]:
    """Makes a ``launch_*`` function keep plans. It takes positional arguments, the first of them a tensor: tensors on one
    device, None, numbers, strings, and tuples of these numbers. What it launches may depend on nothing else, and every
    tensor that a kernel is given must be one of the arguments itself."""
    plans: dict[tuple, Plan | None] = {}

    @functools.wraps(function)
    def launch(*args: Any) -> None:
        first = args[0]
        if not first.is_cuda or not undisturbed():
            return function(*args)
        signature: list[Any] = [first.get_device()]
        if first.dtype is torch.float32:
            signature.append(input_precision(torch.float32))
        pointers = []
        for argument in args:
            if isinstance(argument, Tensor):
                pointer = argument.data_ptr()
                pointers.append(pointer)
                signature += (argument.shape, argument.stride(), argument.dtype, pointer & 15 == 0)
            else:
                signature += (argument.__class__, argument)
        key = tuple(signature)
        plan = plans.get(key)
        if plan is not None and not observed():
            return plan.run(pointers)
        if plan is None and key in plans:  # it cannot be planned
            return function(*args)
        # Tensors that are told apart by identity, one given twice included.
        fresh = [a.detach() if isinstance(a, Tensor) else a for a in args]
        places = {id(a): index for index, a in enumerate(a for a in fresh if isinstance(a, Tensor))}
        with observe() as made:
            function(*fresh)
        if len(plans) >= MAX_PLANS:
            plans.clear()
        plans[key] = plan_of(first.get_device(), made, lambda tensor: places.get(id(tensor)))

    return launch
