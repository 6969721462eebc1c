"""The modules against their equations in float64, by way of the reference; and that hooks and adapters in them take effect."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import fastvit
from fastvit import reference
from fastvit.nn import MLP, Attention, DropPath, EncoderBlock, LayerNorm, LayerScale, Linear
from tests.conftest import ON_GPU
from tests.models_for_acceleration import perturb


def attention_equation(module: Attention, x, attn_mask=None, is_causal=False):
    """MHA(x) of (B, N, C) or, on a grid, (B, H, W, C)."""
    qkv = reference.linear(x, module.qkv.weight, module.qkv.bias)
    if module.on_grid:
        out = reference.image_attention(
            qkv,
            num_heads=module.num_heads,
            rel_pos_h=module.rel_pos_h,
            rel_pos_w=module.rel_pos_w,
            window_size=module.window_size,
            pad_qkv=module.qkv.bias,
        )
    else:
        heads = [t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1)]
        out = reference.attention(*heads, attn_mask, is_causal=is_causal).transpose(1, 2).reshape(x.shape)
    return reference.linear(out, module.proj.weight, module.proj.bias)


def norm_equation(norm: LayerNorm, x):
    rows = x.flatten(1, -2) if norm.statistics == "image" else x
    return reference.layer_norm(rows, norm.weight, norm.bias, norm.eps, statistics=norm.statistics).view(x.shape)


def block_equation(block: EncoderBlock, z, attn_mask=None, is_causal=False):
    """z' = z + γ₁·MHA(LN(z)), z'' = z' + γ₂·MLP(LN(z'))."""
    gamma1, gamma2 = (getattr(scale, "gamma", 1.0) for scale in (block.ls1, block.ls2))
    z = z + gamma1 * attention_equation(block.attn, norm_equation(block.norm1, z), attn_mask, is_causal)
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    hidden = reference.linear(norm_equation(block.norm2, z), fc1.weight, fc1.bias, activation=block.mlp.activation)
    return z + gamma2 * reference.linear(hidden, fc2.weight, fc2.bias)


def assert_same(module, equation, x, tolerance, **keywords):
    """Result and every gradient of ``module`` against the equation computed with its parameters in float64."""
    device = "cuda" if ON_GPU else "cpu"
    module, x = module.to(device), x.to(device)
    keywords = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in keywords.items()}
    exact = copy.deepcopy(module).double()
    leaves = [x.clone().requires_grad_(), x.double().requires_grad_()]
    results = [module(leaves[0], **keywords), equation(exact, leaves[1], **keywords)]
    assert results[0].dtype == x.dtype
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for result in results:
        result.backward(upstream.to(result))
    pairs = {"result": results, "input": [leaf.grad for leaf in leaves]}
    for (name, ours), theirs in zip(module.named_parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None, f"{name} got no gradient"
        pairs[name] = [ours.grad, theirs.grad]
    for name, (ours, theirs) in pairs.items():
        error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-3)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


def tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


# float32: a chain of sums of at most some hundred terms; float64: rounding alone.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}

BLOCKS = {
    "plain": {},
    "layer scale": {"layer_scale": 0.5},
    "relu, no qkv bias": {"activation": "relu", "qkv_bias": False},
    "tanh GELU, ratio 1.7": {"activation": "gelu_tanh", "mlp_ratio": 1.7},
    "quick GELU": {"activation": "quick_gelu"},
    "image statistics": {"norm_statistics": "image", "layer_scale": 0.5},
}


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS.keys())
def test_a_block_is_its_equation(options, backend):
    block = perturb(EncoderBlock(32, 2, **{"mlp_ratio": 2.0, **options}))
    assert_same(block, block_equation, tokens(2, 5, 32), TOLERANCE[torch.float32])


@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS.keys())
def test_a_block_is_its_equation_in_float64(options):
    block = perturb(EncoderBlock(32, 2, **options)).double()
    assert_same(block, block_equation, tokens(2, 5, 32, dtype=torch.float64), TOLERANCE[torch.float64])


@pytest.mark.parametrize("kind", ["bool", "additive", "causal"])
def test_masks_reach_the_attention(kind, backend):
    block = perturb(EncoderBlock(32, 2, mlp_ratio=1.0))
    mask = {"bool": torch.rand(1, 1, 5, 5) < 0.6, "additive": torch.randn(2, 1, 5, 5), "causal": None}[kind]
    assert_same(block, block_equation, tokens(2, 5, 32), TOLERANCE[torch.float32], attn_mask=mask, is_causal=kind == "causal")


