"""Sam, all of it, beside segment_anything 1.0's with the same seeded weights: masks, pictures, sizes, state dicts."""

import copy
import pickle

import pytest
import torch

import fastvit
from fastvit.models import sam_vit_b, sam_vit_h, sam_vit_l
from fastvit.models.sam import build_sam
from tests.metas_sam import FLOAT32, decode, every_gradient, images, parts, points, random
from tests.model_errors import assert_equal_gradients, relative


@pytest.mark.slow
def test_encoder_and_decoder_export_for_any_number_of_prompts():
    ours, _ = parts()
    prompts, tokens = torch.export.Dim("prompts", min=2), torch.export.Dim("tokens")
    embeddings = ours.image_encoder(images(160, 1)).detach()
    exported = torch.export.export(ours.image_encoder, (images(160, 1),)).module()
    assert relative(exported(images(160, 1)).detach(), embeddings) <= FLOAT32

    def given(batch, count):
        return (embeddings, ours.prompt_encoder.get_dense_pe(), *ours.prompt_encoder(points(batch, count)), True)

    shapes = (None, None, {0: prompts, 1: tokens}, {0: prompts}, None)
    with torch.no_grad():
        exported = torch.export.export(ours.mask_decoder, given(2, 1), dynamic_shapes=shapes).module()
        for actual, expected in zip(exported(*given(5, 3)), ours.mask_decoder(*given(5, 3)), strict=True):
            assert relative(actual, expected) <= FLOAT32


def records():
    image = random(3, 160, 160, seed=2).abs().clamp(max=1) * 255
    return [
        {"image": image[:, :, :100], "original_size": (211, 132), "point_coords": points()[0], "point_labels": points()[1]},
        {"image": image[:, :120].round().to(torch.uint8), "original_size": (90, 120), "boxes": random(2, 4).abs() * 50},
        {"image": image, "original_size": (64, 64), "mask_inputs": random(1, 1, 40, 40, scale=5)},
        {"image": image, "original_size": [70, 70]},
    ]


@pytest.mark.parametrize("multimask", [True, False])
def test_masks_of_images_with_different_prompts_are_metas(multimask):
    ours, theirs = parts()
    ours.mask_threshold = theirs.mask_threshold = theirs(records()[:1], multimask)[0]["low_res_logits"].median().item()
    shares = []
    for actual, expected in zip(*(model(records(), multimask) for model in (ours, theirs)), strict=True):
        assert list(actual) == list(expected)
        for name in ("iou_predictions", "low_res_logits"):
            assert relative(actual[name], expected[name]) <= FLOAT32, name
        assert actual["masks"].dtype == torch.bool
        shares.append(expected["masks"].float().mean())
        # A pixel whose logit is nothing but rounding may fall on either side.
        assert actual["masks"].shape == expected["masks"].shape
        assert (actual["masks"] != expected["masks"]).float().mean() <= 1e-5
    assert any(0.1 < share < 0.9 for share in shares)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_images_together_give_what_each_gives_alone(dtype):
    """Of different sizes, with prompts of different kind and number."""
    ours = parts()[0].to(dtype)
    together = ours(records(), True)
    for record, found in zip(records(), together, strict=True):
        (alone,) = ours([record], True)
        for name in ("iou_predictions", "low_res_logits"):
            assert relative(found[name].float(), alone[name].float()) <= (FLOAT32 if dtype == torch.float32 else 0.05)
        assert found["masks"].shape == alone["masks"].shape


def test_text_reaches_the_masks():
    ours, _ = parts(text_dim=12)
    record = {"image": random(3, 160, 160).abs() * 200, "original_size": (20, 30)}
    two = [ours([{**record, "text_embeddings": random(1, 12, seed=seed)}], True)[0] for seed in (1, 2)]
    assert two[0]["masks"].shape == (1, 3, 20, 30)
    assert relative(two[0]["low_res_logits"], two[1]["low_res_logits"]) > 1e-3


@pytest.mark.parametrize("shape", [(3, 160, 160), (3, 1, 160), (2, 3, 77, 50)])
def test_pictures_are_normalized_and_padded_as_metas(shape):
    ours, theirs = parts()
    picture = torch.randint(256, shape, generator=torch.Generator().manual_seed(1))
    for x in (picture.float(), picture.to(torch.uint8)):
        torch.testing.assert_close(ours.preprocess(x), theirs.preprocess(x), atol=1e-6, rtol=1e-6)


