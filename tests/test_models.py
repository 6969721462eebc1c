"""The textbook ViT: timm's numbers with timm's weights, the paper's sizes, positions by their formula, and that it learns."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastvit
from fastvit.models import VisionTransformer, position_similarity, sinusoidal_position, vit_base, vit_huge, vit_large
from fastvit.models.positions import resize_positions
from tests.models_for_acceleration import perturb

SIZES = {"image_size": 32, "patch_size": 8, "num_classes": 7, "dim": 48, "depth": 2, "num_heads": 3, "mlp_dim": 96}


def small(**options) -> VisionTransformer:
    return perturb(VisionTransformer(**{**SIZES, **options}))


def images(batch=2, height=32, width=32):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


# timm


def timm_twin(**options):
    from timm.models.vision_transformer import VisionTransformer as Timm

    sizes = {"img_size": 32, "patch_size": 8, "num_classes": 7, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
    return perturb(Timm(**{**sizes, "dynamic_img_size": True, **options}))


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (16, 16), (64, 48)], ids=str)
def test_timms_weights_give_timms_results_and_gradients(size, backend, device):
    depth = 2 if size == (32, 32) else 1  # the others are about positions
    theirs, ours = timm_twin(depth=depth).to(device), small(depth=depth).to(device)
    ours.load_state_dict(theirs.state_dict())
    x = images(1, *size).to(device)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(leaf) for model, leaf in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), atol=1e-5, rtol=1e-5)
    for output in outputs:
        output.square().sum().backward()
    pairs = {name: (a.grad, b.grad) for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True)}
    pairs["images"] = (inputs[0].grad, inputs[1].grad)
    for name, (a, b) in pairs.items():
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-5, name


def test_without_classes_it_gives_timms_features_of_the_class_token():
    theirs, ours = timm_twin(num_classes=0), small(num_classes=0)
    ours.load_state_dict(theirs.state_dict())
    out = ours(images())
    assert out.shape == (2, 48)
    torch.testing.assert_close(out, theirs(images()), atol=1e-5, rtol=1e-5)
    assert torch.equal(out, ours.forward_features(images())[:, 0])


# The paper's sizes

PAPER = [  # model, exact count, the paper's table 1 in millions, patch of the variant that the table's number is of
    (vit_base, 86_567_656, 86, 16),
    (vit_large, 304_326_632, 307, 32),
    (vit_huge, 632_045_800, 632, 14),
]


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("build", "exact", "millions", "patch"), PAPER, ids=["base", "large", "huge"])
def test_parameters_are_as_many_as_in_the_paper(build, exact, millions, patch):
    assert count(build(device="meta")) == exact
    assert exact == pytest.approx(millions * 1e6, rel=0.01)
    divides = {"image_size": 224, "patch_size": patch}
    assert count(build(device="meta", **divides)) == pytest.approx(millions * 1e6, rel=0.007)
    with torch.device("meta"):
        assert count(build()) == exact


@pytest.mark.parametrize("name", ["base_patch16", "large_patch16", "huge_patch14"])
def test_state_dicts_are_timms_in_name_shape_and_number(name):
    import timm

    build = {"base": vit_base, "large": vit_large, "huge": vit_huge}[name.partition("_")[0]]
    with torch.device("meta"):
        theirs = timm.create_model(f"vit_{name}_224", num_classes=1000)
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in build(device="meta").state_dict().items()} == expected


def test_every_argument_can_be_overridden():
    model = vit_base(image_size=32, patch_size=8, num_classes=3, dim=24, depth=1, num_heads=2, mlp_dim=40, activation="relu")
    assert model(images(1)).shape == (1, 3)
    assert model.blocks[0].mlp.fc1.out_features == 40
    assert model.blocks[0].mlp.activation == "relu"


@pytest.mark.full
@pytest.mark.slow
def test_vit_base_at_full_size_is_timms():
    import timm

    theirs = timm.create_model("vit_base_patch16_224").eval()
    ours = vit_base().eval()
    ours.load_state_dict(theirs.state_dict())
    x = images(1, 224, 224)
    with torch.inference_mode():
        out = ours(x)
        assert out.shape == (1, 1000)
        torch.testing.assert_close(out, theirs(x), atol=2e-5, rtol=2e-5)


# Patches and positions


@pytest.mark.parametrize("bias", [True, False])
def test_patches_are_projected_as_the_linear_map_of_flattened_patches(bias):
    model = small(patch_bias=bias, patch_size=(8, 4))
    assert (model.patch_embed.proj.bias is not None) == bias
    x = images(2)
    patches = x.unfold(2, 8, 8).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    assert patches.shape == (2, 4 * 8, 3 * 8 * 4)
    expected = F.linear(patches, model.patch_embed.proj.weight.flatten(1), model.patch_embed.proj.bias)
    torch.testing.assert_close(model.patch_embed(x), expected, atol=1e-5, rtol=1e-5)
    tokens = model.embed(x)
    torch.testing.assert_close(tokens[:, 1:], expected + model.pos_embed[:, 1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens[:, :1], (model.cls_token + model.pos_embed[:, :1]).expand(2, 1, 48))


def test_the_sinusoidal_table_is_its_formula():
    table = sinusoidal_position(50, 12, dtype=torch.float64)
    assert table.shape == (50, 12)
    for t in range(50):
        for k in range(1, 7):
            angle = t * 10000 ** (-2 * k / 12)
            assert table[t, 2 * k - 2].item() == pytest.approx(math.sin(angle), abs=1e-13)
            assert table[t, 2 * k - 1].item() == pytest.approx(math.cos(angle), abs=1e-13)


def test_sinusoidal_positions_are_bounded_unique_and_alike_by_distance():
    table = sinusoidal_position(1370, 384)
    assert table.dtype == torch.float32
    assert table.abs().max() <= 1
    assert len(torch.unique(table, dim=0)) == 1370
    similarity = position_similarity(table[:300].double())
    assert similarity.shape == (300, 300)
    for distance in (0, 1, 17, 250):
        diagonal = similarity.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
    assert (similarity.argmax(1) == torch.arange(300)).all()
    torch.testing.assert_close(similarity.diagonal(), torch.full((300,), 192.0, dtype=torch.float64), atol=1e-4, rtol=0)


def test_sinusoidal_positions_follow_the_number_of_tokens():
    model = small(pos_embed="sinusoidal")
    assert "pos_embed" not in model.state_dict()
    for size in ((32, 32), (40, 24)):
        x = images(1, *size)
        tokens = 1 + size[0] * size[1] // 64
        without = torch.cat([model.cls_token, model.patch_embed(x)], 1)
        torch.testing.assert_close(model.embed(x) - without, sinusoidal_position(tokens, 48)[None], atol=2e-6, rtol=0)
        assert model(x).isfinite().all()


def test_a_table_is_resized_by_its_grid_and_the_class_token_is_kept():
    ramp = torch.arange(4.0)[:, None, None].expand(4, 6, 2)  # grows down the grid
    table = torch.cat([torch.full((1, 1, 2), 9.0), ramp.reshape(1, 24, 2)], 1)
    resized = resize_positions(table, (4, 6), (8, 3))
    assert resized.shape == (1, 25, 2)
    assert torch.equal(resized[:, :1], table[:, :1])
    grid = resized[:, 1:].unflatten(1, (8, 3))
    assert (grid.diff(dim=1) > 0).all()
    torch.testing.assert_close(grid[:, :, 0], grid[:, :, 2])
    assert resize_positions(table, (4, 6), (4, 6)) is table
    # as many tokens in another arrangement are not the same grid
    assert not torch.equal(resize_positions(table, (4, 6), (6, 4)), table)


# The whole


@pytest.mark.parametrize(
    "options", [{}, {"norm_statistics": "image"}, {"pos_embed": "sinusoidal", "activation": "relu"}], ids=str
)
def test_both_backends_compute_the_float64_model(options, backend, device):
    model, x = small(**options).to(device), images().to(device)
    with fastvit.use_backend("torch"):
        exact = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(model(x).double(), exact, atol=2e-5, rtol=2e-5)


def test_norms_by_image_reach_every_norm():
    model = small(norm_statistics="image")
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 5
    assert all(norm.statistics == "image" for norm in norms)
    twin = small()
    twin.load_state_dict(model.state_dict())
    assert (twin(images()) - model(images())).abs().max() > 1e-3


def test_it_overfits_eight_random_images():
    torch.manual_seed(0)
    model = VisionTransformer(**{**SIZES, "num_classes": 8})
    x, labels = images(8), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(59):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(model(x).argmax(1), labels)
    assert F.cross_entropy(model(x), labels) < 0.1


def test_copies_pickles_and_state_dicts_are_the_same_model(tmp_path):
    model = small()
    expected = model(images())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = VisionTransformer(**SIZES).eval()
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    empty = VisionTransformer(**SIZES, device="meta").to_empty(device="cpu").eval()
    empty.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, empty):
        assert torch.equal(twin(images()), expected)


def test_initial_weights_are_small_and_reproducible():
    first, second = VisionTransformer(**SIZES), VisionTransformer(**SIZES, device="meta").to_empty(device="cpu")
    for model in (first, second):
        torch.manual_seed(3)
        model.reset_parameters()
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
        if name.endswith("bias") or name == "cls_token":
            assert not a.any(), name
        elif "norm" in name:
            assert torch.equal(a, torch.ones_like(a)), name
        else:
            assert 0.015 < a.std() < 0.02, name  # a normal distribution cut at two deviations has 0.88 of its deviation
            assert a.abs().max() <= 0.04, name


@pytest.mark.parametrize("options", [{}, pytest.param({"pos_embed": "sinusoidal"}, marks=pytest.mark.slow)], ids=str)
def test_compiles_as_one_graph_also_for_another_image_size(options, backend, device):
    model = small(depth=1, **options).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in ((16, 16), (24, 16)):
        x = images(1, *size).to(device)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"pos_embed": "sinusoidal"}], ids=str)
def test_exports(options, backend, device):
    model = small(depth=1, **options).to(device)
    x = images(1, 24, 16).to(device)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-5, rtol=1e-5)


def test_autocast(backend, device):
    model = small(depth=1).to(device)
    x = images(1, 16, 16).to(device)
    with torch.autocast(device, torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(x), atol=0.1, rtol=0.05)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pos_embed", ["learned", "sinusoidal"])
def test_another_dtype(dtype, pos_embed):
    model = VisionTransformer(**SIZES, pos_embed=pos_embed, dtype=dtype)
    assert model(images(1, 24, 40).to(dtype)).dtype == dtype


REFUSALS = [
    (lambda: small(image_size=30), ValueError, "image_size has height and width (30, 30)"),
    (lambda: small(patch_size=0), ValueError, "patch_size is 0"),
    (lambda: small(image_size="224"), TypeError, "image_size is '224'"),
    (lambda: small(num_heads=5), ValueError, "dim is 48 and num_heads 5"),
    (lambda: small(depth=-1), ValueError, "depth is -1"),
    (lambda: small(mlp_dim=0), ValueError, "mlp_dim is 0"),
    (lambda: small(num_classes=1.5), TypeError, "num_classes is 1.5"),
    (lambda: small(pos_embed="rotary"), ValueError, "pos_embed is 'rotary'"),
    (lambda: small(dim=51, pos_embed="sinusoidal"), ValueError, "dim is 51"),
    (lambda: small(norm_statistics="batch"), ValueError, "statistics is 'batch'"),
    (lambda: small(activation="swish"), ValueError, "activation is 'swish'"),
    (lambda: small()(images(1, 30, 32)), ValueError, "(30, 32)"),
    (lambda: small()(images(1)[:, :2]), ValueError, "(1, 2, 32, 32)"),
    (lambda: small()(images(1)[0]), ValueError, "(3, 32, 32)"),
    (lambda: small()(images(1)[..., :0]), ValueError, "(32, 0)"),
    (lambda: small()((images(1) * 255).to(torch.uint8)), TypeError, "torch.uint8"),
    (lambda: sinusoidal_position(4, 7), ValueError, "dim is 7"),
    (lambda: sinusoidal_position(0, 8), ValueError, "num_tokens is 0"),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSALS, ids=[words for _, _, words in REFUSALS])
def test_what_does_not_fit_is_refused(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
    assert "expected" in str(caught.value)


def test_an_empty_batch_gives_no_logits():
    assert small()(images(1)[:0]).shape == (0, 7)


def test_the_models_are_reached_from_the_package():
    assert fastvit.models.VisionTransformer is VisionTransformer
