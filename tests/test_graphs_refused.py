"""Calls that a CUDA graph would not repeat rightly are run as ever, and the report says why. On a CPU, on tapes."""

import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit.graphs import store
from fastvit.graphs.inspection import Inspection
from tests.models_for_acceleration import image, timm_vit
from tests.tapes import Probe, TapeRecorder, call, counting, graphed, outcome, recorded


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
        (counting, "it writes over a tensor that outlives the call (aten::add_)"),
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
    assert model.count == (4 if body is counting else 0)


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
    call(model, torch.randn(1, 4))  # from now on it has the attribute
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
