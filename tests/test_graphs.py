"""CUDA graphs of an accelerated model. On a CPU a tape stands in for the graph: it repeats the operators of the recording on the
recording's own tensors, without any Python of the model, as a graph repeats launches on fixed addresses. At the end, the graph
itself, where there is a GPU."""

import contextlib
import copy
import gc
import itertools
import pickle
import threading
import warnings
import weakref
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit.graphs import ATTRIBUTE, recorder, store
from fastvit.graphs.inspection import Inspection
from fastvit.graphs.signature import settings
from tests.models_for_acceleration import hf_vit, image, tensor_of, timm_vit


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


@pytest.fixture
def tapes(monkeypatch):
    """Lets tapes stand in for CUDA graphs, on the CPU."""
    monkeypatch.setattr(TapeRecorder, "fails", None)
    monkeypatch.setitem(recorder.RECORDERS, "cpu", TapeRecorder)


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


# --- results --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [hf_vit, timm_vit])
def test_results_are_the_same_for_any_batch_and_belong_to_the_caller(tapes, build):
    model = fastvit.accelerate(build())
    batches = [image(batch, seed=seed) for seed in range(4) for batch in (1, 3)]
    expected = [call(model, x) for x in batches]
    graphed(model)
    actual = [call(model, x) for x in batches]
    assert recorded(model) == 2
    assert outcome(model) == "2 recorded; its last call was replayed"
    for ours, theirs in zip(actual, expected, strict=True):
        assert type(ours) is type(theirs)
        assert torch.equal(tensor_of(ours), tensor_of(theirs))
    assert not fastvit.report(model).fallbacks


def test_a_replay_runs_no_python_of_the_model(tapes):
    calls = []
    model = graphed(Probe(lambda self, x: calls.append(1) or self.linear(x)))
    call(model, torch.randn(2, 4), times=4)
    ran = len(calls)
    x = torch.randn(2, 4)
    assert torch.equal(call(model, x), model.linear(x))
    assert len(calls) == ran


def test_what_decides_a_call_is_in_its_signature(tapes):
    model = graphed(Probe(lambda self, x, factor=1.0, names=(): {"out": self.linear(x) * factor, "names": list(names)}))
    x = torch.randn(2, 4)
    for factor, names in ((1.0, ("a",)), (2.0, ("a",)), (1.0, ("b",)), (1, ("a",)), (True, ("a",)), (-0.0, ()), (0.0, ())):
        for _ in range(4):
            out = call(model, x, factor=factor, names=names)
            assert torch.equal(out["out"], model.linear(x) * factor)
            assert torch.equal(out["out"].signbit(), (model.linear(x) * factor).signbit())
            assert out["names"] == list(names)
    assert recorded(model) == 7
    for other in (x.T.contiguous().T, x[:1], x.expand(3, 2, 4)):
        assert torch.equal(call(model, other, times=4)["out"], model.linear(other))
    assert recorded(model) == 10


@pytest.mark.parametrize("name", ["fp32_precision", "allow_fp16_accumulation", "allow_bf16_reduced_precision_reduction"])
def test_settings_of_precision_are_told_apart(name):
    matmul, before = torch.backends.cuda.matmul, settings("cuda")
    value = getattr(matmul, name)
    try:
        setattr(matmul, name, "tf32" if name == "fp32_precision" else not value)
        assert settings("cuda") != before
    finally:
        setattr(matmul, name, value)
    assert settings("cuda") == before


def test_inference_mode_and_no_grad_are_told_apart(tapes):
    model = graphed(timm_vit())
    for mode in (torch.inference_mode, torch.no_grad):
        for _ in range(4):
            with mode():
                out = model(image())
            assert out.is_inference() == (mode is torch.inference_mode)
    assert recorded(model) == 2


def test_autocast_is_part_of_the_signature_and_its_cache_stays_out(tapes):
    model = graphed(timm_vit())
    x = image()
    with torch.no_grad():
        for _ in range(4):
            full = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(4):
                half = model(x)
            model.head.bias.add_(1)  # a cast of it that was cached would be stale
            again = model(x)
    assert recorded(model) == 2
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert torch.allclose(again.float(), half.float() + 1, atol=0.05)
    [device] = model.__dict__[ATTRIBUTE].shared._recorders.values()
    assert device.cached == [False, False]


