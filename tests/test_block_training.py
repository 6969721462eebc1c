"""A pre-norm block as one autograd Function under autocast and with stochastic depth: numbers, dtypes, casts, random draws."""

import contextlib
import copy
import gc

import pytest
import torch
from timm.layers import DropPath
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit.integrations.swap import is_served
from fastvit.nn import EncoderBlock
from fastvit.ops import _casts, linear
from tests import models_for_acceleration as models
from tests.model_errors import assert_equal_gradients, seeded
from tests.test_block import ONE, gradients, hf_dinov2, hf_vit, made, timm_vit
from tests.test_sam_accelerate import small

pytestmark = pytest.mark.usefixtures("triton_backend")


def autocast(x: torch.Tensor, dtype: torch.dtype = torch.bfloat16, **options) -> torch.autocast:
    return torch.autocast(x.device.type, dtype=dtype, **options)


def under(block, context):
    """A forward that leaves the context before backward."""

    def forward(x):
        with context():
            return block(x)

    return forward


@pytest.mark.parametrize(
    ("build", "options", "vendor", "dtype"),
    [
        (timm_vit, {"qkv_bias": False}, True, torch.bfloat16),
        (timm_vit, {"init_values": None}, False, torch.bfloat16),
        (hf_vit, {}, True, torch.bfloat16),
        (hf_dinov2, {}, False, torch.float16),
    ],
    ids=["LayerScale", "packed, kernels", "three projections", "both, float16, kernels"],
)
def test_under_autocast_it_errs_as_the_original_does(build, options, vendor, dtype, device, monkeypatch):
    """At most twice what the original errs under autocast, and what an eps of its dtype comes to."""
    monkeypatch.setattr(linear, "left_to_vendor", lambda a, b: vendor)
    ours, original, x = made(build, device, **options)
    x.requires_grad_()
    exact = gradients(copy.deepcopy(original).double(), x.double())
    theirs = gradients(original, x, forward=under(original, lambda: autocast(x, dtype)))
    found = gradients(ours, x, ONE, under(ours, lambda: autocast(x, dtype)))
    assert found.keys() == exact.keys()
    largest = max(gradient.abs().max() for gradient in exact.values())
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        floor = torch.finfo(dtype).eps * max(gradient.abs().max(), 1e-2 * largest)
        error, allowed = (found[name] - gradient).abs().max(), 2 * (theirs[name] - gradient).abs().max() + floor
        assert error <= allowed, f"{name}: {error:.1e}, {allowed:.1e} allowed"


def test_what_stays_float32_under_autocast(device):
    ours, original, x = made(timm_vit, device)
    x.requires_grad_()
    with autocast(x):
        out = ours(x)
        assert out.grad_fn.name() == ONE
        assert out.dtype == original(x).dtype == torch.float32
        torch.testing.assert_close(out, original(x), atol=0.05, rtol=0)
        with autocast(x, enabled=False):
            within = ours(x)
            assert within.grad_fn.name() == ONE
            torch.testing.assert_close(within, original(x), atol=1e-5, rtol=1e-5)
        other = ours(x.bfloat16())
        assert other.grad_fn.name() != ONE, "a residual stream of half precision is the operators'"
    assert_equal_gradients(gradients(ours, x, ONE), gradients(original, x))


@contextlib.contextmanager
def casts(monkeypatch):
    """How many tensors each call casts."""
    made, cast = [], torch._foreach_copy_
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", lambda out, given: made.append(len(out)) or cast(out, given))
        yield made


