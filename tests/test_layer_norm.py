"""layer_norm and add_layer_norm against float64, on both backends."""

import pytest
import torch
import torch.nn.functional as F
from fastvit.kernels import _tuning, layer_norm_backward
from fastvit.kernels._launch import record

import fastvit
from fastvit import functional, reference
from tests.errors import DTYPES, assert_as_exact_as_eager, run
from tests.layouts import LAYOUTS, lay_out

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SLOW = pytest.mark.slow


def _eager(input, weight=None, bias=None, eps=1e-6, *, statistics="token"):
    """PyTorch's own layer norm, in the input's dtype."""
    if statistics == "token":
        return F.layer_norm(input, input.shape[-1:], weight, bias, eps)
    normalized = F.layer_norm(input, input.shape[-2:], None, None, eps)
    normalized = normalized if weight is None else normalized * weight.to(input.dtype)
    return normalized if bias is None else normalized + bias.to(input.dtype)


def _eager_in_float32(input, weight=None, bias=None, eps=1e-6, *, statistics="token"):
    """PyTorch's own layer norm in float32, rounded once: what the kernels are held to, stricter than eager in the dtype."""
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return _eager(input.float(), weight, bias, eps, statistics=statistics).to(input.dtype)


def _baseline():
    return _eager_in_float32 if fastvit.get_backend() == "triton" else _eager


def _eager_add(residual, branch, weight=None, bias=None, eps=1e-6, *, layer_scale=None):
    total = residual + (branch if layer_scale is None else layer_scale * branch)
    return _baseline()(total, weight, bias, eps), total


def _arguments(shape, dtype, device, weight=True, bias=True, parameter_dtype=None):
    channels = shape[-1]
    parameter_dtype = parameter_dtype or dtype
    arguments = {"input": (torch.randn(shape) * 2 + 0.5).to(dtype)}
    if weight:
        arguments["weight"] = (torch.randn(channels) + 1).to(parameter_dtype)
    if bias:
        arguments["bias"] = torch.randn(channels).to(parameter_dtype)
    return {name: value.to(device) for name, value in arguments.items()}


def _check(arguments, **options):
    options = {"statistics": "token", "eps": 1e-6} | options
    return assert_as_exact_as_eager(functional.layer_norm, _baseline(), reference.layer_norm, arguments | options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [2, 7, 64, 768, *(pytest.param(count, marks=SLOW) for count in (100, 384, 1024))])
@pytest.mark.parametrize("statistics", ["token", "image"])
def test_channels(backend, device, dtype, channels, statistics):
    _check(_arguments((3, 7, channels), dtype, device), statistics=statistics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "channels",
    [5120, *(pytest.param(count, marks=SLOW) for count in (16384, 16385, 20000))],
    ids=["5120", "widest row", "first wide row", "20000"],
)
def test_wide_channels(backend, device, dtype, channels):
    _check(_arguments((2, channels), dtype, device))


@pytest.mark.parametrize("channels", [5120, pytest.param(20000, marks=SLOW)])
def test_wide_images(backend, device, channels):
    _check(_arguments((2, 3, channels), torch.bfloat16, device), statistics="image")


@pytest.mark.parametrize("statistics", ["token", "image"])
def test_one_channel(backend, device, statistics):
    """A single channel has no variance: the result is the bias, and no gradient reaches the input."""
    shape = (2, 1, 1) if statistics == "image" else (2, 5, 1)
    arguments = _arguments(shape, torch.float32, device)
    results = run(functional.layer_norm, arguments | {"statistics": statistics})
    torch.testing.assert_close(results["output"], arguments["bias"].expand(shape), rtol=0, atol=1e-6)
    assert results["gradient of input"].abs().max() < 1e-3  # rstd is 10³: rounding a gradient of 1 leaves some 1e-4


@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("statistics", ["token", "image"])
def test_affine_parts(backend, device, weight, bias, statistics):
    _check(_arguments((2, 5, 96), torch.bfloat16, device, weight=weight, bias=bias), statistics=statistics)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("statistics", ["token", "image"])
def test_float32_parameters_beside_a_half_precision_input(backend, device, dtype, statistics):
    _check(_arguments((2, 5, 96), dtype, device, parameter_dtype=torch.float32), statistics=statistics)


@pytest.mark.parametrize("shape", [(1, 64), (64,), (2, 2, 2, 64), (197, 64), (300, 32)], ids=str)
def test_ranks_and_rows(backend, device, shape):
    """300 rows give the backward pass several partial sums for the weight, the last of them incomplete."""
    _check(_arguments(shape, torch.float32, device))


