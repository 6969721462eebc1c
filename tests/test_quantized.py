"""The 8-bit operators: rounding bit for bit, products against float64, extremes, and what is refused."""

import math
from types import SimpleNamespace

import pytest
import torch
from fastvit.kernels import _launch, _tuning

import fastvit
from fastvit import reference, reference_quantized
from fastvit.ops import dispatch, quantized
from fastvit.ops.quantized import E4M3, INT8
from tests.errors import compare
from tests.layouts import embedded
from tests.test_offsets import _far_apart

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [(1, 1), (3, 16), (3, 48), (2, 3, 40), (5, 257)]


@pytest.fixture(params=["fp8", "int8"])
def form(request, device):
    """The dtype of the values."""
    reason = quantized.why_not(request.param, torch.device(device))
    if reason:
        pytest.skip(reason)
    return quantized.FORMATS[request.param]


def _same(ours, expected):
    assert ours.dtype == expected.dtype
    assert torch.equal(ours.cpu().view(torch.uint8), expected.cpu().view(torch.uint8))


def _half_step(exact, scale, form):
    """e4m3: 2⁻⁴ of a number, 2⁻¹⁰ of the scale where numbers are subnormal. int8: half the scale."""
    scale = scale.double()
    return 0.5 * scale.expand_as(exact) if form == INT8 else torch.maximum(exact.abs() * 2.0**-4, scale * 2.0**-10)


def _check_rounded(ours, exact, scale, form):
    """Each value within half a step of the exact one, and some float32 rounding before."""
    assert ours.shape == exact.shape
    wrong = ~((ours.double() - exact).abs() <= 1.001 * _half_step(exact, scale, form) + 1e-6 * exact.abs().max())
    assert not wrong.any(), f"{int(wrong.sum())} values are further than half a step from the exact ones"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_is_the_references_bit_for_bit(device, shape, dtype, form):
    x = (torch.randn(shape) * torch.logspace(-4, 3, shape[-1])).to(dtype).to(device)
    x[0] = 0
    values, scale = quantized.quantize(embedded(x), form)
    expected, expected_scale = reference_quantized.quantize(x, form)
    _same(values, expected)
    _same(scale, expected_scale.flatten())


def test_the_reference_rounds_as_e4m3_says():
    """Largest value 448, seven steps between powers of two, subnormal numbers of 2⁻⁹, ties to even."""
    row = torch.tensor([[448.0, 17.0, 19.0, 2.0**-9, 2.0**-10, -1.0625]])
    values, scale = reference_quantized.quantize(row, E4M3)
    assert scale.item() == 1
    assert values.float().tolist() == [[448.0, 16.0, 20.0, 2.0**-9, 0.0, -1.0]]
    zeros, _ = reference_quantized.quantize(torch.zeros(2, 3), E4M3)
    assert not zeros.float().any()


def test_int8_rounds_ties_to_even_and_is_symmetric(device):
    row = torch.tensor([[127.0, -127.0, 0.5, 1.5, -2.5, 0.49, 126.5, -126.51]]).to(device)
    for values, scale in (reference_quantized.quantize(row, INT8), quantized.quantize(row, INT8)):
        assert scale.item() == 1
        assert values.tolist() == [[127, -127, 0, 2, -2, 0, 126, -127]]
    assert not quantized.quantize(torch.zeros(2, 3, device=device), INT8).values.any()


