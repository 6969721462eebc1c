"""rotary_attention against float64 on both backends, and which kernels serve it."""

from functools import partial

import pytest
import torch
import torch._dynamo.testing

import fastvit
from fastvit import functional, reference
from fastvit.ops import rotary_attention as operator
from tests.errors import DTYPES, assert_as_exact_as_eager, run
from tests.layouts import LAYOUTS, lay_out, lay_out_each
from tests.test_offsets import _far_apart

# Slow as a whole: its two halves, attention and rotation, have quick tests of their own.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]

NORMS = [None, "layer", "rms"]


def _tables(tokens, dim, device="cpu", dtype=torch.float32, lead=()):
    """Angles without any symmetry: neither equal halves nor equal pairs."""
    angle = torch.rand(*lead, tokens, dim) * 6
    return {"cos": angle.cos().to(dtype).to(device), "sin": angle.sin().to(dtype).to(device)}


def _arguments(shape, dtype=torch.float32, device="cpu", norm=None, key_heads=None, value_dim=None):
    batch, heads, tokens, dim = shape
    of_keys = batch, key_heads or heads, tokens
    arguments = {"query": torch.randn(shape), "key": torch.randn(*of_keys, dim) + 0.25}
    arguments["value"] = torch.randn(*of_keys, value_dim or dim)
    if norm:
        arguments |= {f"{name}_weight": torch.randn(dim) * 0.3 + 1 for name in ("query", "key")}
    if norm == "layer":
        arguments |= {f"{name}_bias": torch.randn(dim) * 0.3 for name in ("query", "key")}
    return {name: value.to(dtype).to(device) for name, value in arguments.items()}


def _check(arguments, backward=False, magnitude=1.0, **constants):
    """Inference, unless told otherwise; tables get no gradient, so they are no leaves."""
    ops = functional.rotary_attention, reference.rotary_attention, reference.rotary_attention
    ops = [partial(op, **constants) for op in ops]
    return assert_as_exact_as_eager(*ops, arguments, backward=backward, magnitude=magnitude)


@pytest.fixture
def launched(triton_backend, monkeypatch):
    """The names of the kernels launched, in order."""
    from fastvit.kernels import attention_forward, rotary, rotary_attention

    names = []
    for module in (attention_forward, rotary, rotary_attention):

        def launch(op, *args, _launch=module.launch, **kwargs):
            names.append(op)
            _launch(op, *args, **kwargs)

        monkeypatch.setattr(module, "launch", launch)
    return names


def _set_max_tokens(monkeypatch, tokens):
    from fastvit.kernels import rotary_attention as kernel

    table = kernel.config
    monkeypatch.setattr(kernel, "config", lambda *a, **s: table(*a, **s) | {"MAX_TOKENS": tokens})


@pytest.fixture(autouse=True)
def _longest(monkeypatch):
    """A tuning table by which the one kernel serves any number of tokens."""
    _set_max_tokens(monkeypatch, 2**20)


@pytest.fixture
def shortest(_longest, monkeypatch):
    """A tuning table by which two tokens are many."""
    _set_max_tokens(monkeypatch, 1)


# --- numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("norm", NORMS)
def test_dtypes(backend, device, dtype, interleaved, norm):
    _check(_arguments((2, 2, 19, 16), dtype, device, norm), **_tables(18, 16, device), interleaved=interleaved, norm=norm)


@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 65, 201])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_tokens(backend, device, tokens, norm):
    """Below, at and above the edges of tiles of queries and of keys."""
    _check(_arguments((1, 1, tokens, 16), torch.float32, device, norm), **_tables(max(1, tokens - 4), 16, device), norm=norm)


