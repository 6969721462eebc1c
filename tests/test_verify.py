"""What ``verify`` traces: the block that errs is named, every call is compared, and the model is left as it was."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

import fastvit
from fastvit import verification
from fastvit.integrations import handoff, swap
from fastvit.ops import torch_backend
from tests.interruptions import INTERRUPTIONS, break_at, contents
from tests.models_for_acceleration import (
    DEPTH,
    DIM,
    HIDDEN,
    TOKENS,
    Repeated,
    block_flops,
    hf_dinov2,
    hf_vit,
    image,
    old_vit,
    perturb,
    timm_vit,
    tokens,
)


def tamper(monkeypatch, block: nn.Module) -> None:
    """The fused path, and it alone, sees another fc1 in this block."""
    real, weight = torch_backend.mlp, block.mlp.fc1.weight

    def mlp(input, fc1_weight, *rest):
        return real(input, 1.3 * fc1_weight if fc1_weight is weight else fc1_weight, *rest)

    monkeypatch.setattr(torch_backend, "mlp", mlp)


# --- the trace of verify ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [hf_vit, hf_dinov2, timm_vit])
def test_the_trace_has_every_block_in_order(build):
    model = fastvit.accelerate(build())
    result = fastvit.verify(model, image())
    assert [call.name for call in result.trace] == list(fastvit.report(model).replaced)
    assert all(max(call.relative_error, call.own_error) <= 1e-5 for call in result.trace)
    assert result.first_out_of_line is None
    assert "\n" not in str(result)


@pytest.mark.parametrize("handed", [False, True])
def test_the_trace_of_the_kernels(monkeypatch, device, triton_backend, handed):
    """The norm that one block hands to the next is part of the run, and not of a block on the original's input."""
    model = fastvit.accelerate(old_vit()).to(device)
    if not handed:
        monkeypatch.setattr(handoff, "BACKENDS", ())
    result = fastvit.verify(model, tokens(1).to(device))
    assert [call.name for call in result.trace] == ["layer.0", "layer.1", "layer.2"]
    assert all(max(call.relative_error, call.own_error) <= 1e-5 for call in result.trace)
    assert result.fused_blocks == 3


def test_the_block_that_errs_is_named_and_those_after_it_are_not(monkeypatch):
    model = fastvit.accelerate(timm_vit())
    tamper(monkeypatch, model.blocks[1])
    result = fastvit.verify(model, image())
    first, second, third = result.trace
    assert not result.passed
    assert result.first_out_of_line == "blocks.1"
    assert max(first.relative_error, first.own_error) <= 1e-5
    assert min(second.relative_error, second.own_error) > 1e-3
    assert third.relative_error > 1e-3  # inherited
    assert third.own_error <= 1e-5
    line, named = str(result).split("\n")
    assert line.startswith("FAILED: 3 accelerated blocks")
    assert named == f"first out of line: blocks.1 errs by {second.own_error:.2e} on the original's own input"


def test_an_error_between_the_blocks_blames_none(monkeypatch):
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = old_vit()

        def forward(self, x):
            return self.body(x) + swap.is_served(self.body.layer[0])

    result = fastvit.verify(fastvit.accelerate(Between()), tokens())
    assert not result.passed
    assert result.first_out_of_line is None
    assert "no block is out of line" in str(result).split("\n")[1]


def test_a_block_out_of_line_is_named_though_the_output_does_not_show_it(monkeypatch):
    class FirstToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = old_vit()

        def forward(self, x):
            return self.body(x) * 0

    model = fastvit.accelerate(FirstToken())
    real = torch_backend.mlp
    monkeypatch.setattr(torch_backend, "mlp", lambda *arguments: real(*arguments) + 1)
    result = fastvit.verify(model, tokens())
    assert result.passed
    assert result.first_out_of_line == "body.layer.0"
    assert "first out of line: body.layer.0" in str(result)


def test_every_call_of_a_block_counts():
    result = fastvit.verify(fastvit.accelerate(Repeated(4)), tokens())
    assert [call.name for call in result.trace] == ["block"] * 4
    assert all(max(call.relative_error, call.own_error) <= 1e-5 for call in result.trace)


def test_blocks_that_were_not_called_are_not_claimed():
    result = fastvit.verify(fastvit.accelerate(Repeated(1)), tokens())
    assert (result.blocks, result.fused_blocks) == (2, 1)
    assert str(result).startswith("passed: 2 accelerated blocks (1 were not called) against")


def test_a_block_on_its_own_forward_is_watched_once_a_run():
    model = fastvit.accelerate(timm_vit())
    seen = []
    model.blocks[1].attn.register_forward_hook(lambda *_: seen.append(1))
    result = fastvit.verify(model, image())
    assert len(seen) == 2
    assert result.fused_blocks == 2
    assert result.trace[1].own_error == 0
    assert "(1 ran their own forward)" in str(result)


def test_hooks_of_the_block_itself_fire_once_a_run():
    model = fastvit.accelerate(timm_vit())
    seen = []
    model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(1) or output * 1.5)
    assert fastvit.verify(model, image())
    assert len(seen) == 2


class Switched(nn.Module):
    """Gives ``error`` more when it is on; its output holds two tensors, an integer one and something else."""

    def __init__(self, error: float):
        super().__init__()
        self.error, self.on = error, False

    def forward(self, x):
        y = x + self.error * self.on
        return x, {"y": y, "count": torch.tensor(3), "name": "switched"}


@contextmanager
def switched(modules, on):
    before = [module.on for module in modules]
    for module in modules:
        module.on = on
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.on = was


