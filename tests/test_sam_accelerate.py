"""Segment Anything of three libraries, accelerated against itself: encoder blocks on images, the mask decoder's attention."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import fastvit
from fastvit._torchvision import ensure_importable
from tests.model_errors import assert_equal_gradients, gradients, relative
from tests.models_for_acceleration import perturb

ensure_importable()

ERROR = 1e-5
SIDE, PATCH, WINDOW, DIM = 72, 8, 4, 48  # 9 × 9 tokens: windows of 4 leave a row and a column of one
ENCODERS = ["segment_anything", "hf_sdpa", "hf_eager", "hf_hq", "timm"]
DECODERS = ["segment_anything", "hf_sdpa", "hf_hq"]


def with_tables(model: nn.Module) -> nn.Module:
    """No parameter at a trivial value, relative positions as strong as the scores."""
    perturb(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


def meta_encoder(**options):
    from segment_anything.modeling import ImageEncoderViT

    sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": DIM, "depth": 3, "num_heads": 3, "mlp_ratio": 2, "out_chans": 32}
    positions = {"use_rel_pos": True, "window_size": WINDOW, "global_attn_indexes": (1,)}
    return with_tables(ImageEncoderViT(norm_layer=partial(nn.LayerNorm, eps=1e-6), **{**sizes, **positions, **options}))


def meta_sam(**options):
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    grid = SIDE // PATCH
    prompts = PromptEncoder(embed_dim=32, image_embedding_size=(grid, grid), input_image_size=(SIDE, SIDE), mask_in_chans=8)
    transformer = TwoWayTransformer(depth=2, embedding_dim=32, mlp_dim=64, num_heads=4)
    decoder = MaskDecoder(transformer_dim=32, transformer=transformer, iou_head_hidden_dim=32)
    return with_tables(Sam(meta_encoder(**options), prompts, decoder))


def hf_sam(hq: bool = False, attention: str = "sdpa", **options):
    import transformers

    prefix = "SamHQ" if hq else "Sam"
    vision = {"hidden_size": DIM, "num_hidden_layers": 3, "num_attention_heads": 3, "mlp_dim": 96, "image_size": SIDE}
    vision |= {"patch_size": PATCH, "window_size": WINDOW, "global_attn_indexes": [1], "output_channels": 32, "num_pos_feats": 16}
    sizes = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
    config = getattr(transformers, f"{prefix}Config")(
        vision_config={**vision, **options},
        prompt_encoder_config={"hidden_size": 32, "image_size": SIDE, "patch_size": PATCH, "mask_input_channels": 8},
        mask_decoder_config={**sizes, **({"vit_dim": DIM} if hq else {})},
    )
    config._attn_implementation = attention
    return with_tables(getattr(transformers, f"{prefix}Model")(config))


def timm_encoder(**options):
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    sizes = {
        "img_size": SIDE,
        "patch_size": PATCH,
        "embed_dim": DIM,
        "depth": 3,
        "num_heads": 3,
        "mlp_ratio": 2,
        "num_classes": 5,
    }
    positions = {"use_rel_pos": True, "window_size": WINDOW, "global_attn_indexes": (1,), "neck_chans": 32}
    return with_tables(VisionTransformerSAM(**{**sizes, **positions, **options}))


def encoder(key: str, **options) -> nn.Module:
    if key == "segment_anything":
        return meta_encoder(**options)
    if key == "timm":
        return timm_encoder(**options)
    return hf_sam("hq" in key, "eager" if "eager" in key else "sdpa", **options).vision_encoder


def image(batch: int = 2, size: int = SIDE) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def embedding(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return embedding(model(x))


def assert_fused(model: nn.Module, count: int) -> None:
    found = fastvit.report(model)
    assert found.fallbacks == {}
    assert found.skipped == {}
    assert len(found.replaced) == count


# --- the image encoder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ENCODERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_an_encoder_gives_what_it_gave(key, batch):
    model, x = encoder(key), image(batch)
    expected = run(model, x)
    actual = run(fastvit.accelerate(model), x)
    assert_fused(model, 3)
    assert relative(actual, expected) <= ERROR
    assert fastvit.verify(model, x).passed


@pytest.mark.parametrize("key", ENCODERS)
def test_an_encoder_has_the_gradients_it_had(key):
    model, inputs = encoder(key), {"pixel_values" if key.startswith("hf") else "x": image()}
    expected = gradients(model, inputs)
    assert {name for name, _ in model.named_parameters()} <= expected.keys()
    assert_equal_gradients(gradients(fastvit.accelerate(model), inputs), expected)
    assert_fused(model, 3)


@pytest.mark.parametrize("key", ENCODERS)
def test_an_encoder_in_bfloat16_errs_at_most_twice_as_much(key):
    model, x = encoder(key), image(3)
    exact = run(copy.deepcopy(model).double(), x.double())
    model, x = model.bfloat16(), x.bfloat16()
    eager = run(model, x)
    actual = run(fastvit.accelerate(model), x)
    assert_fused(model, 3)
    assert actual.dtype == torch.bfloat16
    assert relative(actual, exact) <= 2 * relative(eager, exact) + torch.finfo(torch.bfloat16).eps / 2


OPTIONS = {
    "no relative positions": ("segment_anything", {"use_rel_pos": False}),
    "no bias of queries, keys and values": ("segment_anything", {"qkv_bias": False}),
    "windows larger than the image": ("segment_anything", {"window_size": 14}),
    "windows that fill the image": ("segment_anything", {"window_size": 3}),
    "windows of one token": ("segment_anything", {"window_size": 1}),
    "all global": ("segment_anything", {"window_size": 0}),
    "no relative positions in transformers": ("hf_sdpa", {"use_rel_pos": False}),
    "no bias in transformers": ("hf_eager", {"qkv_bias": False}),
    "LayerScale": ("timm", {"init_values": 0.5}),
    "norms of queries and keys": ("timm", {"qk_norm": True}),
    "norms of queries and keys without bias": ("timm", {"qk_norm": True, "qkv_bias": False}),
    "neither in timm": ("timm", {"use_rel_pos": False, "qkv_bias": False}),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_an_encoder_with(what):
    key, options = OPTIONS[what]
    model, x = encoder(key, **options), image()
    expected = run(model, x)
    actual = run(fastvit.accelerate(model), x)
    assert_fused(model, 3)
    assert relative(actual, expected) <= ERROR


def test_tables_of_another_image_size_are_resized():
    """timm takes other sizes; its position table is resized, its relative ones by the attention."""
    model, x = timm_encoder(), image(size=104)
    expected = run(model, x)
    actual = run(fastvit.accelerate(model), x)
    assert_fused(model, 3)
    assert relative(actual, expected) <= ERROR


def test_blocks_of_images_that_are_not_square():
    block = meta_encoder().blocks
    for index in (0, 1):
        x = torch.randn(2, 5, 7, DIM, generator=torch.Generator().manual_seed(index))
        expected = block[index](x).detach()
        fastvit.accelerate(block[index])
        assert relative(block[index](x).detach(), expected) <= ERROR
        assert_fused(block[index], 1)


def test_the_report_tells_windows_from_the_image():
    replaced = fastvit.report(fastvit.accelerate(meta_encoder())).replaced
    assert replaced["blocks.0"] == "fused attention in windows of 4 + relative positions + add+LayerNorm + GELU MLP"
    assert replaced["blocks.1"] == "fused attention on the image + relative positions + add+LayerNorm + GELU MLP"
    plain = fastvit.report(fastvit.accelerate(meta_encoder(use_rel_pos=False))).replaced
    assert plain["blocks.0"] == "fused attention in windows of 4 + add+LayerNorm + GELU MLP"


def test_flops_of_blocks_are_counted():
    model = fastvit.accelerate(meta_encoder())
    found = fastvit.report(model, image(1))
    # qkv and proj of 12 × 12 tokens, scores and values of nine windows of 16; the MLP of 81; relative positions, which the
    # original multiplies too.
    windows, tokens, hidden = 9 * 16, 81, 2 * DIM
    products = windows * 4 * DIM * DIM + 2 * windows * 16 * DIM + 2 * windows * 4 * DIM + 2 * tokens * DIM * hidden
    assert found.flops["blocks.0"] == 2 * products
    assert 0.5 < found.fused_share < 1