GRIDS = {
    "global, its own side": {"rel_pos_size": (5, 3)},
    "global, resized tables": {"rel_pos_size": 4},
    "windows with padding": {"rel_pos_size": 2, "window_size": 2},
    "windows without tables": {"window_size": 3},
    "windows without a bias": {"window_size": 2, "rel_pos_size": 2, "qkv_bias": False},
    "image statistics": {"window_size": 2, "norm_statistics": "image"},
}


@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS.keys())
def test_a_block_on_a_grid_is_its_equation(options, backend):
    block = perturb(EncoderBlock(32, 2, mlp_ratio=1.0, layer_scale=0.5, **options))
    assert_same(block, block_equation, tokens(1, 5, 3, 32), TOLERANCE[torch.float32])


@pytest.mark.parametrize("options", GRIDS.values(), ids=GRIDS.keys())
def test_a_block_on_a_grid_is_its_equation_in_float64(options):
    block = perturb(EncoderBlock(32, 2, **options)).double()
    assert_same(block, block_equation, tokens(2, 5, 3, 32, dtype=torch.float64), TOLERANCE[torch.float64])


def test_relative_positions_begin_at_zero_and_learn():
    block = EncoderBlock(32, 2, rel_pos_size=(5, 3))
    assert block.attn.rel_pos_h.shape == (9, 16)
    assert block.attn.rel_pos_w.shape == (5, 16)
    assert not block.attn.rel_pos_h.any()
    assert not block.attn.rel_pos_w.any()
    block(tokens(1, 5, 3, 32)).square().sum().backward()
    assert block.attn.rel_pos_h.grad.abs().max() > 0
    assert block.attn.rel_pos_w.grad.abs().max() > 0


def test_names_are_those_of_timm_and_segment_anything():
    names = {name for name, _ in EncoderBlock(32, 2, rel_pos_size=4, layer_scale=1e-5).named_parameters()}
    linears = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")
    expected = {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}
    assert names == expected | {"attn.rel_pos_h", "attn.rel_pos_w", "ls1.gamma", "ls2.gamma"}


NORMED = [(s, shape) for s in ("token", "image") for shape in ((2, 3, 32), (2, 3, 2, 32))] + [("token", (2, 32))]


@pytest.mark.parametrize(("statistics", "shape"), NORMED, ids=str)
def test_layer_norm_is_its_equation(statistics, shape, backend):
    norm = perturb(LayerNorm(32, 1e-3, statistics))
    assert_same(norm, norm_equation, tokens(*shape), TOLERANCE[torch.float32])


def test_layer_norm_by_image_makes_an_image_normal_not_a_token():
    x = tokens(2, 7, 32) * torch.arange(1, 8)[:, None] + 3
    out = LayerNorm(32, statistics="image")(x)
    torch.testing.assert_close(out.mean((1, 2)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var((1, 2), correction=0), torch.ones(2), atol=1e-4, rtol=0)
    assert (out.var(2, correction=0) - 1).abs().max() > 0.3


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 3, 2))
    rows = out.flatten(1)
    assert ((rows == 0).all(1) | (rows == 1 / 0.75).all(1)).all()
    # ±4 deviations of a mean of 4000 samples that are 0 or 4/3
    assert abs(rows[:, 0].mean().item() - 1) < 4 * math.sqrt(0.25 / 0.75 / 4000)
    assert torch.equal(drop.eval()(torch.ones(3, 2)), torch.ones(3, 2))


def test_a_block_drops_each_branch_by_itself():
    block = perturb(EncoderBlock(32, 2, drop_path=0.5, layer_scale=0.5)).train()
    x = tokens(1, 3, 32).expand(64, 3, 32)
    outcomes = {tuple(row.flatten()[:4].tolist()) for row in block(x).detach()}
    assert len(outcomes) == 4  # neither, the first, the second, both
    assert any(torch.equal(torch.tensor(outcome), x[0].flatten()[:4]) for outcome in outcomes)
    torch.manual_seed(5)
    first = block(x)
    torch.manual_seed(5)
    assert torch.equal(first, block(x))


