"""Triton's binder and cache as they are, compiling and launching faked, for a process of its own (see ``test_launch.py``).

A launch is noted as (name of the kernel, number of its compilation, grid, stream, arguments), pointers as addresses.
"""

import contextlib
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

import fastvit
from benchmarks.overhead import _vit, pretend_tensors

SCENARIOS: dict[str, Callable[[], None]] = {}
warnings.simplefilter("ignore")
launches: list[tuple] = []
compiled: list[str] = []
wanted_options: dict[int, dict] = {}  # by number of the compilation
state = SimpleNamespace(stream=0, device=0, ordinary=0, entered=[])


class Compiled:
    """What Triton's compiler would have returned."""

    def __init__(self, src, options, **_):
        compiled.append(src.fn.__name__)
        wanted_options[len(compiled)] = options
        self.name, self.number, self.function, self.packed_metadata = src.fn.__name__, len(compiled), len(compiled), (4, 1, 0)

    def launch_metadata(self, grid, stream, *args):
        state.ordinary += 1  # Triton's own way asks for it, a plan does not
        return None

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, exit, *args):
        for call in enter.calls if enter else ():
            call(self)
        assert function == self.function
        assert metadata == self.packed_metadata
        values = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args)
        launches.append((self.name, self.number, (x, y, z), stream, values))


class Driver:
    def __init__(self):
        self.get_current_stream = lambda device: state.stream
        self.get_current_device = lambda: state.device

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


triton.compiler.compile = Compiled
triton.runtime.driver.set_active(Driver())
pretend_tensors()
torch.cuda.current_device = lambda: state.device
torch.Tensor.get_device = lambda self: getattr(self, "_index", 0)


@contextlib.contextmanager
def _device(index):
    before, state.device = state.device, index
    state.entered.append(index)
    yield
    state.device = before


torch.cuda.device = _device


def fresh(*shape):
    return torch.randn(*shape, dtype=torch.float16)


def made(call):
    """(result, launches, how many of them went Triton's own way)."""
    launches.clear()
    state.ordinary = 0
    out = call()
    return out, list(launches), state.ordinary


def tensors(out):
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def without_results(noted, out):
    """Launches with the addresses of the results replaced by their places."""
    places = {t.data_ptr(): f"result {index}" for index, t in enumerate(tensors(out))}
    return [(*launch[:4], tuple(places.get(value, value) for value in launch[4])) for launch in noted]


def addresses(launch):
    """What is below the first page that a program is given is a number, not an address."""
    return [value for value in launch[4] if isinstance(value, int) and value >= 2**16]


def without_addresses(noted):
    return [(*launch[:4], *(v for v in launch[4] if v not in addresses(launch))) for launch in noted]


def repeated(call, plans=True, scratch=False):
    """A call, once Triton's own way and then from a plan: the same launches, results of their own. ``scratch``: launches are
    given memory that belongs to neither arguments nor results."""
    first, noted, ordinary = made(call)
    assert noted
    second, again, planned = made(call)
    assert planned == (0 if plans else ordinary), f"{planned} of {len(again)} launches went Triton's own way"
    if not scratch:
        assert without_results(noted, first) == without_results(again, second)
    assert without_addresses(noted) == without_addresses(again)
    for a, b in zip(tensors(first), tensors(second), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert a.data_ptr() != b.data_ptr()
    return noted, again


def norm_inputs():
    return fresh(2, 4, 32), fresh(32), fresh(32)


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def wanted(*tensors):
    return [t.requires_grad_() for t in tensors]


def block_of_a_vit():
    """(a block on the kernels, hidden states that want a gradient)"""
    model = _vit(depth=1, num_classes=0)
    fastvit.accelerate(model)
    return model.blocks[0], fresh(1, 4, 32).requires_grad_()


def refused(call, words):
    try:
        call()
    except RuntimeError as error:
        if words in str(error):
            return
        raise
    raise AssertionError(f"nothing was raised; expected: {words}")