@pytest.mark.parametrize("dim", [2, 6, 32, 40, 48, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_head_dims(backend, device, dim, interleaved, norm):
    """Halves of every width, those that are no power of two padded."""
    arguments = _arguments((1, 1, 18, dim), torch.bfloat16, device, norm)
    _check(arguments, **_tables(17, dim, device), interleaved=interleaved, norm=norm)


@pytest.mark.parametrize("dim", [1, 2, 3, 33, 80, 255])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_alone(backend, device, dim, norm):
    """Odd head dims too, which only a rotation cannot have; rows of one and two values normalize to steps."""
    _check(_arguments((2, 1, 18, dim), torch.float32, device, norm), norm=norm, eps=1e-2)


@pytest.mark.parametrize(("dim", "value_dim"), [(16, 7), (8, 80), (64, 1), (16, 96)], ids=str)
def test_values_of_another_width(backend, device, dim, value_dim):
    _check(_arguments((2, 2, 18, dim), torch.float32, device, value_dim=value_dim), **_tables(18, dim, device))


@pytest.mark.parametrize(("tokens", "rotated"), [(1, 1), (5, 1), (37, 33), (32, 31), (40, 3)], ids=str)
@pytest.mark.parametrize("norm", [None, "layer"])
def test_prefix_tokens(backend, device, tokens, rotated, norm):
    """(40, 3): the first tile of keys has nothing to rotate."""
    _check(_arguments((2, 1, tokens, 8), torch.float32, device, norm), **_tables(rotated, 8, device), norm=norm)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 1), (6, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_grouped_queries(backend, device, heads, key_heads, norm):
    arguments = _arguments((2, heads, 18, 8), torch.float32, device, norm, key_heads=key_heads)
    _check(arguments, **_tables(17, 8, device), norm=norm)


@pytest.mark.parametrize("lead", [(), (1,), (3,), (1, 1), (3, 1)], ids=str)
def test_table_shapes(backend, device, lead):
    _check(_arguments((3, 2, 18, 8), torch.float32, device), **_tables(17, 8, device, lead=lead))


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tables_of_another_dtype(backend, device, table):
    _check(_arguments((2, 2, 18, 8), torch.bfloat16, device, "rms"), **_tables(17, 8, device, table), norm="rms")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [None, "layer"])
def test_layouts(backend, device, layout, norm):
    arguments = _arguments((3, 2, 18, 16), torch.bfloat16, device, norm)
    tables = {name: lay_out(value, layout) for name, value in _tables(17, 16, device, lead=(3,)).items()}
    _check(lay_out_each(arguments, layout), **tables, norm=norm)


def test_slices_of_a_packed_projection(backend, device):
    """The normal case, read in place; the result lies as the output projection reads it."""
    tables = _tables(17, 16, device)

    def packed(op):
        return lambda qkv: op(*qkv.permute(2, 0, 3, 1, 4).unbind(0), **tables, norm="rms")

    arguments = {"qkv": torch.randn(2, 18, 3, 2, 16).bfloat16().to(device)}
    ops = functional.rotary_attention, reference.rotary_attention, reference.rotary_attention
    assert_as_exact_as_eager(*map(packed, ops), arguments, backward=False)


def test_the_result_lies_tokens_first(triton_backend, device):
    with torch.no_grad():
        out = functional.rotary_attention(**_arguments((2, 3, 18, 16), device=device), **_tables(18, 16, device))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("scale", [0.5, -0.25, 0.0, 3])
def test_scale(backend, device, scale):
    _check(_arguments((2, 2, 18, 8), torch.float32, device), **_tables(17, 8, device), scale=scale)


def test_large_logits(backend, device):
    """Scores around ±10⁴, one key a row."""
    arguments = _arguments((1, 2, 40, 16), torch.float32, device)
    arguments |= {name: arguments[name] * 60 for name in ("query", "key")}
    _check(arguments, **_tables(39, 16, device), magnitude=1e4)


@pytest.mark.parametrize("weights", [("query_weight",), ("key_weight",), ("query_weight", "key_bias"), ("query_bias",), ()])
def test_parameters_of_one_side_alone(backend, device, weights):
    arguments = _arguments((2, 2, 18, 8), torch.float32, device, "layer")
    arguments = {name: value for name, value in arguments.items() if value.dim() == 4 or name in weights}
    _check(arguments, **_tables(17, 8, device), norm="layer")


@pytest.mark.parametrize("norm", NORMS)
def test_empty_batches(backend, device, norm):
    with torch.no_grad():
        out = functional.rotary_attention(
            **_arguments((0, 2, 18, 8), device=device, norm=norm, value_dim=5), **_tables(17, 8, device), norm=norm
        )
    assert out.shape == (0, 2, 18, 5)


def test_the_same_bits_twice_and_inputs_left_alone(backend, device):
    arguments = _arguments((2, 2, 40, 16), torch.bfloat16, device, "layer") | _tables(39, 16, device)
    copies = {name: value.clone() for name, value in arguments.items()}
    with torch.no_grad():
        first, second = (functional.rotary_attention(**arguments, norm="layer") for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(arguments[name], copies[name]) for name in arguments)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients(backend, device, norm):
    arguments = _arguments((1, 2, 9, 8), torch.float32, device, norm, key_heads=1)
    _check(arguments, backward=True, **_tables(7, 8, device), norm=norm)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
@pytest.mark.slow
def test_offsets_beyond_32_bits(triton_backend, device, name, dim):
    arguments = _arguments((3, 3, 3, 8), torch.bfloat16, device, "layer")
    function = partial(functional.rotary_attention, **_tables(2, 8, device), norm="layer")
    far = arguments | {name: _far_apart(arguments[name], dim)}
    assert torch.equal(run(function, far, backward=False)["output"], run(function, arguments, backward=False)["output"])


# --- who serves it --------------------------------------------------------------------------------------------------------

ONE, TWO = ["rotary_attention"], ["qk_norm_rope", "attention_forward"]


def test_one_kernel_in_inference(launched, device):
    arguments = _arguments((2, 2, 18, 16), device=device) | _tables(17, 16, device)
    with torch.no_grad():
        functional.rotary_attention(**arguments)
    assert launched == ONE


@pytest.mark.parametrize(
    "keywords",
    [{"attn_mask": torch.ones(18, 18).tril().bool()}, {"attn_mask": torch.randn(1, 2, 1, 18)}, {"is_causal": True}],
    ids=["boolean mask", "additive mask", "causal"],
)
def test_two_kernels_under_a_mask(launched, device, keywords):
    keywords = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in keywords.items()}
    _check(_arguments((2, 2, 18, 16), device=device), **_tables(17, 16, device), **keywords)
    assert launched == TWO


