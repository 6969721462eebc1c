"""The operators inside PyTorch: opcheck, compile, export, autocast, checkpointing, torch.func, and what runs under them."""

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit import functional
from fastvit.ops import attention as attention_op  # registers torch.ops.fastvit.*
from fastvit.ops import glu, layer_norm, linear, quantized, rotary  # noqa: F401
from tests.conftest import ON_GPU

# --- the raw operators ----------------------------------------------------------------------------------------------------


def _t(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).to("cuda" if ON_GPU else "cpu")


def _attention_forward(mask=None, rel=False, causal=False, dtype=torch.float32):
    rel_h, rel_w = (_t(2, 2, 6, 2, dtype=dtype), _t(2, 2, 6, 3, dtype=dtype)) if rel else (None, None)
    query, key, value = _t(2, 2, 6, 16, dtype=dtype), _t(2, 1, 6, 16, dtype=dtype), _t(2, 1, 6, 8, dtype=dtype)
    return query, key, value, mask, rel_h, rel_w, causal, 0.25


def _attention_backward(wants_mask=False, **options):
    arguments = _attention_forward(**options)
    out, lse = torch.ops.fastvit.attention_forward(*arguments)
    return (torch.randn_like(out), *arguments[:6], out, lse, *arguments[6:], wants_mask)


def _layer_norm_backward(statistics, weight=True, bias=True):
    x, w, b = _t(2, 5, 8), _t(8) if weight else None, _t(8) if bias else None
    y, mean, rstd = torch.ops.fastvit.layer_norm_forward(x, w, b, 1e-6, statistics)
    return torch.randn_like(y), x, w, b, mean, rstd, statistics


def _add_layer_norm_backward(scale=True, residual=torch.float32, branch=torch.float32):
    r, x = _t(2, 5, 8, dtype=residual), _t(2, 5, 8, dtype=branch)
    w, b, s = _t(8), _t(8), _t(8) if scale else None
    y, total, mean, rstd = torch.ops.fastvit.add_layer_norm_forward(r, x, w, b, 1e-6, s)
    return torch.randn_like(y), torch.randn_like(total), x if scale else None, total, w, b, s, mean, rstd, residual, branch


def _linear_backward(activation, wants, bias=True):
    x, w, b = _t(2, 5, 8), _t(6, 8), _t(6)
    out, pre = torch.ops.fastvit.linear_forward(x, w, b, activation, True)
    return torch.randn_like(out), x, w, pre, activation, bias, wants


def _mlp(activation="gelu"):
    return _t(2, 5, 8), _t(12, 8), _t(12), _t(6, 12), _t(6), activation


def _mlp_backward(activation, wants):
    x, w1, b1, w2, b2, _ = _mlp()
    out, pre = torch.ops.fastvit.mlp_forward(x, w1, b1, w2, b2, activation, True)
    return torch.randn_like(out), x, w1, w2, pre, activation, True, True, wants


def _qk_norm_rope(norm=None, rotate=True, bias=True, tables=1, dtype=torch.float32):
    query, key = _t(2, 5, 4, 16, dtype=dtype).transpose(1, 2), _t(2, 2, 5, 16, dtype=dtype)
    cos, sin = (_t(tables, 4, 16) if rotate else None for _ in range(2))
    weight, bias = _t(16) if norm else None, _t(16) if norm == "layer" and bias else None
    return query, key, cos, sin, False, norm, weight, bias, weight, bias, 1e-6


def _rotary_attention(norm=None, **options):
    query, key, *rest = _qk_norm_rope(norm, **options)
    return query, key, torch.randn_like(key), *rest, 0.3


def _qk_norm_rope_backward(**options):
    query, key, *rest = _qk_norm_rope(**options)
    return torch.randn_like(query), torch.randn_like(key), query, key, *rest


def _glu(activation="silu", dtype=torch.float32):
    return *_t(2, 5, 16, dtype=dtype).chunk(2, dim=-1), activation


def _image_attention_forward(window=4, tables=True, pad=True, dtype=torch.float32):
    size = [window, window] if window else [3, 5]
    rel_pos_h, rel_pos_w = (_t(2 * s - 1, 16, dtype=dtype) if tables else None for s in size)
    return _t(2, 3, 5, 96, dtype=dtype), rel_pos_h, rel_pos_w, _t(96, dtype=dtype) if pad else None, 2, size, 0.25


