"""Sam's prompts and mask decoder beside segment_anything 1.0's with the same seeded weights."""

import copy
import pickle

import pytest
import torch

from tests.metas_sam import FLOAT32, decode, every_gradient, parts, points, random, theirs_take
from tests.model_errors import assert_equal_gradients, relative

GIVEN = ("image_embeddings", "image_pe", "sparse_prompt_embeddings", "dense_prompt_embeddings")
PROMPTS = {
    "nothing": lambda batch: {},
    "points": lambda batch: {"points": points(batch)},
    "no points": lambda batch: {"points": points(batch, 0)},
    "boxes": lambda batch: {"boxes": random(batch, 4).abs() * 60},
    "masks": lambda batch: {"masks": random(batch, 1, 40, 40, scale=5)},
    "points and boxes": lambda batch: {"points": points(batch, 3), "boxes": random(batch, 4).abs() * 60},
    "all": lambda batch: {"points": points(batch), "boxes": random(batch, 4).abs(), "masks": random(batch, 1, 40, 40)},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_embedded_as_metas(name, batch):
    ours, theirs = (model.prompt_encoder for model in parts())
    prompts = PROMPTS[name](batch)
    for actual, expected in zip(ours(**prompts), theirs(**theirs_take(prompts)), strict=True):
        torch.testing.assert_close(actual, expected, atol=FLOAT32, rtol=FLOAT32)
    torch.testing.assert_close(ours.get_dense_pe(), theirs.get_dense_pe(), atol=FLOAT32, rtol=FLOAT32)


def test_labels_may_be_floats_and_coordinates_integers():
    ours, theirs = (model.prompt_encoder for model in parts())
    coordinates, labels = points()
    expected = theirs((coordinates.round(), labels), None, None)[0]
    torch.testing.assert_close(ours((coordinates.round().long(), labels.float()))[0], expected, atol=FLOAT32, rtol=FLOAT32)


@pytest.mark.parametrize("shape", [(3, 1, 4), (3, 2, 2)])
def test_boxes_may_come_as_corners_or_one_each_prompt(shape):
    ours, theirs = (model.prompt_encoder for model in parts())
    boxes = random(3, 4).abs() * 60
    assert torch.equal(ours(boxes=boxes.view(shape))[0], ours(boxes=boxes)[0])
    torch.testing.assert_close(ours(boxes=boxes)[0], theirs(None, boxes.view(shape), None)[0], atol=FLOAT32, rtol=FLOAT32)


def test_a_label_of_no_kind_marks_a_place():
    ours, theirs = (model.prompt_encoder for model in parts())
    coordinates, _ = points(1, 1)
    labels = torch.tensor([[7]])
    torch.testing.assert_close(ours((coordinates, labels))[0], theirs((coordinates, labels), None, None)[0], atol=1e-5, rtol=1e-5)


def test_positions_are_as_exact_under_autocast_and_keep_the_weights_dtype():
    ours, _ = (model.prompt_encoder for model in parts())
    prompts = {"points": points()}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(**prompts)[0], ours(**prompts)[0].float())
        under_autocast = ours(**prompts)[0], ours.get_dense_pe()
    assert torch.equal(under_autocast[0], ours(**prompts)[0])
    assert torch.equal(under_autocast[1], ours.get_dense_pe())
    ours.bfloat16()
    assert {t.dtype for t in (*ours(**prompts), ours.get_dense_pe())} == {torch.bfloat16}


def computed(encoder):
    """The dense positions as ``pe_layer`` computes them now."""
    return encoder.pe_layer(encoder.image_embedding_size).unsqueeze(0)


def test_dense_positions_are_computed_once_and_anew_when_their_matrix_changes(monkeypatch):
    ours, other = (parts()[0].prompt_encoder for _ in range(2))
    with torch.inference_mode():
        first = ours.get_dense_pe()
    assert not first.is_inference(), "else nothing that needs gradients could use it"
    assert ours.get_dense_pe() is first
    assert torch.equal(first, computed(ours))
    changes = {
        "loaded": lambda: ours.load_state_dict({**other.state_dict(), **halved(ours)}),
        "assigned": lambda: ours.load_state_dict({**other.state_dict(), **halved(ours)}, assign=True),
        "written to": lambda: ours.pe_layer.positional_encoding_gaussian_matrix.mul_(2),
        "in bfloat16": ours.bfloat16,
        "in float64": ours.double,
        "back": ours.float,
        "another grid": lambda: setattr(ours, "image_embedding_size", (3, 4)),
        "what was given out written to": lambda: ours.get_dense_pe().zero_(),
    }
    for name, change in changes.items():
        before = ours.get_dense_pe()
        change()
        after = ours.get_dense_pe()
        assert after is not before, name
        assert after.dtype == ours.no_mask_embed.weight.dtype, name
        assert torch.equal(after, computed(ours)), name
        assert ours.get_dense_pe() is after, name
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert copied._dense_pe is None, "copies go without"
    monkeypatch.setattr(ours.pe_layer, "forward", lambda size: torch.ones(1))
    assert ours.get_dense_pe().shape == (1, 1), "what was put in its place is asked"


