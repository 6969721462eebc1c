"""oneDNN's linear in training: PyTorch's gradients, and only where it may and should serve."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from fastvit import functional
from fastvit.ops import onednn, onednn_training
from tests.models_for_acceleration import hf_dinov2, image, tensor_of

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def _on_the_torch_backend():
    with fastvit.use_backend("torch"):
        yield


@pytest.fixture
def products(monkeypatch):
    """Counts oneDNN's products, on any CPU and of any size."""
    calls, real = [], onednn.linear
    monkeypatch.setattr(onednn, "cpu_vendor", lambda: "amd")
    for module, name in ((onednn, "MIN_TRAINED_PRODUCTS"), (onednn, "MIN_TRAINED_ROWS")):
        monkeypatch.setattr(module, name, 0)
    for name in ("ROWS_FOR_INPUT", "ROWS_FOR_WEIGHT"):
        monkeypatch.setattr(onednn_training, name, 0)
    monkeypatch.setattr(onednn, "linear", lambda *arguments: calls.append(1) or real(*arguments))
    return calls


def operands(dtype=torch.float32, wants=(True, True, True)):
    made = torch.randn(2, 5, 24), torch.randn(40, 24) / 5, torch.randn(40)
    return [t.to(dtype).requires_grad_(want) for t, want in zip(made, wants, strict=True)]


def gradients(function, tensors, grad):
    return torch.autograd.grad(function(*tensors), [t for t in tensors if t.requires_grad], grad)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "flat", "one row", "expanded gradient", "no bias"])
def test_gradients_are_those_of_pytorch(products, layout):
    x, weight, bias = operands()
    grad = torch.randn(2, 5, 40)
    if layout == "transposed":
        x, grad = x.detach().transpose(0, 1).requires_grad_(), grad.transpose(0, 1)
    elif layout == "sliced":
        x = torch.randn(2, 5, 48)[..., ::2].requires_grad_()
    elif layout in ("flat", "one row"):
        count = 10 if layout == "flat" else 1
        x, grad = x.detach().view(10, 24)[:count].requires_grad_(), grad.view(10, 40)[:count]
    elif layout == "expanded gradient":
        grad = torch.randn(1, 1, 1).expand(2, 5, 40)
    tensors = (x, weight) if layout == "no bias" else (x, weight, bias)
    actual, expected = (gradients(function, tensors, grad) for function in (functional.linear, F.linear))
    assert len(products) == 3
    for mine, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)
        assert mine.stride() == right.stride()


@pytest.mark.parametrize(
    "wants", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)], ids=str
)
def test_only_what_is_wanted_is_computed(products, wants):
    tensors, grad = operands(wants=wants), torch.randn(2, 5, 40)
    actual, expected = (gradients(function, tensors, grad) for function in (functional.linear, F.linear))
    assert len(products) == 1 + wants[0] + wants[1]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "expected"), [(15, 0), (16, 2), (63, 2), (64, 3)])
def test_few_rows_are_left_to_pytorch(monkeypatch, products, rows, expected):
    monkeypatch.setattr(onednn, "MIN_TRAINED_ROWS", 16)
    monkeypatch.setattr(onednn_training, "ROWS_FOR_WEIGHT", 16)
    monkeypatch.setattr(onednn_training, "ROWS_FOR_INPUT", 64)
    x, weight, bias = torch.randn(rows, 24, requires_grad=True), *operands()[1:]
    functional.linear(x, weight, bias).sum().backward()
    assert len(products) == expected


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_second_derivatives_are_those_of_pytorch(products, activation):
    def penalty(dtype, backend):
        torch.manual_seed(0)
        tensors = operands(dtype)
        with fastvit.use_backend(backend):
            out = functional.linear(*tensors, activation=activation)
        (first,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
        return torch.autograd.grad(first.square().sum(), tensors)

    actual, expected = penalty(torch.float32, "torch"), penalty(torch.float64, "torch")
    assert len(products) == 3  # forward, and backward of what is differentiated last
    for mine, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-4)


def test_what_onednn_may_not_serve(products, monkeypatch):
    x, weight, bias = operands()
    functional.linear(x.detach().double(), weight.detach().double().requires_grad_()).sum().backward()
    functional.linear(x, weight.detach().t().contiguous().t().requires_grad_()).sum().backward()
    torch.func.grad(lambda t: functional.linear(t, weight, bias).sum())(x)
    torch.func.vmap(lambda row: functional.linear(row, weight, bias))(x)
    torch.func.jvp(lambda t: functional.linear(t, weight, bias), (x,), (x,))
    torch.jit.trace(functional.linear, (x, weight, bias), check_trace=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.linear(x, weight, bias).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        functional.linear(x, weight, bias).sum().backward()
    with FlopCounterMode(display=False) as counter:
        functional.linear(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 24 * 40
    for vendor in ("intel", "other"):
        monkeypatch.setattr(onednn, "cpu_vendor", lambda vendor=vendor: vendor)
        functional.linear(x, weight, bias).sum().backward()
    assert not products


def test_a_batch_of_gradients_goes_back_at_once(products):
    x, weight, bias = operands()
    out, grads = functional.linear(x, weight, bias), torch.randn(3, 2, 5, 40)
    actual = torch.autograd.grad(out, (x, weight, bias), grads, is_grads_batched=True)
    expected = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), grads, is_grads_batched=True)
    assert products
    for mine, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_computes_the_same_again(products, reentrant):
    tensors, grad = operands(), torch.randn(2, 5, 40)

    def again(*tensors):
        return checkpoint(functional.linear, *tensors, use_reentrant=reentrant)

    out = again(*tensors)
    out.backward(grad)
    assert len(products) == (3 if reentrant else 4)  # reentrant, it runs in inference first
    expected = gradients(F.linear, tensors, grad)
    for tensor, right in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor.grad, right, rtol=1e-5, atol=1e-5)


def test_a_weight_changed_before_backward_is_refused(products):
    x, weight, bias = operands()
    out = functional.linear(x, weight, bias)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    assert len(products) == 1


@pytest.mark.slow
@pytest.mark.parametrize("around", ["everything", "backward"])
def test_compiled_autograd(products, around):
    x, weight, bias = operands()
    expected = gradients(F.linear, (x, weight, bias), torch.ones(2, 5, 40))
    compiled = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))
    if around == "everything":
        with compiled:
            functional.linear(x, weight, bias).sum().backward()
        assert not products
    else:
        out = functional.linear(x, weight, bias).sum()
        with compiled:
            out.backward()
    for tensor, right in zip((x, weight, bias), expected, strict=True):
        torch.testing.assert_close(tensor.grad, right, rtol=1e-5, atol=1e-5)


def test_an_accelerated_model_trains_on_it(products):
    model, x = hf_dinov2(num_hidden_layers=2), image()

    def step():
        model.zero_grad()
        tensor_of(model(x)).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = step()
    fastvit.accelerate(model)
    products.clear()
    actual = step()
    assert len(products) == 2 * 6 * 3
    for mine, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_model_trains_on_it(products):
    model, x = hf_dinov2(num_hidden_layers=2), image()

    def step(call):
        model.zero_grad()
        tensor_of(call(x)).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = step(model)
    fastvit.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    step(compiled)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        actual = step(compiled)
    assert {event.key: event.count for event in profile.key_averages()}["fastvit::onednn_linear"] == 2 * 6 * 3
    for mine, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)