def _within(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.linear(x)


_around = torch.autocast("cpu", dtype=torch.bfloat16)(lambda self, x: self.linear(x))  # made where casts are cached


@pytest.mark.parametrize(("body", "outer"), [(_within, False), (_around, True)], ids=["within", "decorator"])
def test_casts_by_an_autocast_of_the_models_own_are_made_anew(tapes, body, outer):
    model, x = graphed(Probe(body)), torch.randn(2, 4)
    for _ in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
            call(model, x)
    assert recorded(model) == 1
    with torch.no_grad():
        model.linear.weight.add_(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
        out = call(model, x)
    assert torch.equal(out, body(model, x))
    assert outcome(model) == "1 recorded; its last call was replayed"


Pair = namedtuple("Pair", "first second")


@dataclass
class Result:
    value: torch.Tensor
    name: str


def test_containers_come_back_as_what_they_are(tapes):
    def body(self, batch, *, extra):
        hidden = self.linear(batch["x"][0]) + extra.value
        return Pair(
            [hidden, None], {"same": hidden, "given": extra.value, "weight": self.weight, "row": Result(hidden[0], "row")}
        )

    model = graphed(Probe(body))
    for _ in range(4):
        x, extra = torch.randn(2, 4), Result(torch.randn(2, 4), "extra")
        out = call(model, {"x": (x, 3)}, extra=extra)
        expected = model.linear(x) + extra.value
        assert isinstance(out, Pair)
        assert out.first[1] is None
        assert torch.equal(out.first[0], expected)
        assert out.second["same"] is out.first[0]
        assert out.second["given"] is extra.value
        assert out.second["weight"] is model.weight
        assert isinstance(out.second["row"], Result)
        assert torch.equal(out.second["row"].value, expected[0])
    assert recorded(model) == 1


def test_dicts_of_other_kinds_are_returned_as_they_are_and_sizes_are_numbers(tapes):
    def body(self, x, size):
        out = defaultdict(list, out=self.linear(x))
        return out if size else (out["out"], x.shape, OrderedDict(out))

    model, x = graphed(Probe(body)), torch.randn(2, 4)
    for size in (x.shape[:0], x.shape[1:]):
        for _ in range(4):
            out = call(model, x, size)
            assert torch.equal(out["out"] if size else out[0], model.linear(x))
        if size:
            assert out["other"] == []
            assert "its result is or holds a defaultdict" in outcome(model)
        else:
            assert (type(out[1]), out[1]) == (torch.Size, x.shape)
            assert type(out[2]) is OrderedDict
    assert recorded(model) == 1


def test_one_tensor_given_twice_is_another_signature_than_two(tapes):
    model = graphed(Probe(lambda self, q, k: self.linear(q) + (1 if q is k else 2)))
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    for _ in range(4):
        assert torch.equal(call(model, x, x), model.linear(x) + 1)
        assert torch.equal(call(model, x, y), model.linear(x) + 2)
    assert recorded(model) == 2


def test_threads_take_turns(tapes):
    model = graphed(timm_vit())
    inputs = [image(1 + index % 2, seed=index) for index in range(4)]
    expected = [call(model, x) for x in inputs]
    wrong = []

    def work(index):
        for _ in range(4):
            if not torch.equal(call(model, inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert recorded(model) == 2


# --- weights that change --------------------------------------------------------------------------------------------------


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


# --- calls that are not replayed ------------------------------------------------------------------------------------------


def _hook(model):
    model.blocks[1].attn.register_forward_hook(lambda *_: None)


def _dropout(model):
    model.blocks[0].attn.proj_drop.train()


def _own_forward(model):
    model.blocks[1].mlp.forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "blocks.1.attn has hooks"),
        (_dropout, "blocks.0.attn.proj_drop is in training mode"),
        (_own_forward, "blocks.1.mlp has a forward of its own"),
        (lambda model: model.train(), "it is in training mode"),
    ],
    ids=["hook", "dropout", "forward", "training"],
)
def test_what_a_replay_would_leave_out_is_run(tapes, change, reason):
    model, x = graphed(timm_vit()), image()
    call(model, x, times=4)
    change(model)
    out = call(model, x)
    assert reason in outcome(model)
    assert recorded(model) == 1
    assert torch.allclose(out, call(fastvit.restore(model), x), atol=1e-5)


def test_compiled_parts_are_left_to_the_compiler(tapes):
    model = graphed(Probe(lambda self, x: self.linear(x)))
    model.linear._compiled_call_impl = model.linear._call_impl  # what Module.compile() sets
    call(model, torch.randn(2, 4), times=4)
    assert "linear is compiled by torch.compile" in outcome(model)


def test_a_hook_around_the_model_is_called_and_one_for_all_modules_too(tapes):
    model, seen = graphed(Probe(lambda self, x: self.linear(x))), []
    model.register_forward_hook(lambda *_: seen.append("around"))
    call(model, torch.randn(2, 4), times=4)
    assert seen == ["around"] * 4
    assert recorded(model) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    call(model, torch.randn(2, 4))
    handle.remove()
    assert seen[4:] == ["Linear", "Probe", "around"]
    assert "a hook is registered for all modules" in outcome(model)


def test_gradients_go_through_and_attention_maps_are_drawn(tapes):
    model = graphed(timm_vit())
    call(model, image(), times=4)
    model(image()).sum().backward()
    assert model.patch_embed.proj.weight.grad is not None
    assert "gradients are recorded" in outcome(model)
    assert len(fastvit.attention_maps(model, image())) == 3


def test_gradients_of_what_is_no_parameter_are_left_to_pytorch(tapes):
    prompt = torch.randn(4, requires_grad=True)
    model = graphed(Probe(lambda self, x: self.linear(x + prompt)).requires_grad_(False))
    for number in range(6):
        model(torch.randn(2, 4)).sum().backward()
        assert torch.allclose(prompt.grad, (number + 1) * 2 * model.linear.weight.sum(0), atol=1e-5)
    assert "gradients are recorded for a tensor that is no parameter" in outcome(model)
    prompt.requires_grad_(False)
    for _ in range(5):
        model(torch.randn(3, 4))
    assert outcome(model) == "1 recorded; its last call was replayed"
    prompt.requires_grad_(True)
    assert model(torch.randn(3, 4)).requires_grad
    assert "gradients are recorded for a tensor that is no parameter" in outcome(model)


def test_forward_derivatives_and_default_devices(tapes):
    model, x = graphed(Probe(lambda self, x: self.linear(x) + torch.zeros(4))), torch.randn(2, 4)
    call(model, x, times=4)
    with forward_ad.dual_level():
        out = call(model, forward_ad.make_dual(x, torch.ones_like(x)))
        assert torch.allclose(forward_ad.unpack_dual(out).tangent, model.linear.weight.sum(1).expand(2, 4), atol=1e-6)
    with torch.device("cpu"):
        call(model, x, times=4)
    assert outcome(model) == "2 recorded; its last call was replayed"


class Plain(TorchDispatchMode):
    _should_skip_dynamo = classmethod(lambda cls: False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_modes_traces_and_transforms_are_left_alone(tapes):
    model, x = graphed(Probe(lambda self, x: self.linear(x))), torch.randn(2, 4)
    call(model, x, times=4)
    with Plain():
        call(model, x)
    assert "a mode, a transform or a trace" in outcome(model)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(model, (x,))(x + 1), model.linear(x + 1))
        assert torch.equal(torch.func.vmap(model)(x), model.linear(x))
    model = graphed(nn.Sequential(nn.Linear(4, 4)).eval())
    assert torch.equal(torch.fx.symbolic_trace(model)(x + 1), model[0](x + 1))


def _odd(self, x):
    self.count += 1
    return self.linear(x)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda self, x: x + torch.rand(4), "it draws random numbers (aten::rand)"),
        (lambda self, x: nn.functional.dropout(x, 0.5), "it draws random numbers (aten::"),
        (lambda self, x: x * x.sum().item(), "it waits for a value from the device (aten::"),
        (lambda self, x: x if x.sum() > 0 else -x, "it waits for a value from the device (aten::"),
        (lambda self, x: x[x > 0], "it waits for a value from the device (aten::index)"),
        (lambda self, x: self.linear(x.to("meta")), "it computes on meta as well (aten::"),
        (lambda self, x: self.linear(x.add_(1)), "it writes over a tensor that outlives the call (aten::add_)"),
        (_odd, "it writes over a tensor that outlives the call (aten::add_)"),
        (lambda self, x: object(), "its result is or holds a object, which could change unseen"),
        (lambda self, x: x.to_sparse() @ self.weight, "it computes with more than plain dense tensors"),
    ],
    ids=["rand", "dropout", "item", "if", "mask", "device", "input", "buffer", "result", "sparse"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_cannot_be_replayed_runs_as_ever(tapes, body, reason, mode):
    model = Probe(body)
    model.linear.to("meta") if "meta" in reason else None
    graphed(model)
    for number in range(4):
        with mode():
            model(torch.randn(2, 4).abs())
        assert (reason if number else "its signature is new") in outcome(model)
    assert model.count == (4 if body is _odd else 0)


def test_dropout_that_drops_nothing_and_picking_by_number_are_recorded(tapes):
    def body(self, x):
        x = nn.functional.dropout(x, 0.0) + nn.functional.dropout(x, 0.5, training=False) + torch.tensor(0.5)
        return self.linear(x)[torch.arange(2)]

    model = graphed(Probe(body))
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(4):
            with mode():
                model(torch.randn(2, 4))
    assert recorded(model) == 2


def test_a_recording_that_fails_is_said_once_and_not_tried_again(tapes, monkeypatch):
    model, x = graphed(Probe(lambda self, x: self.linear(x))), torch.randn(2, 4)
    monkeypatch.setattr(TapeRecorder, "fails", RuntimeError("operation not permitted\nwhen the stream is capturing"))
    call(model, x, times=3)
    with pytest.warns(UserWarning, match=r"Probe runs without a CUDA graph: it could not be recorded \(RuntimeError: operation"):
        out = call(model, x)
    assert torch.equal(out, model.linear(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model, x, times=2)
    assert "it could not be recorded (RuntimeError: operation not permitted)" in outcome(model)
    monkeypatch.setattr(TapeRecorder, "fails", None)
    call(model, torch.randn(3, 4), times=4)
    assert recorded(model) == 1


def test_what_calls_leave_behind_is_read_where_it_stays_and_not_recorded_where_it_changes(tapes):
    def keeps(self, x):
        self.kept = self.__dict__.get("kept", self.linear(x) * 0 + 3)
        return self.linear(x) + self.kept

    def follows(self, x):
        before, self.kept = self.__dict__.get("kept", x), self.linear(x)
        return before + self.kept

    for body, count in ((keeps, 1), (follows, 0)):
        model, plain = graphed(Probe(body)), Probe(body)
        plain.load_state_dict(model.state_dict())
        for _ in range(8):
            x = torch.randn(2, 4)
            assert torch.equal(call(model, x), call(plain, x))
        assert recorded(model) == count
    assert "every call reads other tensors" in outcome(model)


def test_what_a_call_read_is_kept_no_longer_than_a_recording_may_come_of_it(tapes):
    made = []

    def body(self, x):
        before, self.kept = self.__dict__.get("kept", x), self.linear(x)
        made.append(weakref.ref(self.kept.untyped_storage()))
        return before.sum() + self.kept

    model = graphed(Probe(body))
    for batch in range(1, 5):
        call(model, torch.randn(batch, 4), times=store.MAX_LOOKS + 1)
        assert "every call reads other tensors" in outcome(model)
    assert sum(storage() is not None for storage in made) == 1


def test_signatures_that_never_come_again_and_models_that_always_change_are_not_looked_on_at(tapes, monkeypatch):
    looks = []
    monkeypatch.setattr(store, "Inspection", lambda *args: looks.append(args))

    def body(self, x):
        self.steps = self.__dict__.get("steps", 0) + 1
        return self.linear(x)

    for model in (graphed(Probe(lambda self, x: self.linear(x))), graphed(Probe(body))):
        for batch in range(1, 6):
            call(model, torch.randn(batch, 4))
    call(model, torch.randn(2, 4), times=3)
    assert "a setting or what was made of a weight has become another" in outcome(model)
    assert not looks


def test_numbers_from_the_host_are_no_launches():
    x = torch.randn(4, device="meta")
    for body, reason in (
        (lambda: torch.ops.aten.lift_fresh(x), "it writes numbers down on the device"),  # by which torch.tensor ends
        (lambda: torch.empty_like(x).copy_(torch.tensor(0.5), non_blocking=True), "it computes on cpu as well (aten::copy_)"),
        (lambda: torch.tensor(0.5).to("meta", non_blocking=True), "it computes on cpu as well (aten::"),
        (lambda: torch.empty_like(x).index_put_((x > 0,), x), "it waits for a value from the device (aten::index_put"),
        (lambda: x * torch.tensor(0.5), None),
    ):
        with Inspection(x.device, []) as inspection:
            body()
        assert reason == inspection.reason or inspection.reason.startswith(reason)


@pytest.mark.parametrize("argument", [object(), torch.randn(2, 4).to_sparse(), {object(): 1}])
def test_arguments_that_could_change_unseen(tapes, argument):
    model = graphed(Probe(lambda self, x, other: self.linear(x)))
    call(model, torch.randn(2, 4), argument, times=4)
    assert "an argument is " in outcome(model)


# --- places ---------------------------------------------------------------------------------------------------------------


def test_the_recording_replayed_longest_ago_makes_room_but_none_in_use(tapes, monkeypatch):
    monkeypatch.setattr(store, "MAX_RECORDINGS", 2)
    monkeypatch.setattr(store, "PATIENCE", 8)
    model = graphed(Probe(lambda self, x: self.linear(x)))

    def come(*batches):
        for batch in batches:
            x = torch.randn(batch, 4)
            assert torch.equal(call(model, x), model.linear(x))
        return sorted(entry.recording.inputs[0].shape[0] for entry in model.__dict__[ATTRIBUTE].recordings)

    assert come(1, 1, 1, 1, 2, 2, 2, 2) == [1, 2]
    assert come(*[1, 2, 3] * 5) == [1, 2]
    assert "2 other signatures are recorded, and in use" in outcome(model)
    assert come(*[2, 3] * 5) == [2, 3]
    monkeypatch.setattr(store, "MAX_SIGNATURES", 4)
    come(*range(4, 40))
    assert len(model.__dict__[ATTRIBUTE].entries) == 4
    assert recorded(model) == 2


def test_what_is_called_by_itself_has_graphs_of_its_own(tapes):
    model = graphed(timm_vit())
    for _ in range(4):
        with torch.no_grad():
            model.forward_features(image())
    assert fastvit.report(model).graphs == {
        "": "0 recorded; it was not called yet",
        "blocks": "1 recorded; its last call was replayed",
    }
    call(model, image(), times=4)
    assert recorded(model) == recorded(model.blocks) == 1
    outer = graphed(nn.Sequential(Probe(_odd), timm_vit()).eval())
    outer[0].linear = nn.Identity().eval()
    call(outer, image(), times=6)  # in the second, looked on at, nothing inside counts
    graphs = fastvit.report(outer).graphs
    assert "it writes over a tensor" in graphs[""]
    assert graphs["1"] == "1 recorded; its last call was replayed"


def test_the_parts_of_sam_that_a_predictor_calls_are_recorded(tapes):
    from tests.small_sam import face, own_sam, small_sam

    sam = own_sam(small_sam()).eval()
    predictor = fastvit.SamPredictor(sam)

    def masks():
        predictor.set_image(face())
        return predictor.predict([[40, 40]], [1])[2]

    expected = masks()
    graphed(sam)
    for _ in range(4):
        actual = masks()
    assert abs(actual - expected).max() <= 1e-4 * abs(expected).max()
    graphs = fastvit.report(sam).graphs
    assert graphs["image_encoder"] == graphs["mask_decoder"] == "1 recorded; its last call was replayed"


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


def test_without_a_cuda_device_the_report_says_so():
    model = fastvit.accelerate(timm_vit(), cuda_graphs=True)
    if not torch.cuda.is_available():
        assert "CUDA graphs of the model: 0 recorded; CUDA graphs need a CUDA device, and the model is on cpu" in str(
            fastvit.report(model)
        )
    assert torch.equal(call(model, image(), times=4), call(fastvit.accelerate(model), image()))
    fastvit.accelerate(model, cuda_graphs=True)
    call(model, image())
    assert "CUDA graphs need a CUDA device, one for all tensors among the arguments; theirs is cpu" in outcome(model)
    assert fastvit.report(fastvit.accelerate(timm_vit().blocks, cuda_graphs=True)).graphs
    modules = fastvit.accelerate(nn.ModuleList(timm_vit().blocks), cuda_graphs=True)
    assert fastvit.report(modules).graphs == {"": "none: it has no forward: accelerate what is called"}


class Cuda:
    """What ``CudaRecorder`` asks of ``torch.cuda``, with a log in the place of a GPU."""

    def __init__(self, fails_in_capture=False):
        self.log, self.streams, self.current, self.fails = [], itertools.cycle(range(1, 33)), None, fails_in_capture
        log, handles = self.log, itertools.count(1)
        self.CUDAGraph = type("CUDAGraph", (), {"replay": lambda graph: log.append("replay")})
        self.graph_pool_handle = lambda: (0, next(handles))
        self.synchronize = lambda device: self.log.append("synchronize")

    def Stream(self, device):
        stream = Stream(next(self.streams))
        stream.wait_stream = lambda other: self.log.append(f"{stream} waits for {other}")
        return stream

    def current_stream(self):
        return self.current

    def set_stream(self, stream):
        self.current = stream

    @contextlib.contextmanager
    def device(self, device):
        yield

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        before, self.current = self.current, stream
        self.log.append(f"captures on {stream} in {pool}, {capture_error_mode}")
        yield
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")  # the stream stays current
        self.current = before


class Stream:
    def __init__(self, number):
        self.number = number

    def __eq__(self, other):
        return isinstance(other, Stream) and self.number == other.number

    def __hash__(self):
        return self.number

    def __repr__(self):
        return f"stream {self.number}"


def test_the_recorder_orders_streams_and_survives_a_failed_capture(monkeypatch):
    monkeypatch.setattr(recorder.torch, "cuda", cuda := Cuda())
    ended = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *of: ended.append("ended"), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *of: ended.append("released"), raising=False)
    one, other = (recorder.CudaRecorder(torch.device("cuda", 0)) for _ in range(2))
    assert one.stream != other.stream
    for _ in range(40):  # streams of recorders that are gone are taken again
        recorder.CudaRecorder(torch.device("cuda", 0))
    caller, another = cuda.Stream(0), cuda.Stream(0)
    tensor = SimpleNamespace(record_stream=lambda stream: cuda.log.append(f"input on {stream}"))
    runs = []
    cuda.current = caller
    with one.turn([tensor]):
        replay, result = one.record(lambda: runs.append((cuda.current, gc.isenabled())) or "result")
    assert (runs, result) == ([(caller, True), (caller, True), (one.stream, False)], "result")
    assert gc.isenabled()
    assert cuda.log == [f"input on {caller}", f"captures on {one.stream} in {one.pool}, thread_local"]
    cuda.log.clear()
    for stream in (caller, another, another):
        cuda.current = stream
        with one.turn([tensor]):
            replay()
    turns = [[f"input on {stream}", "replay"] for stream in (caller, another, another)]
    assert cuda.log == [*turns[0], f"{another} waits for {caller}", *turns[1], *turns[2]]
    assert not ended

    pool = one.pool  # shared while a graph of it lives; after the last one PyTorch takes it for no other
    another_replay = one.record(lambda: None)
    assert one.pool == pool
    del replay, another_replay
    one.record(lambda: None)
    assert one.pool != pool

    cuda.fails, before = True, other.stream
    cuda.current = caller
    with pytest.raises(RuntimeError, match="previous error during capture"), other.turn([tensor]):
        other.record(lambda: None)
    assert cuda.current is caller
    assert ended == ["ended", "released"]
    assert other.stream not in (before, one.stream)
    assert not recorder._recording.locked()


# --- on a GPU -------------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs, which needs a GPU")


def half(model):
    return model.half().cuda()


def near(actual, expected):
    """Equal but for the rounding of another algorithm, which a library may pick for a captured call."""
    eps = 4 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, atol=max(eps, 1e-5), rtol=max(eps, 1e-5))


