"""What a user relies on without looking: the block that errs is named, shares are counted right, and failures change nothing."""

import copy
import html.parser
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import fastvit
from fastvit import acceleration, functional, planning, reporting, verification, walk
from fastvit.integrations import handoff, probe, swap
from fastvit.ops import torch_backend
from tests.models_for_acceleration import (
    OldViTLayer,
    hf_dinov2,
    hf_vit,
    image,
    old_vit,
    perturb,
    tensor_of,
    timm_own_mlp,
    timm_vit,
    tokens,
)

ROOT = Path(__file__).parents[1]
TOKENS, DIM, HIDDEN, DEPTH = 10, 48, 96, 3  # of timm_vit


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return perturb(VisionTransformer(24, 8, DEPTH, 3, DIM, HIDDEN, num_classes=5))


def tamper(monkeypatch, block: nn.Module) -> None:
    """The fused path, and it alone, sees another fc1 in this block."""
    real, weight = torch_backend.mlp, block.mlp.fc1.weight

    def mlp(input, fc1_weight, *rest):
        return real(input, 1.3 * fc1_weight if fc1_weight is weight else fc1_weight, *rest)

    monkeypatch.setattr(torch_backend, "mlp", mlp)


def contents(model: nn.Module) -> list:
    """All that acceleration could change, by identity."""
    return [(m, type(m), {key: id(value) for key, value in m.__dict__.items()}, m.training) for m in model.modules()]


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


class Repeated(nn.Module):
    """Runs one block as often as it is told, writing over what the block returned in between."""

    def __init__(self, times: int):
        super().__init__()
        self.times, self.block, self.idle = times, perturb(OldViTLayer()), perturb(OldViTLayer())

    def forward(self, x):
        for _ in range(self.times):
            x = self.block(x)
            x += 1
        return x


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


INTERRUPTIONS = pytest.mark.parametrize("interruption", [RuntimeError("no more"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])


def break_at(monkeypatch, stage, interruption):
    """The stage's function raises at its n-th call, once it has done its work."""
    module, name, number = stage
    real, calls = getattr(module, name), []

    def broken(*arguments, **keywords):
        calls.append(1)
        result = real(*arguments, **keywords)
        if len(calls) == number:
            raise interruption
        return result

    monkeypatch.setattr(module, name, broken)


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


# --- the share that is fused --------------------------------------------------------------------------------------------


def block_flops(batch: int, tokens: int = TOKENS, dim: int = DIM, hidden: int = HIDDEN) -> int:
    """Two a multiply-add: four projections, scores and values, two linears."""
    return 2 * batch * tokens * (4 * dim * dim + 2 * tokens * dim + 2 * dim * hidden)


@pytest.mark.parametrize("batch", [1, 3])
def test_flops_equal_a_count_by_hand(batch):
    model = fastvit.accelerate(timm_vit())
    found = fastvit.report(model, image(batch))
    patches, head = 2 * batch * 9 * DIM * 3 * 8 * 8, 2 * batch * DIM * 5
    assert found.flops == {f"blocks.{i}": block_flops(batch) for i in range(DEPTH)}
    assert found.total_flops == DEPTH * block_flops(batch) + patches + head
    assert found.fused_share == pytest.approx(DEPTH * block_flops(batch) / found.total_flops)
    assert fastvit.report(model).total_flops is None
    assert fastvit.report(model).fused_share is None


def test_vit_b_16_takes_35_gflop_an_image():
    from timm import create_model

    with torch.device("meta"):
        model = fastvit.accelerate(create_model("vit_base_patch16_224"))
        found = fastvit.report(model, torch.empty(1, 3, 224, 224))
    assert found.total_flops == pytest.approx(35.1e9, rel=0.01)
    assert found.fused_share == pytest.approx(0.993, abs=0.001)  # the rest: patches and head
    assert "fused: 99.3% of 35.1 GFLOP" in str(found)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_counted_whichever_implementation_runs(implementation):
    model = hf_vit()
    model.set_attn_implementation(implementation)
    found = fastvit.report(fastvit.accelerate(model), image())
    assert list(found.flops.values()) == [block_flops(2)] * 3


def test_keywords_are_inputs_too():
    model = fastvit.accelerate(hf_vit())
    assert fastvit.report(model, pixel_values=image()) == fastvit.report(model, image())


def test_every_call_is_counted():
    found = fastvit.report(fastvit.accelerate(Repeated(4)), tokens())
    assert found.flops == {"block": 4 * block_flops(2, tokens=7), "idle": 0}
    assert found.fused_share == 1


def test_what_a_block_calls_as_it_is_does_not_count_as_fused():
    model = timm_vit()
    blocks = {"blocks.0": model.blocks[0], "blocks.1": model.blocks[1]}
    called = {"blocks.0": ("mlp", "mlp.fc1", "gone"), "blocks.1": ()}
    flops, total = reporting.count_flops(model, (image(),), {}, blocks, called, nullcontext)
    mlp = 2 * 2 * TOKENS * 2 * DIM * HIDDEN
    assert flops == {"blocks.0": block_flops(2) - mlp, "blocks.1": block_flops(2)}
    assert total == fastvit.report(model, image()).total_flops


def test_a_block_inside_a_block_counts_once():
    model = timm_vit()
    blocks = {"outer": model.blocks[0], "inner": model.blocks[0].mlp}
    flops, _ = reporting.count_flops(model, (image(),), {}, blocks, {}, nullcontext)
    assert flops == {"outer": block_flops(2), "inner": 0}


ATTENTION_FLOPS = 2 * 2 * TOKENS * (4 * DIM * DIM + 2 * TOKENS * DIM)


def test_an_mlp_of_another_kind_does_not_count_as_fused():
    found = fastvit.report(fastvit.accelerate(timm_own_mlp()), image())
    assert set(found.flops.values()) == {ATTENTION_FLOPS}
    assert found.total_flops == fastvit.report(timm_own_mlp(), image()).total_flops


def test_an_adapter_does_not_count_as_fused():
    peft = pytest.importorskip("peft")
    model = timm_vit()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["fc1"], r=4), model)
    found = fastvit.report(fastvit.accelerate(model), image())
    assert set(found.flops.values()) == {ATTENTION_FLOPS + 2 * 2 * TOKENS * DIM * HIDDEN}
    adapters = DEPTH * 2 * 2 * TOKENS * 4 * (DIM + HIDDEN)
    assert found.total_flops == fastvit.report(timm_vit(), image()).total_flops + adapters