def halved(encoder):
    name = "pe_layer.positional_encoding_gaussian_matrix"
    return {name: encoder.state_dict()[name] / 2}


@pytest.mark.parametrize("watched", ["hooks", "dispatch mode", "trained"])
def test_dense_positions_that_someone_watches_are_not_kept(watched):
    from torch.utils.flop_counter import FlopCounterMode

    encoder = parts()[0].prompt_encoder
    kept = encoder.get_dense_pe()
    if watched == "hooks":
        encoder.pe_layer.register_forward_hook(lambda m, args, out: out + 1)
        assert torch.equal(encoder.get_dense_pe(), kept + 1)
    elif watched == "trained":
        encoder.pe_layer.positional_encoding_gaussian_matrix.requires_grad_()
        assert encoder.get_dense_pe().requires_grad
    else:
        with FlopCounterMode(display=False):
            assert encoder.get_dense_pe() is not kept


def test_a_text_is_one_token_more():
    ours, theirs = (model.prompt_encoder for model in parts(text_dim=12))
    text, prompts = random(3, 12), {"points": points(), "boxes": random(3, 4).abs() * 60}
    projection = ours.text_embedding
    token = text @ projection.weight.T + projection.bias
    for given in ({}, prompts):
        alone = theirs(**theirs_take(given))[0].expand(3, -1, -1)
        expected = torch.cat([alone, token.unsqueeze(1)], dim=1)
        torch.testing.assert_close(ours(**given, text=text)[0], expected, atol=FLOAT32, rtol=FLOAT32)
    ours(text=text)[0].sum().backward()
    assert projection.weight.grad.abs().max() > 0


def test_the_state_dict_is_metas_and_one_linear_with_text():
    ours, theirs = parts()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    with_text, _ = parts(text_dim=12)
    more = with_text.state_dict().keys() - theirs.state_dict().keys()
    assert more == {"prompt_encoder.text_embedding.weight", "prompt_encoder.text_embedding.bias"}


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", PROMPTS)
def test_masks_and_iou_are_metas(name, batch, multimask):
    ours, theirs = parts()
    embeddings, prompts = random(1, 32, 10, 10), PROMPTS[name](batch)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for actual, expected in zip(*(decode(m, embeddings, multimask, **prompts) for m in (ours, theirs)), strict=True):
                assert relative(actual, expected) <= FLOAT32
                assert actual.shape[1] == (3 if multimask else 1)


def test_the_decoder_on_the_kernels(triton_backend, device):
    ours, theirs = parts(side=48, decoder_dim=64, mlp_dim=32)
    prompts = {"points": points(2), "boxes": random(2, 4).abs() * 30}
    with torch.no_grad():
        expected = decode(theirs, random(1, 64, 3, 3), **prompts)
        moved = {"points": tuple(t.to(device) for t in prompts["points"]), "boxes": prompts["boxes"].to(device)}
        for actual, wanted in zip(decode(ours.to(device), random(1, 64, 3, 3).to(device), **moved), expected, strict=True):
            assert relative(actual.cpu(), wanted) <= FLOAT32


@pytest.mark.parametrize("name", ["points", "masks", "all"])
def test_prompts_of_several_images_are_decoded_together(name):
    ours, theirs = parts()
    embeddings, prompts = random(2, 32, 10, 10), PROMPTS[name](6)

    def of_image(index):
        rows = slice(3 * index, 3 * index + 3)
        return {key: tuple(t[rows] for t in v) if isinstance(v, tuple) else v[rows] for key, v in prompts.items()}

    with torch.no_grad():
        together = decode(ours, embeddings, **prompts)
        apart = [decode(theirs, embeddings[i : i + 1], **of_image(i)) for i in range(2)]
    for actual, expected in zip(together, zip(*apart, strict=True), strict=True):
        assert relative(actual, torch.cat(expected)) <= FLOAT32


