"""Sam beside segment_anything 1.0 with the same seeded weights, positions and relative positions not zero: each part and all."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit.models import sam_vit_b, sam_vit_h, sam_vit_l
from fastvit.models.sam import ImageEncoder, build_sam
from tests.model_errors import assert_equal_gradients, relative
from tests.models_for_acceleration import perturb

FLOAT32 = 1e-5  # relative to the largest value: sums in another order, through some blocks

GIVEN = ("image_embeddings", "image_pe", "sparse_prompt_embeddings", "dense_prompt_embeddings")
ENCODER = {"image_size": 80, "patch_size": 16, "dim": 32, "depth": 3, "num_heads": 2, "out_channels": 16, "window_size": 3}


def theirs_of(ours: ImageEncoder):
    """segment_anything's encoder of the same sizes, with random weights, which ``ours`` takes."""
    from segment_anything.modeling import ImageEncoderViT

    block = ours.blocks[0]
    theirs = ImageEncoderViT(
        img_size=ours.img_size,
        patch_size=ours.patch_size,
        embed_dim=ours.pos_embed.shape[3],
        depth=len(ours.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.lin1.out_features / ours.pos_embed.shape[3],
        out_chans=ours.neck[0].out_channels,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=max(b.attn.window_size for b in ours.blocks),
        global_attn_indexes=[index for index, b in enumerate(ours.blocks) if not b.attn.window_size],
    )
    ours.load_state_dict(perturb(theirs).state_dict())
    return theirs


def encoders(**options):
    ours = ImageEncoder(**{**ENCODER, "global_attention": (1,), **options})
    return ours, theirs_of(ours)


def images(side=80, batch=2):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# The image encoder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"image_size": 64, "window_size": 2},
        {"image_size": 48, "window_size": 14},
        {"image_size": 240, "window_size": 14, "depth": 2},
        {"global_attention": ()},
        {"global_attention": (0, 1, 2)},
    ],
    ids=str,
)
def test_the_encoder_gives_metas_embeddings(options):
    ours, theirs = encoders(**options)
    x = images(ours.img_size)
    with torch.no_grad():
        assert relative(ours(x), theirs(x)) <= FLOAT32
    assert relative(ours(x).detach(), theirs(x).detach()) <= FLOAT32


def test_the_encoder_on_the_kernels(triton_backend, device):
    ours, theirs = encoders(image_size=48, dim=32, depth=2, window_size=2)
    x = images(48, 1)
    with torch.no_grad():
        assert relative(ours.to(device)(x.to(device)).cpu(), theirs(x)) <= FLOAT32


def encoder_gradients(model, x):
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = model(x)
    (out * random(*out.shape, seed=3).to(out)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"images": x.grad}


def test_the_encoders_gradients_on_the_kernels(triton_backend, device):
    ours, theirs = encoders(image_size=48, depth=2, window_size=2)
    found = encoder_gradients(ours.to(device), images(48, 1).to(device))
    assert_equal_gradients({name: t.cpu() for name, t in found.items()}, encoder_gradients(theirs, images(48, 1)))


def test_the_encoders_gradients_are_metas():
    ours, theirs = encoders()
    assert_equal_gradients(encoder_gradients(ours, images()), encoder_gradients(theirs, images()))


@pytest.mark.parametrize("trained", ["norm1", "norm2", "rel_pos", "qkv", "lin1", "blocks.2.", "neck"])
def test_gradients_of_a_part_while_the_rest_is_frozen(trained):
    """Sums may be written over branches before the first parameter that is trained, never after it."""
    found = []
    for model in encoders():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        out = model(images())
        (out * random(*out.shape, seed=3)).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0]
    assert_equal_gradients(*found)