def test_one_module_called_by_two_blocks_is_taken_from_each_once():
    model = timm_vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    blocks = {"blocks.0": model.blocks[0], "blocks.1": model.blocks[1]}
    flops, _ = reporting.count_flops(model, (image(),), {}, blocks, dict.fromkeys(blocks, ("mlp",)), nullcontext)
    assert set(flops.values()) == {block_flops(2) - 2 * 2 * TOKENS * 2 * DIM * HIDDEN}


def test_a_block_on_its_own_forward_counts_none():
    model = fastvit.accelerate(timm_vit())
    model.blocks[1].attn.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model(image())
    found = fastvit.report(model, image())
    assert found.flops == {"blocks.0": block_flops(2), "blocks.1": 0, "blocks.2": block_flops(2)}
    assert found.fallbacks == {"blocks.1": "attn has forward hooks"}


def test_a_dry_run_is_counted_too():
    model = timm_vit()
    fastvit.accelerate(model, dry_run=True, exclude="blocks.0")
    found = fastvit.report(model, image())
    assert found.planned
    assert found.flops == {"blocks.1": block_flops(2), "blocks.2": block_flops(2)}


def test_a_model_that_is_not_accelerated_has_nothing_fused():
    found = fastvit.report(timm_vit(), image())
    assert (found.flops, found.fused_share) == ({}, 0)
    assert found.total_flops > 3 * block_flops(2)


def test_torchs_own_fast_path_is_counted():
    """It is one operator in inference, which the counter does not know."""
    layer = nn.TransformerEncoderLayer(DIM, 4, HIDDEN, batch_first=True, activation="gelu").eval()
    x = tokens(2, TOKENS)
    assert fastvit.report(layer, x).total_flops == block_flops(2)
    attention = nn.MultiheadAttention(DIM, 4, batch_first=True).eval()
    assert fastvit.report(attention, x, x, x).total_flops == ATTENTION_FLOPS
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("setting", ["auto", "triton", "torch"])
def test_fastvits_own_operators_are_counted(setting):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x):
            x = functional.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            return functional.attention(*(x[:, None] for _ in range(3)))

    x = torch.randn(2, 256, 64)  # enough for oneDNN to serve it otherwise
    with fastvit.use_backend(setting):
        found = fastvit.report(Own(), x)
    assert found.total_flops == 2 * 2 * 256 * (2 * 64 * 128 + 2 * 256 * 64)


def small_siglip(**options) -> nn.Module:
    from timm import create_model

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": 1, "num_heads": 3}
    return create_model("vit_base_patch16_siglip_224", **sizes, **options).eval()


def test_a_pool_whose_query_is_a_parameter_is_counted():
    """It expands the parameter without gradients, a view that wants one and has no history."""
    model = fastvit.accelerate(small_siglip())
    x = image(size=32).requires_grad_()
    found = fastvit.report(model, x.expand(2, -1, -1, -1))
    assert found.flops == {"blocks.0": block_flops(2, tokens=16, hidden=4 * DIM)}
    assert found.total_flops > found.flops["blocks.0"]
    assert x.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.blocks.requires_grad_(False)
    fastvit.report(model, x)
    assert not any(parameter.requires_grad for parameter in model.blocks.parameters())


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 3, batch_first=True)

    def forward(self, x, **options):
        return self.attention(x, x, x, **options)[0]


