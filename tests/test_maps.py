"""Attention maps and rollout against matrices that the libraries' own eager attention returns, and their explicit product."""

import copy

import pytest
import torch
from torch import nn

import fastvit
from fastvit import maps
from fastvit.models import VisionTransformer
from fastvit.nn import Attention, EncoderBlock
from tests.models_for_acceleration import hf_dinov2, hf_vit, image, perturb, timm_vit


def own_vit(**options):
    sizes = {"image_size": 24, "patch_size": 8, "num_classes": 5, "dim": 48, "depth": 3, "num_heads": 3, "mlp_dim": 96}
    return perturb(VisionTransformer(**{**sizes, **options}))


def hf_dinov3():
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
    return perturb(DINOv3ViTModel(DINOv3ViTConfig(image_size=24, patch_size=8, num_register_tokens=2, **sizes)))


def hf_siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
    return perturb(SiglipVisionModel(SiglipVisionConfig(image_size=24, patch_size=8, **sizes)))


def hf_clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 96}
    return perturb(CLIPVisionModel(CLIPVisionConfig(image_size=24, patch_size=8, **sizes)))


def torchvision_vit():
    from torchvision.models import VisionTransformer as Torchvision

    return perturb(Torchvision(24, 8, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=5))


def timm_qk_norm():
    return timm_vit(qk_norm=True)


def matrices(model, x) -> list[torch.Tensor]:
    """(B, H, N, N) of every layer, by the library's own code."""
    model = copy.deepcopy(fastvit.restore(model) if hasattr(model, "_fastvit_state") else model)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
        return list(model(x, output_attentions=True).attentions)
    found = []

    def of_own(module, args):
        query, key, _ = module.qkv(args[0]).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found.append(torch.softmax(query @ key.transpose(-2, -1) / module.head_dim**0.5, -1))

    def of_multihead(module, args, kwargs):
        sequence = args[0]
        found.append(nn.MultiheadAttention.forward(module, *[sequence] * 3, average_attn_weights=False)[1])

    for module in list(model.modules()):
        if isinstance(module, Attention):
            module.register_forward_pre_hook(of_own)
        elif isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(of_multihead, with_kwargs=True)
        elif hasattr(module, "attn_drop"):  # timm: what goes through the dropout of its unfused attention is the matrix
            module.fused_attn = False
            module.attn_drop.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    model(x)
    return found


def rollout(attentions: list[torch.Tensor]) -> torch.Tensor:
    """The class token's row of Π ½(A + I), every matrix written out."""
    product = torch.eye(attentions[0].shape[-1])
    for attention in attentions:
        product = (attention.mean(1) + torch.eye(attention.shape[-1])) / 2 @ product
    return product[:, 0]


