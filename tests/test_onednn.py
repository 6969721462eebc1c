"""oneDNN's linear on CPUs: the right numbers, and only where it may and should serve."""

import pytest
import torch

import fastvit
from fastvit import functional, reference
from fastvit.ops import onednn
from tests.models_for_acceleration import hf_dinov2, image

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def _on_the_torch_backend():
    with fastvit.use_backend("torch"):
        yield


@pytest.fixture
def onednn_calls(monkeypatch):
    """Counts the linears that oneDNN serves, on any CPU."""
    calls = []
    real = onednn.linear
    monkeypatch.setattr(onednn, "cpu_vendor", lambda: "amd")
    monkeypatch.setattr(onednn, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(onednn, "linear", lambda *arguments: calls.append(1) or real(*arguments))
    return calls


def operands(dtype=torch.float32):
    x, weight, bias = torch.randn(2, 5, 24), torch.randn(40, 24) / 5, torch.randn(40)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@needs_onednn
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "relu"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed input", "sliced input"])
def test_onednn_gives_the_reference(onednn_calls, activation, layout):
    x, weight, bias = operands()
    if layout == "transposed input":
        x = x.transpose(0, 1)
    elif layout == "sliced input":
        x = torch.randn(2, 5, 48)[..., ::2]
    kept = x.clone()
    with torch.no_grad():
        actual = functional.linear(x, weight, bias, activation=activation)
    assert onednn_calls
    torch.testing.assert_close(actual, reference.linear(x, weight, bias, activation=activation), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, kept)


@needs_onednn
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_onednn_errs_no_more_than_pytorch_in_bfloat16(onednn_calls, activation):
    x, weight, bias = operands(torch.bfloat16)
    exact = reference.linear(x.double(), weight.double(), bias.double(), activation=activation)
    with torch.no_grad():
        error = (functional.linear(x, weight, bias, activation=activation) - exact).abs().max()
    assert onednn_calls
    assert error <= 2 * (reference.linear(x, weight, bias, activation=activation) - exact).abs().max()


@needs_onednn
def test_onednn_keeps_the_tails_of_gelu(onednn_calls):
    x = torch.linspace(-12, 12, 2001)[:, None]
    with torch.no_grad():
        actual = functional.linear(x, torch.ones(1, 1), activation="gelu")
    assert (actual - reference.activate(x.double(), "gelu")).abs().max() < 1e-6


@needs_onednn
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_a_nan_stays_one_in_its_row_alone(onednn_calls, activation):
    x, weight, bias = operands()
    x[1, 2, 3] = torch.nan
    with torch.no_grad():
        rows = functional.linear(x, weight, bias, activation=activation).isnan()
    assert onednn_calls
    assert rows[1, 2].all()
    assert rows.sum() == 40


def test_a_strided_weight_never_meets_onednn(onednn_calls):
    """It has a kernel for that layout which takes a thousand times as long."""
    x, weight, bias = operands()
    for strided in (weight.t().contiguous().t(), torch.randn(40, 48)[:, ::2]):
        with torch.no_grad():
            actual = functional.linear(x, strided, bias)
        torch.testing.assert_close(actual, reference.linear(x, strided, bias), rtol=1e-5, atol=1e-5)
    assert not onednn_calls


def test_what_onednn_may_not_serve(onednn_calls):
    x, weight, bias = operands()
    functional.linear(x, weight.requires_grad_(), bias, activation="gelu").sum().backward()
    assert weight.grad is not None
    weight = weight.detach()
    with torch.no_grad():
        assert functional.linear(x[:0], weight, bias).shape == (0, 5, 40)
        functional.linear(*operands(torch.float16))
        functional.linear(*operands(torch.float64))
        torch.func.vmap(lambda row: functional.linear(row, weight, bias))(x)
        torch.func.jvp(lambda t: functional.linear(t, weight, bias, activation="gelu"), (x,), (x,))
        torch.jit.trace(lambda t: functional.linear(t, weight, bias), x, check_trace=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert functional.linear(x, weight, bias).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            functional.linear(x, weight, bias)
    assert not onednn_calls


@pytest.mark.parametrize(("vendor", "plain", "fused"), [("amd", 1, 1), ("intel", 0, 1), ("other", 0, 0)])
def test_onednn_serves_where_it_is_the_faster_library(onednn_calls, monkeypatch, vendor, plain, fused):
    monkeypatch.setattr(onednn, "cpu_vendor", lambda: vendor)
    x, weight, bias = operands()
    with torch.no_grad():
        functional.linear(x, weight, bias)
        assert len(onednn_calls) == plain
        functional.linear(x, weight, bias, activation="gelu")
    assert len(onednn_calls) == plain + fused


@needs_onednn
def test_an_accelerated_model_uses_it(onednn_calls):
    model = fastvit.accelerate(hf_dinov2())
    onednn_calls.clear()  # those of the probe
    with torch.no_grad():
        model(image())
    assert len(onednn_calls) == 3 * 6
