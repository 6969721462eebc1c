"""8-bit linears of models that are changed, tied, stored or called in unusual ways; and what is given to measure them."""

import pytest
import torch
from torch import nn

import fastvit
from fastvit import quantization
from fastvit.integrations import quantized as served
from fastvit.ops import quantized
from tests.conftest import ON_GPU
from tests.models_for_acceleration import hf_dinov2, image, timm_vit
from tests.test_quantized_models import _check_served, _in_fp8

if ON_GPU and (_reason := quantized.why_not("int8", torch.device("cuda"))):
    pytest.skip(_reason, allow_module_level=True)


def _in_int8(device, **options):
    return _in_fp8(timm_vit(depth=1, **options), device, "int8")


@torch.no_grad()
def test_weights_may_lie_in_memory_as_they_like(device):
    """Transposed matrices, and biases that are columns of another tensor."""
    model = timm_vit(depth=1).to(device)
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.t().contiguous().t())
            module.bias = nn.Parameter(torch.stack([module.bias, module.bias], 1)[:, 0])
    _check_served(model, image().to(device), device, "int8")


@torch.no_grad()
def test_keys_and_values_with_one_weight_have_each_their_bias(device):
    model = hf_dinov2(num_hidden_layers=1).to(device)
    attention = model.encoder.layer[0].attention
    if hasattr(attention, "k_proj"):
        key, value = attention.k_proj, attention.v_proj
    else:  # transformers 5.17
        key, value = attention.attention.key, attention.attention.value
    value.weight = key.weight
    key.bias.fill_(3)
    value.bias.fill_(-3)
    _check_served(model, image().to(device), device, "int8")


class Linear:
    """What ``Weights.of`` reads of a linear."""

    def __init__(self, weight, bias=None):
        self.weight, self.bias = weight, bias


@torch.no_grad()
def test_an_address_that_comes_back_is_no_old_weight(device, monkeypatch):
    """Memory that is freed goes to the next tensor of its size; and a Parameter's ``id`` to the next Parameter."""
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 0)  # every address comes back
    weights, weight = served.Weights("int8", frozenset({"mlp"})), nn.Parameter(torch.ones(16, 16, device=device))
    linear = Linear(weight)
    assert weights.of("fc1", linear).scale[0] == 1 / 127
    weight.data = 2 * weight.data
    assert weights.of("fc1", linear).scale[0] == 2 / 127
    kept = weights.of("fc1", linear)
    assert weights.of("fc1", linear) is kept
    linear.weight = nn.Parameter(3 * weight.data)
    assert weights.of("fc1", linear).scale[0] == 6 / 127
    other = nn.Parameter(linear.weight.data)  # the same memory, counting its own changes
    kept, linear.weight = weights.of("fc1", linear), other
    assert weights.of("fc1", linear) is not kept


@torch.no_grad()
def test_old_weights_are_not_kept_in_memory(device):
    """Only the 8-bit ones lie beside the model's own."""
    weights, linear = served.Weights("int8", frozenset({"mlp"})), Linear(nn.Parameter(torch.ones(16, 16, device=device)))
    weights.of("fc1", linear)
    ((source,), _) = weights.made["fc1"]
    linear.weight = None
    assert source.tensor() is None
    assert source.storage.expired()


@pytest.mark.parametrize("kind", ["Dropout", "DropPath"])
@torch.no_grad()
def test_dropout_that_is_active_by_itself_drops(device, kind):
    """Monte Carlo dropout: the model in evaluation mode, some of its modules in training mode."""
    model = _in_fp8(timm_vit(depth=2, proj_drop_rate=0.5, drop_path_rate=0.5), device, "int8", include="blocks.1")
    for module in model.blocks[1].modules():
        if type(module).__name__ == kind:
            module.train()
    x = image().to(device)
    torch.manual_seed(0)
    out = model(x)
    assert "is in training mode: call model.eval()" in fastvit.report(model).fallbacks["blocks.1"]
    torch.manual_seed(0)
    assert torch.equal(out, fastvit.restore(model)(x))


@torch.no_grad()
def test_no_pictures(device):
    model = _in_int8(device)
    assert model(image()[:0].to(device)).shape == (0, 5)
    assert not fastvit.report(model).fallbacks


@torch.no_grad()
def test_parameters_of_one_call(device):
    """``functional_call`` lends the model other parameters, which come and go."""
    model, x = _in_int8(device), image().to(device)
    expected = model(x)
    lent = {name: -p if name.endswith("fc2.weight") else p.clone() for name, p in model.named_parameters()}
    other = torch.func.functional_call(model, lent, (x,))
    assert not torch.allclose(other, expected)
    assert torch.equal(model(x), expected)
    model.load_state_dict(lent)
    assert torch.equal(model(x), other)


@torch.no_grad()
def test_transforms_are_refused_in_words(device):
    x = torch.randn(2, 3, 16, device=device)
    with pytest.raises(RuntimeError, match=r"and outside of torch\.func's transforms"):
        torch.func.vmap(lambda row: quantized.quantize(row, torch.int8).scale)(x)


# --- what is measured, and on what ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_was_measured_on_another_model_is_refused():
    """A wrapped model's blocks have other names: nothing would be in 8 bits, and nothing be said of it."""
    model = timm_vit(depth=1)
    found = quantization.accuracy(model, image(), min_cosine=0.5, precision="int8")
    said = r"precision was measured on another model: this one has no block 'blocks\.0'"
    with pytest.raises(ValueError, match=said):
        fastvit.accelerate(nn.Sequential(model), precision=found, dry_run=True)
    with pytest.raises(ValueError, match=said), quantization.simulated(nn.Sequential(model), found):
        pass


def test_a_model_restored_while_it_is_simulated_stays_so():
    model = timm_vit(depth=1)
    own, keys = type(model.blocks[0]), set(model.blocks[0].__dict__)
    fastvit.accelerate(model)
    with quantization.simulated(model):
        fastvit.restore(model)
    assert type(model.blocks[0]) is own
    assert set(model.blocks[0].__dict__) == keys
    fastvit.accelerate(model)
    with quantization.simulated(model):
        assert type(model.blocks[0]) is own
    assert list(fastvit.report(model).replaced) == ["blocks.0"]


@torch.no_grad()
def test_keywords_may_be_any_mapping():
    """What transformers' image processors return is a mapping, and no dict."""
    from transformers import BatchFeature

    model = hf_dinov2(num_hidden_layers=1)
    assert quantization.accuracy(model, BatchFeature({"pixel_values": image()}), min_cosine=0.5).pictures == 2
    assert quantization.accuracy(model, [BatchFeature({"pixel_values": image()})], min_cosine=0.5).pictures == 2


@torch.no_grad()
def test_equal_features_have_a_cosine_of_one():
    """Zeros too, which padded tokens are."""
    found = quantization.accuracy(timm_vit(depth=1), image(), features=lambda out: 0 * out)
    assert found.worst_cosine == 1
    assert not found.kept


@pytest.mark.parametrize("precision", [3, None, ["fp8"]])
def test_precisions_that_are_none(precision):
    with pytest.raises(ValueError, match=r"precision is .*; expected 'fp8' or 'int8'"):
        quantization.accuracy(timm_vit(depth=1), image(), precision=precision)
    with pytest.raises(ValueError, match="expected 'fp8' or 'int8'"), quantization.simulated(timm_vit(depth=1), precision):
        pass


def test_inputs_that_are_none():
    with pytest.raises(TypeError, match="inputs is int; expected tensors, tuples of arguments or mappings of keywords"):
        quantization.accuracy(timm_vit(depth=1), 3)
