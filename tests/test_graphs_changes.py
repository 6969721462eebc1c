"""CUDA graphs of a model that changes, is copied, moved or restored: recordings follow, or hold no longer. On a CPU, on tapes."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import fastvit
from fastvit.graphs import ATTRIBUTE
from tests.models_for_acceleration import hf_vit, image, timm_vit
from tests.tapes import Probe, call, graphed, outcome, recorded


def _assign(model):
    model.load_state_dict({name: torch.randn_like(t) for name, t in model.state_dict().items()}, assign=True)


def _set_data(model):
    model.linear.weight.data = torch.randn(4, 4)


def _replace_child(model):
    model.linear = nn.Linear(4, 4).eval()


def _replace_buffer(model):
    model.count = torch.ones(())


def _convert(model):
    model.double().float()


@pytest.mark.parametrize("change", [_assign, _set_data, _replace_child, _replace_buffer, _convert])
def test_replaced_weights_are_seen(tapes, change):
    model = graphed(Probe(lambda self, x: self.linear(x) @ self.weight + self.count))
    x = torch.randn(2, 4)
    call(model, x, times=4)
    change(model)
    for _ in range(4):
        assert torch.equal(call(model, x), model.linear(x) @ model.weight + model.count)
    assert recorded(model) == 1


def test_weights_changed_in_place_are_read_by_the_same_recording(tapes):
    model = graphed(Probe(lambda self, x: self.linear(x)))
    x = torch.randn(2, 4)
    call(model, x, times=4)
    [entry] = model.__dict__[ATTRIBUTE].recordings
    model.load_state_dict({name: torch.randn_like(t) for name, t in model.state_dict().items()})
    assert torch.equal(call(model, x), model.linear(x))
    assert model.__dict__[ATTRIBUTE].recordings == [entry]


def test_8_bit_weights_follow_what_they_were_made_of():
    from fastvit.graphs.watch import Watch
    from fastvit.integrations import quantized, swap

    model = fastvit.accelerate(timm_vit())
    model.blocks[1].__dict__[swap.ATTRIBUTE].weights = quantized.Weights("fp8", frozenset({"mlp"}))
    watch = Watch(model)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.add_(1)
        assert not watch.replaced(model)
        model.blocks[1].mlp.fc1.weight.add_(1)
    assert watch.replaced(model)


class Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.adapter = None

    def forward(self, x):
        return x * 2 if self.adapter is None else self.adapter(x)


def _transpose(model):
    model.linear.weight.data = model.linear.weight.data.t()


def _slice(model):
    model.linear.weight.data, model.linear.bias.data = model.linear.weight.data[:2], model.linear.bias.data[:2]


def _first_child(model):
    model.leaf.adapter = nn.Linear(4, 4).eval()


def _patch_class(model):
    type(model.leaf).forward = lambda self, x: x - 1


@pytest.mark.parametrize("change", [_transpose, _slice, _first_child, _patch_class])
def test_what_lies_at_the_same_address_in_another_way_and_other_python_are_seen(tapes, change):
    model = Probe(lambda self, x: self.linear(self.leaf(x)))
    model.leaf = type("Patched", (Leaf,), {})().eval()
    graphed(model)
    x = torch.randn(2, 4)
    call(model, x, times=4)
    change(model)
    expected = model.linear(model.leaf(x))
    assert torch.equal(call(model, x), expected)
    assert "since the call before" in outcome(model)
    assert torch.equal(call(model, x, times=4), expected)
    assert recorded(model) == 1


def test_settings_of_the_model_and_its_config_are_looked_at(tapes):
    model = graphed(hf_vit())
    call(model, image(), times=4)
    model.config.output_hidden_states = True
    assert len(call(model, image()).hidden_states) == 4
    assert recorded(model) == 0


# --- the model stays what it was ------------------------------------------------------------------------------------------


def test_copies_pickles_and_moves_carry_no_recording(tapes):
    model = graphed(timm_vit())
    call(model, image(), times=4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert recorded(twin) == 0
        assert recorded(model) == 1
        assert torch.equal(call(twin, image(), times=4), call(model, image()))
        assert recorded(twin) == 1
        assert type(twin) is type(model)
    model.double()
    assert recorded(model) == 0
    assert list(model.state_dict()) == list(timm_vit().state_dict())


def test_shallow_copies_and_swapped_tensors_are_seen(tapes):
    model, x = graphed(Probe(lambda self, x: self.linear(x))), torch.randn(2, 4)
    call(model, x, times=3)
    torch.utils.swap_tensors(model.linear.weight, nn.Parameter(torch.randn(4, 4)))  # refuses where there is a view of it
    assert torch.equal(call(model, x, times=4), model.linear(x))
    assert recorded(model) == 1
    twin = copy.copy(model)
    twin._modules = {"linear": nn.Linear(4, 4).eval()}
    assert torch.equal(call(twin, x), twin.linear(x))
    assert torch.equal(call(model, x), model.linear(x))


def test_restore_gives_back_exactly_the_model(tapes):
    model = timm_vit()
    before = [(type(m), set(m.__dict__)) for m in model.modules()]
    with fastvit.accelerated(model, cuda_graphs=True):
        call(model, image(), times=4)
        assert recorded(model) == 1
        assert isinstance(model, before[0][0])
        assert type(model).__qualname__ == before[0][0].__qualname__
        with fastvit.accelerated(model, backend="torch"):
            assert ATTRIBUTE not in model.__dict__
            assert not fastvit.report(model).graphs
        fastvit.accelerate(model, dry_run=True)
        call(model, image())
        assert recorded(model) == 1
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before


def test_a_block_by_itself_is_served_and_graphed(tapes):
    block = graphed(timm_vit()).blocks[0]
    fastvit.restore(block)
    x = torch.randn(2, 10, 48)
    expected = call(block, x)
    graphed(block)
    for twin in (block, pickle.loads(pickle.dumps(block))):
        assert torch.allclose(call(twin, x, times=4), expected, atol=1e-5)
        assert recorded(twin) == 1
        assert fastvit.report(twin).replaced.keys() == {""}
        assert fastvit.verify(twin, x).fused_blocks == 1
        assert recorded(twin) == 1
    fastvit.restore(block)
    assert ATTRIBUTE not in block.__dict__


def test_verify_and_counting_look_at_the_blocks_themselves(tapes):
    model = graphed(timm_vit())
    call(model, image(), times=4)
    verified = fastvit.verify(model, image())
    assert (verified.passed, verified.fused_blocks, len(verified.trace)) == (True, 3, 3)
    assert fastvit.report(model, image()).fused_share > 0.5
    call(model, image())
    assert outcome(model) == "1 recorded; its last call was replayed"


def test_a_graphed_model_is_freed_without_the_garbage_collector(tapes):
    model = graphed(timm_vit())
    call(model, image(), times=4)
    gone, memory = weakref.ref(model), weakref.ref(model.__dict__[ATTRIBUTE].recordings[0].recording)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
        assert memory() is None
    finally:
        gc.enable()