ONE_FOR_ALL = {
    "a mask for points": {"points": points(3), "masks": random(1, 1, 40, 40, scale=5)},
    "a mask for boxes": {"boxes": random(3, 4).abs() * 60, "masks": random(1, 1, 40, 40, scale=5)},
    "a point for masks": {"points": points(1), "masks": random(3, 1, 40, 40, scale=5)},
}


@pytest.mark.parametrize("name", ONE_FOR_ALL)
def test_one_prompt_of_a_kind_is_that_of_all(name):
    ours, theirs = parts()
    with torch.no_grad():
        found = [decode(model, random(1, 32, 10, 10), **ONE_FOR_ALL[name]) for model in (ours, theirs)]
    for actual, expected in zip(*found, strict=True):
        assert actual.shape[0] == 3
        assert relative(actual, expected) <= FLOAT32


def test_one_prompt_is_that_of_all_images():
    ours, theirs = parts()
    with torch.no_grad():
        found = [decode(model, random(2, 32, 10, 10), points=points(1)) for model in (ours, theirs)]
    for actual, expected in zip(*found, strict=True):
        assert actual.shape[0] == 2
        assert relative(actual, expected) <= FLOAT32


@pytest.mark.parametrize("multimask", [True, False])
def test_every_parameter_of_the_decoder_gets_a_gradient_in_training(multimask):
    """Zeros where Meta's get zeros: DistributedDataParallel waits for each of them."""
    found = []
    for model in parts():
        masks, iou = decode(model, random(1, 32, 10, 10), multimask, points=points())
        (masks.square().mean() + iou.sum()).backward()
        found.append({name: p.grad for name, p in model.mask_decoder.named_parameters()})
    assert [name for name in found[0] if found[0][name] is None] == [name for name in found[1] if found[1][name] is None] == []
    unwanted = "output_hypernetworks_mlps.0." if multimask else "output_hypernetworks_mlps.1."
    assert not any(gradient.any() for name, gradient in found[0].items() if name.startswith(unwanted))


def test_no_prompts_give_no_masks():
    ours, _ = parts()
    masks, iou = decode(ours, random(1, 32, 10, 10), points=points(0))
    assert (masks.shape, iou.shape) == ((0, 3, 40, 40), (0, 3))


def decoder_gradients(model, side, prompts, device="cpu"):
    embeddings = random(1, model.prompt_encoder.embed_dim, side, side).to(device).requires_grad_()
    masks, iou = decode(model, embeddings, **prompts)
    loss = (masks * random(*masks.shape, seed=5).to(masks)).sum() + (iou * random(*iou.shape, seed=6).to(iou)).sum()
    loss.backward()
    return every_gradient(model) | {"image": embeddings.grad.cpu()}


@pytest.mark.parametrize("name", ["points", "all"])
def test_gradients_of_prompts_and_decoder_are_metas(name):
    ours, theirs = (decoder_gradients(model, 10, PROMPTS[name](2)) for model in parts())
    assert sum(bool(gradient.any()) for gradient in theirs.values()) > 100
    assert_equal_gradients(ours, theirs)


@pytest.mark.slow
def test_the_decoders_gradients_on_the_kernels(triton_backend, device):
    """Two prompts of one image: its keys are seen through views without a stride, and their gradients added up."""
    ours, theirs = parts(side=48, decoder_dim=32, mlp_dim=32)
    prompts = {"points": points(2)}
    moved = {"points": tuple(t.to(device) for t in prompts["points"])}
    found = decoder_gradients(ours.to(device), 3, moved, device)
    assert_equal_gradients(found, decoder_gradients(theirs, 3, prompts))


@pytest.mark.parametrize("place", ["0", "1", "2", "3", ""])
def test_a_hook_within_the_upscaling_takes_effect(place):
    ours, theirs = parts()
    for model in (ours, theirs):
        model.mask_decoder.output_upscaling.get_submodule(place).register_forward_hook(lambda m, args, out: out * 1.5)
    with torch.no_grad():
        for actual, expected in zip(*(decode(m, random(1, 32, 10, 10), points=points()) for m in (ours, theirs)), strict=True):
            assert relative(actual, expected) <= FLOAT32