def test_hooks_for_all_modules_see_every_block_and_linear():
    ours, theirs = encoders()
    seen, kept = [], []

    def look(module, args, out):
        seen.append(module)
        kept.append((out, out.clone()))

    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        with torch.no_grad():
            out = ours(images())
    finally:
        handle.remove()
    silent = set(ours.modules()) - set(seen)
    assert silent == {ours.blocks}
    assert all(torch.equal(held, copied) for held, copied in kept)
    with torch.no_grad():
        assert relative(out, theirs(images())) <= FLOAT32


def test_every_table_of_positions_matters():
    ours, _ = encoders()
    with torch.no_grad():
        before = ours(images())
        for name, table in ours.named_parameters():
            if "rel_pos" in name or name == "pos_embed":
                kept = table.clone()
                table.zero_()
                assert relative(ours(images()), before) > 100 * FLOAT32, name
                table.copy_(kept)


def test_a_hook_sees_a_block_and_what_it_keeps_is_not_written_over():
    ours, theirs = encoders()
    kept: dict[str, list] = {"attn": [], "mlp": [], "1": [], "proj": []}
    ours.blocks[0].attn.register_forward_hook(lambda m, args, out: kept["attn"].append((out, out.clone())))
    ours.blocks[2].attn.proj.register_forward_hook(lambda m, args, out: kept["proj"].append((out, out.clone())))
    ours.blocks[0].mlp.register_forward_hook(lambda m, args, out: kept["mlp"].append((out, out.clone())))
    ours.blocks[1].register_forward_hook(lambda m, args, out: kept["1"].append((out, out.clone())))
    with torch.no_grad():
        assert relative(ours(images()), theirs(images())) <= FLOAT32
    for name, [(held, copied)] in kept.items():
        assert torch.equal(held, copied), name


def test_a_hook_that_changes_a_norm_takes_effect():
    ours, theirs = encoders()
    for model in (ours, theirs):
        for block in model.blocks:
            block.norm1.register_forward_hook(lambda m, args, out: out * 1.5)
            block.norm2.register_forward_hook(lambda m, args, out: out * 0.5)
    with torch.no_grad():
        assert relative(ours(images()), theirs(images())) <= FLOAT32


def test_the_encoder_writes_over_nothing_that_is_given():
    ours, _ = encoders()
    x = images()
    kept, state = x.clone(), copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        first = ours(x)
        tokens = torch.randn(1, 5, 5, 32)
        given = tokens.clone()
        ours.blocks[0](tokens)
        assert torch.equal(tokens, given)
        assert torch.equal(ours(x), first)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


def test_the_encoder_in_bfloat16():
    ours, theirs = encoders()
    x = images()
    with torch.no_grad():
        exact = theirs(x)
        theirs_error = relative(theirs.bfloat16()(x.bfloat16()).float(), exact)
        assert relative(ours.bfloat16()(x.bfloat16()).float(), exact) <= 2 * theirs_error


def test_the_encoder_under_autocast_and_in_inference_mode():
    ours, theirs = encoders()
    x = images()
    with torch.inference_mode():
        exact = theirs(x)
        assert relative(ours(x), exact) <= FLOAT32
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(ours(x).float(), exact) <= 2 * relative(theirs(x).float(), exact)


def test_the_encoder_copied_and_pickled():
    ours, _ = encoders()
    x = images()
    with torch.no_grad():
        expected = ours(x)
        assert torch.equal(copy.deepcopy(ours)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(ours))(x), expected)