@pytest.mark.parametrize("name", ["query", "key", "value", "key_weight", "query_bias"])
def test_two_kernels_where_a_gradient_is_wanted(launched, device, name):
    arguments = _arguments((2, 2, 18, 16), device=device, norm="layer")
    arguments[name].requires_grad_()
    tables = _tables(17, 16, device)
    out = functional.rotary_attention(**arguments, **tables, norm="layer")
    assert launched == TWO
    (gradient,) = torch.autograd.grad(out.square().sum(), arguments[name])
    exact = {key: value.detach().double().requires_grad_(key == name) for key, value in arguments.items()}
    out = reference.rotary_attention(**exact, **tables, norm="layer")
    (expected,) = torch.autograd.grad(out.square().sum(), exact[name])
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4)


def test_two_kernels_for_many_tokens(launched, shortest, device):
    arguments = _arguments((2, 2, 18, 16), device=device, norm="rms") | _tables(17, 16, device)
    _check(arguments, norm="rms")
    assert launched == TWO


def test_both_ways_agree(triton_backend, device, request):
    arguments = _arguments((2, 2, 70, 16), torch.bfloat16, device, "layer") | _tables(65, 16, device)
    with torch.no_grad():
        one = functional.rotary_attention(**arguments, norm="layer")
        request.getfixturevalue("shortest")
        two = functional.rotary_attention(**arguments, norm="layer")
    torch.testing.assert_close(one, two, rtol=2**-7, atol=2**-7)


def test_every_table_says_how_many_tokens():
    from fastvit.kernels import _tuning

    for target in [*_tuning.targets(), "default"]:
        for row in _tuning.table(target)["ops"]["rotary_attention"]:
            assert row["config"]["MAX_TOKENS"] >= 1


def test_autocast_casts_after_the_rotation(launched, device):
    """As the two operators do: qk_norm_rope keeps the dtype, attention takes autocast's."""
    arguments = _arguments((2, 2, 18, 16), device=device) | _tables(17, 16, device)
    names = "query", "key", "value"
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        out = functional.rotary_attention(**arguments)
        rotated = functional.qk_norm_rope(*(arguments[n] for n in ("query", "key", "cos", "sin")))
        assert torch.equal(out, functional.attention(*rotated, arguments["value"]))
        assert launched == TWO * 2
        launched.clear()
        arguments |= {name: arguments[name].bfloat16() for name in names}
        assert functional.rotary_attention(**arguments).dtype == torch.bfloat16
        assert launched == ONE


def test_float32_products_are_left_to_pytorch_on_auto(monkeypatch, device):
    """As ``attention`` does; the interpreter stands in for a GPU."""
    with fastvit.use_backend("auto"), torch.no_grad():
        monkeypatch.setattr(operator, "rotary_attention", None)
        arguments = _arguments((2, 2, 18, 16), device=device)
        assert functional.rotary_attention(**arguments, **_tables(17, 16, device)).shape == (2, 2, 18, 16)


# --- the raw operator -----------------------------------------------------------------------------------------------------


def _raw(norm=None, rotate=True, bias=True, tables=1, dtype=torch.float32, device="cpu"):
    arguments = _arguments((2, 2, 5, 8), dtype, device, norm)
    values = [arguments.pop(name) for name in ("query", "key", "value")]
    cos, sin = _tables(4, 8, device, lead=(tables,)).values() if rotate else (None, None)
    names = [f"{of}_{name}" for of in ("query", "key") for name in ("weight", "bias")]
    return *values, cos, sin, False, norm, *(arguments.get(name) for name in names), 1e-6, 0.3


