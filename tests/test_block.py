"""A pre-norm block as one autograd Function: gradients, what it leaves to operators, what autograd asks. And as one recipe."""

import copy

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit.ops import _recipes, linear
from fastvit.ops import block as one_block
from tests import models_for_acceleration as models
from tests.model_errors import OUTPUT, assert_equal_gradients, relative

ONE = "BlockBackward"

pytestmark = pytest.mark.usefixtures("triton_backend")


def timm_vit(**options):
    model = models.timm_vit(embed_dim=32, depth=1, num_heads=2, **options)
    return model, model.blocks


def hf_vit(**options):
    model = models.hf_vit(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, **options)
    return model, model.layers if hasattr(model, "layers") else model.encoder.layer


def hf_dinov2(**options):
    model = models.hf_dinov2(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **options)
    return model, model.layers if hasattr(model, "layers") else model.encoder.layer


def made(build, device, **options) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """(an accelerated block, the same as it was, hidden states)"""
    model, blocks = build(**options)
    blocks, original = blocks.to(device), copy.deepcopy(blocks[0]).to(device)
    fastvit.accelerate(model)
    assert fastvit.report(model).replaced
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(device)
    return blocks[0], original, x


def gradients(block: nn.Module, x: torch.Tensor, name: str | None = None, forward=None) -> dict[str, torch.Tensor]:
    """By name, of what wants one; ``name``: of the Function that the output must come from."""
    block.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    out = (forward or block)(x)
    out = out[0] if isinstance(out, tuple) else out
    if name is not None:
        assert out.grad_fn.name() == name
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    (out * weights).sum().backward()
    found = {n: p.grad for n, p in block.named_parameters() if p.grad is not None}
    return found if x.grad is None else {**found, "x": x.grad}


@pytest.mark.parametrize("vendor", [False, True], ids=["kernels", "vendor's products"])
@pytest.mark.parametrize(
    ("build", "options"),
    [(timm_vit, {"qkv_bias": False}), (timm_vit, {"init_values": None}), (hf_vit, {}), (hf_dinov2, {})],
    ids=["LayerScale", "packed", "three projections", "both"],
)
def test_gradients_are_those_of_the_original(build, options, vendor, device, monkeypatch):
    monkeypatch.setattr(linear, "left_to_vendor", lambda a, b: vendor)
    ours, original, x = made(build, device, **options)
    x.requires_grad_()
    expected = gradients(original, x)
    assert set(expected) == {"x", *(name for name, _ in original.named_parameters())}
    assert_equal_gradients(gradients(ours, x, ONE), expected)


TRAINED = [("mlp.fc2.weight",), ("ls1.gamma", "attn.proj.bias"), ("attn.qkv.bias",), ("norm1.weight", "x")]


@pytest.mark.parametrize("trained", TRAINED, ids=" ".join)
def test_frozen_parameters_get_no_gradient(trained, device, monkeypatch):
    monkeypatch.setattr(linear, "left_to_vendor", lambda a, b: True)
    ours, original, x = made(timm_vit, device)
    x.requires_grad_("x" in trained)
    for block in (ours, original):
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name in trained)
    found = gradients(ours, x, ONE)
    assert set(found) == set(trained)
    assert_equal_gradients(found, gradients(original, x))


def test_what_is_not_plain_goes_by_the_operators(device):
    ours, _, x = made(timm_vit, device)
    x.requires_grad_()

    def served_at_once() -> bool:
        return ours(x).grad_fn.name() == ONE

    assert served_at_once()
    for name in ("attn.qkv", "mlp.fc1", "norm2", "ls1"):
        handle = ours.get_submodule(name).register_forward_hook(lambda module, args, out: None)
        assert not served_at_once(), name
        handle.remove()
    for path in ("attn.proj_drop", "mlp.drop1"):
        ours.get_submodule(path).p = 0.5
        assert served_at_once()
        ours.train()
        assert not served_at_once(), path
        ours.eval()
        ours.get_submodule(path).p = 0.0
    with torch.autograd.forward_ad.dual_level():
        assert not served_at_once()
    ours.norm1.double()
    with pytest.raises(TypeError, match="weight of shape"):
        served_at_once()
    ours.norm1.float()
    assert served_at_once()


def test_autograd_sees_one_function_like_any_other(device):
    ours, _, x = made(timm_vit, device)
    x.requires_grad_()
    once, parameters = gradients(ours, x, ONE), dict(ours.named_parameters())
    hooked = []
    parameters["attn.qkv.weight"].register_hook(lambda grad: hooked.append("qkv"))
    parameters["ls2.gamma"].register_post_accumulate_grad_hook(lambda p: hooked.append("gamma"))
    again = gradients(ours, x, ONE, lambda x: checkpoint(ours, x, use_reentrant=False))
    assert_equal_gradients(again, once)
    assert sorted(hooked) == ["gamma", "qkv"]
    out = ours(x)
    out.sum().backward()
    for name, parameter in parameters.items():
        assert not torch.equal(parameter.grad, once[name]), f"{name}'s gradient was not added to"
    with pytest.raises(RuntimeError, match="a second time"):
        out.sum().backward()
    (grad,) = torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()
    out = ours(x)
    with torch.no_grad():
        parameters["mlp.fc1.weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Calls(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_a_checkpoint_may_be_computed_again_without_a_function_mode(device):
    ours, original, x = made(timm_vit, device)
    expected = gradients(original, x.requires_grad_())

    def forward(x: torch.Tensor) -> torch.Tensor:
        with Calls():  # gone in backward
            return checkpoint(ours, x, use_reentrant=False)

    assert_equal_gradients(gradients(ours, x, forward=forward), expected)


def test_a_layer_scale_may_be_a_buffer(device):
    ours, original, x = made(timm_vit, device)
    for block in (ours, original):
        gamma = block.ls1.gamma.detach()
        del block.ls1.gamma
        block.ls1.register_buffer("gamma", gamma)
    assert_equal_gradients(gradients(ours, x, ONE), gradients(original, x))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_gradients_enabled_within_inference_mode_are_none(autocast, device):
    """Autograd records nothing there, and refuses to save what was made there."""
    block, original, x = made(timm_vit, device)
    with torch.inference_mode(), torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=autocast):
        expected, out = original(x), block(x)
    assert out.is_inference()
    assert not out.requires_grad
    assert relative(out, expected) <= (2e-2 if autocast else OUTPUT)
    with torch.inference_mode(), torch.enable_grad():  # what a GPU goes by
        assert not _recipes.signature_of(one_block.block_forward, (x, *block.parameters())).training


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"init_values": None}], ids=["LayerScale", "plain"])
def test_what_a_recipe_of_inference_repeats(mode, options, device, monkeypatch):
    """The blocks of a model, the first leaving the norm of its sum for the second."""
    model = models.timm_vit(embed_dim=32, depth=2, num_heads=2, **options).to(device)
    picture = models.image().to(device)
    given = []

    def infer(tensors, options, normalized, following):
        given.append((normalized is not None, following is not None))
        return one_block.block_inference(*tensors, *options, normalized, *(following or (None, None, None)))

    monkeypatch.setattr(one_block, "infer", infer)
    monkeypatch.setattr(linear, "left_to_vendor", lambda a, b: True)
    with mode():
        expected = model(picture)
        assert relative(fastvit.accelerate(model)(picture), expected) <= OUTPUT
    assert given == [(False, True), (True, False)]