def test_masks_are_resized_as_metas():
    ours, theirs = parts()
    logits = random(2, 3, 40, 40)
    assert torch.equal(ours.postprocess_masks(logits, (160, 99), (33, 21)), theirs.postprocess_masks(logits, (160, 99), (33, 21)))


def test_attributes_that_its_users_read():
    ours, theirs = parts()
    assert (ours.mask_threshold, ours.image_format, ours.device) == (theirs.mask_threshold, theirs.image_format, theirs.device)
    assert ours.image_encoder.img_size == theirs.image_encoder.img_size
    for name in ("embed_dim", "mask_input_size", "image_embedding_size", "input_image_size"):
        assert getattr(ours.prompt_encoder, name) == getattr(theirs.prompt_encoder, name), name
    for name in ("num_mask_tokens", "num_multimask_outputs", "transformer_dim"):
        assert getattr(ours.mask_decoder, name) == getattr(theirs.mask_decoder, name), name
    assert torch.equal(ours.pixel_mean, theirs.pixel_mean)
    assert torch.equal(ours.pixel_std, theirs.pixel_std)
    assert not ours.training


def test_the_model_copied_pickled_and_in_bfloat16():
    ours, _ = parts()
    (expected,) = ours(records()[:1], True)
    for model in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        (found,) = model(records()[:1], True)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    (found,) = ours.bfloat16()(records()[:1], True)
    assert found["low_res_logits"].dtype == torch.bfloat16
    assert (found["masks"] == expected["masks"]).float().mean() > 0.9


def test_acceleration_leaves_its_results():
    ours, theirs = parts()
    fastvit.accelerate(ours)
    for actual, expected in zip(*(model(records(), True) for model in (ours, theirs)), strict=True):
        assert relative(actual["low_res_logits"], expected["low_res_logits"]) <= FLOAT32


def test_gradients_reach_the_encoder_from_the_masks_as_metas():
    found = []
    for model in parts():
        logits, iou = decode(model, model.image_encoder(images(160, 1)), points=points(2))
        ((logits * random(*logits.shape, seed=5)).sum() + iou.sum()).backward()
        found.append(every_gradient(model))
    assert found[1]["image_encoder.blocks.0.attn.rel_pos_h"].any()
    assert_equal_gradients(*found)


SIZES = [  # the paper's appendix A gives the ViTs; the parameters are those of Meta's models
    (sam_vit_b, "vit_b", 93_735_472),
    (sam_vit_l, "vit_l", 312_342_832),
    (sam_vit_h, "vit_h", 641_090_608),
]


@pytest.mark.parametrize(("build", "name", "parameters"), SIZES, ids=[name for _, name, _ in SIZES])
def test_the_three_sizes_have_metas_state_dicts(build, name, parameters):
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        theirs = sam_model_registry[name]()
    ours = build(device="meta")
    assert {key: t.shape for key, t in ours.state_dict().items()} == {key: t.shape for key, t in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == parameters
    windows = [block.attn.window_size for block in ours.image_encoder.blocks]
    assert windows == [block.window_size for block in theirs.image_encoder.blocks]
    assert ours.image_encoder.blocks[0].norm1.eps == theirs.image_encoder.blocks[0].norm1.eps == 1e-6
    assert ours.mask_decoder.transformer.layers[0].norm1.eps == theirs.mask_decoder.transformer.layers[0].norm1.eps == 1e-5


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (
            lambda: parts()[0].preprocess(torch.zeros(3, 161, 20)),
            ValueError,
            r"image has shape \(3, 161, 20\); expected .* up to 160",
        ),
        (lambda: parts()[0].preprocess(torch.zeros(1, 16, 16)), ValueError, r"image has shape \(1, 16, 16\)"),
        (lambda: parts()[0].preprocess([0]), TypeError, "image is list; expected a torch.Tensor"),
        (lambda: build_sam(prompt_dim=20), ValueError, "num_heads is 8; expected a divisor"),
        (lambda: build_sam(text_dim=0, depth=0, global_attention=()), ValueError, "text_dim is 0; expected at least 1"),
    ],
)
def test_the_model_refuses(call, error, says):
    with pytest.raises(error, match=says):
        call()
