"""qk_norm_rope against float64 and against the libraries it stands in for, on both backends."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import fastvit
from fastvit import functional, reference
from fastvit.ops import torch_backend
from tests.errors import DTYPES, assert_as_exact_as_eager, run
from tests.layouts import LAYOUTS, lay_out, lay_out_each
from tests.test_offsets import _check as check_offsets

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NORMS = [None, "layer", "rms"]
SLOW = pytest.mark.slow
FLOAT16 = pytest.param(torch.float16, marks=SLOW)


def _tables(tokens, dim, device, dtype=torch.float32, lead=()):
    """Angles without any symmetry: neither equal halves nor equal pairs."""
    angle = torch.rand(*lead, tokens, dim) * 6
    return {"cos": angle.cos().to(dtype).to(device), "sin": angle.sin().to(dtype).to(device)}


def _arguments(shape, dtype, device, norm=None, key_heads=None, parameter_dtype=None):
    batch, heads, tokens, dim = shape
    arguments = {"query": torch.randn(shape), "key": torch.randn(batch, key_heads or heads, tokens, dim) * 2 + 0.5}
    arguments = {name: value.to(dtype) for name, value in arguments.items()}
    if norm:
        arguments |= {f"{name}_weight": (torch.randn(dim) + 1).to(parameter_dtype or dtype) for name in ("query", "key")}
    if norm == "layer":
        arguments |= {f"{name}_bias": torch.randn(dim).to(parameter_dtype or dtype) for name in ("query", "key")}
    return {name: value.to(device) for name, value in arguments.items()}


def _check(arguments, magnitude=1.0, eager=reference.qk_norm_rope, **constants):
    """Tables get no gradient, so they are no leaves."""
    ops = functional.qk_norm_rope, eager, reference.qk_norm_rope
    return assert_as_exact_as_eager(*(partial(op, **constants) for op in ops), arguments, magnitude=magnitude)


def _pytorchs_layer_norms(query, key, query_weight, query_bias, key_weight, key_bias, norm):
    """PyTorch's own layer norm, which errs more than its definition where a row has two or three values."""
    shape = query.shape[-1:]
    return F.layer_norm(query, shape, query_weight, query_bias, 1e-6), F.layer_norm(key, shape, key_weight, key_bias, 1e-6)


def _steepest(arguments, norm):
    """The largest rstd: the size of the terms that cancel in the gradient of a row of one, two or three values."""
    rows = torch.cat([arguments[name].double().flatten(0, 2) for name in ("query", "key")])
    square = rows.var(-1, correction=0) if norm == "layer" else rows.square().mean(-1)
    return (square + 1e-6).rsqrt().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("norm", NORMS)
def test_dtypes(backend, device, dtype, interleaved, norm):
    _check(_arguments((2, 3, 7, 16), dtype, device, norm), **_tables(6, 16, device), interleaved=interleaved, norm=norm)


@pytest.mark.parametrize("dim", [2, 32, 64, 80, 256, *(pytest.param(dim, marks=SLOW) for dim in (6, 40, 48, 72, 128))])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_head_dims(backend, device, dim, interleaved, norm):
    arguments = _arguments((1, 2, 5, dim), torch.bfloat16, device, norm)
    _check(arguments, **_tables(4, dim, device), interleaved=interleaved, norm=norm)


@pytest.mark.parametrize("dim", [1, 3, 80, 255, *(pytest.param(dim, marks=SLOW) for dim in (2, 33, 256))])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_alone(backend, device, dim, norm):
    """Odd head dims too, which only a rotation cannot have."""
    arguments = _arguments((2, 2, 5, dim), torch.float32, device, norm)
    eager = _pytorchs_layer_norms if backend == "torch" and norm == "layer" else reference.qk_norm_rope
    _check(arguments, magnitude=_steepest(arguments, norm), eager=eager, norm=norm)


@pytest.mark.parametrize(("tokens", "rotated"), [(1, 1), (5, 5), (5, 1), (37, 33), (32, 31), (65, 64)], ids=str)
@pytest.mark.parametrize("norm", [None, "layer"])
def test_prefix_tokens(backend, device, tokens, rotated, norm):
    """37 and 65 tokens end in an incomplete block; a prefix of 4 puts the first rotated token inside one."""
    _check(_arguments((2, 2, tokens, 8), torch.float32, device, norm), **_tables(rotated, 8, device), norm=norm)