def test_a_block_has_a_scale_of_its_own():
    x = torch.cat([torch.full((2, 128), 1e-3), torch.full((2, 5), 1e3)], 1)
    for form in (E4M3, INT8):
        values, scale = reference_quantized.quantize(x, form, 128)
        assert values.shape == x.shape
        assert scale.shape == (2, 2)
        torch.testing.assert_close(reference_quantized.dequantize(values, scale, 128), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(device, shape, affine, form):
    x = (torch.randn(shape) * 3 + 1).bfloat16().to(device)
    weight, bias = (torch.randn(shape[-1], device=device) if affine else None for _ in range(2))
    values, scale = quantized.layer_norm(embedded(x), weight, bias, 1e-5, form)
    exact = reference.layer_norm(x.double(), *(t if t is None else t.double() for t in (weight, bias)), 1e-5)
    scale = scale.view(*shape[:-1], 1)
    expected = exact.abs().amax(-1, keepdim=True).clamp(min=1e-30) / reference_quantized.LARGEST[form]
    torch.testing.assert_close(scale.double(), expected, rtol=1e-5, atol=1e-9)
    _check_rounded(values.double() * scale, exact, scale, form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
def test_add_layer_norm(device, dtype, scaled, form):
    x, branch = (torch.randn(2, 5, 40).to(dtype).to(device) for _ in range(2))
    weight, bias, gamma = (torch.randn(40).to(dtype).to(device) for _ in range(3))
    gamma = gamma if scaled else None
    (values, scale), total = quantized.add_layer_norm(embedded(x), embedded(branch), weight, bias, 1e-6, form, gamma)
    branch = branch.double() if gamma is None else branch.double() * gamma.double()
    torch.testing.assert_close(total.double(), x.double() + branch, rtol=torch.finfo(dtype).eps, atol=1e-6)
    exact = reference.layer_norm(total.double(), weight.double(), bias.double(), 1e-6)
    scale = scale.view(2, 5, 1)
    _check_rounded(values.double() * scale, exact, scale, form)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("channels", [40, 128, 300])
def test_glu(device, channels, activation, form):
    """Gate and value are the halves of one tensor, as a packed SwiGLU makes them."""
    gate, value = torch.randn(2, 19, 2 * channels).bfloat16().to(device).chunk(2, dim=-1)
    values, scale = quantized.glu(gate, value, activation, form)
    assert scale.shape == (-(-channels // 128), 38)
    scale = scale.t().reshape(2, 19, -1)
    exact = reference.glu(gate.double(), value.double(), activation=activation)
    each = scale.repeat_interleave(128, -1)[..., :channels]
    error = (reference_quantized.dequantize(values, scale, 128) - exact).abs()
    slack = 1e-6 if activation == "silu" else 2e-4  # the fitted GELU's own error, times the largest value
    assert (error <= 1.001 * _half_step(exact, each, form) + slack).all()
    largest = torch.nn.functional.pad(exact, (0, -channels % 128)).unflatten(-1, (-1, 128)).abs().amax(-1)
    torch.testing.assert_close(scale.double(), largest / reference_quantized.LARGEST[form], rtol=1e-3, atol=1e-6)


def _operands(shape, outputs, device, form, block=None):
    """(x, W, bias, both rounded, the exact product with the bias in float64)."""
    x, weight, bias = torch.randn(shape).to(device), torch.randn(outputs, shape[-1]).to(device), torch.randn(outputs).to(device)
    values, scale = reference_quantized.quantize(x, form, block)
    scales = scale.flatten(0, -2).t().contiguous() if block else scale.flatten()
    rounded = quantized.quantize_weight(weight, form, bias)
    exact = reference_quantized.dequantize(values, scale, block).double() @ (rounded.values.double() * rounded.scale[:, None]).t()
    return quantized.Quantized(values, scales), rounded, exact + bias.double()


# Rows and outputs below, at and beyond a tile of 64; sums that end within a step of 128, and just at one.
PRODUCTS = [((1, 16), 8), ((2, 5, 40), 24), ((65, 128), 72), ((3, 200), 130), ((9, 272), 64)]
OTHERS = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float16)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, *OTHERS], ids=str)
@pytest.mark.parametrize("block", [None, 128], ids=["scale a row", "scale a block"])
@pytest.mark.parametrize(("shape", "outputs"), PRODUCTS, ids=str)
def test_linear(device, shape, outputs, block, dtype, form):
    x, weight, exact = _operands(shape, outputs, device, form, block)
    out = quantized.linear(x, weight, dtype)
    comparison = compare("out", out, exact.to(dtype), exact, magnitude=shape[-1] ** 0.5)
    assert comparison.ours <= comparison.allowed, comparison


def test_integers_are_summed_exactly(device):
    """The largest values there are, of one sign: their sum is beyond the integers that float32 holds all of."""
    values = torch.full((3, 4096), 127, dtype=torch.int8, device=device)
    values[1, ::2] = -127
    values[2, -1] = 126
    one, weight = torch.ones(3, device=device), torch.full((16, 4096), 127, dtype=torch.int8, device=device)
    plain = quantized.QuantizedWeight(weight, torch.ones(16, device=device), None)
    ours = quantized.linear(quantized.Quantized(values, one), plain, torch.float32)
    exact = (values.long().cpu() @ weight.long().cpu().t()).float()
    assert exact[0, 0] > 2**25
    assert torch.equal(ours.cpu(), exact)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_activations(device, activation, form):
    x, weight, exact = _operands((5, 40), 24, device, form)
    exact = reference.linear(exact, torch.eye(24, dtype=torch.float64, device=device), activation=activation)
    out = quantized.linear(x, weight, torch.bfloat16, activation)
    assert compare("out", out, exact.bfloat16(), exact).ours <= 2.0**-8 * exact.abs().max()


def test_layer_scale_and_residual(device, form):
    """LayerScale lies in the weight's scale and in the bias; the sum is rounded once."""
    x, weight, bias, gamma = (torch.randn(*size).to(device) for size in ((5, 200), (24, 200), (24,), (24,)))
    residual = torch.randn(5, 24).bfloat16().to(device)
    rounded, folded = quantized.quantize(x, form), quantized.quantize_weight(weight, form, bias, gamma)
    out = quantized.linear(rounded, folded, torch.bfloat16, residual=embedded(residual))
    expected = reference_quantized.linear(x, weight, bias, dtype=form, residual=residual, layer_scale=gamma)
    assert compare("out", out, expected.bfloat16(), expected.double(), magnitude=100.0).ours <= 2.0**-8 * expected.abs().max()


@pytest.mark.parametrize(("shape", "outputs"), [((1, 16), 8), ((2, 5, 40), 128), ((65, 136), 300)], ids=str)
def test_rounding_in_the_epilogue(device, shape, outputs, form):
    x, weight, exact = _operands(shape, outputs, device, form)
    exact = torch.nn.functional.gelu(exact)
    values, scale = quantized.linear_quantized(x, weight, "gelu")
    assert values.dtype == form
    assert scale.shape == (-(-outputs // 128), exact[..., 0].numel())
    scale = scale.t().reshape(*shape[:-1], -1)
    largest = torch.nn.functional.pad(exact, (0, -outputs % 128)).unflatten(-1, (-1, 128)).abs().amax(-1)
    torch.testing.assert_close(scale.double(), largest / reference_quantized.LARGEST[form], rtol=1e-3, atol=1e-6)
    ours = reference_quantized.dequantize(values, scale, 128)
    each = scale.repeat_interleave(128, -1)[..., :outputs]
    error, allowed = (ours - exact).abs(), 1.001 * _half_step(exact, each, form)
    assert (error <= allowed + 5e-5).all(), "further than half a step and the fitted GELU's own error from exact"


@pytest.mark.parametrize(("shape", "outputs"), [((1, 16), 8), ((65, 136), 300)], ids=str)
def test_a_scale_for_all(device, shape, outputs):
    """Given to the epilogue, then undone by the next product: what comes out, and what becomes of it."""
    x, weight, exact = _operands(shape, outputs, device, E4M3)
    exact, given = torch.nn.functional.gelu(exact), torch.full((1,), 0.37, device=device)
    hidden = quantized.linear_quantized(x, weight, "gelu", given)
    assert hidden.scale is given
    error = (hidden.values.double() * given - exact).abs()
    assert (error <= 1.001 * _half_step(exact, given, E4M3) + 5e-5).all(), "further than half a step from exact"
    fc2 = quantized.quantize_weight(torch.randn(24, outputs, device=device), E4M3)
    out = quantized.linear(hidden, fc2, torch.float32)
    expected = (hidden.values.double() * given) @ (fc2.values.double() * fc2.scale[:, None]).t()
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4 * outputs**0.5)
    values, scale = reference_quantized.quantize(exact.float(), E4M3, given=given)
    assert scale.shape == (*shape[:-1], 1)
    torch.testing.assert_close(values.float() * scale, exact.float(), rtol=2.0**-4, atol=0.37 * 2.0**-10)


@pytest.mark.parametrize("affine", [True, False])
def test_no_hidden_value_is_beyond_its_scale(affine):
    """Inputs that bring each hidden value as far up, and down, as a LayerNorm lets it come."""
    weight, bias = torch.randn(24, 40, dtype=torch.float64), torch.randn(24)
    norm = (torch.randn(40), torch.randn(40)) if affine else (None, None)
    gained = weight if norm[0] is None else weight * norm[0]
    worst = torch.cat([gained, -gained])
    hidden = torch.nn.functional.layer_norm(worst, (40,), *(t if t is None else t.double() for t in norm), eps=0.0)
    scale = reference_quantized.hidden_scale(weight, bias, *norm)
    assert scale.shape == (1,)
    rounded = reference_quantized.linear(hidden.float(), weight.float(), bias, dtype=E4M3)
    for largest in (rounded.abs().max() / scale, (hidden @ weight.t() + bias).abs().max() / scale):
        assert 250 < largest <= 448, "beyond the largest value, or far below"


def test_a_bound_too_far_above_is_none():
    """One row of fc1 so many times as large as the others: up to where the bound serves, fc2 errs no more than in blocks."""
    x = torch.nn.functional.layer_norm(torch.randn(32, 384), (384,))
    for times, served in ((1, True), (300, True), (1000, False), (torch.nan, False)):
        fc1, fc2 = torch.randn(256, 384) / 384**0.5, torch.randn(64, 256) / 16
        fc1[0] *= times
        fc2[:, 0] /= times
        given = reference_quantized.hidden_scale(fc1, None, None, None)
        assert (given is not None) == served
        if given is not None:
            hidden = torch.nn.functional.gelu(x @ fc1.t())
            rounded = reference_quantized.linear(hidden, fc2, dtype=E4M3, given=given)
            blocks = reference_quantized.linear(hidden, fc2, dtype=E4M3, block=128)
            exact = hidden @ fc2.t()
            assert (rounded - exact).norm() < 1.15 * (blocks - exact).norm()


def _one_step(products, total):
    """Of Hopper's tensor cores, in Python's own numbers: each term cut off 13 bits below the largest's exponent."""
    exponent = max(math.frexp(a)[1] + math.frexp(b)[1] - 2 for a, b in [*products, (total, 1.0)] if a and b)
    unit = 2.0 ** (exponent - 13)
    found = sum(math.trunc(a * b / unit) for a, b in [*products, (total, 1.0)]) * unit
    keep = 2.0 ** (math.frexp(found)[1] - 1 - 13)
    return math.trunc(found / keep) * keep


@pytest.mark.parametrize("width", [8, 32, 80])
def test_sums_of_hopper(width):
    """By an explicit loop, bit for bit; and they err by some 2⁻¹³."""
    spread = torch.logspace(-1, 1, width)
    a, b = ((torch.randn(rows, width) * spread).to(E4M3) for rows in (5, 3))
    found = reference_quantized.hopper_product(a, b)
    for i, j in [(0, 0), (4, 2), (2, 1)]:
        total, pairs = 0.0, list(zip(a[i].tolist(), b[j].tolist(), strict=True))
        for start in range(0, width, 32):
            total = _one_step(pairs[start : start + 32], total)
        assert found[i, j].item() == total
    error = (found.double() - a.double() @ b.double().t()).norm() / (a.double() @ b.double().t()).norm()
    assert 1e-6 < error < 2e-3
    assert not reference_quantized.hopper_product(torch.zeros(2, width).to(E4M3), b).any()
    a[1, 3] = math.nan
    assert torch.equal(reference_quantized.hopper_product(a, b).isnan().any(1), torch.tensor([False, True, False, False, False]))


@pytest.mark.parametrize("block", [None, 128])
def test_sums_of_hopper_in_a_linear(block):
    """The more often they are promoted, the nearer they come to float32's."""
    x, weight, bias = torch.randn(7, 512), torch.randn(16, 512), torch.randn(16)

    def linear(promote):
        return reference_quantized.linear(x, weight, bias, dtype=E4M3, activation="gelu", block=block, promote=promote)

    errors = [(linear(promote) - linear(None)).norm().item() for promote in (32, 128, 0)]
    assert 0 < errors[0] <= errors[1] <= errors[2] < 2e-3 * linear(None).norm()
    assert (errors[0] < errors[1] < errors[2]) == (block is None), "a block is a sum of its own"


def test_promotion_changes_the_order_of_a_sum_alone(device):
    x, weight, _ = _operands((3, 200), 24, device, E4M3)
    row = _tuning.config("linear_fp8", _launch.target_of(x.values), rows=3, blocks=0)
    plain = quantized.linear(x, weight, torch.float32)
    with _tuning.override("linear_fp8", row | {"PROMOTE": 1}):
        torch.testing.assert_close(quantized.linear(x, weight, torch.float32), plain, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("adds", "scale"), [(False, "row"), (True, "row"), (True, "all")])
def test_pytorchs_own_product_on_request(device, adds, scale):
    """Where a rule says so, of what it computes; anything else stays with the kernel, as all does without such a rule."""
    x, weight, exact = _operands((2, 5, 48), 32, device, E4M3)
    if scale == "all":
        exact = (exact - weight.bias) / x.scale.view(2, 5, 1) * 0.25 + weight.bias
        x = x._replace(scale=torch.full((1,), 0.25, device=device))
    residual = torch.randn(2, 5, 32, device=device).bfloat16() if adds else None
    exact = exact if residual is None else exact + residual
    with fastvit.use_backend("auto"), dispatch.taken() as taken:
        ours = quantized.linear(x, weight, torch.bfloat16, residual=residual)
        with _tuning.override("dispatch linear_8bit", {"serve": "vendor"}):
            theirs = quantized.linear(x, weight, torch.bfloat16, residual=residual)
            quantized.linear(x, weight, torch.bfloat16, "relu")
            quantized.linear(x, weight, torch.float32)
    with fastvit.use_backend("triton"), _tuning.override("dispatch linear_8bit", {"serve": "vendor"}):
        assert torch.equal(quantized.linear(x, weight, torch.bfloat16, residual=residual), ours)
    assert [(op, way) for op, _, way in taken] == [("linear_8bit", "kernel"), ("linear_8bit", "vendor")]
    assert taken[0][1] == {"adds": "residual" if adds else "nothing", "rows": 10, "width": 48, "outputs": 32}
    for out in (ours, theirs):
        assert out.shape == (2, 5, 32)
        comparison = compare("out", out, exact.bfloat16(), exact, magnitude=48**0.5)
        assert comparison.ours <= (1 if out is ours else 2) * comparison.allowed, "rounded once, or before the sum too"
    assert not torch.equal(ours, theirs) or not adds, "PyTorch's product was not taken"


def test_a_hidden_layer_from_one_product_into_the_next(device, form):
    x, residual = (torch.randn(2, 5, size).bfloat16().to(device) for size in (40, 24))
    fc1, fc2, bias1, bias2 = (torch.randn(*size).to(device) / 8 for size in ((160, 40), (24, 160), (160,), (24,)))
    hidden = quantized.linear_quantized(quantized.quantize(x, form), quantized.quantize_weight(fc1, form, bias1), "gelu")
    out = quantized.linear(hidden, quantized.quantize_weight(fc2, form, bias2), torch.float32, residual=residual)
    expected = reference_quantized.linear(x, fc1, bias1, dtype=form, activation="gelu")
    expected = reference_quantized.linear(expected, fc2, bias2, dtype=form, block=128, residual=residual)
    unrounded = reference.linear(reference.linear(x.float(), fc1, bias1, activation="gelu"), fc2, bias2) + residual
    step = (expected - unrounded).abs().max()
    # A hidden value next to the middle between two steps may fall to either: far less than what rounding costs in all.
    assert (out - expected).abs().max() < 0.25 * step


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_spoil_their_row_alone(device, bad, form):
    x = torch.randn(4, 40).to(device)
    weight, unit = (quantized.quantize_weight(w.to(device), form) for w in (torch.randn(160, 40), torch.eye(160)))
    clean = quantized.linear(quantized.linear_quantized(quantized.quantize(x, form), weight, "gelu"), unit, torch.float32)
    x[2, 7] = bad
    rounded = quantized.quantize(x, form)
    out = quantized.linear(quantized.linear_quantized(rounded, weight, "gelu"), unit, torch.float32)
    assert quantized.linear(rounded, weight, torch.float32)[2].isnan().all()
    assert out[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(out[others], clean[others])
    (values, scale), _ = quantized.add_layer_norm(x, x, None, None, 1e-6, form)
    assert torch.equal((values.float() * scale[:, None]).isnan().any(1).cpu(), torch.tensor([False, False, True, False]))
    expected = reference_quantized.dequantize(*reference_quantized.quantize(x, form))
    assert torch.equal(expected.isnan().any(1).cpu(), torch.tensor([False, False, True, False]))


@pytest.mark.parametrize("size", [1e-38, 3e38])
def test_the_ends_of_float32(device, size, form):
    """The smallest normal numbers count as nothing, the largest do not overflow."""
    x = torch.tensor([[size, -size / 2, 0.0] * 8]).to(device)
    values, scale = quantized.quantize(x, form)
    assert scale.isfinite().all()
    torch.testing.assert_close(values.float() * scale[:, None], x, rtol=0, atol=1e-30 if size < 1 else size * 2.0**-4)


def test_empty_batches(device, form):
    weight = quantized.quantize_weight(torch.randn(24, 40).to(device), form)
    x = quantized.quantize(torch.randn(0, 5, 40).to(device), form)
    assert quantized.linear(x, weight, torch.bfloat16).shape == (0, 5, 24)
    assert quantized.linear_quantized(x, weight).values.shape == (0, 5, 24)
    assert quantized.glu(*torch.randn(2, 0, 5, 40).to(device), "silu", form).values.shape == (0, 5, 40)


def test_rows_far_apart(device, form):
    """2³⁰ elements from row to row, of what is rounded and of the residual."""
    torch.use_deterministic_algorithms(False)  # which would fill the memory between
    x, residual = (torch.randn(3, size).bfloat16().to(device) for size in (40, 24))
    weight = quantized.quantize_weight(torch.randn(24, 40).to(device), form)
    near = quantized.linear(quantized.quantize(x, form), weight, torch.bfloat16, residual=residual)
    far = quantized.linear(quantized.quantize(_far_apart(x, 0), form), weight, torch.bfloat16, residual=_far_apart(residual, 0))
    assert torch.equal(near, far)
    _same(quantized.glu(_far_apart(x, 0), x, "silu", form).values, quantized.glu(x, x, "silu", form).values)


def test_opcheck(device, form):
    x, weight = torch.randn(2, 5, 40).to(device), torch.randn(24, 40).to(device)
    gamma = torch.randn(40).to(device)
    rounded = quantized.quantize_weight(weight, form, torch.randn(24).to(device))
    values, scale = quantized.quantize(x, form)
    ops = torch.ops.fastvit
    tests = ("test_faketensor",)  # the schema's test multiplies e4m3 tensors, which PyTorch cannot
    torch.library.opcheck(ops.quantize, (x, x, gamma, True, gamma, gamma, 1e-6, form), test_utils=tests)
    torch.library.opcheck(ops.quantize_glu, (x, x, "silu", form), test_utils=tests)
    arguments = values, scale, *rounded
    torch.library.opcheck(ops.linear_8bit, (*arguments, "relu", x[..., :24], torch.float32), test_utils=tests)
    torch.library.opcheck(ops.linear_8bit_quantized, (*arguments, "gelu", None), test_utils=tests)
    if form == E4M3:
        torch.library.opcheck(ops.linear_8bit_quantized, (*arguments, "gelu", torch.ones(1, device=device)), test_utils=tests)


def test_a_gradient_is_refused(device, form):
    x = torch.randn(2, 40, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="8-bit operators have no backward; run them under"):
        quantized.quantize(x, form)
    with torch.no_grad():
        assert quantized.quantize(x, form).values.shape == (2, 40)


def test_where_it_does_not_run(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(quantized.backend, "why_not_triton", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert quantized.why_not("fp8", cuda) == "FP8 needs compute capability 8.9, this GPU has 8.0"
    assert quantized.why_not("int8", cuda) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert quantized.why_not("fp8", cuda) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "fnuz" in quantized.why_not("fp8", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-"))
    assert quantized.why_not("int8", cuda) is None
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName="gfx1100"))
    assert quantized.why_not("int8", cuda) == "INT8 needs one of AMD's gfx90a, gfx942, gfx950, this GPU is gfx1100"