def test_attention_that_is_asked_for_weights_does_not_count_as_fused():
    model, x = fastvit.accelerate(Pooled().eval()), tokens()
    asked, not_asked = fastvit.report(model, x), fastvit.report(model, x, need_weights=False)
    assert list(asked.replaced) == list(not_asked.replaced) == ["attention"]
    assert (asked.flops, asked.fused_share) == ({"attention": 0}, 0)
    assert not_asked.fused_share == 1
    assert asked.total_flops == not_asked.total_flops == not_asked.flops["attention"] > 0
    assert not model.attention.__dict__.get(swap.ATTRIBUTE).fallback


def test_counting_leaves_the_model_as_it_was():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.body = nn.BatchNorm2d(3), fastvit.accelerate(timm_vit(drop_path_rate=0.5))

        def forward(self, x):
            return self.body(self.norm(x)) + torch.rand(5)

    model = Normed().train()
    before, state, buffers = contents(model), torch.get_rng_state(), copy.deepcopy(model.state_dict())
    fastvit.report(model, image())
    for interruption in (RuntimeError("no more"), KeyboardInterrupt()):
        handle = model.body.norm.register_forward_pre_hook(lambda *_, interruption=interruption: raising(interruption))
        with pytest.raises(type(interruption)):
            fastvit.report(model, image())
        handle.remove()
    assert contents(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled
    assert not nn.modules.module._global_forward_pre_hooks


def raising(error, *_):
    raise error


# --- the report, to print, to store and to show -------------------------------------------------------------------------


class Table(html.parser.HTMLParser):
    """Reads a table, and that every tag is closed in its place."""

    VOID = ("meta", "br", "!doctype")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.rows, self.caption, self.tags = [], [], "", Counter()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if "caption" in self.open:
            self.caption += data


def eventful() -> nn.Module:
    """One block replaced, one on its own forward, one left alone; names and reasons with characters that HTML keeps."""
    model = nn.Sequential()
    for name in ("plain", "<b>own & forward</b>", "left"):
        model.add_module(name, perturb(OldViTLayer()))
    model.left.layernorm_before = nn.GroupNorm(1, DIM)
    fastvit.accelerate(model)
    model[1].intermediate.dense.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model[:2](tokens())
    return model


def test_a_page_has_a_row_for_every_module():
    model = eventful()
    found = fastvit.report(model)
    page = Table(found.to_html())
    assert page.tags["html"] == page.tags["table"] == 1
    assert not {"script", "link", "img", "b"} & set(page.tags)
    header, plain, own, left = page.rows
    assert header == ["module", "status", "what serves it, or why not"]
    assert plain == ["plain", "replaced", found.replaced["plain"]]
    assert own[:2] == ["<b>own & forward</b>", "own forward"]
    assert own[2].endswith("its last call ran its own forward: intermediate.dense has forward hooks")
    assert left == ["left", "left alone", "layernorm_before is a GroupNorm, not a LayerNorm"]
    assert "2 blocks replaced, 1 left as they were" in page.caption
    assert f"backend: {found.backend}" in page.caption
    fragment = found._repr_html_()
    assert Table(fragment).rows == page.rows
    assert "<html" not in fragment


def test_a_page_shows_the_share_where_it_was_counted():
    model = fastvit.accelerate(timm_vit(), exclude="blocks.0")
    found = fastvit.report(model, image())
    page = Table(found.to_html())
    assert page.rows[0][3] == "fused"
    assert [row[3] for row in page.rows[1:]] == ["776 kFLOP", "776 kFLOP", ""]
    assert block_flops(2) == 775680
    assert f"fused: {found.fused_share:.1%} of 2.66 MFLOP" in page.caption


@pytest.mark.parametrize("state", ["not accelerated", "nothing to replace", "would be replaced"])
def test_pages_and_lines_of_models_without_served_blocks(state):
    model = {"nothing to replace": lambda: fastvit.accelerate(nn.Linear(3, 3))}.get(state, timm_vit)()
    if state == "would be replaced":
        fastvit.accelerate(model, dry_run=True)
    found = fastvit.report(model)
    assert state in str(found)
    assert state in Table(found.to_html()).caption
    assert state in Table(found._repr_html_()).caption


def test_a_report_as_a_dictionary_is_plain():
    model = eventful()
    model.left = nn.Identity()
    found = fastvit.report(model, tokens())
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["replaced"] == found.replaced
    assert plain["skipped"] == found.skipped
    assert plain["fallbacks"] == found.fallbacks
    assert plain["flops"] == {"plain": block_flops(2, tokens=7), "<b>own & forward</b>": 0}
    assert plain["total_flops"] == 2 * block_flops(2, tokens=7)
    assert plain["fused_share"] == 0.5
    assert (plain["accelerated"], plain["planned"], plain["backend"]) == (True, False, found.backend)
    plain["replaced"].clear()
    assert found.replaced


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0, "0 FLOP"), (999, "999 FLOP"), (1000, "1 kFLOP"), (35_127_656_448, "35.1 GFLOP"), (5.6e15, "5600 TFLOP")],
)
def test_flops_to_read(flops, text):
    assert reporting._readable(int(flops)) == text


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
