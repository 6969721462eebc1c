"""Sam's image encoder beside segment_anything 1.0's with the same seeded weights, positions and relative positions not zero."""

import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from fastvit.models.sam import ImageEncoder
from tests.metas_sam import ENCODER, FLOAT32, images, random, theirs_of
from tests.model_errors import assert_equal_gradients, relative


def encoders(**options):
    ours = ImageEncoder(**{**ENCODER, "global_attention": (1,), **options})
    return ours, theirs_of(ours)


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