def _image_attention_backward(wants_tables=True, wants_pad=True, **options):
    arguments = _image_attention_forward(**options)
    out, *saved = torch.ops.fastvit.image_attention_forward(*arguments)
    return (torch.randn_like(out), *arguments[:4], out, *saved, *arguments[4:], wants_tables, wants_pad)


def _torch_image_attention_backward(wanted, **options):
    qkv, *rest = _image_attention_forward(**options)
    return _t(*qkv.shape[:3], qkv.shape[3] // 3, dtype=qkv.dtype), qkv, *rest, wanted


def _linear_8bit(form=quantized.INT8):
    return *quantized.quantize(_t(2, 5, 16), form), *quantized.quantize_weight(_t(8, 16), form, _t(8))


SAMPLES = {
    "attention_forward": {
        "plain": _attention_forward,
        "causal, bfloat16": lambda: _attention_forward(causal=True, dtype=torch.bfloat16),
        "boolean mask": lambda: _attention_forward(mask=_t(2, 1, 6, 6) > 0),
        "rel and additive mask": lambda: _attention_forward(mask=_t(1, 2, 1, 6), rel=True),
    },
    "attention_backward": {
        "plain": _attention_backward,
        "rel": lambda: _attention_backward(rel=True),
        "additive mask, its gradient wanted": lambda: _attention_backward(mask=_t(1, 2, 1, 6), wants_mask=True),
        "additive mask, its gradient not wanted": lambda: _attention_backward(mask=_t(1, 2, 1, 6)),
    },
    "image_attention_forward": {
        "windows": _image_attention_forward,
        "the whole image, bare, bfloat16": lambda: _image_attention_forward(0, False, False, torch.bfloat16),
    },
    "image_attention_backward": {
        "windows": _image_attention_backward,
        "dqkv only": lambda: _image_attention_backward(False, False),
        "the whole image, bare": lambda: _image_attention_backward(False, False, window=0, tables=False, pad=False),
    },
    "torch_image_attention_forward": {
        "windows": _image_attention_forward,
        "the whole image, bare, bfloat16": lambda: _image_attention_forward(0, False, False, torch.bfloat16),
    },
    "torch_image_attention_backward": {
        "windows": lambda: _torch_image_attention_backward([True] * 4),
        "a table only": lambda: _torch_image_attention_backward([False, True, False, False]),
        "the whole image, bare": lambda: _torch_image_attention_backward([True, False, False, False], window=0, tables=False),
    },
    "quantize": {
        "bfloat16": lambda: (_t(2, 5, 16, dtype=torch.bfloat16), None, None, False, None, None, 0.0, quantized.INT8),
        "sum and norm": lambda: (_t(2, 5, 16), _t(2, 5, 16), _t(16), True, _t(16), _t(16), 1e-6, quantized.E4M3),
    },
    "quantize_glu": {"silu": lambda: (_t(2, 5, 16), _t(2, 5, 16), "silu", quantized.INT8)},
    "linear_8bit": {
        "gelu": lambda: (*_linear_8bit(quantized.E4M3), "gelu", None, torch.float32),
        "residual, bfloat16": lambda: (*_linear_8bit(), None, _t(2, 5, 8, dtype=torch.bfloat16), torch.bfloat16),
    },
    "linear_8bit_quantized": {"gelu": lambda: (*_linear_8bit(), "gelu", None)},
    "layer_norm_forward": {
        "token": lambda: (_t(2, 5, 8), _t(8), _t(8), 1e-6, "token"),
        "image, bare": lambda: (_t(2, 5, 8), None, None, 1e-6, "image"),
        "bfloat16, float32 weight": lambda: (_t(2, 5, 8, dtype=torch.bfloat16), _t(8), None, 1e-6, "token"),
    },
    "layer_norm_backward": {
        "token": lambda: _layer_norm_backward("token"),
        "image": lambda: _layer_norm_backward("image"),
        "bare": lambda: _layer_norm_backward("token", weight=False, bias=False),
    },
    "add_layer_norm_forward": {
        "layer scale": lambda: (_t(2, 5, 8), _t(2, 5, 8), _t(8), _t(8), 1e-6, _t(8)),
        "mixed dtypes": lambda: (_t(2, 5, 8), _t(2, 5, 8, dtype=torch.bfloat16), None, None, 1e-6, None),
    },
    "add_layer_norm_backward": {
        "layer scale": _add_layer_norm_backward,
        "no layer scale": lambda: _add_layer_norm_backward(scale=False),
        "mixed dtypes": lambda: _add_layer_norm_backward(branch=torch.bfloat16),
    },
    "linear_forward": {
        "gelu, saved": lambda: (_t(2, 5, 8), _t(6, 8), _t(6), "gelu", True),
        "bare": lambda: (_t(2, 5, 8), _t(6, 8), None, None, False),
    },
    "linear_backward": {
        "gelu": lambda: _linear_backward("gelu", [True, True, True]),
        "input only": lambda: _linear_backward(None, [True, False, False], bias=False),
    },
    "onednn_linear": {"gelu": lambda: (torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(6), "gelu")},
    "onednn_attention": {
        "positions": lambda: (
            *(torch.randn(1, 2, 6, 4) for _ in range(3)),
            0.5,
            torch.randn(1, 2, 6, 2),
            torch.randn(1, 2, 6, 3),
        ),
    },
    "mlp_forward": {"saved": lambda: (*_mlp(), True), "not saved": lambda: (*_mlp(None), False)},
    "mlp_backward": {
        "gelu": lambda: _mlp_backward("gelu", [True] * 5),
        "weights only": lambda: _mlp_backward("relu", [False, True, True, True, True]),
        "input only": lambda: _mlp_backward("gelu", [True, False, False, False, False]),
    },
    "qk_norm_rope_forward": {
        "rotated": lambda: (*_qk_norm_rope(), False),
        "rotated back": lambda: (*_qk_norm_rope(tables=2), True),
        "bfloat16, layer norm": lambda: (*_qk_norm_rope("layer", dtype=torch.bfloat16), False),
        "rms norm alone": lambda: (*_qk_norm_rope("rms", rotate=False), False),
    },
    "qk_norm_rope_backward": {
        "layer norm": lambda: _qk_norm_rope_backward(norm="layer"),
        "layer norm without a bias": lambda: _qk_norm_rope_backward(norm="layer", bias=False),
        "rms norm alone": lambda: _qk_norm_rope_backward(norm="rms", rotate=False),
    },
    "rotary_attention_forward": {
        "rotated": _rotary_attention,
        "bfloat16, layer norm": lambda: _rotary_attention("layer", dtype=torch.bfloat16),
    },
    "glu_forward": {"silu": _glu, "bfloat16, gelu": lambda: _glu("gelu", torch.bfloat16)},
    "glu_backward": {"silu": lambda: (_t(2, 5, 8), *_glu())},
}


def _raw_operators():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastvit::")}
    return sorted(names)


def test_every_raw_operator_has_a_sample():
    assert _raw_operators() == sorted(SAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sample"), [(name, sample) for name in SAMPLES for sample in SAMPLES[name]])
def test_opcheck(name, sample):
    """Schema (nothing mutated, nothing aliased), fake tensors (shapes, dtypes, strides), dynamic shapes."""
    arguments = SAMPLES[name][sample]()
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if torch.float8_e4m3fn in (getattr(argument, "dtype", None) for argument in arguments):
        checks.remove("test_schema")  # it multiplies its arguments, which PyTorch does not do in e4m3 on a CPU
    torch.library.opcheck(getattr(torch.ops.fastvit, name).default, arguments, test_utils=checks)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_results_of_the_librarys_products_may_be_written_over(bias):
    """``auto`` leaves products with nothing to fuse to the vendor's library, and their results are as fresh."""
    x, w, b = _t(2, 5, 8).requires_grad_(), _t(6, 8).requires_grad_(), _t(6).requires_grad_() if bias else None
    with fastvit.use_backend("auto"):
        out = linear.linear(x, w, b, None)
        torch.testing.assert_close(out, torch.nn.functional.linear(x, w, b))
        out += 1
        out.sum().backward()
        torch.library.opcheck(torch.ops.fastvit.linear_forward.default, (x, w, b, None, False))
    torch.testing.assert_close(x.grad, w.sum(0).expand_as(x))


# --- through the public wrappers ------------------------------------------------------------------------------------------


OPERATORS = ["attention", "layer_norm", "add_layer_norm", "linear", "mlp", "glu", "qk_norm_rope"]


class Block(torch.nn.Module):
    """Every operator once, as a transformer block strings them together."""

    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(dim), torch.nn.LayerNorm(dim)
        self.qkv, self.proj = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)
        self.fc1, self.fc2 = torch.nn.Linear(dim, 2 * dim), torch.nn.Linear(2 * dim, dim)
        self.gated = torch.nn.Linear(dim, 2 * dim)
        self.q_norm, self.k_norm = torch.nn.LayerNorm(dim // heads), torch.nn.LayerNorm(dim // heads)
        self.scale = torch.nn.Parameter(torch.full((dim,), 0.5))
        angle = torch.linspace(0, 3, 4)[:, None] * torch.linspace(1, 0.1, dim // heads)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, x, mask=None):
        batch, tokens, dim = x.shape
        y = functional.layer_norm(x, self.norm1.weight, self.norm1.bias)
        qkv = functional.linear(y, self.qkv.weight, self.qkv.bias)
        q, k, v = qkv.view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        affine = dict(query_weight=self.q_norm.weight, query_bias=self.q_norm.bias)
        affine |= dict(key_weight=self.k_norm.weight, key_bias=self.k_norm.bias)
        q, k = functional.qk_norm_rope(q, k, self.cos, self.sin, norm="layer", **affine)
        y = functional.attention(q, k, v, mask).transpose(1, 2).flatten(2)
        y = functional.linear(y, self.proj.weight, self.proj.bias)
        y, x = functional.add_layer_norm(x, y, self.norm2.weight, self.norm2.bias, layer_scale=self.scale)
        x = x + functional.glu(*functional.linear(y, self.gated.weight, self.gated.bias).chunk(2, dim=-1))
        return x + functional.mlp(y, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, activation="gelu_tanh")


def _step(model, *inputs):
    """Output and every gradient of one training step."""
    model.zero_grad()
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = model(*leaves)
    out.square().mean().backward()
    grads = [leaf.grad for leaf in leaves] + [p.grad.clone() for p in model.parameters()]
    return [out.detach(), *grads]


def _assert_same(ours, expected, tolerance=1e-5):
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.fixture
def block(device):
    return Block().to(device)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph_forward_and_backward(backend, device, block, compiler):
    torch._dynamo.reset()
    x, mask = torch.randn(2, 6, 16, device=device), torch.randn(6, 6, device=device)
    expected = _step(block, x, mask)
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    _assert_same(_step(compiled, x, mask), expected, 1e-4)


def test_compile_without_gradients(backend, device, block):
    torch._dynamo.reset()
    x = torch.randn(2, 6, 16, device=device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


@pytest.mark.slow
def test_compile_with_dynamic_shapes(backend, device, block):
    """Another number of tokens compiles at most once more, and not a third time."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    for tokens in (6, 9, 14):
        x = torch.randn(2, tokens, 16, device=device)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


def test_export_keeps_the_operators_by_name(triton_backend, device, block):
    x = torch.randn(2, 6, 16, device=device)
    with torch.no_grad():
        program = torch.export.export(block, (x,), strict=False)
        called = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("fastvit.")}
        expected = {"attention", "layer_norm", "add_layer_norm", "linear", "mlp", "qk_norm_rope", "glu"}
        assert called == {f"fastvit.{name}_forward.default" for name in expected}
        torch.testing.assert_close(program.module()(x), block(x))


def test_export_on_the_torch_backend_needs_nothing_of_ours(device, block):
    x = torch.randn(2, 6, 16, device=device)
    with fastvit.use_backend("torch"), torch.no_grad():
        program = torch.export.export(block, (x,), strict=False)
        assert not [node for node in program.graph.nodes if "fastvit" in str(node.target) or "mkldnn" in str(node.target)]
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_activation_checkpointing(backend, device, block, use_reentrant):
    x = torch.randn(2, 6, 16, device=device)
    expected = _step(block, x)

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=use_reentrant)

    _assert_same(_step(Checkpointed(), x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, device, dtype, block):
    """Matrix products in the autocast dtype, norms in float32, gradients in the parameters' own dtype, as PyTorch does."""
    x = torch.randn(2, 6, 16, device=device)
    with torch.autocast(device, dtype=dtype):
        q = torch.randn(1, 2, 5, 8, device=device)
        assert functional.attention(q, q, q).dtype == dtype
        assert functional.linear(x, block.fc1.weight, block.fc1.bias).dtype == dtype
        mlp = functional.mlp(x, block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias)
        assert mlp.dtype == dtype
        assert functional.layer_norm(x.to(dtype), block.norm1.weight).dtype == torch.float32
        assert functional.add_layer_norm(x.to(dtype), x.to(dtype))[1].dtype == torch.float32
        assert functional.glu(x.to(dtype), x.to(dtype)).dtype == dtype
        assert functional.qk_norm_rope(q.to(dtype), q.to(dtype), norm="layer")[0].dtype == dtype
        step = _step(block, x)
    exact = _step(block, x)
    for ours, full in zip(step, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - full).norm() <= 8 * torch.finfo(dtype).eps * full.norm() + 1e-6


@pytest.mark.slow
def test_autocast_under_compile(backend, device, block):
    torch._dynamo.reset()
    x = torch.randn(2, 6, 16, device=device)

    def run(model):
        with torch.autocast(device, dtype=torch.bfloat16):
            return _step(model, x)

    _assert_same(run(torch.compile(block, fullgraph=True, backend="aot_eager")), run(block), 2e-2)


def test_func_grad(backend, device, block):
    """torch.func.grad of a functional call gives what backward gives."""
    x = torch.randn(2, 6, 16, device=device)
    parameters = dict(block.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(block, parameters, (x,)).square().mean()

    grads = torch.func.grad(loss)(parameters)
    block.zero_grad()
    block(x).square().mean().backward()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


def _attempt(function):
    """(the result, None), or (None, why it was refused)."""
    try:
        return function(), None
    except RuntimeError as error:
        return None, str(error).strip()


def _vmap_cases(device):
    x, w = torch.randn(3, 2, 6, 16, device=device), torch.randn(16, 16, device=device)
    q, table = torch.randn(3, 2, 2, 6, 8, device=device), torch.randn(5, 8, device=device)
    return {
        "attention": (lambda q: functional.attention(q, q, q), q),
        "layer_norm": (lambda x: functional.layer_norm(x, w[0]), x),
        "add_layer_norm": (lambda x: functional.add_layer_norm(x, x)[0], x),
        "linear": (lambda x: functional.linear(x, w, activation="gelu"), x),
        "mlp": (lambda x: functional.mlp(x, w, None, w, None), x),
        "glu": (lambda x: functional.glu(x, x), x),
        "qk_norm_rope": (lambda q: functional.qk_norm_rope(q, q, table, -table, norm="layer")[1], q),
    }


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("grad", [False, True], ids=["", "of a gradient"])
def test_vmap_works_or_refuses_in_one_sentence(backend, device, op, grad):
    function, x = _vmap_cases(device)[op]
    mapped = torch.func.grad(lambda x: function(x).square().sum()) if grad else function
    expected = torch.stack([mapped(entry) for entry in x])
    result, refusal = _attempt(lambda: torch.func.vmap(mapped)(x))
    if refusal is None:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        return
    assert backend == "triton", "the torch backend has no reason to refuse"
    assert "do not support torch.func.vmap" in refusal
    assert "use_backend('torch')" in refusal
    assert "\n" not in refusal


@pytest.mark.parametrize("op", OPERATORS)
def test_a_second_derivative_works_or_refuses(backend, device, op):
    """The kernels have no double backward: they must say so, never return a wrong or missing one in silence."""
    function, stacked = _vmap_cases(device)[op]
    x = stacked[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
    _, refusal = _attempt(lambda: first.square().sum().backward())
    if backend == "triton":
        assert "differentiated once" in refusal
        assert "fastvit.reference" in refusal
        assert "\n" not in refusal
    elif op == "attention":  # PyTorch's own fused attention on CPU has no second derivative either
        assert refusal is None or "_scaled_dot_product_flash_attention" in refusal
    else:
        assert refusal is None
        assert x.grad.isfinite().all()


def _jvp(function, x, tangent):
    return torch.func.jvp(function, (x,), (tangent,))[1]


def _dual_number(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


def _jvp_of_a_gradient(function, x, tangent):
    return torch.func.jvp(torch.func.grad(lambda x: function(x).pow(3).sum()), (x,), (tangent,))[1]


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("derive", [_jvp, _dual_number, _jvp_of_a_gradient], ids=["jvp", "dual number", "jvp of a gradient"])
def test_forward_mode_works_or_refuses_in_one_sentence(backend, device, derive, op):
    """A raw operator without a forward derivative would give a tangent of zero, or none, and nobody would know."""
    function, stacked = _vmap_cases(device)[op]
    x = stacked[0]
    tangent = torch.randn_like(x)
    result, refusal = _attempt(lambda: derive(function, x, tangent))
    if backend == "triton":
        assert "have no forward-mode derivative" in refusal
        assert "\n" not in refusal
    elif op == "attention":  # PyTorch's own fused attention on CPU has no forward derivative either
        assert refusal is None or "_scaled_dot_product_flash_attention" in refusal
    else:
        assert refusal is None
        if derive is not _jvp_of_a_gradient:
            ahead, behind = (function(x + sign * 1e-2 * tangent) for sign in (1, -1))
            torch.testing.assert_close(result, (ahead - behind) / 2e-2, rtol=5e-2, atol=5e-2)


def test_inference_mode(backend, device, block):
    x = torch.randn(2, 6, 16, device=device)
    with torch.no_grad():
        expected = block(x)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), expected)
    x.requires_grad_()
    with torch.inference_mode(), torch.enable_grad():  # autograd records nothing, and nothing could be saved for it
        torch.testing.assert_close(block(x), expected)


def test_parameters_as_inputs(backend, device):
    """nn.Parameter is a Tensor subclass; results are plain tensors."""
    w = torch.nn.Parameter(torch.randn(16, 16, device=device))
    assert type(functional.linear(w, w)) is torch.Tensor


def test_results_are_fresh(backend, device):
    """No output shares memory with an input, even where there is nothing to compute."""
    q = torch.randn(1, 1, 1, 16, device=device)
    x = torch.randn(3, 16, device=device)
    for out, source in (
        (functional.attention(q, q, q), q),
        (functional.layer_norm(x), x),
        (functional.add_layer_norm(x, torch.zeros_like(x))[1], x),
        (functional.linear(x, torch.eye(16, device=device)), x),
        (functional.glu(x, torch.ones_like(x), activation="relu"), x),
        (functional.qk_norm_rope(q, q, torch.ones(1, 16, device=device), torch.zeros(1, 16, device=device))[0], q),
    ):
        assert out.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()


def _calls(device):
    """Every operator on inputs that want a gradient; those of more than two dimensions, where a result could be a view."""
    x, w = (torch.randn(shape, device=device, requires_grad=True) for shape in ((2, 3, 16), (16, 16)))
    q = torch.randn(2, 2, 5, 16, device=device, requires_grad=True)
    return {
        "attention": lambda: functional.attention(q, q, q),
        "layer_norm": lambda: functional.layer_norm(x, w[0]),
        "add_layer_norm": lambda: functional.add_layer_norm(x, x)[0],
        "linear": lambda: functional.linear(x, w),
        "mlp": lambda: functional.mlp(x, w, None, w, None),
        "glu": lambda: functional.glu(x, x),
        "qk_norm_rope": lambda: functional.qk_norm_rope(q, q, norm="rms")[0],
    }


@pytest.mark.parametrize("op", OPERATORS)
def test_results_may_be_written_over(backend, device, op):
    """As with PyTorch's own operators; a result of a Function that is a view of something else would refuse."""
    out = _calls(device)[op]()
    before = out.detach().clone()
    out += 1
    torch.testing.assert_close(out.detach(), before + 1)
    if op != "attention":  # whose backward needs the result, as that of PyTorch's own does
        out.sum().backward()


def test_the_raw_operator_is_what_the_wrapper_calls(triton_backend, device):
    q = torch.randn(1, 2, 9, 16, device=device)
    raw = torch.ops.fastvit.attention_forward(q, q, q, None, None, None, False, 0.25)[0]
    assert torch.equal(functional.attention(q, q, q), raw)
    assert torch.equal(attention_op.attention(q, q, q, None, False, 0.25, None, None), raw)