def test_a_parameter_is_cast_once_as_long_as_autocast_would_keep_it(device, monkeypatch):
    ours, _, x = made(timm_vit, device)
    with casts(monkeypatch) as made_:
        for _ in range(2):
            with autocast(x):
                first, again = ours(x), ours(x)
                with autocast(x):
                    within = ours(x)
            assert torch.equal(first, again)
            assert torch.equal(first, within)
        assert made_ == [8, 8], "once within each outermost autocast"
        with autocast(x, cache_enabled=False):
            kept = ours(x), ours(x)
        assert made_[2:] == [8, 8]
        with autocast(x):
            kept = [ours(x)]
            with torch.no_grad():
                ours.mlp.fc1.weight.add_(1)
            kept.append(ours(x))
            ours.mlp.fc2.weight.data = ours.mlp.fc2.weight.data + 1
            kept.append(ours(x))
            ours.attn.proj.weight.requires_grad_(False)
            kept.append(ours(x))
        assert made_[4:] == [8, 1, 1, 1], "what wants no gradient is cast each time"
        with autocast(x, torch.float16):
            kept.append(ours(x))
        assert made_[8:] == [8]
        ours.mlp.fc1.weight.data.sub_(1)  # which no version tells
        with autocast(x):
            changed = ours(x)
        assert made_[9:] == [8]
        assert not torch.equal(changed, kept[3])
    ours.bfloat16()
    with casts(monkeypatch) as made_, autocast(x):
        assert ours(x).grad_fn.name() != ONE, "norms of half precision"
    assert made_ == []


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_regions_are_told_apart_whatever_the_default_dtype(default, device, monkeypatch):
    monkeypatch.setattr(_casts, "_probes", {})
    monkeypatch.setattr(_casts, "_casts", {})
    ours, _, x = made(timm_vit, device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with casts(monkeypatch) as made_:
            for _ in range(2):
                with autocast(x):
                    ours(x), ours(x)
        assert made_ == [8, 8]
    finally:
        torch.set_default_dtype(before)


def test_a_negated_view_of_a_gradient(device):
    ours, _, x = made(timm_vit, device)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    found = []
    for gradient in (-upstream, torch._neg_view(upstream)):
        ours.zero_grad()
        ours(x).backward(gradient)
        found.append({name: parameter.grad.clone() for name, parameter in ours.named_parameters()})
    assert_equal_gradients(found[1], found[0], 0)


def test_compiled_autograd_is_given_the_operators(device):
    ours, _, x = made(timm_vit, device)
    expected = gradients(ours, x, ONE)
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        assert ours(x).grad_fn.name() != ONE
    assert_equal_gradients(gradients(ours, x, ONE), expected)


def test_casts_live_as_long_as_graphs_that_need_them(device):
    ours, _, x = made(timm_vit, device)
    gc.collect()
    with autocast(x):
        out = ours(x)
        keys = {id(parameter) for parameter in ours.parameters()}
        known = [known for (key, _), known in _casts._casts.items() if key in keys]
        assert all(entry.cast() is not None for entry in known)
        out.sum().backward()
        assert [entry.cast().dim() for entry in known if entry.cast() is not None] == [1] * 4
    count = len(_casts._casts)
    assert len(known) == 8
    del ours, out, known
    gc.collect()
    assert len(_casts._casts) == count - 8


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_under_autocast_compute_the_same_again(reentrant, device):
    ours, _, x = made(timm_vit, device)
    x.requires_grad_()
    once = gradients(ours, x, ONE, under(ours, lambda: autocast(x)))
    again = gradients(ours, x, forward=under(lambda x: checkpoint(ours, x, use_reentrant=reentrant), lambda: autocast(x)))
    assert_equal_gradients(again, once, 0 if not reentrant else 5e-2)


def test_backward_may_be_run_twice_and_under_autocast(device):
    ours, _, x = made(timm_vit, device)
    expected = gradients(ours, x, ONE, under(ours, lambda: autocast(x)))
    leaves = [parameter for _, parameter in ours.named_parameters()]
    with autocast(x):
        out = ours(x)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        first = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
        with torch.no_grad():
            for parameter in ours.mlp.parameters():
                parameter.add_(1)  # of which backward has what forward made
        second = torch.autograd.grad(out, leaves, upstream)
    for (name, _), one, two in zip(ours.named_parameters(), first, second, strict=True):
        assert torch.equal(one, two), name
        assert torch.equal(one, expected[name]), name


def last_of_timm(**options):
    """The second of two blocks, as the first of several has no stochastic depth."""
    model = models.timm_vit(embed_dim=32, depth=2, num_heads=2, drop_path_rate=0.5, **options)
    return model, model.blocks[1:]


DROPPING = [(last_of_timm, {"init_values": None}), (last_of_timm, {}), (hf_dinov2, {"drop_path_rate": 0.5})]


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(("build", "options"), DROPPING, ids=["plain", "LayerScale", "transformers"])
def test_stochastic_depth_draws_as_before(build, options, mixed, device):
    ours, original, x = made(build, device, **options)
    x = x.repeat(2, 1, 1).requires_grad_()
    for block in (ours, original):
        block.train()
        assert any(type(module).__name__.endswith("DropPath") for module in block.modules())
    context = (lambda: autocast(x)) if mixed else contextlib.nullcontext
    found, after = [], []
    for block, name in ((original, None), (ours, ONE)):
        with seeded(5):
            found.append(gradients(block, x, name, under(block, context)))
            after.append(torch.rand(3, device=device))
    assert torch.equal(*after), "another number of draws"
    assert_equal_gradients(found[1], found[0], 5e-2 if mixed else 5e-4)
    with seeded(6):
        assert relative_change(found[1]["x"], gradients(ours, x, ONE, under(ours, context))["x"]) > 0.1, "nothing was dropped"


def relative_change(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


def test_a_drop_path_that_is_watched_is_called_with_the_branch(device):
    ours, _, x = made(last_of_timm, device)
    ours.train()
    seen = []
    ours.drop_path1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert ours(x).grad_fn.name() != ONE
    assert seen == [x.shape]
    with torch.no_grad():
        ours(x)
    assert len(seen) == 2


class NoisyDropPath(torch.nn.Module):
    """Adds to a branch, by its values and not by its samples."""

    def forward(self, branch):
        return branch + branch.abs() * torch.rand_like(branch) if self.training else branch


class NormDropPath(DropPath):
    """Drops the samples of smaller branches."""

    def forward(self, branch):
        norms = branch.detach().flatten(1).norm(dim=1)
        return branch * (norms > norms.median())[:, None, None] if self.training else branch


@pytest.mark.parametrize("kind", [NoisyDropPath, NormDropPath])
def test_a_drop_path_of_another_kind_is_called_with_the_branch(kind, device):
    def build():
        model, blocks = last_of_timm()
        blocks[0].drop_path1, blocks[0].drop_path2 = kind(), kind()
        return model, blocks

    ours, original, x = made(build, device)
    assert is_served(ours)
    found = []
    for block in (original, ours):
        block.train()
        with seeded(5):
            found.append(gradients(block, x))
    assert_equal_gradients(found[1], found[0])


def images_of(options, device):
    """(a block of Segment Anything's on the kernels, the same as it was, hidden states)"""
    torch.manual_seed(0)
    original = models.perturb(EncoderBlock(32, 2, mlp_ratio=1.0, **options)).to(device)
    return copy.deepcopy(original), original, torch.randn(2, 3, 4, 32).to(device)


IMAGES = [
    {"window_size": 2, "rel_pos_size": 2},
    {"window_size": 2, "qkv_bias": False, "layer_scale": 0.5},
    {"rel_pos_size": (3, 4), "drop_path": 0.5},
]


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("options", IMAGES, ids=["windows", "no positions", "global"])
def test_a_block_of_images_is_one_function(options, mixed, device):
    """Against the operators, one of whose steps is called by itself for a hook."""
    ours, original, x = images_of(options, device)
    original.ls2.register_forward_hook(lambda module, args, out: None)
    context = (lambda: autocast(x)) if mixed else contextlib.nullcontext
    x.requires_grad_()
    found = []
    for block, name in ((original, None), (ours, ONE)):
        block.train()
        with seeded(5):
            found.append(gradients(block, x, name, under(block, context)))
    assert all(gradient.dtype == torch.float32 for gradient in found[1].values())
    assert_equal_gradients(found[1], found[0], 3e-2 if mixed else 5e-4)


@pytest.mark.parametrize("others", [(), ("attn.proj", "mlp")], ids=["alone", "and what is above attention"])
def test_tables_of_relative_positions_are_trained_by_themselves(others, device):
    block, _, x = images_of({"window_size": 2, "rel_pos_size": 2}, device)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name.startswith(("attn.rel_pos", *others)))
    wanted = {name: parameter for name, parameter in block.named_parameters() if parameter.requires_grad}
    with fastvit.use_backend("torch"):
        expected = torch.autograd.grad(block(x).square().sum(), list(wanted.values()))
    out = block(x)
    assert out.grad_fn.name() == ONE
    found = torch.autograd.grad(out.square().sum(), list(wanted.values()))
    assert_equal_gradients(dict(zip(wanted, found, strict=True)), dict(zip(wanted, expected, strict=True)))


def test_tables_of_another_size_go_by_the_operators(device):
    ours, original, x = images_of({"rel_pos_size": 5}, device)
    with fastvit.use_backend("torch"):
        expected = gradients(original, x)
    found = gradients(ours, x)
    assert ours(x).grad_fn.name() != ONE
    assert_equal_gradients(found, expected)


def test_segment_anythings_blocks_are_one_function_each(device):
    model, x = (part.to(device) for part in small("segment_anything"))
    original = copy.deepcopy(model)
    fastvit.accelerate(model)
    ended = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: ended.append(out.grad_fn.name()))
    assert_equal_gradients(gradients(model, x.requires_grad_()), gradients(original, x))
    assert ended == [ONE] * len(model.blocks)
