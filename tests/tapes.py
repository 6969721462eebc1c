"""On a CPU a tape stands in for a CUDA graph: it repeats the operators of a recording on the recording's own tensors, without any
Python of the model, as a graph repeats launches on fixed addresses."""

import contextlib

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit.graphs import ATTRIBUTE


class Tape(TorchDispatchMode):
    _should_skip_dynamo = classmethod(lambda cls: False)  # which would import it

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        kept = _pytree.tree_map_only(
            torch.Tensor, torch.Tensor.detach, (args, kwargs or {})
        )  # what lies there now, not what will
        self.calls.append((func, kept, tensors(output)))
        return output

    def replay(self):
        for func, (args, kwargs), outputs in self.calls:
            given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
            for old, new in zip(outputs, tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage()._cdata not in given:
                    old.copy_(new)


def tensors(values):
    return [leaf for leaf in _pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class TapeRecorder:
    fails: Exception | None = None

    def __init__(self, device):
        self.tapes, self.running, self.cached = [], False, []

    @staticmethod
    def busy():
        return False

    @contextlib.contextmanager
    def turn(self, inputs):
        assert not self.running, "two turns at once"
        self.running = True
        yield
        self.running = False

    def record(self, function):
        self.cached.append(torch.is_autocast_cache_enabled())
        function()
        if self.fails is not None:
            self.running = False
            raise self.fails
        with Tape() as tape:
            output = function()
        self.tapes.append(tape)
        return tape.replay, output


def graphed(model):
    return fastvit.accelerate(model, cuda_graphs=True)


def recorded(model) -> int:
    return len(model.__dict__[ATTRIBUTE].recordings)


def outcome(model) -> str:
    return fastvit.report(model).graphs[""]


def call(model, *args, times=1, **kwargs):
    with torch.no_grad():
        for _ in range(times):
            out = model(*args, **kwargs)
    return out


class Probe(nn.Module):
    """A model whose forward is ``body(probe, *args)``."""

    def __init__(self, body):
        super().__init__()
        self.body = (body,)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.eval()

    def forward(self, *args, **kwargs):
        return self.body[0](self, *args, **kwargs)


def counting(self, x):
    self.count += 1
    return self.linear(x)
