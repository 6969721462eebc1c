"""glu against float64, on both backends."""

import pytest
import torch

from fastvit import functional, reference
from tests.errors import DTYPES, assert_as_exact_as_eager, run
from tests.layouts import LAYOUTS, lay_out
from tests.test_offsets import _check as check_offsets

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "sigmoid"]


def _arguments(shape, dtype, device):
    return {name: (torch.randn(shape) * 2).to(dtype).to(device) for name in ("gate", "value")}


def _check(arguments, **options):
    return assert_as_exact_as_eager(functional.glu, reference.glu, reference.glu, arguments | options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, device, dtype, activation):
    _check(_arguments((3, 7, 40), dtype, device), activation=activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inference(backend, device, dtype, activation):
    """Without a gradient to keep anything for, the torch backend writes over its own."""
    ops = functional.glu, reference.glu, reference.glu
    assert_as_exact_as_eager(*ops, _arguments((3, 7, 40), dtype, device) | {"activation": activation}, backward=False)


@pytest.mark.parametrize("shape", [(1,), (64,), (3, 1), (2, 2, 2, 8), (17, 257), (2, 3, 1000)], ids=str)
def test_shapes(backend, device, shape):
    """17 rows and 257 channels leave an incomplete tile on either side."""
    _check(_arguments(shape, torch.bfloat16, device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, layout):
    arguments = _arguments((3, 5, 40), torch.bfloat16, device)
    _check({name: lay_out(value, layout) for name, value in arguments.items()})


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_halves_of_a_packed_tensor(backend, device, activation):
    """As one projection hands them over; the gradient reaches the packed tensor."""

    def packed(op):
        return lambda input: op(*input.chunk(2, dim=-1), activation=activation)

    arguments = {"input": torch.randn(2, 9, 48).bfloat16().to(device)}
    assert_as_exact_as_eager(packed(functional.glu), packed(reference.glu), packed(reference.glu), arguments)


def test_halves_are_read_in_place(triton_backend, device, monkeypatch):
    from fastvit.kernels import glu as kernel

    launched = []
    launch = kernel.launch_glu_forward
    monkeypatch.setattr(kernel, "launch_glu_forward", lambda *args: (launched.append(args), launch(*args)))
    packed = torch.randn(2, 9, 48, device=device)
    functional.glu(*packed.chunk(2, dim=-1))
    gate, value = launched[0][:2]
    assert gate.data_ptr() == packed.data_ptr()
    assert value.data_ptr() == packed.data_ptr() + 24 * packed.element_size()


def test_an_upstream_gradient_of_any_layout(backend, device):
    def summed(op):
        def function(**named):
            out = op(**named)
            return out.transpose(0, 2).contiguous() * torch.arange(3.0, device=out.device), out.sum()

        return function

    arguments = _arguments((3, 5, 40), torch.float32, device)
    assert_as_exact_as_eager(summed(functional.glu), summed(reference.glu), summed(reference.glu), arguments)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates(backend, device, activation):
    """±10⁴ saturates every activation and overflows none."""
    gate = torch.tensor([-1e4, -100.0, -1.0, 0.5, 1.0, 100.0, 1e4], device=device)
    _check({"gate": gate, "value": torch.randn(7, device=device)}, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_largest_float16(backend, device, activation):
    """1.702 times it is infinite."""
    gate = torch.tensor([-65504.0, 65504.0], device=device).half()
    out = functional.glu(gate, torch.full_like(gate, 0.5), activation=activation)
    expected = reference.glu(gate.double(), torch.full_like(gate, 0.5).double(), activation=activation)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16)], ids=str)
def test_empty(backend, device, shape):
    results = run(functional.glu, _arguments(shape, torch.float32, device))
    assert all(result.shape == shape for result in results.values())


def test_inputs_are_left_alone(backend, device):
    arguments = _arguments((2, 5, 24), torch.float32, device)
    copies = {name: value.clone() for name, value in arguments.items()}
    with torch.no_grad():
        for activation in ACTIVATIONS:
            functional.glu(**arguments, activation=activation)
    assert all(torch.equal(arguments[name], copies[name]) for name in arguments)


@pytest.mark.parametrize("frozen", ["gate", "value"])
def test_frozen_arguments_get_no_gradient(backend, device, frozen):
    arguments = _arguments((2, 8), torch.float32, device)
    leaves = {name: value.requires_grad_(name != frozen) for name, value in arguments.items()}
    functional.glu(**leaves).sum().backward()
    assert leaves[frozen].grad is None
    assert all(leaves[name].grad is not None for name in leaves.keys() - {frozen})


def test_the_same_bits_twice(backend, device):
    arguments = _arguments((4, 70, 48), torch.bfloat16, device)
    first, second = (run(functional.glu, arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    gate, value = (torch.randn(3, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, v: functional.glu(g, v, activation=activation), (gate, value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_dtype(backend, device, dtype):
    arguments = _arguments((3, 8), dtype, device)
    plain = functional.glu(**arguments)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(functional.glu(**arguments), plain)


@pytest.mark.parametrize("name", ["gate", "value"])
@pytest.mark.slow
def test_offsets_beyond_32_bits(triton_backend, device, name):
    arguments = {name: torch.randn(3, 16, device=device) for name in ("gate", "value")}
    check_offsets(functional.glu, arguments, name, 0)


X = torch.zeros(2, 8)
WRONG = {
    "gate is no tensor": ({"gate": 1.0}, TypeError, "gate is float"),
    "value missing": ({"value": None}, TypeError, "value is NoneType"),
    "integers": ({"gate": X.int()}, TypeError, "gate of shape (2, 8) has dtype torch.int32"),
    "mixed dtypes": ({"value": X.bfloat16()}, TypeError, "value of shape (2, 8) has dtype torch.bfloat16"),
    "other shape": ({"value": torch.zeros(2, 9)}, ValueError, "value has shape (2, 9); expected (2, 8)"),
    "no channels": ({"gate": torch.zeros(2, 0), "value": torch.zeros(2, 0)}, ValueError, "gate has shape (2, 0)"),
    "no dimensions": ({"gate": torch.tensor(1.0), "value": torch.tensor(1.0)}, ValueError, "gate has shape ()"),
    "other device": ({"value": X.to("meta")}, ValueError, "value of shape (2, 8) is on meta"),
    "unknown activation": ({"activation": "swish"}, ValueError, "activation is 'swish'; expected one of silu"),
    "no activation": ({"activation": None}, ValueError, "activation is None"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(case):
    changes, error, message = WRONG[case]
    with pytest.raises(error) as caught:
        functional.glu(**({"gate": X, "value": X} | changes))
    assert message in str(caught.value)
    assert "expected" in str(caught.value)
