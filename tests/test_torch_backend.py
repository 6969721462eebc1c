"""What the torch backend promises beyond the right numbers: exact derivatives, little memory, any floating-point dtype."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastvit
from fastvit import functional, reference
from fastvit.ops import torch_backend


@pytest.fixture(autouse=True)
def _torch_backend():
    with fastvit.use_backend("torch"):
        yield


def _leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("statistics", ["token", "image"])
def test_layer_norm_gradcheck(statistics):
    assert torch.autograd.gradcheck(
        lambda x, w, b: functional.layer_norm(x, w, b, statistics=statistics), (_leaf(2, 3, 5), _leaf(5), _leaf(5))
    )


def test_add_layer_norm_gradcheck():
    inputs = (_leaf(2, 3, 5), _leaf(2, 3, 5), _leaf(5), _leaf(5), _leaf(5))
    assert torch.autograd.gradcheck(lambda r, x, w, b, s: functional.add_layer_norm(r, x, w, b, layer_scale=s), inputs)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu", None])
def test_mlp_gradcheck(activation):
    inputs = (_leaf(2, 3, 4), _leaf(6, 4), _leaf(6), _leaf(5, 6), _leaf(5))
    assert torch.autograd.gradcheck(lambda *tensors: functional.mlp(*tensors, activation=activation), inputs)


def _attention_inputs(mask=False, rel=False):
    inputs = {"query": _leaf(2, 4, 5, 3), "key": _leaf(2, 2, 6, 3), "value": _leaf(2, 2, 6, 4)}
    if mask:
        inputs["attn_mask"] = _leaf(4, 1, 6)
    if rel:
        inputs |= {"rel_h": _leaf(2, 4, 5, 2), "rel_w": _leaf(2, 4, 5, 3)}
    return inputs


@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("rel", [False, True], ids=["no rel", "rel"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_attention_gradcheck(mask, rel, is_causal):
    inputs = _attention_inputs(mask, rel)

    def function(*tensors):
        return functional.attention(**dict(zip(inputs, tensors, strict=True)), is_causal=is_causal)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


class _LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator, forward or backward, makes in memory of its own."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("case", ["plain", "rel", "rel and mask", "causal and mask"])
@pytest.mark.parametrize("backward", [False, True], ids=["inference", "training"])
def test_no_score_matrix_in_memory(case, backward):
    """2304 queries by 2304 keys: no more than a block of query rows times the keys, forward or backward."""
    grid, heads, dim = 48, 2, 8
    tokens = grid * grid
    q, k, v = (torch.randn(1, heads, tokens, dim, requires_grad=backward) for _ in range(3))
    options = {}
    if "rel" in case:
        options |= {name: torch.randn(1, heads, tokens, grid, requires_grad=backward) for name in ("rel_h", "rel_w")}
    if "mask" in case:
        options["attn_mask"] = torch.rand(1, 1, 1, tokens) > 0.1
    if "causal" in case:
        options["is_causal"] = True
    with _LargestTensor() as largest, torch.set_grad_enabled(backward):
        out = functional.attention(q, k, v, **options)
        if backward:
            out.sum().backward()
    assert largest.elements <= heads * torch_backend.BIAS_ROWS * tokens < tokens**2


def test_mlp_in_inference_keeps_one_hidden_layer():
    """The activation is written over the hidden layer, which nothing else holds."""
    hidden_layers = []

    class _Hidden(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() and out.shape[-1] == 96:
                hidden_layers.append(out.untyped_storage().data_ptr())
            return out

    arguments = (torch.randn(5, 8), torch.randn(96, 8), torch.randn(96), torch.randn(8, 96), torch.randn(8))
    with torch.no_grad(), _Hidden():
        functional.mlp(*arguments)
    assert len(set(hidden_layers) - {arguments[1].data_ptr(), arguments[3].data_ptr()}) == 1


@pytest.mark.parametrize(("rows", "pieces"), [(8, 1), (9, 3), (11, 3), (13, 4), (0, 1)])
def test_a_large_hidden_layer_is_never_whole(monkeypatch, rows, pieces):
    """Beyond two pieces' worth, a piece at a time; with a gradient wanted, whole."""
    monkeypatch.setattr(torch_backend, "HIDDEN_BYTES", 4 * 96 * 4)
    calls, right = [], torch_backend.linear
    monkeypatch.setattr(torch_backend, "linear", lambda *args: calls.append(args[0].shape) or right(*args))
    arguments = (torch.randn(1, rows, 8), torch.randn(96, 8), torch.randn(96), torch.randn(8, 96), torch.randn(8))
    out = torch_backend.mlp(*arguments, "gelu")
    assert len(calls) == 2 * pieces
    torch.testing.assert_close(out, reference.mlp(*arguments), rtol=1e-5, atol=1e-4)
    calls.clear()
    torch_backend.mlp(arguments[0].requires_grad_(), *arguments[1:], "gelu")
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_mask_of_higher_precision_is_not_rounded_first(dtype):
    """Around 100 a bfloat16 is exact to 0.5 only; softmax ignores the 100, so nothing of it may show."""
    q, k, v = torch.randn(3, 2, 2, 40, 16).to(dtype)
    mask = 100 + 3 * torch.randn(2, 1, 40, 40)
    expected = reference.attention(q.double(), k.double(), v.double(), mask.double())
    ours, eager = functional.attention(q, k, v, mask), reference.attention(q.float(), k.float(), v.float(), mask).to(dtype)
    error, rounding = ((out.double() - expected).norm() / expected.norm() for out in (ours, eager))
    assert error <= 4 * rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_row_of_the_lowest_float32_is_a_mean_and_one_of_minus_infinity_is_zeros(dtype):
    q, k, v = torch.randn(3, 1, 2, 8, 16).to(dtype)
    mask = torch.zeros(8, 8)
    mask[2], mask[4], mask[5, 3:] = torch.finfo(torch.float32).min, float("-inf"), torch.finfo(torch.float32).min
    mask.requires_grad_()
    out = functional.attention(q, k, v, mask)
    expected = reference.attention(q.float(), k.float(), v.float(), mask).to(dtype)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert not out[:, :, 4].any()
    out.sum().backward()
    assert mask.grad.isfinite().all()


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NORM_DTYPES = [
    (BF16, BF16, F32), (BF16, F32, BF16), (BF16, None, F32), (BF16, F32, None), (BF16, None, BF16), (BF16, F32, F32),
    (F16, F16, F32), (F16, F32, F16), (F16, None, F32), (F64, F32, F32), (F64, F64, F32), (F64, None, F32),
]  # fmt: skip


