"""How blocks are recognised, proved and refused; and what each library expects of its models."""

import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastvit
from fastvit.integrations import block, matching, probe, swap
from fastvit.integrations.matching import find_layout
from tests.model_errors import relative
from tests.models_for_acceleration import (
    Encoder,
    OldDinov2Layer,
    OldViTLayer,
    PostNormLayer,
    hf_dinov2,
    hf_vit,
    image,
    old_vit,
    perturb,
    timm_own_mlp,
    timm_subclass,
    timm_vit,
    tokens,
)


class LoraLinear(nn.Module):
    """Stands for any adapter or quantized layer in a Linear's place."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


# --- what is refused, with its reason -----------------------------------------------------------------------------------


def _unknown_child(layer):
    layer.adapter = nn.Linear(48, 48)


def _lora(layer):
    layer.attention.attention.value = LoraLinear(layer.attention.attention.value)


def _parametrized(layer):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(layer.attention.output.dense, "weight", Doubled())


def _tanh(layer):
    layer.intermediate.intermediate_act_fn = nn.Tanh()


def _rms(layer):
    layer.layernorm_before = nn.RMSNorm(48)


def _no_heads(layer):
    del layer.attention.attention.num_attention_heads


def _odd_heads(layer):
    layer.attention.attention.num_attention_heads = 5


def _own_forward(layer):
    layer.forward = lambda hidden_states: hidden_states


def _hooked_forward(layer):
    layer._old_forward = layer.forward
    layer.forward = lambda *args, **kwargs: layer._old_forward(*args, **kwargs)


def _sharded(layer):
    class FSDPModule:
        pass

    layer.__class__ = type("FSDPOldViTLayer", (FSDPModule, OldViTLayer), {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_unknown_child, "unknown child 'adapter' (Linear)"),
        (_tanh, "intermediate.intermediate_act_fn is a Tanh, an activation without a fused form"),
        (_rms, "layernorm_before is a RMSNorm, not a LayerNorm"),
        (_no_heads, "attention.attention does not say its number of heads"),
        (_odd_heads, "query, key and value do not have 5 heads of one size each"),
        (_own_forward, "it has a forward of its own, set on the instance"),
        (_hooked_forward, "accelerate's hooks hold its forward"),
        (_sharded, "it is sharded by FSDP"),
    ],
)
def test_what_cannot_be_served_is_left_alone_with_its_reason(change, reason):
    model, x = old_vit(), tokens()
    change(model.layer[1])
    classes = [type(m) for m in model.layer[1].modules()]
    fastvit.accelerate(model)
    assert list(fastvit.report(model).replaced) == ["layer.0", "layer.2"]
    assert fastvit.report(model).skipped["layer.1"].startswith(reason)
    assert [type(m) for m in model.layer[1].modules()] == classes
    if change is not _no_heads and change is not _odd_heads:
        with torch.no_grad():
            assert model(x).shape == x.shape


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (_lora, "attention.attention.value is called as it is (a LoraLinear, not a plain Linear)"),
        (_parametrized, "attention.output.dense is called as it is (a ParametrizedLinear, not a plain Linear)"),
    ],
)
def test_a_linear_of_another_kind_is_called_as_it_is_and_named(change, note):
    model, x = old_vit(), tokens()
    change(model.layer[1])
    with torch.no_grad():
        expected = model(x)
        fastvit.accelerate(model)
        assert fastvit.report(model).replaced["layer.1"] == f"fused attention + add+LayerNorm + GELU MLP; {note}"
        assert relative(model(x), expected) <= 1e-5
    assert not fastvit.report(model).fallbacks


def test_the_same_children_in_another_computation_are_refused():
    model = fastvit.accelerate(perturb(Encoder(OldDinov2Layer(), PostNormLayer())))
    assert list(fastvit.report(model).replaced) == ["layer.0"]
    assert "its forward computes something else than a pre-norm block" in fastvit.report(model).skipped["layer.1"]


def test_timm_blocks_of_other_kinds_are_refused():
    from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelThingsBlock, ResPostBlock

    for kind in (ResPostBlock, DiffParallelScalingBlock, ParallelThingsBlock):
        model = fastvit.accelerate(timm_vit(block_fn=kind, depth=1, init_values=None))
        assert not fastvit.report(model).replaced
        fastvit.restore(model)


def test_the_probe_tells_erf_from_tanh(monkeypatch):
    monkeypatch.setattr(matching, "activation_of", lambda *where: "gelu_tanh")
    model = fastvit.accelerate(old_vit())
    assert not fastvit.report(model).replaced


def test_the_probe_touches_neither_model_nor_random_numbers():
    model = hf_dinov2(drop_path_rate=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fastvit.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_apples_fastvit_has_nothing_to_replace():
    from timm.models.fastvit import FastVit

    model = FastVit(layers=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), token_mixers=("repmixer",) * 4, num_classes=3)
    assert "nothing to replace" in str(fastvit.report(fastvit.accelerate(model)))
    assert "not accelerated" in str(fastvit.report(fastvit.restore(model)))


def test_a_plain_module_is_no_block():
    assert find_layout(nn.Linear(3, 3)) is None
    assert find_layout(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 1)) is None


@pytest.mark.parametrize(
    ("activation", "served"),
    [
        ("gelu", "GELU"),
        ("gelu_new", "tanh GELU"),
        ("gelu_fast", "tanh GELU"),
        ("gelu_pytorch_tanh", "tanh GELU"),
        ("quick_gelu", "quick GELU"),
        ("relu", "ReLU"),
    ],
)
def test_activations_of_transformers(activation, served):
    model = hf_vit(hidden_act=activation, num_hidden_layers=1)
    fastvit.accelerate(model)
    assert fastvit.report(model).replaced == {"layers.0": f"fused attention + add+LayerNorm + {served} MLP"}
    assert fastvit.verify(model, image()).relative_error <= 1e-5


@pytest.mark.parametrize("name", ["GELU", "GELUTanh", "QuickGELU"])
def test_activations_of_timm(name):
    import timm.layers

    model = fastvit.accelerate(timm_vit(act_layer=getattr(timm.layers, name), depth=1))
    assert len(fastvit.report(model).replaced) == 1
    assert fastvit.verify(model, image()).relative_error <= 1e-5


def test_an_activation_without_a_fused_form_leaves_the_mlp_as_it_is():
    model = fastvit.accelerate(hf_vit(hidden_act="silu"))
    reason = "mlp.activation_fn is a SiLUActivation, an activation without a fused form"
    assert set(fastvit.report(model).replaced.values()) == {
        f"fused attention + add+LayerNorm, own MLP; mlp is called as it is ({reason})"
    }
    assert fastvit.verify(model, image()).relative_error <= 1e-5


def test_norms_keep_their_own_eps():
    model = old_vit()
    model.layer[1].layernorm_after.eps = 0.5
    x = tokens()
    with torch.no_grad():
        expected = model(x)
        assert relative(fastvit.accelerate(model)(x), expected) <= 1e-5


def test_transformers_models_of_the_same_layout_come_for_free():
    from transformers import DeiTConfig, DeiTModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 24, "patch_size": 8}
    for model in (DeiTModel(DeiTConfig(**sizes)), Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes))):
        fastvit.accelerate(perturb(model))
        assert len(fastvit.report(model).replaced) == 2
        assert fastvit.verify(model, image()).relative_error <= 1e-5


# --- changes after accelerate -------------------------------------------------------------------------------------------


def test_an_adapter_put_in_later_is_honoured():
    model, x = old_vit(), tokens()
    fastvit.accelerate(model)
    _lora(model.layer[2])
    with torch.no_grad():
        actual = model(x)
        assert "LoraLinear" in fastvit.report(model).fallbacks["layer.2"]
        assert relative(actual, fastvit.restore(model)(x)) <= 1e-5


def test_a_forward_patched_onto_the_class_later_is_honoured(monkeypatch):
    model, x = old_vit(), tokens()
    fastvit.accelerate(model)
    monkeypatch.setattr(OldViTLayer, "forward", lambda self, hidden_states: hidden_states * 2)
    assert torch.equal(model(x), 8 * x)
    assert fastvit.report(model).fallbacks["layer.0"] == "its class was given another forward"


def test_a_wrapped_block_is_not_restored_over():
    model = fastvit.accelerate(old_vit())
    kind = type(model.layer[0])
    model.layer[0].__class__ = type("Wrapped", (kind,), {})
    for action in (fastvit.restore, fastvit.accelerate):
        with pytest.raises(ValueError, match=r"layer\.0 was given the class Wrapped after accelerate"):
            action(model)
    model.layer[0].__class__ = kind
    fastvit.restore(model)


# --- transformers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [hf_vit, hf_dinov2])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attentions_and_hidden_states_are_collected_as_before(build, implementation):
    model, x = build(attn_implementation=implementation), image()
    with torch.no_grad():
        for wanted in ({"output_attentions": True}, {"output_hidden_states": True}, {}):
            expected = model(x, **wanted)
            fastvit.accelerate(model)
            actual = model(x, **wanted)
            reasons = set(fastvit.report(model).fallbacks.values())
            assert bool(reasons) == ("output_attentions" in wanted), reasons
            fastvit.restore(model)
            assert actual.keys() == expected.keys()
            for key in ("attentions", "hidden_states"):
                ours, theirs = getattr(actual, key, None), getattr(expected, key, None)
                assert (ours is None) == (theirs is None)
                assert len(ours or ()) == len(theirs or ())
                for a, b in zip(ours or (), theirs or (), strict=True):
                    assert relative(a, b) <= 1e-5
            assert relative(actual.last_hidden_state, expected.last_hidden_state) <= 1e-5


def test_attentions_of_a_pinned_eager_model_have_weights():
    model = fastvit.accelerate(hf_vit(attn_implementation="eager"))
    with torch.no_grad():
        attentions = model(image(), output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(2, 3, 10, 10)] * 3


def test_no_split_modules_still_finds_the_blocks():
    model = fastvit.accelerate(hf_dinov2())
    names = [type(m).__name__ for m in model.modules()]
    assert all(name in names for name in model._no_split_modules)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_of_transformers(kind):
    model = hf_vit()
    allowed = torch.ones(2, 1, 10, 10, dtype=torch.bool)
    allowed[0, :, :, 7:] = False
    mask = allowed if kind is torch.bool else torch.zeros(2, 1, 10, 10).masked_fill(~allowed, torch.finfo(kind).min)
    x = torch.randn(2, 10, 48)
    with torch.no_grad():
        expected = model.layers[0](x, mask)
        fastvit.accelerate(model)
        assert relative(model.layers[0](x, mask), expected) <= 1e-5
        assert relative(model.layers[0](x, attention_mask=mask), expected) <= 1e-5
    assert not fastvit.report(model).fallbacks


def test_an_attention_implementation_of_the_users_own_is_used():
    from transformers import AttentionInterface

    calls = []

    def own(module, query, key, value, attention_mask, **kwargs):
        calls.append(1)
        return value.transpose(1, 2).contiguous(), None

    AttentionInterface.register("fastvit_test_own", own)
    model = hf_vit()
    model.config._attn_implementation = "fastvit_test_own"
    fastvit.accelerate(model)
    with torch.no_grad():
        model(image())
    assert len(calls) == 3
    assert "fastvit_test_own" in fastvit.report(model).fallbacks["layers.0"]


def test_flash_attention_is_served_where_nothing_is_masked():
    """It computes what the fused attention computes; only its masks are of another kind."""
    model = hf_vit()
    with torch.no_grad():
        expected = model(image()).last_hidden_state
        model.config._attn_implementation = "flash_attention_2"
        fastvit.accelerate(model)
        x = torch.randn(2, 10, 48)
        for layer in model.layers:
            x = layer(x)
        assert len(fastvit.report(model).replaced) == 3
        assert not fastvit.report(model).fallbacks
        model.config._attn_implementation = "sdpa"
        assert relative(model(image()).last_hidden_state, expected) <= 1e-5


def test_save_pretrained_round_trip(tmp_path):
    from transformers import Dinov2Model

    model = fastvit.accelerate(hf_dinov2())
    model.save_pretrained(tmp_path)
    again = Dinov2Model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert relative(again(image()).last_hidden_state, model(image()).last_hidden_state) <= 1e-5


# --- timm ---------------------------------------------------------------------------------------------------------------


def test_masks_and_causality_of_timm():
    model, x = timm_vit(), torch.randn(2, 10, 48)
    mask = torch.rand(10, 10) > 0.3
    mask.fill_diagonal_(True)
    calls = ({"attn_mask": mask}, {"is_causal": True}, {"attn_mask": torch.randn(2, 1, 10, 10)})
    with torch.no_grad():
        expected = [model.blocks[0](x, **call) for call in calls]
        fastvit.accelerate(model)
        for call, out in zip(calls, expected, strict=True):
            assert relative(model.blocks[0](x, **call), out) <= 1e-5
            assert swap.ATTRIBUTE in model.blocks[0].__dict__
            assert not fastvit.report(model).fallbacks


def test_gated_attention_of_timm():
    from timm.layers import Attention

    class Gated(Attention):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, gated=True, **kwargs)

    model = fastvit.accelerate(timm_vit(attn_layer=Gated))
    assert len(fastvit.report(model).replaced) == 3
    assert fastvit.verify(model, image()).relative_error <= 1e-5


def test_intermediate_features_of_timm():
    model, x = timm_vit(), image()
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[0, 2])
        actual = fastvit.accelerate(model).forward_intermediates(x, indices=[0, 2])
    assert relative(actual[0], expected[0]) <= 1e-5
    for ours, theirs in zip(actual[1], expected[1], strict=True):
        assert relative(ours, theirs) <= 1e-5


# --- what the probe sees, and what it leaves alone ----------------------------------------------------------------------


def _scaled(layer, x):
    x = x + layer.alpha * layer.ls1(layer.attn(layer.norm1(x)))
    return x + layer.alpha * layer.ls2(layer.mlp(layer.norm2(x)))


def _attribute(model):
    for number, layer in enumerate(model.blocks):
        layer.alpha = 1.0 if number == 0 else 0.5


def _buffer(model):
    for number, layer in enumerate(model.blocks):
        layer.register_buffer("alpha", torch.tensor(1.0 if number == 0 else 0.5))


def _timm_scale(model):
    for number, layer in enumerate(model.blocks):
        layer.attn.scale = 0.25 if number == 0 else 0.5  # which timm's fused attention does not look at


@pytest.mark.parametrize("differ", [_attribute, _buffer, _timm_scale])
def test_blocks_that_differ_are_proved_one_by_one(differ):
    model = timm_vit() if differ is _timm_scale else timm_subclass(_scaled)
    differ(model)
    with torch.no_grad():
        expected = model(image())
        fastvit.accelerate(model)
        assert list(fastvit.report(model).replaced) == ["blocks.0"]
        assert relative(model(image()), expected) <= 1e-5


def test_equal_blocks_need_one_proof(monkeypatch):
    proofs = []
    proved = probe.why_different
    monkeypatch.setattr(probe, "why_different", lambda *block: proofs.append(1) or proved(*block))
    for model in (hf_vit(), hf_dinov2(), timm_vit()):
        fastvit.accelerate(model)
        assert len(fastvit.report(model).replaced) == 3
    assert len(proofs) == 3


def test_dropout_that_is_no_module_is_seen():
    def body(layer, x):
        x = x + nn.functional.dropout(layer.ls1(layer.attn(layer.norm1(x))), 0.1, layer.training)
        return x + layer.ls2(layer.mlp(layer.norm2(x)))

    model = timm_subclass(body)
    state = torch.get_rng_state()
    fastvit.accelerate(model)
    assert not fastvit.report(model).replaced
    assert all("in training its forward computes something else" in r for r in fastvit.report(model).skipped.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_probe_changes_no_buffer_and_no_list():
    model = fastvit.accelerate(timm_own_mlp(), dry_run=True)
    for layer in model.blocks:
        assert layer.mlp.calls == 0
        assert layer.mlp.kept == []


@pytest.mark.parametrize("keep", ["list", "memory", "expand"])
def test_what_the_users_own_mlp_holds_is_not_overwritten(keep):
    model = timm_own_mlp(keep)
    runs = []
    for prepare in (fastvit.restore, fastvit.accelerate):
        for layer in model.blocks:
            layer.mlp.kept, layer.mlp.memory = [], None
        prepare(model)
        with torch.no_grad():
            out = [model(image()) for _ in range(2)]
        held = [tensor for layer in model.blocks for tensor in (*layer.mlp.kept, layer.mlp.memory) if tensor is not None]
        runs.append([tensor.clone() for tensor in (*out, *held)])
    assert len(fastvit.report(model).replaced) == 3
    assert all(relative(actual, expected) <= 1e-5 for expected, actual in zip(*runs, strict=True))


def test_an_activation_of_the_same_class_put_in_later_is_seen():
    model = fastvit.accelerate(timm_vit())
    for layer in model.blocks:
        layer.mlp.act = nn.GELU(approximate="tanh")
    with torch.no_grad():
        actual = model(image())
        assert "mlp.act now computes something else" in fastvit.report(model).fallbacks["blocks.0"]
        assert torch.equal(actual, fastvit.restore(model)(image()))


def test_replicas_keep_their_weights_as_plain_attributes():
    def replicate(module):  # as torch.nn.parallel.replicate does, without its GPUs
        replica = module._replicate_for_data_parallel()
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            setattr(replica, name, None if tensor is None else tensor.detach().clone())
        for name, inner in module._modules.items():
            setattr(replica, name, inner and replicate(inner))
        return replica

    model = timm_vit()
    with torch.no_grad():
        expected = model(image())
        fastvit.accelerate(model)
        assert relative(replicate(model)(image()), expected) <= 1e-5
    assert not fastvit.report(model).fallbacks


# --- on the kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [old_vit, partial(hf_dinov2, num_hidden_layers=2), partial(timm_vit, depth=2)],
    ids=["old_vit", "hf_dinov2", "timm_vit"],
)
def test_a_model_on_the_triton_backend(build, device, triton_backend):
    model = build().to(device)
    x = (tokens(1) if isinstance(model, Encoder) else image(1)).to(device)
    fastvit.accelerate(model)
    assert "triton" in fastvit.report(model).backend
    result = fastvit.verify(model, x)
    assert result.fused_blocks == len(fastvit.report(model).replaced) >= 2
    assert result.relative_error <= 1e-5


def test_a_pinned_triton_that_cannot_serve_says_why(monkeypatch):
    from fastvit import backend

    monkeypatch.setattr(backend, "_interpreted", False)
    model = fastvit.accelerate(old_vit(), backend="triton")
    assert "calls will fail" in fastvit.report(model).backend
    with pytest.raises(ValueError, match="backend 'triton' cannot serve"):
        model(tokens())


def test_a_pinned_block_leaves_the_backend_of_other_threads_alone(monkeypatch):
    from fastvit import backend

    model = timm_own_mlp()
    seen = []

    def look(module, inputs):
        seen.append(backend.get_backend())
        thread = threading.Thread(target=lambda: seen.append(backend.get_backend()))
        thread.start()
        thread.join()

    monkeypatch.setattr(backend, "_interpreted", True)
    kernels = {name: getattr(block.TORCH, name) for name in ("attention", "layer_norm", "add_layer_norm", "linear", "mlp")}
    monkeypatch.setattr(block, "TRITON", type(block.TORCH)(**kernels))
    fastvit.accelerate(model, backend="triton")
    model.blocks[0].mlp.register_forward_pre_hook(look)
    with fastvit.use_backend("torch"), torch.no_grad():
        model(image())
    assert seen == ["triton", "torch"]
    assert backend.get_backend() == backend._current
