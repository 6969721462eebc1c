"""What surrounds a call when it is repeated: stream, GPU, hooks, knobs, modes, autocast, a gradient that is wanted."""

import torch
from fastvit.kernels import _launch, _plans, _tuning
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

import fastvit
from fastvit import functional as F
from tests.launch_scenarios.harness import (
    addresses,
    compiled,
    fresh,
    made,
    norm_inputs,
    repeated,
    scenario,
    state,
    wanted,
    wanted_options,
)


@scenario
def the_stream_of_the_moment():
    x, w, b = norm_inputs()
    repeated(lambda: F.layer_norm(x, w, b))
    state.stream = 7
    try:
        _, noted, ordinary = made(lambda: F.layer_norm(x, w, b))
    finally:
        state.stream = 0
    assert (noted[0][3], ordinary) == (7, 0)


@scenario
def another_device():
    x, w, b = norm_inputs()
    repeated(lambda: F.layer_norm(x, w, b))
    fastvit.backend._gpu_reasons[1] = None
    for tensor in (x, w, b):
        tensor._index = 1
    _, _, ordinary = made(lambda: F.layer_norm(x, w, b))
    assert ordinary == 1, "a plan of GPU 0 served GPU 1"
    state.entered.clear()
    made(lambda: F.layer_norm(x, w, b))
    assert state.entered == [1], "launched without switching to the tensors' GPU"


@scenario
def launch_hooks_see_every_launch():
    x, w, b = norm_inputs()
    repeated(lambda: F.layer_norm(x, w, b))
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        for _ in range(2):
            _, _, ordinary = made(lambda: F.layer_norm(x, w, b))
            assert ordinary == 1
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
        knobs.runtime.launch_enter_hook.calls.clear()
    assert len(seen) == 2
    assert made(lambda: F.layer_norm(x, w, b))[2] == 0


@scenario
def knobs_that_are_set():
    x, w, b = norm_inputs()
    repeated(lambda: F.layer_norm(x, w, b))
    before = len(compiled)
    knobs.runtime.debug = True
    try:
        _, _, ordinary = made(lambda: F.layer_norm(x, w, b))
    finally:
        del knobs.runtime.__dict__["debug"]
    assert ordinary == 1
    assert len(compiled) > before, "a debugging kernel was asked for"


@scenario
def an_unknown_triton():
    x, w, b = norm_inputs()
    _plans._known = False
    try:
        repeated(lambda: F.layer_norm(x, w, b), plans=False)
    finally:
        _plans._known = True


@scenario
def small_grids_are_dependent_launches():
    """What is compiled says so, and a plan runs it again; large grids are not, nor any that are asked not to be."""
    w, b = fresh(300), fresh(300)
    dependent = lambda noted: [wanted_options[number]["launch_pdl"] for _, number, *_ in noted]  # noqa: E731
    for rows, small in ((4 * 528, True), (4 * 528 + 1, False)):
        x = fresh(rows, 300)
        _, again = repeated(lambda x=x: F.layer_norm(x, w, b))
        assert dependent(again) == [small]
    x = fresh(4, 300)
    _, before = repeated(lambda: F.layer_norm(x, w, b))
    with _tuning.override("launch", {"PDL": 0}):
        _, noted, ordinary = made(lambda: F.layer_norm(x, w, b))
        assert (dependent(noted), ordinary) == ([False], 1)
    _, later, ordinary = made(lambda: F.layer_norm(x, w, b))
    assert (dependent(later), later[0][1], ordinary) == ([True], before[0][1], 0)


@scenario
def nothing_is_launched_under_record():
    x, w, b = norm_inputs()
    repeated(lambda: F.layer_norm(x, w, b))
    with _launch.record("sm_90") as recorded:
        _, noted, _ = made(lambda: F.layer_norm(x, w, b))
    _launch._recorded_target = "sm_90"
    assert (len(recorded), noted) == (1, [])


@scenario
def the_backend_of_the_moment():
    x, w, b = norm_inputs()
    repeated(lambda: F.layer_norm(x, w, b))
    with fastvit.use_backend("torch"):
        assert made(lambda: F.layer_norm(x, w, b))[1] == []


@scenario
def gradients_wanted_later():
    x, w, b = norm_inputs()
    repeated(lambda: F.layer_norm(x, w, b))
    w.requires_grad_()
    assert F.layer_norm(x, w, b).requires_grad
    with torch.no_grad():
        assert not F.layer_norm(x, w, b).requires_grad


@scenario
def autocast_switched_on_later():
    x, w, b = norm_inputs()
    repeated(lambda: F.layer_norm(x, w, b))
    torch.set_autocast_enabled("cuda", True)
    try:
        assert F.layer_norm(x, w, b).dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)


@scenario
def autocast_with_nothing_to_cast():
    x, w, b = wanted(*(t.float() for t in norm_inputs()))
    torch.set_autocast_enabled("cuda", True)
    try:
        F.layer_norm(x, w, b)
        out, noted, ordinary = made(lambda: F.layer_norm(x, w, b))
        assert (len(noted), ordinary, out.dtype) == (1, 0, torch.float32)
        halves = [t.detach().half() for t in (x, w, b)]
        for _ in range(3):
            out, noted, _ = made(lambda: F.layer_norm(*halves))
            assert (len(noted), out.dtype) == (1, torch.float32)
            assert halves[0].data_ptr() not in addresses(noted[0]), "what had to be cast was not"
    finally:
        torch.set_autocast_enabled("cuda", False)


@scenario
def modes_see_the_operator():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    x, w, b = norm_inputs()
    repeated(lambda: F.layer_norm(x, w, b))
    with Names():
        F.layer_norm(x, w, b)
    assert any("fastvit.layer_norm_forward" in name for name in names), names