@pytest.mark.parametrize(("shape", "statistics"), [((0, 64), "token"), ((0, 5, 64), "image"), ((3, 0, 64), "token")], ids=str)
def test_empty_batches(backend, device, shape, statistics):
    results = run(functional.layer_norm, _arguments(shape, torch.float32, device) | {"statistics": statistics})
    assert results["output"].shape == shape
    assert results["gradient of input"].shape == shape
    assert not results["gradient of weight"].any()
    assert not results["gradient of bias"].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("statistics", ["token", "image"])
def test_layouts(backend, device, layout, statistics):
    arguments = _arguments((3, 5, 40), torch.bfloat16, device)
    arguments["input"] = lay_out(arguments["input"], layout)
    for name in ("weight", "bias"):
        if layout != "contiguous":
            arguments[name] = lay_out(arguments[name], "gaps" if layout == "gaps" else "embedded")
    _check(arguments, statistics=statistics)


@pytest.mark.parametrize("statistics", ["token", "image"])
def test_an_upstream_gradient_of_any_layout(backend, device, statistics):
    """``.sum()`` hands back a gradient of stride 0, a transposed consumer one in another order."""
    arguments = _arguments((3, 5, 40), torch.float32, device)

    def summed(op):
        def function(**named):
            out = op(**named, statistics=statistics)
            return out.transpose(0, 2).contiguous() * torch.arange(3.0, device=out.device), out.sum()

        return function

    assert_as_exact_as_eager(summed(functional.layer_norm), summed(_baseline()), summed(reference.layer_norm), arguments)


@pytest.mark.parametrize("channels", [768, 20000])
@pytest.mark.parametrize("statistics", ["token", "image"])
def test_a_large_mean_does_not_drown_the_variance(backend, device, channels, statistics):
    """Mean 10⁴, standard deviation 1: the textbook E[x²] − E[x]² loses every digit in float32."""
    arguments = {"input": torch.randn(2, 3, channels, device=device) + 1e4}
    results = run(functional.layer_norm, arguments | {"statistics": statistics}, backward=False)
    exact = run(reference.layer_norm, arguments | {"statistics": statistics}, torch.float64, backward=False)
    # The mean itself is rounded to eps·10⁴ ≈ 1e-3 of a standard deviation.
    torch.testing.assert_close(results["output"].double(), exact["output"], rtol=0, atol=4e-3)


def test_eps_is_used(backend, device):
    arguments = _arguments((2, 16), torch.float32, device)
    arguments["input"] = arguments["input"] * 1e-3
    _check(arguments, eps=1e-5)
    _check(arguments, eps=1e-12)


def test_constant_rows_have_finite_gradients(backend, device):
    arguments = _arguments((2, 16), torch.float32, device)
    arguments["input"] = torch.full((2, 16), 3.0, device=device)
    assert all(value.isfinite().all() for value in run(functional.layer_norm, arguments).values())


