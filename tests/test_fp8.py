"""The FP8 operators: rounding bit for bit, products against float64, extremes, and what is refused."""

import pytest
import torch

from fastvit import reference, reference_fp8
from fastvit.ops import fp8
from tests.errors import compare
from tests.layouts import embedded
from tests.test_offsets import _far_apart

if torch.cuda.is_available() and (_reason := fp8.why_not(torch.device("cuda"))):
    pytest.skip(_reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HALF_STEP = 2.0**-4  # of an e4m3 number, relative; half the step between subnormal ones is 2⁻¹⁰
SHAPES = [(1, 1), (3, 16), (2, 3, 40), (5, 257)]


def _same(ours, expected):
    assert ours.dtype == expected.dtype
    assert torch.equal(ours.cpu().view(torch.uint8), expected.cpu().view(torch.uint8))


def _check_rounded(ours, exact, scale):
    """Each value within half a step of the exact one, and some float32 rounding before."""
    assert ours.shape == exact.shape
    allowed = 1.001 * torch.maximum(exact.abs() * HALF_STEP, scale.double() * 2.0**-10) + 1e-6 * exact.abs().max()
    wrong = ~((ours.double() - exact).abs() <= allowed)
    assert not wrong.any(), f"{int(wrong.sum())} values are further than half a step from the exact ones"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_is_the_references_bit_for_bit(device, shape, dtype):
    x = (torch.randn(shape) * torch.logspace(-4, 3, shape[-1])).to(dtype).to(device)
    x[0] = 0
    values, scale = fp8.quantize(embedded(x))
    expected, expected_scale = reference_fp8.quantize(x)
    _same(values, expected)
    _same(scale, expected_scale.flatten())


def test_the_reference_rounds_as_the_format_says():
    """Largest value 448, seven steps between powers of two, subnormal numbers of 2⁻⁹, ties to even."""
    row = torch.tensor([[448.0, 17.0, 19.0, 2.0**-9, 2.0**-10, -1.0625]])
    values, scale = reference_fp8.quantize(row)
    assert scale.item() == 1
    assert values.float().tolist() == [[448.0, 16.0, 20.0, 2.0**-9, 0.0, -1.0]]
    zeros, _ = reference_fp8.quantize(torch.zeros(2, 3))
    assert not zeros.float().any()


def test_a_block_has_a_scale_of_its_own():
    x = torch.cat([torch.full((2, 128), 1e-3), torch.full((2, 5), 1e3)], 1)
    values, scale = reference_fp8.quantize(x, 128)
    assert values.shape == x.shape
    assert scale.shape == (2, 2)
    torch.testing.assert_close(reference_fp8.dequantize(values, scale, 128), x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(device, shape, affine):
    x = (torch.randn(shape) * 3 + 1).bfloat16().to(device)
    weight, bias = (torch.randn(shape[-1], device=device) if affine else None for _ in range(2))
    values, scale = fp8.layer_norm(embedded(x), weight, bias, 1e-5)
    exact = reference.layer_norm(x.double(), *(t if t is None else t.double() for t in (weight, bias)), 1e-5)
    scale = scale.view(*shape[:-1], 1)
    torch.testing.assert_close(scale.double(), exact.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448, rtol=1e-5, atol=1e-9)
    _check_rounded(values.double() * scale, exact, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
def test_add_layer_norm(device, dtype, scaled):
    x, branch = (torch.randn(2, 5, 40).to(dtype).to(device) for _ in range(2))
    weight, bias, gamma = (torch.randn(40).to(dtype).to(device) for _ in range(3))
    gamma = gamma if scaled else None
    (values, scale), total = fp8.add_layer_norm(embedded(x), embedded(branch), weight, bias, 1e-6, gamma)
    branch = branch.double() if gamma is None else branch.double() * gamma.double()
    torch.testing.assert_close(total.double(), x.double() + branch, rtol=torch.finfo(dtype).eps, atol=1e-6)
    exact = reference.layer_norm(total.double(), weight.double(), bias.double(), 1e-6)
    scale = scale.view(2, 5, 1)
    _check_rounded(values.double() * scale, exact, scale)


def _operands(shape, outputs, device, block=None):
    """(x, W, bias, both rounded to e4m3, the exact product with the bias in float64)."""
    x, weight, bias = torch.randn(shape).to(device), torch.randn(outputs, shape[-1]).to(device), torch.randn(outputs).to(device)
    values, scale = reference_fp8.quantize(x, block)
    scales = scale.flatten(0, -2).t().contiguous() if block else scale.flatten()
    rounded = fp8.quantize_weight(weight, bias)
    exact = reference_fp8.dequantize(values, scale, block).double() @ (rounded.values.double() * rounded.scale[:, None]).t()
    return fp8.Quantized(values, scales), rounded, exact + bias.double()


# Rows and outputs below, at and beyond a tile of 64; sums that end within a step of 128, and just at one.
PRODUCTS = [((1, 16), 8), ((2, 5, 40), 24), ((65, 128), 72), ((3, 200), 130), ((9, 272), 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [None, 128], ids=["scale a row", "scale a block"])
@pytest.mark.parametrize(("shape", "outputs"), PRODUCTS, ids=str)
def test_linear(device, shape, outputs, block, dtype):
    x, weight, exact = _operands(shape, outputs, device, block)
    out = fp8.linear(x, weight, dtype)
    comparison = compare("out", out, exact.to(dtype), exact, magnitude=shape[-1] ** 0.5)
    assert comparison.ours <= comparison.allowed, comparison


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_activations(device, activation):
    x, weight, exact = _operands((5, 40), 24, device)
    exact = reference.linear(exact, torch.eye(24, dtype=torch.float64, device=device), activation=activation)
    out = fp8.linear(x, weight, torch.bfloat16, activation)
    assert compare("out", out, exact.bfloat16(), exact).ours <= 2.0**-8 * exact.abs().max()


def test_layer_scale_and_residual(device):
    """LayerScale lies in the weight's scale and in the bias; the sum is rounded once."""
    x, weight, bias, gamma = (torch.randn(*size).to(device) for size in ((5, 200), (24, 200), (24,), (24,)))
    residual = torch.randn(5, 24).bfloat16().to(device)
    rounded, folded = fp8.quantize(x), fp8.quantize_weight(weight, bias, gamma)
    out = fp8.linear(rounded, folded, torch.bfloat16, residual=embedded(residual))
    expected = reference_fp8.linear(x, weight, bias, residual=residual, layer_scale=gamma)
    assert compare("out", out, expected.bfloat16(), expected.double(), magnitude=100.0).ours <= 2.0**-8 * expected.abs().max()


@pytest.mark.parametrize(("shape", "outputs"), [((1, 16), 8), ((2, 5, 40), 128), ((65, 136), 300)], ids=str)
def test_rounding_in_the_epilogue(device, shape, outputs):
    x, weight, exact = _operands(shape, outputs, device)
    exact = torch.nn.functional.gelu(exact)
    values, scale = fp8.linear_quantized(x, weight, "gelu")
    assert scale.shape == (-(-outputs // 128), exact[..., 0].numel())
    scale = scale.t().reshape(*shape[:-1], -1)
    largest = torch.nn.functional.pad(exact, (0, -outputs % 128)).unflatten(-1, (-1, 128)).abs().amax(-1)
    torch.testing.assert_close(scale.double(), largest / 448, rtol=1e-3, atol=1e-6)
    ours = reference_fp8.dequantize(values, scale, 128)
    each = scale.repeat_interleave(128, -1)[..., :outputs]
    error, allowed = (ours - exact).abs(), 1.001 * torch.maximum(exact.abs() * HALF_STEP, each.double() * 2.0**-10)
    assert (error <= allowed + 5e-5).all(), "further than half a step and the fitted GELU's own error from exact"


def test_a_hidden_layer_from_one_product_into_the_next(device):
    x, residual = (torch.randn(2, 5, size).bfloat16().to(device) for size in (40, 24))
    fc1, fc2, bias1, bias2 = (torch.randn(*size).to(device) / 8 for size in ((160, 40), (24, 160), (160,), (24,)))
    hidden = fp8.linear_quantized(fp8.quantize(x), fp8.quantize_weight(fc1, bias1), "gelu")
    out = fp8.linear(hidden, fp8.quantize_weight(fc2, bias2), torch.float32, residual=residual)
    expected = reference_fp8.linear(x, fc1, bias1, activation="gelu")
    expected = reference_fp8.linear(expected, fc2, bias2, block=128, residual=residual)
    unrounded = reference.linear(reference.linear(x.float(), fc1, bias1, activation="gelu"), fc2, bias2) + residual
    step = (expected - unrounded).abs().max()
    # A hidden value next to the middle between two e4m3 numbers may fall to either: far less than what rounding costs in all.
    assert (out - expected).abs().max() < 0.25 * step


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_spoil_their_row_alone(device, bad):
    x, weight = torch.randn(4, 40).to(device), fp8.quantize_weight(torch.randn(160, 40).to(device))
    clean = fp8.linear(fp8.linear_quantized(fp8.quantize(x), weight, "gelu"), fp8.quantize_weight(torch.eye(160)), torch.float32)
    x[2, 7] = bad
    out = fp8.linear(fp8.linear_quantized(fp8.quantize(x), weight, "gelu"), fp8.quantize_weight(torch.eye(160)), torch.float32)
    assert out[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(out[others], clean[others])
    (values, _), _ = fp8.add_layer_norm(x, x, None, None, 1e-6)
    assert torch.equal(values.float().isnan().any(1).cpu(), torch.tensor([False, False, True, False]))


@pytest.mark.parametrize("size", [1e-38, 3e38])
def test_the_ends_of_float32(device, size):
    """The smallest normal numbers count as nothing, the largest do not overflow."""
    x = torch.tensor([[size, -size / 2, 0.0] * 8]).to(device)
    values, scale = fp8.quantize(x)
    assert scale.isfinite().all()
    torch.testing.assert_close(values.float() * scale[:, None], x, rtol=0, atol=1e-30 if size < 1 else size * HALF_STEP)


def test_empty_batches(device):
    weight = fp8.quantize_weight(torch.randn(24, 40).to(device))
    x = fp8.quantize(torch.randn(0, 5, 40).to(device))
    assert fp8.linear(x, weight, torch.bfloat16).shape == (0, 5, 24)
    assert fp8.linear_quantized(x, weight).values.shape == (0, 5, 24)


def test_rows_far_apart(device):
    """2³⁰ elements from row to row, of what is rounded and of the residual."""
    torch.use_deterministic_algorithms(False)  # which would fill the memory between
    x, residual = (torch.randn(3, size).bfloat16().to(device) for size in (40, 24))
    weight = fp8.quantize_weight(torch.randn(24, 40).to(device))
    near = fp8.linear(fp8.quantize(x), weight, torch.bfloat16, residual=residual)
    far = fp8.linear(fp8.quantize(_far_apart(x, 0)), weight, torch.bfloat16, residual=_far_apart(residual, 0))
    assert torch.equal(near, far)


def test_opcheck(device):
    x, weight = torch.randn(2, 5, 40).to(device), torch.randn(24, 40).to(device)
    gamma = torch.randn(40).to(device)
    rounded = fp8.quantize_weight(weight, torch.randn(24).to(device))
    values, scale = fp8.quantize(x)
    tests = ("test_faketensor",)  # the schema's test multiplies e4m3 tensors, which PyTorch cannot
    torch.library.opcheck(torch.ops.fastvit.fp8_quantize, (x, x, gamma, True, gamma, gamma, 1e-6), test_utils=tests)
    arguments = values, scale, *rounded
    torch.library.opcheck(torch.ops.fastvit.fp8_linear, (*arguments, "relu", x[..., :24], torch.float32), test_utils=tests)
    torch.library.opcheck(torch.ops.fastvit.fp8_linear_quantized, (*arguments, "gelu"), test_utils=tests)


def test_a_gradient_is_refused(device):
    x = torch.randn(2, 40, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="FP8 operators have no backward; run them under"):
        fp8.quantize(x)
    with torch.no_grad():
        assert fp8.quantize(x).values.shape == (2, 40)


def test_where_it_does_not_run(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(fp8.backend, "why_not_triton", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert fp8.why_not(cuda) == "FP8 needs compute capability 8.9, this GPU has 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert fp8.why_not(cuda) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "fnuz" in fp8.why_not(cuda)