@pytest.mark.parametrize(("error", "expected"), [(0.0, 0.0), (0.5, 0.25)])
def test_tensors_within_a_blocks_output_are_compared(error, expected):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Switched(error)

        def forward(self, x):
            return self.part(x)[1]["y"]

    model = Model()
    result = verification.compare(
        model,
        (torch.full((2, 3), 2.0),),
        {},
        {"part": model.part},
        within=lambda: switched([model.part], True),
        without=nullcontext,
        again=lambda block: switched([block], True),
        fell_back=lambda block: False,
    )
    assert [tuple(call) for call in result.trace] == [("part", expected, expected)]
    assert result.relative_error == expected


@pytest.mark.parametrize(
    ("actual", "error"),
    [
        (torch.ones(2), 0.0),
        (torch.tensor([1.0, 1.5]), 0.5),
        (torch.tensor([1.0, float("nan")]), float("inf")),
        (torch.ones(3), float("inf")),
        ((torch.ones(2),), float("inf")),
        (None, float("inf")),
    ],
)
def test_errors_of_outputs(actual, error):
    assert verification._relative(actual, torch.ones(2)) == error


def test_padded_batches_are_traced_though_torch_nests_them():
    layer = nn.TransformerEncoderLayer(DIM, 4, HIDDEN, batch_first=True, activation="gelu")
    model = fastvit.accelerate(perturb(nn.TransformerEncoder(layer, 2)).eval())
    padding = torch.zeros(2, TOKENS, dtype=torch.bool)
    padding[1, 7:] = True
    result = fastvit.verify(model, tokens(2, TOKENS), src_key_padding_mask=padding)
    assert result.passed
    assert [call.name for call in result.trace] == ["layers.0", "layers.1"]
    assert all(max(call.relative_error, call.own_error) <= 1e-5 for call in result.trace)


def test_multi_head_attention_is_traced_with_its_tuple(monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(DIM, 4, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x, need_weights=False)[0]

    model = fastvit.accelerate(perturb(Model()))
    assert fastvit.verify(model, tokens()).trace[0].own_error <= 1e-5
    real = torch_backend.attention
    monkeypatch.setattr(torch_backend, "attention", lambda *arguments: 1.1 * real(*arguments))
    assert fastvit.verify(model, tokens()).first_out_of_line == "attn"


@pytest.mark.parametrize("hooks", ["held before", "held after", "removed"])
def test_blocks_that_accelerates_hooks_held_are_traced_and_counted(monkeypatch, hooks):
    library = pytest.importorskip("accelerate.hooks")
    model = timm_vit()
    if hooks != "held before":
        fastvit.accelerate(model)
    for block in model.blocks:
        library.add_hook_to_module(block, library.ModelHook())
        if hooks == "removed":
            library.remove_hook_from_module(block)
    if hooks == "held before":
        fastvit.accelerate(model)
    assert fastvit.report(model, image()).flops == {f"blocks.{i}": block_flops(2) for i in range(DEPTH)}
    before = contents(model)
    tamper(monkeypatch, model.blocks[1])
    result = fastvit.verify(model, image())
    assert (result.fused_blocks, result.first_out_of_line) == (3, "blocks.1")
    assert result.trace[2].own_error <= 1e-5
    assert [entry[:2] for entry in contents(model)] == [entry[:2] for entry in before]
    assert [set(entry[2]) for entry in contents(model)] == [set(entry[2]) for entry in before]


def test_a_compiled_model_is_traced_without_its_compiler():
    model, ran = fastvit.accelerate(timm_vit()), []

    def backend(graph, inputs):
        return lambda *arguments: ran.append(1) or graph.forward(*arguments)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    result = fastvit.verify(compiled, image())
    assert result.passed
    assert len(ran) == 2  # compared is what was compiled
    assert [call.name for call in result.trace] == [f"_orig_mod.blocks.{i}" for i in range(3)]
    assert fastvit.report(compiled, image()).fused_share == fastvit.report(model, image()).fused_share


@INTERRUPTIONS
@pytest.mark.parametrize(
    ("name", "number"),
    [("mlp", 2), ("mlp", 5), ("layer_norm", 2)],
    ids=["in the accelerated run", "on the fused path in the original run", "before a block's MLP"],
)
@pytest.mark.parametrize("lower", [False, True])
def test_a_verification_that_ends_early_leaves_the_model_as_it_was(monkeypatch, name, number, lower, interruption):
    model = fastvit.accelerate(timm_vit()).train()
    model = model.bfloat16() if lower else model
    before, setting = contents(model), fastvit.get_backend()
    parameters = [(parameter, parameter.dtype) for parameter in model.parameters()]
    with monkeypatch.context() as broken:
        break_at(broken, (torch_backend, name, number), interruption)
        with pytest.raises(type(interruption)):
            fastvit.verify(model, image())
    assert contents(model) == before
    assert all(now is was and now.dtype == dtype for now, (was, dtype) in zip(model.parameters(), parameters, strict=True))
    assert fastvit.get_backend() == setting
    assert fastvit.verify(model, image())


def test_verify_leaves_the_report_as_it_was():
    model = fastvit.accelerate(timm_vit())
    handle = model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model(image())
    handle.remove()
    before = fastvit.report(model)
    assert list(before.fallbacks) == ["blocks.0"]
    fastvit.verify(model, image())
    assert fastvit.report(model) == before


@pytest.mark.parametrize("function", [fastvit.verify, fastvit.report])
def test_data_parallel_is_refused(function):
    model = nn.DataParallel(fastvit.accelerate(timm_vit()))
    x = image().to(next(model.parameters()).device)  # it takes the model to the GPU where there is one
    with pytest.raises(ValueError, match="holds a DataParallel, whose replicas cannot be observed; pass the module inside it"):
        function(model, x)
    assert fastvit.report(model).replaced
    assert function(model.module, x)
