"""What a user sees of accelerate, report, verify and restore: same results, same model, and the way back."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import fastvit
from tests.model_errors import relative
from tests.models_for_acceleration import (
    MODELS,
    Encoder,
    OldViTLayer,
    hf_dinov2,
    hf_vit,
    image,
    old_dinov2,
    old_vit,
    tensor_of,
    timm_vit,
    tokens,
)


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


def fused_everywhere(model) -> bool:
    found = fastvit.report(model)
    return len(found.replaced) == 3 and not found.fallbacks


# --- results ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_equal_the_original(model, batch):
    x = image(batch)
    with torch.no_grad():
        expected = tensor_of(model(x))
        actual = tensor_of(fastvit.accelerate(model)(x))
    assert fused_everywhere(model)
    assert relative(actual, expected) <= 1e-5


def test_gradients_of_all_parameters_equal_the_original(model):
    gradients = []
    for prepare in (fastvit.restore, fastvit.accelerate):
        prepare(model)
        model.zero_grad()
        tensor_of(model(image())).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    expected, actual = gradients
    assert fused_everywhere(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # the key bias has no influence: its gradient is rounding noise around zero
        floor = 1e-5 * max(g.abs().max() for g in expected.values())
        assert (actual[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + floor, name


def test_bfloat16_keeps_the_features(model):
    x = image().bfloat16()
    with torch.no_grad():
        expected = tensor_of(model(image())).flatten(1)
        model.bfloat16()
        actual = tensor_of(fastvit.accelerate(model)(x)).float().flatten(1)
    assert fused_everywhere(model)
    assert torch.cosine_similarity(actual, expected).min() >= 0.9999


def test_autocast_behaves_as_before(model):
    x = image()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = tensor_of(model(x))
        actual = tensor_of(fastvit.accelerate(model)(x))
    assert fused_everywhere(model)
    assert actual.dtype == expected.dtype
    assert torch.cosine_similarity(actual.float().flatten(1), expected.float().flatten(1)).min() >= 0.9999


def test_results_do_not_overwrite_what_the_caller_holds():
    block = fastvit.accelerate(old_vit()).layer[0]
    x = tokens()
    kept = x.clone()
    with torch.no_grad():
        first = block(x)
        held = first.clone()
        block(first)
    assert torch.equal(x, kept)
    assert torch.equal(first, held)


@pytest.mark.parametrize("build", [old_vit, old_dinov2])
def test_older_class_layouts_are_served(build):
    model, x = build(), tokens()
    with torch.no_grad():
        expected = model(x)
        actual = fastvit.accelerate(model)(x)
    assert fused_everywhere(model)
    assert relative(actual, expected) <= 1e-5


def test_inference_mode_runs_fused(model):
    with torch.inference_mode():
        expected = tensor_of(model(image()))
        actual = tensor_of(fastvit.accelerate(model)(image()))
    assert fused_everywhere(model)
    assert relative(actual, expected) <= 1e-5


# --- the model stays what it was ----------------------------------------------------------------------------------------


def test_state_dict_names_and_classes_stay(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    classes = {name: type(module) for name, module in modules.items()}
    assert fastvit.accelerate(model) is model
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert dict(model.named_modules()) == modules
    for name, module in modules.items():
        assert isinstance(module, classes[name])
        assert type(module).__name__ == classes[name].__name__
        assert type(module).__qualname__ == classes[name].__qualname__
        assert type(module).__module__ == classes[name].__module__
    assert [type(m).__name__ for m in model.modules()].count(
        type(modules[next(iter(fastvit.report(model).replaced))]).__name__
    ) == 3


def test_restore_gives_back_exactly_the_model(model):
    before = [(m, type(m), set(m.__dict__)) for m in model.modules()]
    with torch.no_grad():
        expected = tensor_of(model(image()))
        fastvit.accelerate(model)
        model(image())
        assert fastvit.restore(model) is model
        actual = tensor_of(model(image()))
    assert torch.equal(actual, expected)
    for module, cls, keys in before:
        assert type(module) is cls
        assert set(module.__dict__) == keys
    assert not fastvit.report(model).replaced


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: torch_round_trip(m)])
def test_copies_and_pickles_are_accelerated_too(model, copied):
    fastvit.accelerate(model)
    twin = copied(model)
    with torch.no_grad():
        assert torch.equal(tensor_of(twin(image())), tensor_of(model(image())))
    assert fused_everywhere(twin)
    assert str(fastvit.report(twin)) == str(fastvit.report(model))
    assert all(a is not b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    fastvit.restore(twin)
    assert fused_everywhere(model)


def torch_round_trip(model):
    import io

    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_copied_block_does_not_carry_its_neighbours():
    model = fastvit.accelerate(timm_vit())
    assert len(pickle.dumps(model.blocks[0])) < 1.2 * len(pickle.dumps(fastvit.restore(model).blocks[0])) + 4000


def test_train_and_eval_reach_the_blocks(model):
    fastvit.accelerate(model).train()
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_hooks_on_a_block_still_fire():
    model = fastvit.accelerate(timm_vit())
    seen = []
    model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model.blocks[1].register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    with torch.no_grad():
        model(image())
    assert seen == ["before", (2, 10, 48)]
    assert fused_everywhere(model)


def test_a_hook_inside_a_block_makes_that_block_run_its_own_forward():
    model, x = timm_vit(), image()
    with torch.no_grad():
        expected = model(x)
        fastvit.accelerate(model)
        seen = []
        handle = model.blocks[1].attn.qkv.register_forward_hook(lambda *_: seen.append(1))
        assert relative(model(x), expected) <= 1e-5
        assert seen
        assert fastvit.report(model).fallbacks == {"blocks.1": "attn.qkv has forward hooks"}
        assert "its last call ran its own forward: attn.qkv has forward hooks" in str(fastvit.report(model))
        handle.remove()
        model(x)
    assert not fastvit.report(model).fallbacks


def test_a_hook_for_all_modules_is_honoured():
    model = fastvit.accelerate(timm_vit())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        with torch.no_grad():
            model(image())
    finally:
        handle.remove()
    assert "Attention" in seen


# --- training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "fused"),
    [
        (lambda: timm_vit(proj_drop_rate=0.2, drop_path_rate=0.3), True),
        (lambda: timm_vit(attn_drop_rate=0.2), False),
        (lambda: hf_vit(hidden_dropout_prob=0.2), True),
        (lambda: hf_vit(attention_probs_dropout_prob=0.2), False),
        (lambda: hf_dinov2(drop_path_rate=0.3), True),
        (lambda: hf_dinov2(drop_path_rate=0.3, use_swiglu_ffn=True), True),
        (lambda: Encoder(OldViTLayer(dropout=0.2), OldViTLayer(dropout=0.2), OldViTLayer(dropout=0.2)), True),
    ],
    ids=["timm proj+path", "timm attention", "vit hidden", "vit attention", "dinov2 path", "swiglu path", "old hidden"],
)
def test_active_dropout_gives_the_original_with_the_same_seed(build, fused):
    model = build().train()
    x = tokens() if isinstance(model, Encoder) else image()
    results = []
    for prepare in (fastvit.restore, fastvit.accelerate):
        prepare(model)
        model.zero_grad()
        torch.manual_seed(3)
        out = tensor_of(model(x))
        out.square().sum().backward()
        results.append((out.detach(), next(p.grad for p in model.parameters() if p.grad is not None).clone()))
    (expected, expected_grad), (actual, actual_grad) = results
    assert relative(actual, expected) <= 1e-5
    assert relative(actual_grad, expected_grad) <= 1e-4
    reasons = set(fastvit.report(model).fallbacks.values())
    assert reasons == (set() if fused else {"dropout of the attention weights is active"})


@pytest.mark.parametrize("build", [hf_vit, hf_dinov2, timm_vit])
def test_gradient_checkpointing_works_and_changes_nothing(build):
    model = fastvit.accelerate(build()).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing and hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable()
        elif checkpointing:
            model.set_grad_checkpointing(True)
        model.zero_grad()
        tensor_of(model(image())).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert fused_everywhere(model)
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


# --- compile and export -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [partial(hf_vit, num_hidden_layers=1), partial(hf_dinov2, num_hidden_layers=1), partial(timm_vit, depth=1)],
    ids=["hf_vit", "hf_dinov2", "timm_vit"],
)
def test_compile_takes_the_whole_graph_forward_and_backward(build):
    model = build()
    expected = tensor_of(model(image()))
    expected.square().sum().backward()
    gradient = next(model.parameters()).grad.clone()
    model.zero_grad()
    compiled = torch.compile(fastvit.accelerate(model), fullgraph=True, backend="aot_eager")
    actual = tensor_of(compiled(image()))
    actual.square().sum().backward()
    assert relative(actual, expected) <= 1e-5
    assert relative(next(model.parameters()).grad, gradient) <= 1e-4


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("build", [partial(hf_vit, num_hidden_layers=1), partial(timm_vit, depth=1)], ids=["hf_vit", "timm_vit"])
def test_export_works_and_names_portable_operators_only(build, strict):
    model = fastvit.accelerate(build())
    with torch.no_grad():
        expected = tensor_of(model(image()))
        program = torch.export.export(model, (image(),), strict=strict)
        assert relative(tensor_of(program.module()(image())), expected) <= 1e-5
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("scaled_dot_product_attention" in name for name in operators)
    assert not any("mkldnn" in name for name in operators)


# --- options ------------------------------------------------------------------------------------------------------------


def test_dry_run_changes_nothing_and_reports_the_plan():
    model = timm_vit()
    before = [(type(m), set(m.__dict__)) for m in model.modules()]
    assert fastvit.accelerate(model, dry_run=True, exclude="blocks.0") is model
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before
    planned = fastvit.report(model)
    assert planned.planned
    assert list(planned.replaced) == ["blocks.1", "blocks.2"]
    assert planned.skipped == {"blocks.0": "excluded by the pattern 'blocks.0'"}
    assert "would be replaced" in str(planned)
    fastvit.accelerate(model)
    assert not fastvit.report(model).planned


def test_dry_run_of_an_accelerated_model_leaves_it_accelerated():
    model = fastvit.accelerate(timm_vit(), include="blocks.0")
    types = [type(m) for m in model.modules()]
    fastvit.accelerate(model, dry_run=True)
    assert [type(m) for m in model.modules()] == types
    assert fastvit.verify(model, image()).fused_blocks == 1


def test_include_and_exclude_are_globs_that_take_what_lies_inside():
    model = hf_dinov2()
    fastvit.accelerate(model, include="encoder", exclude=["*.1"])
    found = fastvit.report(model)
    assert list(found.replaced) == ["encoder.layer.0", "encoder.layer.2"]
    assert list(found.skipped) == ["encoder.layer.1"]
    fastvit.accelerate(model, include=["encoder.layer.1"])
    assert list(fastvit.report(model).replaced) == ["encoder.layer.1"]
    assert fastvit.report(model).skipped["encoder.layer.0"] == "not among the included patterns"


def test_twice_is_once(model):
    fastvit.accelerate(model)
    first = str(fastvit.report(model))
    classes = [type(m) for m in model.modules()]
    fastvit.accelerate(model)
    assert str(fastvit.report(model)) == first
    assert [type(m) for m in model.modules()] == classes
    fastvit.restore(fastvit.restore(model))
    assert not fastvit.report(model).accelerated


def test_scoped_acceleration_ends_with_its_scope(model):
    with fastvit.accelerated(model) as inside:
        assert inside is model
        assert fused_everywhere(model)
    assert not fastvit.report(model).accelerated
    fastvit.accelerate(model, backend="torch")
    with pytest.raises(RuntimeError, match="inside"), fastvit.accelerated(model, dry_run=False):
        raise RuntimeError("inside")
    assert fused_everywhere(model)
    assert "asked for" in fastvit.report(model).backend


def test_pinned_backends(monkeypatch):
    from fastvit.ops import torch_backend

    model = fastvit.accelerate(timm_vit(), backend="torch")
    calls = []
    real = torch_backend.attention
    monkeypatch.setattr(torch_backend, "attention", lambda *a: calls.append(1) or real(*a))
    with torch.no_grad(), fastvit.use_backend("triton"):
        model(image())
    assert len(calls) == 3


def test_verify_holds_the_kernels_where_they_serve_in_half_precision(monkeypatch, device):
    """On a GPU, auto leaves float32 products to PyTorch: verifying in float32 used to pass by the kernels."""
    from fastvit.kernels import attention_forward, layer_norm, linear

    from fastvit import acceleration

    launched = []
    for module in (attention_forward, layer_norm, linear):
        real = module.launch
        monkeypatch.setattr(module, "launch", lambda op, *a, real=real, **k: launched.append(op) or real(op, *a, **k))
    model, x = fastvit.accelerate(hf_dinov2(num_hidden_layers=1).to(device)), image(1).to(device)
    with fastvit.use_backend("auto"):
        assert fastvit.verify(model, x).passed
        assert torch.cuda.is_available() or not launched
        monkeypatch.setattr(acceleration, "_kernels_serve", lambda model: True)
        assert fastvit.verify(model, x).passed
    assert {"attention_forward", "linear", "layer_norm_forward"} <= set(launched)


def test_half_done_work_is_undone(monkeypatch):
    from fastvit.integrations import swap

    model = timm_vit()
    before = [(type(m), set(m.__dict__)) for m in model.modules()]
    real, count = swap.serve, []

    def failing(module, serving):
        count.append(1)
        if len(count) == 3:
            raise RuntimeError("no more")
        real(module, serving)

    monkeypatch.setattr(swap, "serve", failing)
    with pytest.raises(RuntimeError, match="no more"):
        fastvit.accelerate(model)
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "expected one of auto, triton, torch"),
        ({"precision": "fp8"}, "leave precision=None"),
        ({"precision": "int4"}, "expected None"),
        ({"include": "layers.*.attention_"}, "matches no module"),
        ({"exclude": ["nothing"]}, "matches no module"),
    ],
)
def test_bad_options_say_what_to_do(options, message):
    model = timm_vit()
    with pytest.raises(ValueError, match=message):
        fastvit.accelerate(model, **options)
    assert not fastvit.report(model).accelerated


def test_only_modules_are_accelerated():
    with pytest.raises(TypeError, match=r"model is str; expected a torch\.nn\.Module"):
        fastvit.accelerate("google/vit-base-patch16-224")
    with pytest.raises(TypeError, match="glob patterns"):
        fastvit.accelerate(timm_vit(), include=[3])
    with pytest.raises(TypeError, match="include is int; expected a glob pattern on module names, or several"):
        fastvit.accelerate(timm_vit(), include=5)
    for function in (fastvit.report, fastvit.restore, fastvit.verify):
        with pytest.raises(TypeError, match=r"model is int; expected a torch\.nn\.Module"):
            function(3)


def test_on_the_meta_device_and_before_a_move():
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        model = VisionTransformer(img_size=24, patch_size=8, embed_dim=48, depth=3, num_heads=3, mlp_ratio=2, num_classes=5)
        fastvit.accelerate(model)
    assert len(fastvit.report(model).replaced) == 3
    source = timm_vit(init_values=None)
    model.load_state_dict(source.state_dict(), assign=True)
    with torch.no_grad():
        assert relative(model.eval()(image()), source(image())) <= 1e-5


# --- verify -------------------------------------------------------------------------------------------------------------


def test_verify_passes_and_leaves_the_model_alone(model):
    fastvit.accelerate(model).train()
    result = fastvit.verify(model, image())
    assert result.passed
    assert result
    assert result.relative_error <= 1e-5
    assert str(result).startswith("passed: 3 accelerated blocks against the original in float32")
    assert model.training
    assert fused_everywhere(model)


def test_verify_runs_a_half_model_in_float32():
    model = fastvit.accelerate(timm_vit().bfloat16())
    assert fastvit.verify(model, image().bfloat16()).relative_error <= 1e-5
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_verify_takes_dictionaries_and_keywords():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timm_vit()

        def forward(self, *, pixels, scale=1.0):
            return {"logits": self.body(pixels) * scale, "pair": (self.body(pixels), 3)}

    assert fastvit.verify(fastvit.accelerate(Named()), pixels=image(), scale=2.0).passed


def test_verify_sees_a_difference(monkeypatch):
    from fastvit.integrations import branches

    model = fastvit.accelerate(timm_vit())
    monkeypatch.setattr(branches, "score_scale", lambda owner, head_dim: 1.0)
    result = fastvit.verify(model, image())
    assert not result.passed
    assert str(result).startswith("FAILED")


def test_verify_asks_for_an_accelerated_model():
    with pytest.raises(ValueError, match="no accelerated block"):
        fastvit.verify(timm_vit(), image())


def test_verify_gives_both_runs_the_same_random_numbers():
    from transformers import ViTMAEConfig, ViTMAEModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
    model = fastvit.accelerate(ViTMAEModel(ViTMAEConfig(image_size=24, patch_size=8, **sizes)))
    state = torch.get_rng_state()
    assert fastvit.verify(model, image())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dry_run_on_an_accelerated_model_shows_its_plan():
    model = fastvit.accelerate(timm_vit())
    fastvit.accelerate(model, exclude="blocks.0", dry_run=True)
    found = fastvit.report(model)
    assert (found.planned, found.accelerated, len(found.replaced), list(found.skipped)) == (True, True, 2, ["blocks.0"])
    assert len(fastvit.report(fastvit.accelerate(model)).replaced) == 3


def test_a_report_tells_of_blocks_restored_since():
    model = fastvit.accelerate(timm_vit())
    fastvit.restore(model.blocks[0])
    found = fastvit.report(model)
    assert found.accelerated
    assert "blocks.0  left alone: it was served, and was restored or replaced since" in str(found)
    fastvit.restore(model.blocks)
    assert not fastvit.report(model).accelerated
    assert "not accelerated" in str(fastvit.report(model))
    fastvit.restore(model)
    assert not fastvit.report(model).skipped