MODELS = [own_vit, hf_vit, hf_dinov2, hf_dinov3, hf_siglip, hf_clip, timm_vit, timm_qk_norm, torchvision_vit]
exact = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.parametrize("accelerated", [False, True], ids=["original", "accelerated"])
@pytest.mark.parametrize("build", MODELS)
@torch.no_grad()
def test_maps_and_rollout_are_the_librarys_own(build, accelerated):
    model, x = build(), image(2)
    expected = matrices(model, x)
    assert len(expected) == 3
    assert max((a - 1 / a.shape[-1]).abs().max() for a in expected) > 0.01  # not all tokens alike
    if accelerated:
        fastvit.accelerate(model)
    before = {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()}
    for query in (0, 2, -1):
        found = fastvit.attention_maps(model, x, query=query)
        assert len(found) == 3
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs[:, :, query], **exact)
    torch.testing.assert_close(fastvit.attention_rollout(model, x), rollout(expected), **exact)
    assert {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rollout_in_blocks_of_rows(monkeypatch):
    model, x = own_vit(), image(2)
    expected = rollout(matrices(model, x))
    monkeypatch.setattr(maps, "ROWS", 4)  # of 10
    torch.testing.assert_close(fastvit.attention_rollout(model, x), expected, **exact)


def test_rollout_holds_no_matrix_of_all_tokens(monkeypatch):
    monkeypatch.setattr(maps, "ROWS", 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 4 and out.shape[-1] == 145 and out.shape[-2] != 16:
                largest = max(largest, out.shape[-2])
            return out

    model = own_vit(image_size=96)  # 145 tokens
    attention = [module for module in model.modules() if isinstance(module, Attention)]
    assert {module.head_dim for module in attention} == {16}
    with Watch():
        out = fastvit.attention_rollout(model, image(1, 96))
    assert out.shape == (1, 145)
    assert largest == 8


def test_rows_sum_to_one_and_follow_masks():
    block = perturb(EncoderBlock(32, 2))
    x = torch.randn(2, 6, 32)
    mask = torch.rand(2, 1, 6, 6) < 0.5
    mask[:, :, 1] = False  # the second token attends to nothing
    mask[:, :, 0, 0] = True
    for options in ({"attn_mask": mask}, {"is_causal": True}, {"attn_mask": mask.float() * 3}):
        (row,) = fastvit.attention_maps(block, x, query=0, **options)
        torch.testing.assert_close(row.sum(-1), torch.ones(2, 2))
    (row,) = fastvit.attention_maps(block, x, attn_mask=mask, query=1)
    assert not row.any()
    (row,) = fastvit.attention_maps(block, x, is_causal=True, query=2)
    assert (row[:, :, :3] > 0).all()
    assert not row[:, :, 3:].any()
    (row,) = fastvit.attention_maps(block, x, attn_mask=mask, query=0)
    assert torch.equal(row > 0, mask[:, :, 0].expand(2, 2, 6))


def test_float64_and_bfloat16_models():
    model = own_vit()
    expected = fastvit.attention_rollout(model, image())
    double = fastvit.attention_rollout(copy.deepcopy(model).double(), image().double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected, **exact)
    half = fastvit.attention_rollout(copy.deepcopy(model).bfloat16(), image().bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.sum(-1), torch.ones(2), **exact)
    torch.testing.assert_close(half, expected, atol=0.02, rtol=0.1)


def test_no_gradients_are_recorded_and_the_mode_is_kept():
    model = own_vit().train()
    assert not fastvit.attention_rollout(model, image()).requires_grad
    assert not any(row.requires_grad for row in fastvit.attention_maps(model, image()))
    assert model.training


def test_a_model_that_fails_is_left_without_hooks():
    model = own_vit()
    with pytest.raises(ValueError, match="expected multiples of patch_size"):
        fastvit.attention_maps(model, image(1, 20))
    with pytest.raises(ValueError, match="query is 10"):
        fastvit.attention_maps(model, image(1), query=10)
    assert not any(module._forward_pre_hooks for module in model.modules())


class Twice(nn.Module):
    """Two encoders, or one encoder of which a layer is left out."""

    def __init__(self, skip=False):
        super().__init__()
        self.skip = skip
        self.first = nn.Sequential(EncoderBlock(32, 2), EncoderBlock(32, 2))
        self.second = nn.Identity() if skip else nn.Sequential(EncoderBlock(32, 2))

    def forward(self, x):
        return self.second(self.first[0](x) if self.skip else self.first(x))


REFUSALS = [
    (lambda: fastvit.attention_maps(own_vit(), image(), query=0.0), TypeError, "query is 0.0"),
    (lambda: fastvit.attention_maps(own_vit(), image(), query=-11), ValueError, "query is -11"),
    (lambda: fastvit.attention_maps("vit", image()), TypeError, "model is str"),
    (lambda: fastvit.attention_rollout(nn.Linear(3, 3), torch.zeros(3)), ValueError, "no transformer block"),
    (lambda: fastvit.attention_rollout(Twice(), torch.zeros(1, 2, 32)), ValueError, "several encoders (first, second)"),
    (lambda: fastvit.attention_rollout(Twice(True), torch.zeros(1, 2, 32)), ValueError, "did not call first.1"),
    (lambda: fastvit.attention_rollout(EncoderBlock(32, 2, window_size=2), torch.zeros(1, 2, 2, 32)), ValueError, "on a grid"),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSALS, ids=[words for _, _, words in REFUSALS])
def test_what_does_not_fit_is_refused(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
    assert "expected" in str(caught.value)


def test_a_block_whose_attention_is_not_what_its_names_say_is_refused():
    """timm's post-norm block has the children of a pre-norm one."""
    from timm.models.vision_transformer import ResPostBlock

    model = timm_vit(block_fn=ResPostBlock)
    with pytest.raises(ValueError, match=r"the attention of blocks\.0 is not known"):
        fastvit.attention_rollout(model, image())


def test_a_model_of_two_towers_is_refused_and_either_tower_served():
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    text = CLIPTextConfig(vocab_size=20, max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    vision = CLIPVisionConfig(image_size=24, patch_size=8, **sizes)
    model = perturb(CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)))
    words = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 2]])
    with pytest.raises(ValueError, match="several encoders"):
        fastvit.attention_rollout(model, input_ids=words, pixel_values=image(2))
    assert fastvit.attention_rollout(model.vision_model, pixel_values=image(2)).shape == (2, 10)
    model.text_model.set_attn_implementation("eager")
    expected = model.text_model(input_ids=words, output_attentions=True).attentions
    for ours, theirs in zip(fastvit.attention_maps(model.text_model, input_ids=words, query=2), expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, 2], **exact)
        assert not ours[:, :, 3:].any()  # causal


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_encoder_with_padded_tokens(norm_first):
    layer = nn.TransformerEncoderLayer(48, 3, 96, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    model = perturb(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    x, padding = torch.randn(2, 6, 48), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    expected = []
    twin = copy.deepcopy(model)

    def record(module, args, kwargs):
        x = args[0]
        masked = nn.MultiheadAttention.forward(module, x, x, x, key_padding_mask=padding, average_attn_weights=False)
        expected.append(masked[1])

    for block in twin.layers:
        block.self_attn.register_forward_pre_hook(record, with_kwargs=True)
    twin.train()(x, src_key_padding_mask=padding)  # in evaluation torch's fast path calls no attention
    found = fastvit.attention_maps(model, x, src_key_padding_mask=padding, query=3)
    assert len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, 3], **exact)
    assert not found[0][1, :, 4:].any()
    torch.testing.assert_close(fastvit.attention_rollout(model, x, src_key_padding_mask=padding), rollout(expected), **exact)


def test_blocks_served_by_the_kernels_show_the_same(backend, device):
    model, x = hf_vit().to(device), image(1).to(device)
    expected = rollout(matrices(model, x))
    fastvit.accelerate(model)
    torch.testing.assert_close(fastvit.attention_rollout(model, x), expected, **exact)


def test_accelerate_has_nothing_to_do_for_our_own_model_and_says_so():
    model = own_vit()
    expected = model(image())
    report = fastvit.report(fastvit.accelerate(model))
    assert not report.replaced
    assert "fastvit's own block" in report.skipped["blocks.0"]
    assert torch.equal(model(image()), expected)