@pytest.mark.parametrize("statistics", ["token", "image"])
def test_the_same_bits_twice(backend, device, statistics):
    arguments = _arguments((2, 35, 48), torch.bfloat16, device) | {"statistics": statistics}
    first, second = (run(functional.layer_norm, arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("channels", [24, 48, 52])
def test_backward_programs_of_several_rounds(backend, device, channels):
    """Two programs share the rows four at a time, the last round incomplete; a row is one piece or two, of several parts."""
    with _tuning.override("layer_norm_backward", {"BLOCK_ROWS": 4, "PROGRAMS": 2, "PART": 16, "num_warps": 4}):
        _check(_arguments((23, channels), torch.float32, device))
        _check_add(_add_arguments((21, channels), torch.float32, device))


@pytest.mark.parametrize(("channels", "as_wide_as"), [(768, 768), (777, 1554), (200, 200)])
def test_rows_that_16_does_not_divide_get_the_warps_of_wider_ones(channels, as_wide_as):
    with record("sm_90"):
        row = layer_norm_backward._backward_config(torch.empty(4, channels, device="meta"), False)
    assert row == _tuning.config("layer_norm_backward", "sm_90", channels=as_wide_as, sums=2)


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_frozen_arguments_get_no_gradient(backend, device, frozen):
    arguments = {name: value.requires_grad_(name != frozen) for name, value in _arguments((4, 16), torch.float32, device).items()}
    functional.layer_norm(**arguments).square().sum().backward()
    assert arguments[frozen].grad is None
    expected = {name: value.detach().double().requires_grad_() for name, value in arguments.items()}
    reference.layer_norm(**expected).square().sum().backward()
    for name in arguments.keys() - {frozen}:
        torch.testing.assert_close(arguments[name].grad.double(), expected[name].grad, rtol=1e-4, atol=1e-5)


# --- residual addition and layer norm -------------------------------------------------------------------------------------


def _add_arguments(shape, dtype, device, scale=True, branch_dtype=None, **affine):
    arguments = _arguments(shape, dtype, device, **affine)
    arguments["residual"] = arguments.pop("input")
    arguments["branch"] = torch.randn(shape).to(branch_dtype or dtype).to(device)
    if scale:
        arguments["layer_scale"] = (torch.randn(shape[-1]) * 0.5).to(dtype).to(device)
    return arguments


def _check_add(arguments):
    return assert_as_exact_as_eager(functional.add_layer_norm, _eager_add, reference.add_layer_norm, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [7, 384, pytest.param(2, marks=SLOW), pytest.param(1024, marks=SLOW)])
@pytest.mark.parametrize("scale", [True, False], ids=["layer scale", "no layer scale"])
def test_add_channels(backend, device, dtype, channels, scale):
    _check_add(_add_arguments((3, 7, channels), dtype, device, scale=scale))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [16384, 20000])
@pytest.mark.parametrize("scale", [True, False], ids=["layer scale", "no layer scale"])
def test_add_wide_channels(backend, device, channels, scale):
    _check_add(_add_arguments((3, channels), torch.bfloat16, device, scale=scale))


@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no weight"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_add_affine_parts(backend, device, weight, bias):
    _check_add(_add_arguments((2, 5, 96), torch.bfloat16, device, weight=weight, bias=bias))


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=["residual float32", "residual bfloat16"])
@pytest.mark.parametrize("scale", [True, False], ids=["layer scale", "no layer scale"])
def test_add_mixed_precision(backend, device, residual, scale):
    """A residual stream in float32 beside half-precision branches, and the other way round: the sum is float32."""
    branch = torch.bfloat16 if residual == torch.float32 else torch.float32
    arguments = _add_arguments((2, 5, 96), residual, device, scale=scale, branch_dtype=branch, parameter_dtype=torch.float32)
    _check_add(arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_layouts(backend, device, layout):
    arguments = _add_arguments((3, 5, 40), torch.bfloat16, device)
    for name in ("residual", "branch"):
        arguments[name] = lay_out(arguments[name], layout)
    arguments["layer_scale"] = lay_out(arguments["layer_scale"], "gaps")
    _check_add(arguments)


@pytest.mark.parametrize("shape", [(0, 48), (3, 0, 48)], ids=str)
def test_add_empty(backend, device, shape):
    results = run(functional.add_layer_norm, _add_arguments(shape, torch.float32, device))
    assert results["output 0"].shape == results["output 1"].shape == shape
    for name in ("weight", "bias", "layer_scale"):
        assert not results[f"gradient of {name}"].any()


@pytest.mark.parametrize("used", [0, 1], ids=["only the norm is used", "only the sum is used"])
def test_add_with_one_output_unused(backend, device, used):
    arguments = _add_arguments((2, 5, 24), torch.float32, device)
    unused_parameters = {"weight", "bias"} if used == 1 else set()
    results = {}
    for op, dtype in ((functional.add_layer_norm, torch.float32), (reference.add_layer_norm, torch.float64)):
        leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in arguments.items()}
        op(**leaves)[used].square().sum().backward()
        results[dtype] = leaves
    for name in arguments.keys() - unused_parameters:
        ours, exact = results[torch.float32][name].grad, results[torch.float64][name].grad
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
    for name in unused_parameters:
        grad = results[torch.float32][name].grad
        assert grad is None or not grad.any()


def test_add_leaves_its_inputs_alone(backend, device):
    """In inference too, where an operator might be tempted to write the sum over the residual."""
    arguments = _add_arguments((2, 5, 24), torch.float32, device)
    copies = {name: value.clone() for name, value in arguments.items()}
    with torch.no_grad():
        normalized, total = functional.add_layer_norm(**arguments)
    assert all(torch.equal(arguments[name], copies[name]) for name in arguments)
    assert normalized.data_ptr() != total.data_ptr() != arguments["residual"].data_ptr()


def test_add_the_same_bits_twice(backend, device):
    arguments = _add_arguments((2, 35, 48), torch.bfloat16, device)
    first, second = (run(functional.add_layer_norm, arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
