"""What a user relies on without looking: failures change nothing, twice is once, hooks and wrappers of others take effect."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastvit
from fastvit import acceleration, planning, walk
from fastvit.integrations import probe, swap
from tests.interruptions import INTERRUPTIONS, break_at, contents
from tests.models_for_acceleration import (
    DEPTH,
    hf_vit,
    image,
    tensor_of,
    timm_vit,
    torchvision_vit,
)

ROOT = Path(__file__).parents[1]


# --- patterns and traces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_from_a_generator_are_kept_as_they_were_given(option):
    model = fastvit.accelerate(timm_vit(), **{option: (f"blocks.{i}" for i in (0, 2))})
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fastvit.report(copied) == fastvit.report(model)
    assert model.__dict__[walk.STATE].options[option] == ("blocks.0", "blocks.2")


def test_the_empty_pattern_is_the_model_with_all_that_it_has():
    model = fastvit.accelerate(timm_vit(), include="")
    assert list(fastvit.report(model).replaced) == [f"blocks.{i}" for i in range(DEPTH)]
    model = fastvit.accelerate(timm_vit(), exclude="")
    assert fastvit.report(model).skipped == {f"blocks.{i}": "excluded by the pattern ''" for i in range(DEPTH)}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("build", [hf_vit, timm_vit, torchvision_vit])
@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_is_one_graph_in_every_gradient_mode(build, grad):
    """``torch.jit.trace`` traces again without gradients, and compares."""
    model, x = build(), image()
    with torch.no_grad():
        expected = tensor_of(model(x))
    fastvit.accelerate(model)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x, strict=False)
    assert fastvit.report(model).fallbacks == {}
    other = image(seed=1)
    with torch.no_grad():
        for given, wanted in ((x, expected), (other, tensor_of(fastvit.restore(model)(other)))):
            out = traced(given)
            torch.testing.assert_close(out["last_hidden_state"] if isinstance(out, dict) else out, wanted, rtol=0, atol=1e-4)


def test_a_class_of_the_same_name_is_named_with_its_module():
    class Linear(nn.Linear):
        pass

    model = fastvit.accelerate(timm_vit())
    model.blocks[1].attn.qkv.__class__ = Linear
    model(image())
    here = f"{__name__}.{Linear.__qualname__}"
    assert fastvit.report(model).fallbacks == {
        "blocks.1": f"attn.qkv is now a {here} (it was a torch.nn.modules.linear.Linear)",
    }


# --- twice, and not at all ----------------------------------------------------------------------------------------------


def test_twice_is_once_in_outputs_and_weights():
    model = timm_vit()
    results = []
    for _ in range(2):
        fastvit.accelerate(model)
        with torch.no_grad():
            output = model(image())
        classes = [type(module) for module in model.modules()]
        results.append((fastvit.report(model, image()), classes, copy.deepcopy(model.state_dict()), output))
    (first, first_classes, first_state, first_output), (second, classes, state, output) = results
    assert second == first
    assert classes == first_classes
    assert torch.equal(output, first_output)
    assert list(state) == list(first_state)
    assert all(torch.equal(state[name], value) for name, value in first_state.items())


PLANNING = {
    "looking for layouts": (planning, "find_layout", 2),
    "telling blocks apart": (probe, "signature", 2),
    "proving": (probe, "why_different", 1),
}
SERVING = {
    "serving the first": (swap, "serve", 1),
    "serving the last": (swap, "serve", 3),
    "linking": (swap, "link", 2),
    "remembering": (walk, "State", 1),
}
AGAIN = {"releasing the first": (swap, "release", 1), "releasing the second": (swap, "release", 2)}


def attempt(monkeypatch, model, stage, interruption, action):
    with torch.no_grad():
        expected = model(image())
    before, keys, found = contents(model), list(model.state_dict()), str(fastvit.report(model))
    with monkeypatch.context() as broken:
        break_at(broken, stage, interruption)
        with pytest.raises(type(interruption)):
            action(model)
    assert contents(model) == before
    assert list(model.state_dict()) == keys
    assert str(fastvit.report(model)) == found
    with torch.no_grad():
        assert torch.equal(model(image()), expected)


@INTERRUPTIONS
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("stage", [*PLANNING, *SERVING])
def test_a_failure_at_any_stage_changes_nothing(monkeypatch, stage, accelerated, interruption):
    model = timm_vit()
    if accelerated:
        fastvit.accelerate(model, include="blocks.[12]", backend="torch")
    attempt(monkeypatch, model, {**PLANNING, **SERVING}[stage], interruption, fastvit.accelerate)


@INTERRUPTIONS
@pytest.mark.parametrize("stage", [*PLANNING, "describing"])
def test_a_failure_of_a_dry_run_changes_nothing(monkeypatch, stage, interruption):
    where = {**PLANNING, "describing": (acceleration, "_describe_backend", 1)}[stage]
    attempt(monkeypatch, timm_vit(), where, interruption, lambda model: fastvit.accelerate(model, dry_run=True))


@INTERRUPTIONS
@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("stage", AGAIN)
def test_a_failure_in_starting_afresh_changes_nothing(monkeypatch, stage, dry_run, interruption):
    model = fastvit.accelerate(timm_vit(), include="blocks.[12]", backend="torch")
    attempt(monkeypatch, model, AGAIN[stage], interruption, lambda model: fastvit.accelerate(model, dry_run=dry_run))


@INTERRUPTIONS
@pytest.mark.parametrize("stage", AGAIN)
def test_a_failure_in_restore_leaves_the_model_accelerated(monkeypatch, stage, interruption):
    attempt(monkeypatch, fastvit.accelerate(timm_vit()), AGAIN[stage], interruption, fastvit.restore)


@INTERRUPTIONS
@pytest.mark.parametrize("accelerated", [False, True])
def test_a_scope_left_by_an_error_ends_as_it_began(interruption, accelerated):
    model = timm_vit()
    if accelerated:
        fastvit.accelerate(model, exclude="blocks.0")
    before = contents(model)
    with pytest.raises(type(interruption)), fastvit.accelerated(model):
        raise interruption
    assert contents(model) == before


# --- hooks --------------------------------------------------------------------------------------------------------------


def _register(module: nn.Module, kind: str, log: list):
    def shape(value):
        return tuple(shape(item) for item in value) if isinstance(value, tuple) else None if value is None else tuple(value.shape)

    def note(name, *values):
        log.append((name, *map(shape, values)))

    registrations = {
        "forward": lambda: module.register_forward_hook(lambda m, args, out: note("forward", args, out)),
        "forward changing": lambda: module.register_forward_hook(lambda m, args, out: note("changed", out) or out * 1.5),
        "forward with keywords": lambda: module.register_forward_hook(
            lambda m, args, kwargs, out: note(f"forward {sorted(kwargs)}", args, out), with_kwargs=True
        ),
        "before": lambda: module.register_forward_pre_hook(lambda m, args: note("before", args)),
        "before changing": lambda: module.register_forward_pre_hook(
            lambda m, args: note("before", args) or (args[0] * 0.5, *args[1:])
        ),
        "backward": lambda: module.register_full_backward_hook(lambda m, gi, go: note("backward", gi, go)),
        "backward changing": lambda: module.register_full_backward_hook(
            lambda m, gi, go: note("backward", gi, go) or tuple(None if g is None else g * 2 for g in gi)
        ),
        "before backward": lambda: module.register_full_backward_pre_hook(lambda m, go: note("before backward", go)),
    }
    registrations[kind]()


KINDS = [
    "forward",
    "forward changing",
    "forward with keywords",
    "before",
    "before changing",
    "backward",
    "backward changing",
    "before backward",
]


@pytest.mark.parametrize("when", ["before accelerate", "after accelerate"])
@pytest.mark.parametrize("place", ["", "norm1", "attn", "attn.proj", "mlp", "mlp.fc1", "mlp.act", "drop_path1"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_and_change_what_they_did(kind, place, when):
    outcomes, original = [], timm_vit()
    for serving in (False, True):
        model, log = copy.deepcopy(original), []
        steps = [lambda m: fastvit.accelerate(m)] if serving else []
        hook = lambda m, log=log: _register(m.blocks[1].get_submodule(place), kind, log)  # noqa: E731
        for step in [hook, *steps] if when.startswith("before") else [*steps, hook]:
            step(model)
        output = model(image())
        output.square().sum().backward()
        outcomes.append((log, output.detach(), {name: p.grad for name, p in model.named_parameters()}))
        if serving:
            fallbacks = fastvit.report(model).fallbacks
    (expected_log, expected, expected_gradients), (log, output, gradients) = outcomes
    assert log == expected_log
    assert log
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()
    largest = max(g.abs().max() for g in expected_gradients.values())
    assert all((g - expected_gradients[name]).abs().max() <= 1e-5 * largest for name, g in gradients.items())
    assert set(fallbacks) == (set() if place == "" else {"blocks.1"})


# --- sharded, and held by others' hooks ---------------------------------------------------------------------------------

SHARD = """
import tempfile
import torch, torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import fastvit
from fastvit._torchvision import ensure_importable
ensure_importable()
from tests.models_for_acceleration import image, timm_vit

rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)

def shard(model):
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def gradients(model):
    model.zero_grad()
    model(image()).square().sum().backward()
    return {name: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for name, p in model.named_parameters()}
"""


def in_a_process(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SHARD + code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_a_sharded_model_is_left_alone():
    printed = in_a_process("""
model = shard(timm_vit())
classes = [type(module) for module in model.modules()]
fastvit.accelerate(model)
print(fastvit.report(model))
assert [type(module) for module in model.modules()] == classes
assert fastvit.report(model).skipped.keys() == {"blocks.0", "blocks.1", "blocks.2"}
""")
    assert printed.count("left alone: it is sharded by FSDP, whose class a swap would strip: accelerate before fully_shard") == 3


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_an_accelerated_model_may_be_sharded():
    printed = in_a_process("""
model = timm_vit()
with torch.no_grad():
    expected = model(image())
expected_gradients = gradients(model)
model.zero_grad()
shard(fastvit.accelerate(model))
with torch.no_grad():
    assert (model(image()) - expected).abs().max() <= 1e-5 * expected.abs().max()
assert len(fastvit.report(model).replaced) == 3
largest = max(gradient.abs().max() for gradient in expected_gradients.values())
for name, gradient in gradients(model).items():
    assert (gradient - expected_gradients[name]).abs().max() <= 1e-5 * largest, name
assert not fastvit.report(model).fallbacks
classes = [type(module) for module in model.modules()]
verify, count = (lambda model: fastvit.verify(model, image())), (lambda model: fastvit.report(model, image()))
for function in (fastvit.restore, fastvit.accelerate, verify, count):
    try:
        function(model)
    except ValueError as error:
        print(error)
assert [type(module) for module in model.modules()] == classes
""")
    assert printed.count("blocks.0 was given the class FSDPBlock after accelerate (as fully_shard does); undo that first") == 4