@pytest.mark.parametrize("train", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_encoder_compiles_whole(train):
    ours, _ = encoders(image_size=48, depth=2)
    x = images(48)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(train):
        assert relative(compiled(x).detach(), ours(x).detach()) <= FLOAT32


def test_in_inference_sums_are_written_over_their_branches():
    ours, _ = encoders()
    sums = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if str(func) in ("aten.add_.Tensor", "aten.add.Tensor") and result.shape[1:] == ours.pos_embed.shape[1:]:
                sums.append(str(func))
            return result

    with torch.no_grad(), fastvit.use_backend("torch"), Record():
        ours(images())
    assert sums == ["aten.add.Tensor"] + ["aten.add_.Tensor"] * 2 * 3  # positions first


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: ImageEncoder(image_size=100), ValueError, "image_size is 100; expected a multiple of patch_size 16"),
        (lambda: ImageEncoder(depth=2), ValueError, r"global_attention is \(2, 5, 8, 11\); expected indices of the 2 blocks"),
        (lambda: ImageEncoder(window_size=0), ValueError, "window_size is 0; expected at least 1"),
        (lambda: ImageEncoder(dim=30.0), TypeError, "dim is 30.0; expected an int"),
        (lambda: encoders()[0](torch.zeros(1, 3, 64, 80)), ValueError, r"images has shape \(1, 3, 64, 80\); expected \(1, 3, 80"),
        (lambda: encoders()[0](torch.zeros(3, 80, 80)), ValueError, "images has shape .* 4 dimensions"),
        (lambda: encoders()[0](torch.zeros(1, 3, 80, 80, dtype=torch.uint8)), TypeError, "images .* torch.uint8"),
    ],
)
def test_an_encoder_refuses(call, error, says):
    with pytest.raises(error, match=says):
        call()


# Prompts


def parts(side=160, dim=32, mask_in=16, decoder_dim=32, mlp_dim=64, **options):
    """segment_anything's Sam and ours, small, with the same weights."""
    from segment_anything import modeling

    grid = side // 16
    encoder = ImageEncoder(
        side, 16, dim=dim, depth=2, num_heads=2, out_channels=decoder_dim, window_size=3, global_attention=(1,)
    )
    theirs = modeling.Sam(
        theirs_of(encoder),
        modeling.PromptEncoder(decoder_dim, (grid, grid), (side, side), mask_in),
        modeling.MaskDecoder(
            transformer_dim=decoder_dim,
            transformer=modeling.TwoWayTransformer(2, decoder_dim, 4, mlp_dim),
            iou_head_hidden_dim=decoder_dim,
        ),
    )
    sizes = {"dim": dim, "depth": 2, "num_heads": 2, "global_attention": (1,), "window_size": 3, "mask_in_channels": mask_in}
    sizes |= {"prompt_dim": decoder_dim, "decoder_heads": 4, "decoder_mlp_dim": mlp_dim, "iou_head_hidden_dim": decoder_dim}
    ours = build_sam(side, **sizes, **options)
    ours.load_state_dict(perturb(theirs).state_dict(), strict="text_dim" not in options)
    return ours, theirs


def points(batch=3, count=2):
    coordinates = random(batch, count, 2).abs() * 60
    labels = torch.tensor([1, 0, -1]).repeat(batch * count)[: batch * count].view(batch, count)
    return coordinates, labels


PROMPTS = {
    "nothing": lambda batch: {},
    "points": lambda batch: {"points": points(batch)},
    "no points": lambda batch: {"points": points(batch, 0)},
    "boxes": lambda batch: {"boxes": random(batch, 4).abs() * 60},
    "masks": lambda batch: {"masks": random(batch, 1, 40, 40, scale=5)},
    "points and boxes": lambda batch: {"points": points(batch, 3), "boxes": random(batch, 4).abs() * 60},
    "all": lambda batch: {"points": points(batch), "boxes": random(batch, 4).abs(), "masks": random(batch, 1, 40, 40)},
}


def theirs_take(prompts):
    return {"points": None, "boxes": None, "masks": None, **prompts}


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


# The mask decoder


def decode(model, embeddings, multimask=True, **prompts):
    sparse, dense = model.prompt_encoder(**theirs_take(prompts))
    return model.mask_decoder(
        image_embeddings=embeddings,
        image_pe=model.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )


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


def every_gradient(model):
    """Zeros stand for none."""
    return {name: torch.zeros_like(p).cpu() if p.grad is None else p.grad.cpu() for name, p in model.named_parameters()}


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


# The whole


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