@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.5}, {"drop_path": 0.5}], ids=str)
def test_on_the_kernels_a_block_that_trains_is_one_function(options, triton_backend, device):
    block = perturb(EncoderBlock(32, 2, mlp_ratio=1.0, **options)).to(device).train()
    x = tokens(3, 5, 32).to(device).requires_grad_()

    def gradients(one: bool) -> list[torch.Tensor]:
        torch.manual_seed(5)
        out = block(x)
        assert (out.grad_fn.name() == "BlockBackward") == one
        return [out, *torch.autograd.grad(out.square().sum(), (x, *block.parameters()))]

    once = gradients(True)
    block.ls1.register_forward_hook(lambda module, args, out: None)
    for found, expected in zip(once, gradients(False), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    for extra in ({"is_causal": True}, {"attn_mask": torch.zeros(5, 5, device=device)}):
        assert perturb(EncoderBlock(32, 2)).to(device)(x, **extra).grad_fn.name() != "BlockBackward"
    with pytest.raises(ValueError, match="expected 3 dimensions"):
        perturb(EncoderBlock(32, 2)).to(device)(x[0])


def test_queries_and_keys_are_what_the_attention_uses():
    attention = perturb(Attention(32, 2))
    x = tokens(2, 5, 32)
    query, key, scale = attention.queries_and_keys(x)
    value = attention.qkv(x).chunk(3, -1)[2].unflatten(-1, (2, 16)).transpose(1, 2)
    weights = torch.softmax(scale * query @ key.transpose(-2, -1), -1)
    expected = attention.proj((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("path", ["attn", "attn.qkv", "ls1", "norm2", "mlp", "mlp.fc1", "mlp.fc2", "ls2"])
def test_a_hook_on_a_child_is_called_and_changes_the_result(path):
    block = perturb(EncoderBlock(32, 2, layer_scale=0.5))
    x = tokens(1, 3, 32)
    before = block(x)
    hook = block.get_submodule(path).register_forward_hook(lambda module, args, output: output * 2)
    doubled = block(x)
    assert (doubled - before).abs().max() > 1e-3
    hook.remove()
    assert torch.equal(block(x), before)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_on_all_modules_sees_every_child(kind):
    block, seen = EncoderBlock(16, 2, layer_scale=0.5), []
    hook = getattr(nn.modules.module, f"register_module_{kind}_hook", None)
    if hook is None:
        pytest.skip(f"this torch has no {kind} hook on all modules")
    handle = hook(lambda module, *_: seen.append(module))
    try:
        block(tokens(2, 5, 16).requires_grad_()).sum().backward()
    finally:
        handle.remove()
    expected = {"norm1", "attn", "attn.qkv", "attn.proj", "ls1", "norm2", "mlp", "mlp.fc1", "mlp.fc2", "ls2"}
    assert {name for name, module in block.named_modules() if module in seen} >= expected


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu", None])
def test_the_mlp_in_steps_computes_the_same(activation):
    mlp = perturb(MLP(32, 24, activation))
    x = tokens(3, 32)
    fused = mlp(x)
    mlp.fc2.register_forward_hook(lambda module, args, output: None)
    torch.testing.assert_close(mlp(x), fused, atol=1e-5, rtol=1e-5)


def test_a_lora_adapter_takes_effect():
    peft = pytest.importorskip("peft")
    block = perturb(EncoderBlock(32, 2))
    x = tokens(1, 3, 32)
    before = block(x).detach()
    adapted = peft.get_peft_model(block, peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], init_lora_weights=False))
    assert (adapted(x) - before).abs().max() > 1e-4
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x), before, atol=1e-6, rtol=1e-6)


def test_copies_pickles_and_state_dicts_are_the_same_block():
    block = perturb(EncoderBlock(32, 2, layer_scale=0.5, drop_path=0.1))
    x = tokens(2, 3, 32)
    other = EncoderBlock(32, 2, layer_scale=0.1)
    other.load_state_dict(block.state_dict())
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), other.eval()):
        assert torch.equal(twin(x), block(x))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.5}, {"norm_statistics": "image"}], ids=str)