def test_prefix_tokens_keep_their_bits(backend, device):
    arguments = _arguments((2, 2, 9, 16), torch.bfloat16, device)
    query, key = functional.qk_norm_rope(**arguments, **_tables(6, 16, device))
    assert torch.equal(query[:, :, :3], arguments["query"][:, :, :3])
    assert torch.equal(key[:, :, :3], arguments["key"][:, :, :3])
    assert not torch.equal(query[:, :, 3], arguments["query"][:, :, 3])


@pytest.mark.parametrize(
    ("heads", "key_heads"), [(4, 1), (1, 3), (5, 5), *(pytest.param(*pair, marks=SLOW) for pair in ((6, 2), (12, 12)))]
)
@pytest.mark.parametrize("norm", NORMS)
def test_grouped_queries(backend, device, heads, key_heads, norm):
    """Groups of heads that share a program and do not divide the heads, nor end with the queries."""
    arguments = _arguments((2, heads, 5, 8), torch.float32, device, norm, key_heads=key_heads)
    _check(arguments, **_tables(4, 8, device), norm=norm)


@pytest.mark.parametrize("lead", [(), (1,), (3,), (1, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("norm", [None, "rms"])
def test_table_shapes(backend, device, lead, norm):
    _check(_arguments((3, 2, 5, 8), torch.float32, device, norm), **_tables(4, 8, device, lead=lead), norm=norm)


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=SLOW), FLOAT16], ids=str)
def test_tables_of_another_dtype(backend, device, dtype, table):
    _check(_arguments((2, 2, 5, 8), dtype, device, "rms"), **_tables(4, 8, device, table), norm="rms")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", [None, "layer"])
def test_layouts(backend, device, layout, norm):
    arguments = _arguments((3, 2, 5, 16), torch.bfloat16, device, norm)
    tables = {name: lay_out(value, layout) for name, value in _tables(4, 16, device, lead=(3,)).items()}
    _check(lay_out_each(arguments, layout), **tables, norm=norm)


def test_slices_of_a_packed_projection(backend, device):
    """The normal case, read in place and left in the order in which attention reads a projection's rows."""
    tables = _tables(6, 16, device)

    def packed(op):
        def function(qkv):
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            return *op(query, key, **tables, norm="rms"), value * 1.0

        return function

    arguments = {"qkv": torch.randn(2, 7, 3, 2, 16).bfloat16().to(device)}
    ops = functional.qk_norm_rope, reference.qk_norm_rope, reference.qk_norm_rope
    assert_as_exact_as_eager(*map(packed, ops), arguments)
    with torch.no_grad():
        query, key, _ = packed(functional.qk_norm_rope)(**arguments)
    assert query.transpose(1, 2).is_contiguous()
    assert key.transpose(1, 2).is_contiguous()


def test_an_upstream_gradient_of_any_layout(backend, device):
    tables = _tables(4, 8, device)

    def summed(op):
        def function(**named):
            query, key = op(**named, **tables, norm="layer")
            return query.transpose(0, 3).contiguous() * torch.arange(3.0, device=query.device), key.sum()

        return function

    arguments = _arguments((3, 2, 5, 8), torch.float32, device, "layer")
    ops = functional.qk_norm_rope, reference.qk_norm_rope, reference.qk_norm_rope
    assert_as_exact_as_eager(*map(summed, ops), arguments)


@pytest.mark.parametrize("used", [0, 1], ids=["only the query is used", "only the key is used"])
@pytest.mark.parametrize("norm", [None, "layer"])
def test_one_output_unused(backend, device, used, norm):
    tables = _tables(4, 8, device)
    arguments = _arguments((2, 2, 5, 8), torch.float32, device, norm)
    names = [name for name in arguments if name.startswith(("query", "key")[used])]
    grads = {}
    for op, dtype in ((functional.qk_norm_rope, torch.float32), (reference.qk_norm_rope, torch.float64)):
        leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in arguments.items()}
        op(**leaves, **tables, norm=norm)[used].square().sum().backward()
        grads[dtype] = {name: leaf.grad for name, leaf in leaves.items()}
    for name in arguments:
        ours = grads[torch.float32][name]
        if name in names:
            torch.testing.assert_close(ours.double(), grads[torch.float64][name], rtol=1e-4, atol=1e-4)
        else:
            assert ours is None or not ours.any()