@on_gpu
@pytest.mark.parametrize("options", [{}, {"backend": "triton"}, {"backend": "torch"}], ids=["auto", "triton", "torch"])
@pytest.mark.parametrize("build", [hf_vit, timm_vit])
def test_gpu_results_over_changing_batches(build, options):
    model = fastvit.accelerate(half(build()), **options)
    inputs = [image(batch, seed=seed).half().cuda() for seed in range(6) for batch in (1, 2, 5)]
    expected = [tensor_of(call(model, x)) for x in inputs]
    fastvit.accelerate(model, cuda_graphs=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = [tensor_of(call(model, x)) for x in inputs]
    assert outcome(model) == "3 recorded; its last call was replayed"
    for ours, theirs in zip(actual, expected, strict=True):
        near(ours, theirs)


@on_gpu
def test_gpu_autocast_and_weights_that_change():
    model, x = graphed(timm_vit().cuda()), image().cuda()
    plain = fastvit.accelerate(timm_vit().cuda())

    def same(**autocast):
        with torch.autocast("cuda", **autocast):
            near(call(model, x), call(plain, x))

    for change in (None, "in place", "assigned", "data"):
        state = {name: t * 1.1 if t.is_floating_point() else t for name, t in plain.state_dict().items()}
        for each in (model, plain) if change else ():
            if change == "data":
                for name, parameter in each.named_parameters():
                    parameter.data = state[name].clone()
            else:
                each.load_state_dict({name: t.clone() for name, t in state.items()}, assign=change == "assigned")
        for _ in range(4):
            same(enabled=False)
            same(dtype=torch.bfloat16)
            same(dtype=torch.float16)
        assert outcome(model) == "3 recorded; its last call was replayed"


@on_gpu
def test_gpu_threads_and_streams():
    model = graphed(half(timm_vit()))
    inputs = [image(1 + index % 2, seed=index).half().cuda() for index in range(6)]
    expected = [call(model, x) for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(index):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                out = call(model, inputs[index])
                if not torch.allclose(out, expected[index], atol=4e-3, rtol=4e-3):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert outcome(model) == "2 recorded; its last call was replayed"


@on_gpu
def test_gpu_a_recording_that_fails_leaves_the_device_as_it_was():
    def body(self, x):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return self.linear(x)

    model, x = graphed(Probe(body).cuda()), torch.randn(2, 4, device="cuda")
    call(model, x, times=3)
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="it could not be recorded"):
        out = call(model, x)
    assert torch.cuda.current_stream() == stream
    near(out, model.linear(x))
    model.body = (lambda self, x: self.linear(x),)
    y = torch.randn(3, 4, device="cuda")
    near(call(model, y, times=4), model.linear(y))
    assert recorded(model) == 1


@on_gpu
def test_gpu_the_callers_own_capture_and_released_memory():
    model, x = graphed(half(timm_vit())), image().half().cuda()
    expected = call(model, x, times=4)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = model(x)
    graph.replay()
    near(captured, expected)
    del graph, captured
    before = torch.cuda.memory_reserved()
    fastvit.restore(model)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before


@on_gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="FP8 needs compute capability 8.9"
)
def test_gpu_fp8_weights_are_made_anew():
    model, x = half(timm_vit()), image().half().cuda()
    fastvit.accelerate(model, precision="fp8", cuda_graphs=True)
    call(model, x, times=6)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight.mul_(1.5)
    actual = [call(model, x) for _ in range(6)]
    assert recorded(model) == 1
    expected = call(fastvit.accelerate(model, precision="fp8"), x)
    for out in actual:
        near(out, expected)