def test_compiles_as_one_graph_with_gradients(options, backend, device):
    block = perturb(EncoderBlock(32, 2, mlp_ratio=1.0, **options)).to(device)
    x = tokens(1, 3, 32).to(device).requires_grad_()
    expected = block(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    out = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_windowed_block_compiles_as_one_graph(backend, device):
    block = perturb(EncoderBlock(32, 2, mlp_ratio=1.0, window_size=4, rel_pos_size=4)).to(device)
    x = tokens(1, 3, 3, 32).to(device)
    with torch.no_grad():  # every window of the torch backend is traced by itself, with its checkpoint where it has a gradient
        out = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(out, block(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window_size": 2, "rel_pos_size": 2}], ids=str)
def test_autocast_computes_products_in_bfloat16_and_sums_in_float32(options, backend, device):
    block = perturb(EncoderBlock(32, 2, mlp_ratio=1.0, layer_scale=0.5, **options)).to(device)
    x = (tokens(1, 3, 3, 32) if options else tokens(1, 3, 32)).to(device)
    seen = []
    block.attn.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast(device, torch.bfloat16):
        out = block(x)
    assert seen == [torch.bfloat16]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, block(x), atol=0.05, rtol=0.05)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_block_in_another_dtype_stays_in_it(dtype):
    block = perturb(EncoderBlock(32, 2, layer_scale=0.5, dtype=dtype))
    assert {p.dtype for p in block.parameters()} == {dtype}
    x = tokens(2, 5, 32, dtype=dtype)
    out = block(x)
    assert out.dtype == dtype
    exact = block_equation(copy.deepcopy(block).double(), x.double())
    assert (out.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_device_is_where_parameters_are_made():
    block = EncoderBlock(32, 2, layer_scale=0.5, rel_pos_size=3, device="meta")
    assert {p.device.type for p in block.parameters()} == {"meta"}


REFUSALS = [
    (lambda: Attention(30, 4), ValueError, "dim is 30 and num_heads 4"),
    (lambda: Attention(514, 2), ValueError, "257"),
    (lambda: Attention(32.0, 2), TypeError, "dim is 32.0"),
    (lambda: Attention(32, True), TypeError, "num_heads is True"),
    (lambda: Attention(32, 2, window_size=-1), ValueError, "window_size is -1"),
    (lambda: Attention(32, 2, rel_pos_size=0), ValueError, "rel_pos_size is 0"),
    (lambda: Attention(32, 2, rel_pos_size=(1, 2, 3)), TypeError, "rel_pos_size is (1, 2, 3)"),
    (lambda: MLP(32, 0), ValueError, "hidden_dim is 0"),
    (lambda: MLP(32, 8, "swish"), ValueError, "activation is 'swish'"),
    (lambda: LayerNorm(32, eps=-1), ValueError, "eps is -1"),
    (lambda: LayerNorm(32, statistics="batch"), ValueError, "statistics is 'batch'"),
    (lambda: LayerScale(8, "x"), TypeError, "value is 'x'"),
    (lambda: DropPath(1.0), ValueError, "drop_path is 1.0"),
    (lambda: EncoderBlock(32, 2, mlp_ratio=0), ValueError, "mlp_ratio is 0"),
    (lambda: EncoderBlock(32, 2, drop_path=float("nan")), ValueError, "drop_path is nan"),
    (lambda: Attention(32, 2)(torch.zeros(2, 3, 3, 32)), ValueError, "(2, 3, 3, 32)"),
    (lambda: Attention(32, 2)(torch.zeros(2, 3, 31)), ValueError, "(2, 3, 31)"),
    (lambda: Attention(32, 2, window_size=2)(torch.zeros(2, 3, 32)), ValueError, "(2, 3, 32)"),
    (lambda: Attention(32, 2, window_size=2)(torch.zeros(1, 2, 2, 32), is_causal=True), ValueError, "is_causal"),
    (lambda: Attention(32, 2, rel_pos_size=2).queries_and_keys(torch.zeros(1, 4, 32)), ValueError, "rel_pos_size"),
    (lambda: EncoderBlock(32, 2)(None), TypeError, "NoneType"),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSALS, ids=[words for _, _, words in REFUSALS])
def test_what_does_not_fit_is_refused(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
    assert "expected" in str(caught.value)


def test_printing_shows_what_was_chosen():
    text = repr(EncoderBlock(32, 2, window_size=7, layer_scale=0.1, drop_path=0.2, norm_statistics="image"))
    for words in ("num_heads=2, window_size=7", "eps=1e-06", "statistics='image'", "activation='gelu'", "rate=0.2"):
        assert words in text


def test_the_modules_are_reached_from_the_package():
    assert fastvit.nn.EncoderBlock is EncoderBlock
    assert isinstance(EncoderBlock(32, 2).attn.qkv, nn.Linear)
    assert type(EncoderBlock(32, 2).attn.qkv) is Linear