def _same_norm(out, expected, dtype):
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("statistics", ["token", "image"])
@pytest.mark.parametrize(("dtype", "weight", "bias"), NORM_DTYPES, ids=str)
def test_layer_norm_takes_every_mix_of_dtypes_that_the_checks_let_through(dtype, weight, bias, statistics):
    x = torch.randn(2, 5, 8).to(dtype).requires_grad_()
    w, b = (None if d is None else torch.randn(8).to(d).requires_grad_() for d in (weight, bias))
    out = functional.layer_norm(x, w, b, statistics=statistics)
    wide = (t if t is None else t.double() for t in (x, w, b))
    expected = reference.layer_norm(*wide, statistics=statistics)
    if statistics == "token":
        _same_norm(out, expected, dtype)
    else:
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    out.sum().backward()
    assert all(t.grad.dtype == t.dtype for t in (x, w, b) if t is not None)


@pytest.mark.parametrize("scale", [False, True], ids=["", "layer scale"])
@pytest.mark.parametrize(
    ("residual", "branch", "weight"),
    [(BF16, F32, BF16), (F32, BF16, F32), (BF16, BF16, F32), (F32, F64, F32), (F64, F32, F64), (F64, F32, F32)],
    ids=str,
)
def test_add_layer_norm_takes_every_mix_of_dtypes_that_the_checks_let_through(residual, branch, weight, scale):
    r, x = torch.randn(2, 5, 8).to(residual), torch.randn(2, 5, 8).to(branch)
    w, b, s = torch.randn(8).to(weight), torch.randn(8), torch.randn(8) if scale else None
    normalized, total = functional.add_layer_norm(r, x, w, b, layer_scale=s)
    dtype = torch.promote_types(residual, branch)
    wide = [t.double() for t in (total, w, b)]
    _same_norm(normalized, reference.layer_norm(*wide), dtype)
    assert total.dtype == dtype
    expected = reference.add_layer_norm(r.double(), x.double(), layer_scale=None if s is None else s.double())[1]
    torch.testing.assert_close(total.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_triton_refuses_a_float64_branch_too():
    x = torch.randn(2, 8)
    with fastvit.use_backend("triton"), pytest.raises(ValueError, match="float64"):
        functional.add_layer_norm(x, x.double())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_vmap_over_an_activation_needs_no_fallback(activation):
    """vmap has no rule for aten::gelu_ and would warn, then loop."""
    x, w = torch.randn(3, 4, 8), torch.randn(6, 8)
    torch._C._functorch._set_vmap_fallback_warning_enabled(True)
    mapped = torch.func.vmap(lambda x: functional.linear(x, w, activation=activation))(x)
    torch.testing.assert_close(mapped, functional.linear(x, w, activation=activation))


def test_float64_is_computed_in_float64():
    q, k, v = torch.randn(3, 1, 2, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(functional.attention(q, k, v), reference.attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_the_triton_backend_refuses_float64_rather_than_losing_it():
    q = torch.randn(1, 2, 9, 8, dtype=torch.float64)
    with fastvit.use_backend("triton"), pytest.raises(ValueError, match="float64"):
        functional.attention(q, q, q)


def test_auto_serves_a_cpu_tensor_with_the_torch_backend():
    """The interpreter is for tests: nobody's model may land in it by accident."""
    with fastvit.use_backend("auto"):
        assert fastvit.backend.resolve(torch.zeros(1)) == "torch"
