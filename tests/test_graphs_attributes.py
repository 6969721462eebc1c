"""What a recording holds no longer after, though no weight is another one: functions, settings and tensors that Python reads, the
way memory is read, and buffers that other calls write over. On a CPU, on tapes."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fastvit.graphs import paused
from fastvit.graphs.attributes import LARGEST, Attributes
from tests.models_for_acceleration import image, perturb, timm_vit
from tests.tapes import Probe, call, graphed, outcome, recorded


def _leaves(out):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]


def check(model, change, *args, **kwargs):
    """Records a call, makes the change, and compares the next calls with those of the model without graphs."""
    call(model, *args, times=4, **kwargs)
    assert recorded(model) == 1
    with paused(model):
        before = _leaves(call(model, *args, **kwargs))
        change(model)
        expected = _leaves(call(model, *args, **kwargs))
    assert len(before) != len(expected) or any(
        one.shape != other.shape or one.dtype != other.dtype or not torch.equal(one, other)
        for one, other in zip(before, expected, strict=True)
    ), "the change changes nothing"
    for _ in range(5):
        found = _leaves(call(model, *args, **kwargs))
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]
        assert all(map(functools.partial(torch.allclose, atol=1e-5), found, expected))
    assert recorded(model) == 1
    assert outcome(model).endswith("its last call was replayed")


# --- functions ------------------------------------------------------------------------------------------------------------


def _on_the_instance(model):
    model.forward_head = lambda x, pre_logits=False: x[:, 0]


def _another_pool(model):
    model.pool = lambda x, pool_type=None: x.mean(1)


def _around_its_own(model):
    model.forward_features = functools.partial(lambda own, x, **kwargs: own(x) * 0, model.forward_features)


def _on_the_class(model):
    type(model).forward_head = lambda self, x, pre_logits=False: x[:, 0]


@pytest.mark.parametrize("change", [_on_the_instance, _another_pool, _around_its_own, _on_the_class])
def test_functions_exchanged_on_a_model_or_its_class_are_seen(tapes, change):
    model = timm_vit()
    model.__class__ = type("Patched", (type(model),), {})
    check(graphed(model), change, image())


def test_what_other_classes_define_is_looked_at_too(tapes):
    class Base(nn.Module):
        def forward(self, x):
            return self.head(x) + self.shift

    model, x = Probe(lambda self, x: self.inner(self.linear(x))), torch.randn(2, 4)
    model.inner = type("Inner", (type("Middle", (Base,), {"head": lambda self, x: x, "shift": 0}),), {})().eval()
    graphed(model)
    check(model, lambda model: setattr(type(model.inner), "head", lambda self, x: x * 2), x)
    check(model, lambda model: setattr(Base, "forward", lambda self, x: x - 1), x)


# --- settings and tensors among the attributes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2,), (3,)),
        ([1, [2]], [1, [3]]),
        ({"a": {"b": 2}}, {"a": {"b": 3}}),
        ({2, 4}, {3, 4}),
        (torch.Size([2]), torch.Size([3])),
        ({"k": torch.float32, "n": 2}, {"k": torch.float32, "n": 3}),
        ([torch.float32], [torch.float64]),
        (torch.float32, torch.float64),
        (torch.tensor(2.0), torch.tensor(3.0)),
        ([torch.tensor(2.0)], [torch.tensor(3.0)]),
        (2, 2.0),
        (nn.functional.gelu, nn.functional.silu),
    ],
)
def test_attributes_of_the_model_itself_are_compared(tapes, before, after):
    def body(self, x):
        k = self.k
        while isinstance(k, tuple | list | dict | set):
            k = min(k) if isinstance(k, set) else k[-1] if isinstance(k, tuple | list) else list(k.values())[-1]
        return (x.round().int() if isinstance(k, int | float) else x) * k if not callable(k) else k(x)

    def typed(self, x):
        k = self.k[0] if isinstance(self.k, list) else self.k
        return x.to(k) * 1

    dtype = torch.float32 in (before, *(before if isinstance(before, list) else ()))
    model = Probe(typed if dtype else body)
    model.k = before
    check(graphed(model), lambda model: setattr(model, "k", after), torch.randn(2, 4) * 3)


def test_containers_changed_in_place_are_seen(tapes):
    model, x = Probe(lambda self, x: x * self.plain["k"][0] * self.mixed[0] + len(self.plain)), torch.randn(2, 4)
    model.plain, model.mixed = {"k": [2]}, [torch.tensor(2.0), torch.float32]
    graphed(model)
    check(model, lambda model: model.plain["k"].__setitem__(0, 3), x)
    check(model, lambda model: model.mixed.__setitem__(0, torch.tensor(3.0)), x)
    check(model, lambda model: model.plain.update(other=torch.ones(2)), x)


def test_values_are_compared_by_what_they_are_and_only_so_many():
    own = {"number": 1, "flag": True, "many": list(range(LARGEST)), "training": False, "_fastvit_x": object(), "odd": object()}
    said = Attributes(own)
    own |= {"number": int("1"), "training": True, "_fastvit_x": object()}
    own["many"].append(1)
    assert not said.changed(own)
    for name, other in (("number", 1.0), ("number", True), ("flag", 1), ("many", list(own["many"])), ("odd", object())):
        assert said.changed({**own, name: other})
        assert said.changed({**own, name: other}), "asked again, it says so again"
    assert not said.changed(own)
    assert said.changed({**own, "more": 1})
    assert said.changed({name: value for name, value in own.items() if name != "flag"})
    own["self"] = [own]
    assert said.changed(own)


def test_tensors_that_a_call_leaves_behind_are_no_settings(tapes):
    def body(self, x):
        self.features = [self.linear(x)]
        return self.features[0] * self.scale

    model, x = Probe(body), torch.randn(2, 4)
    model.scale, model.features = torch.tensor(2.0), [torch.zeros(())]
    graphed(model)
    call(model, x, times=5)
    assert recorded(model) == 1
    check(model, lambda model: setattr(model, "scale", torch.tensor(3.0)), x)


def test_an_exchanged_list_of_layers_is_seen(tapes):
    from transformers import Dinov2Backbone, Dinov2Config

    config = Dinov2Config(image_size=24, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2)
    model = perturb(Dinov2Backbone(config)).eval()
    check(graphed(model), lambda model: setattr(model, "out_indices", [1]), image())


@dataclass
class Options:
    shift: torch.Tensor


def test_what_a_dataclass_has_beside_its_fields_is_part_of_the_signature(tapes):
    model, x, options = graphed(Probe(lambda self, x, o: x * o.factor + o.shift)), torch.randn(2, 4), Options(torch.ones(4))
    for factor in (2, 3, torch.tensor(4.0), torch.tensor(5.0)):
        options.factor = factor
        assert torch.equal(call(model, x, options, times=5), x * factor + 1)
    assert recorded(model) == 3


# --- memory ---------------------------------------------------------------------------------------------------------------


def _transposed(model):
    model.grid.data = model.grid.data.transpose(0, 1)


def _reshaped(model):
    model.grid.data = model.grid.data.view(8, 3)


def _as_another_dtype(model):
    model.grid.data = model.grid.data.view(torch.int32)


@pytest.mark.parametrize("kind", ["parameter", "attribute"])
@pytest.mark.parametrize("change", [_transposed, _reshaped, _as_another_dtype])
@pytest.mark.parametrize("guards", [True, False])
def test_the_same_memory_read_in_another_way_is_seen(tapes, monkeypatch, kind, change, guards):
    if not guards:
        monkeypatch.setattr("fastvit.graphs.watch._guards", lambda tensors: None)
    model = Probe(lambda self, x: x + self.grid.flatten()[1] + self.grid.sum(0).flatten()[0])
    grid = torch.randn(2, 3, 4)
    model.grid = nn.Parameter(grid, requires_grad=False) if kind == "parameter" else grid
    check(graphed(model), change, torch.randn(2, 4))


def test_modes_do_not_pass_for_other_weights(tapes):
    model, x = graphed(Probe(lambda self, x: self.linear(x))), torch.randn(2, 4)
    for _ in range(5):
        call(model, x)
        model.requires_grad_(False)
        with torch.inference_mode():
            model(x)
        with torch.autocast("cpu", torch.bfloat16):
            call(model, x)
        model.requires_grad_(True)
    assert recorded(model) == 3


class Table(nn.Module):
    """Rows for the size that it was called with last, in a buffer that it writes over."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(4))
        self.size, self.fills = None, 0

    def forward(self, x):
        if self.size != x.shape:
            self.table, self.size = self.table.fill_(len(x)), x.shape
        return x + self.table


def test_a_buffer_that_another_signature_wrote_over_is_filled_again(tapes):
    model = Probe(lambda self, x: self.inner(x))
    model.inner = Table().eval()
    graphed(model)
    two, three = torch.zeros(2, 4), torch.zeros(3, 4)
    call(model, two, times=4)
    assert recorded(model) == 1
    for _ in range(3):
        assert torch.equal(call(model, three), three + 3)
        assert torch.equal(call(model, two), two + 2)
        assert "a buffer that it reads was written" in outcome(model)
    for _ in range(3):
        assert torch.equal(call(model, two), two + 2)
    assert outcome(model) == "1 recorded; its last call was replayed"
    model.inner.table.fill_(7)  # by the caller: the recording reads it
    for _ in range(2):
        assert torch.equal(call(model, two), two + 7)
    assert outcome(model) == "1 recorded; its last call was replayed"