CASES = {
    "rotated": {},
    "tables an image": {"tables": 2},
    "bfloat16, layer norm": {"norm": "layer", "dtype": torch.bfloat16},
    "rms norm alone": {"norm": "rms", "rotate": False},
}


@pytest.mark.parametrize("case", CASES)
def test_opcheck(device, case):
    torch.library.opcheck(torch.ops.fastvit.rotary_attention_forward.default, _raw(**CASES[case], device=device))


class Rotary(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)
        self.weight = torch.nn.Parameter(torch.randn(8))

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        angle = torch.arange(8.0, device=x.device) * 0.1 + torch.arange(float(x.shape[1]), device=x.device)[:, None]
        weights = {"query_weight": self.weight, "key_weight": self.weight}
        return functional.rotary_attention(query, key, value, angle.cos(), angle.sin(), norm="rms", **weights)


@pytest.mark.slow
@pytest.mark.parametrize("wants_grad", [False, True], ids=["inference", "training"])
def test_compile_fullgraph(backend, device, wants_grad):
    torch._dynamo.reset()
    module, x = Rotary().to(device), torch.randn(2, 6, 16, device=device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(wants_grad):
        ours, expected = compiled(x), module(x)
    torch.testing.assert_close(ours, expected)
    if wants_grad:
        compiled_grad, eager_grad = (torch.autograd.grad(out.square().sum(), module.weight) for out in (ours, expected))
        torch.testing.assert_close(compiled_grad, eager_grad)


def test_one_graph_for_few_tokens_and_many(launched, device, request):
    """Which kernels serve is decided below the graph."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module, x = Rotary().to(device), torch.randn(2, 6, 16, device=device)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.no_grad():
        few = compiled(x)
        assert launched == ONE
        request.getfixturevalue("shortest")
        torch.testing.assert_close(compiled(x), few)
    assert launched == ONE + TWO
    assert counter.frame_count == 1


def test_export_keeps_the_operator_by_name(triton_backend, device):
    module, x = Rotary().to(device), torch.randn(2, 6, 16, device=device)
    with torch.no_grad():
        program = torch.export.export(module, (x,), strict=False)
        called = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("fastvit.")}
        assert called == {"fastvit.rotary_attention_forward.default"}
        torch.testing.assert_close(program.module()(x), module(x))


# --- blocks and wrong input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", [False, True])
def test_an_accelerated_block_takes_the_one_kernel(launched, device, qk_norm):
    from timm.models.eva import EvaBlock

    torch.manual_seed(0)
    block = EvaBlock(32, 2, attn_type="rope", qkv_fused=True, qk_norm=qk_norm, num_prefix_tokens=1).to(device).eval()
    x, rope = torch.randn(2, 10, 32, device=device), torch.randn(9, 32, device=device)
    with torch.no_grad():
        expected = block(x, rope=rope)
        fastvit.accelerate(block, backend="triton")
        launched.clear()
        ours = block(x, rope=rope)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert launched == ONE


X, T = torch.zeros(2, 3, 5, 8), torch.zeros(4, 8)
WRONG = {
    "query is no tensor": ({"query": [1.0]}, TypeError, "query is list"),
    "value missing": ({"value": None}, TypeError, "value is NoneType"),
    "value of other tokens": ({"value": X[:, :, :4]}, ValueError, "value has shape (2, 3, 4, 8)"),
    "value of another dtype": ({"value": X.bfloat16()}, TypeError, "value of shape (2, 3, 5, 8) has dtype torch.bfloat16"),
    "key heads that divide no heads": (
        {"key": X[:, :2], "value": X[:, :2]},
        ValueError,
        "key has shape (2, 2, 5, 8); expected a number of heads that divides query's 3",
    ),
    "key of other tokens": ({"key": X[:, :, :4], "value": X[:, :, :4]}, ValueError, "key has shape (2, 3, 4, 8)"),
    "nothing to do": ({"cos": None, "sin": None}, ValueError, "cos, sin and norm are None"),
    "unknown norm": ({"norm": "batch"}, ValueError, "norm is 'batch'"),
    "is_causal is no bool": ({"is_causal": 0}, TypeError, "is_causal is 0; expected True or False"),
    "scale is no number": ({"scale": "small"}, TypeError, "scale is 'small'"),
    "mask of another shape": ({"attn_mask": X[0, 0]}, ValueError, "attn_mask has shape (5, 8)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(backend, case):
    changes, error, message = WRONG[case]
    with pytest.raises(error) as caught:
        functional.rotary_attention(**({"query": X, "key": X, "value": X, "cos": T, "sin": T} | changes))
    assert message in str(caught.value)
    assert "expected" in str(caught.value)