@pytest.mark.parametrize("weights", [("query_weight",), ("key_weight",), ("query_weight", "key_bias"), ("query_bias",), ()])
def test_parameters_of_one_side_alone(backend, device, weights):
    arguments = _arguments((2, 2, 5, 8), torch.float32, device, "layer")
    arguments = {name: value for name, value in arguments.items() if value.dim() == 4 or name in weights}
    _check(arguments, **_tables(4, 8, device), norm="layer")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_float32_parameters_beside_a_half_precision_input(backend, device, dtype, norm):
    arguments = _arguments((2, 2, 5, 16), dtype, device, norm, parameter_dtype=torch.float32)
    _check(arguments, **_tables(5, 16, device), norm=norm)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_eps_is_used(backend, device, norm):
    arguments = _arguments((1, 2, 3, 16), torch.float32, device, norm)
    arguments |= {name: arguments[name] * 1e-3 for name in ("query", "key")}
    for eps in (1e-5, 1e-12, 0.0):
        _check(arguments, norm=norm, eps=eps)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_rows_that_do_not_exist_leave_no_trace_without_eps(backend, device, norm):
    """Their variance is zero, and 1/0 times zero must not reach the weights' gradients."""
    results = run(partial(functional.qk_norm_rope, norm=norm, eps=0.0), _arguments((1, 1, 5, 8), torch.float32, device, norm))
    assert all(result.isfinite().all() for result in results.values())


@pytest.mark.parametrize("norm", NORMS)
def test_empty_batches(backend, device, norm):
    arguments = _arguments((0, 2, 5, 8), torch.float32, device, norm)
    results = run(partial(functional.qk_norm_rope, **_tables(4, 8, device), norm=norm), arguments)
    for index, name in enumerate(("query", "key")):
        assert results[f"output {index}"].shape == results[f"gradient of {name}"].shape == (0, 2, 5, 8)
    assert not any(results[name].any() for name in results)


@pytest.mark.parametrize("norm", NORMS)
def test_many_programs_share_the_sums(triton_backend, device, norm, monkeypatch):
    """More tiles than programs: each adds up several, the last of them fewer."""
    from fastvit.kernels import rotary_backward as kernel

    few = kernel.config
    monkeypatch.setattr(kernel, "config", lambda *a, **s: few(*a, **s) | {"PROGRAMS": 2, "BLOCK_ROWS": 4, "GROUP": 2})
    _check(_arguments((2, 3, 9, 8), torch.float32, device, norm, key_heads=1), **_tables(8, 8, device, lead=(2,)), norm=norm)