def test_what_hooks_in_the_decoder_keep_is_not_written_over():
    ours, _ = parts()
    kept = []
    for module in ours.mask_decoder.transformer.modules():
        module.register_forward_hook(lambda m, args, out: kept.append([(t, t.clone()) for t in (args[0], *out)]))
    with torch.no_grad():
        decode(ours, random(1, 32, 10, 10), points=points())
    assert len(kept) > 40
    assert all(torch.equal(held, copied) for pairs in kept for held, copied in pairs)


def test_the_decoder_in_bfloat16():
    ours, theirs = parts()
    sparse, dense = theirs.prompt_encoder(**theirs_take({"points": points()}))
    given = dict(zip(GIVEN, (random(1, 32, 10, 10), theirs.prompt_encoder.get_dense_pe(), sparse, dense), strict=True))
    rounded = {name: t.bfloat16() for name, t in given.items()}
    with torch.no_grad():
        exact = theirs.mask_decoder(**given, multimask_output=True)
        eager = theirs.mask_decoder.bfloat16()(**rounded, multimask_output=True)
        for actual, theirs_, wanted in zip(
            ours.mask_decoder.bfloat16()(**rounded, multimask_output=True), eager, exact, strict=True
        ):
            assert actual.dtype == torch.bfloat16
            assert relative(actual.float(), wanted) <= 2 * relative(theirs_.float(), wanted)


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_decoder_compiles_whole(train):
    ours, _ = parts()
    with torch.set_grad_enabled(train):
        expected = decode(ours, random(1, 32, 10, 10), points=points())
        ours.mask_decoder.compile(fullgraph=True, backend="aot_eager")
        ours.prompt_encoder.compile(fullgraph=True, backend="aot_eager")
        for actual, wanted in zip(decode(ours, random(1, 32, 10, 10), points=points()), expected, strict=True):
            assert relative(actual.detach(), wanted.detach()) <= FLOAT32


PROMPT_ERRORS = [
    ({"points": torch.zeros(1, 1, 2)}, TypeError, "points is Tensor; expected a pair of tensors"),
    ({"points": (torch.zeros(1, 1, 2), [1])}, TypeError, "labels of points is list; expected a torch.Tensor"),
    ({"points": (torch.zeros(1, 2), torch.ones(1))}, ValueError, r"points has shape \(1, 2\)"),
    ({"points": (torch.zeros(1, 2, 2), torch.ones(1, 3))}, ValueError, r"labels of points has shape \(1, 3\); expected \(1, 2\)"),
    ({"boxes": torch.zeros(4)}, ValueError, r"boxes has shape \(4,\); expected \(4, 4\)"),
    ({"boxes": torch.zeros(2, 4), "points": points(3)}, ValueError, r"boxes has shape \(2, 4\); expected \(3, 4\)"),
    ({"masks": torch.zeros(1, 1, 64, 64)}, ValueError, r"masks has shape .* expected \(1, 1, 40, 40\)"),
    ({"text": torch.zeros(1, 12)}, ValueError, "text was given to a prompt encoder without text_dim"),
]


@pytest.mark.parametrize(("prompts", "error", "says"), PROMPT_ERRORS)
def test_a_prompt_encoder_refuses(prompts, error, says):
    with pytest.raises(error, match=says):
        parts()[0].prompt_encoder(**prompts)


def test_a_text_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"text has shape \(1, 13\); expected \(1, 12\)"):
        parts(text_dim=12)[0].prompt_encoder(text=torch.zeros(1, 13))


@pytest.mark.parametrize(
    ("changed", "shape", "says"),
    [
        ("image_embeddings", (1, 31, 10, 10), r"image_embeddings has shape \(1, 31, 10, 10\); expected \(1, 32"),
        ("image_embeddings", (2, 32, 10, 10), "has 3 prompts; expected a multiple of the 2 images"),
        ("image_pe", (1, 32, 9, 10), "image_pe has shape"),
        ("sparse_prompt_embeddings", (3, 32), "sparse_prompt_embeddings has shape .* 3 dimensions"),
        ("dense_prompt_embeddings", (2, 32, 10, 10), r"dense_prompt_embeddings has shape .* expected \(3, 32, 10, 10\)"),
    ],
)
def test_a_decoder_refuses(changed, shape, says):
    shapes = dict(zip(GIVEN, ((1, 32, 10, 10), (1, 32, 10, 10), (3, 2, 32), (3, 32, 10, 10)), strict=True))
    given = {name: torch.zeros(size) for name, size in (shapes | {changed: shape}).items()}
    with pytest.raises(ValueError, match=says):
        parts()[0].mask_decoder(**given, multimask_output=True)