@pytest.mark.parametrize("norm", ["layer", pytest.param("rms", marks=SLOW), pytest.param(None, marks=SLOW)])
def test_the_same_bits_twice(backend, device, norm):
    arguments = _arguments((2, 3, 40, 16), torch.bfloat16, device, norm)
    function = partial(functional.qk_norm_rope, **_tables(39, 16, device), norm=norm)
    first, second = (run(function, arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("norm", NORMS)
def test_inputs_are_left_alone(backend, device, norm):
    arguments = _arguments((2, 2, 5, 8), torch.float32, device, norm) | _tables(4, 8, device)
    copies = {name: value.clone() for name, value in arguments.items()}
    with torch.no_grad():
        functional.qk_norm_rope(**arguments, norm=norm)
    assert all(torch.equal(arguments[name], copies[name]) for name in arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("norm", NORMS)
def test_inference(backend, device, dtype, interleaved, norm):
    """Without a gradient to keep anything for, the torch backend writes over its own."""
    constants = _tables(5, 16, device) | {"interleaved": interleaved, "norm": norm}
    ops = [partial(op, **constants) for op in (functional.qk_norm_rope, reference.qk_norm_rope, reference.qk_norm_rope)]
    assert_as_exact_as_eager(*ops, _arguments((2, 2, 7, 16), dtype, device, norm), backward=False)


def test_inference_on_the_torch_backend_writes_over_its_own(device, monkeypatch):
    monkeypatch.setattr(torch_backend, "_rotate", None)  # what a traced or differentiated call takes
    with fastvit.use_backend("torch"), torch.no_grad():
        functional.qk_norm_rope(**_arguments((1, 1, 5, 8), torch.float32, device), **_tables(5, 8, device))


@pytest.mark.parametrize("frozen", ["query", "key", "query_weight", "key_bias"])
def test_frozen_arguments_get_no_gradient(backend, device, frozen):
    arguments = _arguments((2, 2, 5, 8), torch.float32, device, "layer")
    leaves = {name: value.requires_grad_(name != frozen) for name, value in arguments.items()}
    query, key = functional.qk_norm_rope(**leaves, norm="layer")
    (query.square().sum() + key.square().sum()).backward()
    assert leaves[frozen].grad is None
    assert all(leaves[name].grad is not None for name in leaves.keys() - {frozen})


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(interleaved, norm):
    arguments = _arguments((1, 2, 3, 4), torch.float64, "cpu", norm)
    names, leaves = arguments.keys(), [value.requires_grad_() for value in arguments.values()]
    function = partial(functional.qk_norm_rope, **_tables(2, 4, "cpu", torch.float64), interleaved=interleaved, norm=norm)
    assert torch.autograd.gradcheck(lambda *values: function(**dict(zip(names, values, strict=True))), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_autocast_keeps_the_dtype(backend, device, dtype, norm):
    arguments = _arguments((2, 2, 5, 16), dtype, device, norm, parameter_dtype=torch.float32)
    function = partial(functional.qk_norm_rope, **arguments, **_tables(4, 16, device), norm=norm)
    plain = function()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert all(torch.equal(mine, other) for mine, other in zip(function(), plain, strict=True))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.slow
def test_offsets_beyond_32_bits(triton_backend, device, name, dim):
    arguments = {key: torch.randn(3, 3, 3, 8, device=device) for key in ("query", "key")}
    check_offsets(partial(functional.qk_norm_rope, **_tables(2, 8, device), norm="layer"), arguments, name, dim)


# --- what it stands in for ------------------------------------------------------------------------------------------------


def test_the_pairs_of_halves_and_of_neighbours(backend, device):
    """A quarter turn by hand: (a, b) → (−b, a)."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device).reshape(1, 1, 1, 4)
    tables = {"cos": torch.zeros(1, 4, device=device), "sin": torch.ones(1, 4, device=device)}
    assert functional.qk_norm_rope(x, x, **tables)[0].flatten().tolist() == [-3, -4, 1, 2]
    assert functional.qk_norm_rope(x, x, **tables, interleaved=True)[1].flatten().tolist() == [-2, 1, -4, 3]


@pytest.mark.parametrize("half", [False, True], ids=["interleaved", "halves"])
def test_timm(backend, device, half):
    from timm.layers import apply_rot_embed_cat

    arguments = _arguments((2, 3, 9, 16), torch.float32, device)
    rope = torch.randn(7, 32, device=device)
    sin, cos = rope.chunk(2, dim=-1)
    ours = functional.qk_norm_rope(**arguments, cos=cos, sin=sin, interleaved=not half)
    for mine, x in zip(ours, arguments.values(), strict=True):
        theirs = torch.cat([x[:, :, :2], apply_rot_embed_cat(x[:, :, 2:], rope, half=half)], dim=2)
        torch.testing.assert_close(mine, theirs)


def test_dinov3_in_transformers(backend, device):
    from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

    arguments, tables = _arguments((2, 3, 9, 16), torch.float32, device), _tables(4, 16, device)
    ours = functional.qk_norm_rope(**arguments, **tables)
    theirs = apply_rotary_pos_emb(arguments["query"], arguments["key"], **tables)
    torch.testing.assert_close(ours, theirs)


def test_pytorchs_norms(backend, device):
    arguments = _arguments((2, 3, 9, 16), torch.float32, device, "layer")
    query, key = functional.qk_norm_rope(**arguments, norm="layer", eps=1e-5)
    torch.testing.assert_close(query, F.layer_norm(arguments["query"], (16,), arguments["query_weight"], arguments["query_bias"]))
    torch.testing.assert_close(key, F.layer_norm(arguments["key"], (16,), arguments["key_weight"], arguments["key_bias"]))
    arguments = _arguments((2, 3, 9, 16), torch.float32, device, "rms")
    query, _ = functional.qk_norm_rope(**arguments, norm="rms", eps=1e-5)
    torch.testing.assert_close(query, F.rms_norm(arguments["query"], (16,), arguments["query_weight"], 1e-5))


# --- wrong input ----------------------------------------------------------------------------------------------------------

X, T, W = torch.zeros(2, 3, 5, 8), torch.zeros(4, 8), torch.zeros(8)
WRONG = {
    "query is no tensor": ({"query": [1.0]}, TypeError, "query is list"),
    "key missing": ({"key": None}, TypeError, "key is NoneType"),
    "integers": ({"query": X.long()}, TypeError, "query of shape (2, 3, 5, 8) has dtype torch.int64"),
    "mixed dtypes": ({"key": X.bfloat16()}, TypeError, "key of shape (2, 3, 5, 8) has dtype torch.bfloat16"),
    "query of rank 3": ({"query": X[0]}, ValueError, "query has shape (3, 5, 8)"),
    "key of rank 5": ({"key": X[None]}, ValueError, "key has shape (1, 2, 3, 5, 8)"),
    "key of other tokens": ({"key": X[:, :, :4]}, ValueError, "key has shape (2, 3, 4, 8)"),
    "key without heads": ({"key": X[:, :0]}, ValueError, "key (2, 0, 5, 8)"),
    "head_dim too large": (
        dict.fromkeys(("query", "key"), torch.zeros(1, 1, 1, 258)),
        ValueError,
        "query has shape (1, 1, 1, 258)",
    ),
    "odd head_dim": (
        dict.fromkeys(("query", "key"), X[..., :7]) | dict.fromkeys(("cos", "sin"), T[:, :7]),
        ValueError,
        "query has shape (2, 3, 5, 7); expected an even head_dim",
    ),
    "nothing to do": ({"cos": None, "sin": None}, ValueError, "cos, sin and norm are None"),
    "cos alone": ({"sin": None}, ValueError, "sin is None; expected cos and sin together"),
    "sin alone": ({"cos": None}, ValueError, "cos is None; expected cos and sin together"),
    "too many positions": (dict.fromkeys(("cos", "sin"), torch.zeros(6, 8)), ValueError, "cos has shape (6, 8)"),
    "no positions": (dict.fromkeys(("cos", "sin"), torch.zeros(0, 8)), ValueError, "cos has shape (0, 8)"),
    "half tables": (dict.fromkeys(("cos", "sin"), torch.zeros(4, 4)), ValueError, "cos has shape (4, 4)"),
    "tables of another batch": (dict.fromkeys(("cos", "sin"), torch.zeros(3, 4, 8)), ValueError, "cos has shape (3, 4, 8)"),
    "tables a head": (dict.fromkeys(("cos", "sin"), torch.zeros(1, 3, 4, 8)), ValueError, "cos has shape (1, 3, 4, 8)"),
    "tables of two shapes": ({"sin": T[None]}, ValueError, "sin has shape (1, 4, 8); expected (4, 8)"),
    "a table that learns": ({"cos": T.clone().requires_grad_()}, ValueError, "cos of shape (4, 8) requires a gradient"),
    "a table elsewhere": ({"sin": T.to("meta")}, ValueError, "sin of shape (4, 8) is on meta"),
    "unknown norm": ({"norm": "batch"}, ValueError, "norm is 'batch'; expected 'layer', 'rms' or None"),
    "interleaved is no bool": ({"interleaved": 1}, TypeError, "interleaved is 1; expected True or False"),
    "weight without a norm": ({"query_weight": W}, ValueError, "query_weight of shape (8,) is given and norm is None"),
    "bias under rms": ({"norm": "rms", "key_bias": W}, ValueError, "key_bias of shape (8,) is given and norm is 'rms'"),
    "weight of another length": ({"norm": "rms", "key_weight": W[:7]}, ValueError, "key_weight has shape (7,); expected (8,)"),
    "half weight": ({"norm": "rms", "key_weight": W.half()}, TypeError, "key_weight of shape (8,) has dtype torch.float16"),
    "negative eps": ({"norm": "rms", "eps": -1.0}, ValueError, "eps is -1.0"),
    "eps is no number": ({"norm": "rms", "eps": "small"}, TypeError, "eps is 'small'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    changes, error, message = WRONG[case]
    with pytest.raises(error) as caught:
        functional.qk_norm_rope(**({"query": X, "key": X, "cos": T, "sin": T} | changes))
    assert message in str(caught.value)
    assert "expected" in str(caught.value)


def test_a_table_that_learns_serves_where_nothing_does(backend, device):
    arguments, tables = _arguments((1, 1, 5, 8), torch.float32, device), _tables(5, 8, device)
    expected = functional.qk_norm_rope(**arguments, **tables)
    with torch.no_grad():
        learning = {name: table.clone().requires_grad_() for name, table in tables.items()}
        assert all(torch.equal(a, b) for a, b in zip(functional.qk_norm_rope(**arguments, **learning), expected, strict=True))
