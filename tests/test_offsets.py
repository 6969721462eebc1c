"""Offsets beyond 2³¹ elements, one stride at a time: the third entry along it lies 2³¹ elements away.

The memory between is reserved and never touched, so each test costs some pages. In the interpreter 32-bit arithmetic that
wraps raises (``test_interpreter.py`` shows it does); on a GPU it would read somewhere else and give wrong results.
"""

import pytest
import torch

from fastvit import functional, reference
from tests.errors import run

STRIDE = 2**30
ENTRIES = 3

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("triton_backend")]


@pytest.fixture(autouse=True)
def _enough_memory(device):
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory, which no page is saved on")


def _far_apart(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The same values with a stride of 2³⁰ elements along ``dim``, in uncommitted memory (bfloat16, to halve it)."""
    values = values.to(torch.bfloat16)
    assert values.shape[dim] == ENTRIES
    others = [size for index, size in enumerate(values.shape) if index != dim]
    strides = list(torch.empty(others, device="meta").stride())
    strides.insert(dim, STRIDE)
    needed = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
    try:
        storage = torch.empty(needed, dtype=torch.bfloat16, device=values.device)
    except RuntimeError as error:
        pytest.skip(f"this machine does not reserve {2 * needed >> 20} MiB: {error}")
    return storage.as_strided(values.shape, strides).copy_(values)


def _check(op, arguments, name, dim):
    """Forward and backward with the argument far apart give what they give with it contiguous."""
    arguments = {key: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    expected = run(op, arguments)
    far = run(op, arguments | {name: _far_apart(arguments[name], dim)})
    for key in expected:
        assert torch.equal(far[key], expected[key]), key


@pytest.mark.parametrize("name", ["residual", "branch"])
def test_add_layer_norm(device, name):
    arguments = {key: torch.randn(ENTRIES, 16, device=device) for key in ("residual", "branch")}
    _check(functional.add_layer_norm, arguments, name, 0)


@pytest.mark.parametrize("channels", [16, 20000], ids=["", "wide"])
def test_layer_norm_rows(device, channels):
    _check(functional.layer_norm, {"input": torch.randn(ENTRIES, channels, device=device)}, "input", 0)


@pytest.mark.parametrize("dim", [0, 1], ids=["image", "token"])
def test_layer_norm_image(device, dim):
    arguments = {"input": torch.randn(3, 3, 16, device=device), "statistics": "image"}
    _check(functional.layer_norm, arguments, "input", dim)


@pytest.mark.parametrize(("name", "dim"), [("input", 0), ("input", 1), ("weight", 0), ("weight", 1)], ids=str)
def test_linear(device, name, dim):
    arguments = {"input": torch.randn(3, 3, device=device), "weight": torch.randn(3, 3, device=device), "activation": "gelu"}
    _check(functional.linear, arguments, name, dim)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
def test_attention(device, name, dim):
    arguments = {key: torch.randn(3, 3, 3, 16, device=device) for key in ("query", "key", "value")}
    _check(functional.attention, arguments, name, dim)


@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["batch", "head", "row", "column"])
@pytest.mark.parametrize("kind", ["additive", "boolean"])
def test_attention_mask(device, dim, kind):
    arguments = {key: torch.randn(3, 3, 3, 16, device=device) for key in ("query", "key", "value")}
    arguments["attn_mask"] = torch.randn(3, 3, 3, 3, device=device)
    if kind == "additive":
        _check(functional.attention, arguments, "attn_mask", dim)
        return
    mask = _far_apart((arguments.pop("attn_mask") > -0.5).float(), dim).view(torch.int16)
    # A boolean mask of one byte an entry, seen through 16-bit entries that are 0 or not: strides double to 2³¹.
    as_bytes = torch.empty(0, dtype=torch.bool, device=device)
    as_bytes.set_(mask.untyped_storage(), 1, mask.shape, [2 * stride for stride in mask.stride()])
    attend = mask != 0
    far = functional.attention(**arguments, attn_mask=as_bytes)
    assert torch.equal(far, functional.attention(**arguments, attn_mask=attend))


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
@pytest.mark.parametrize("name", ["rel_h", "rel_w"])
def test_attention_rel(device, name, dim):
    arguments = {key: torch.randn(3, 3, 3, 16, device=device) for key in ("query", "key", "value")}
    arguments |= {"rel_h": torch.randn(3, 3, 3, 1, device=device), "rel_w": torch.randn(3, 3, 3, 3, device=device)}
    _check(functional.attention, arguments, name, dim)


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "head", "row"])
def test_an_upstream_gradient_far_apart(device, dim):
    q, k, v = (torch.randn(3, 3, 3, 16, device=device).bfloat16().requires_grad_() for _ in range(3))
    upstream = torch.randn(3, 3, 3, 16, device=device).bfloat16()
    out = functional.attention(q, k, v)
    near = torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)
    far = torch.autograd.grad(out, (q, k, v), _far_apart(upstream, dim))
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_the_far_tensor_holds_what_it_should(device):
    values = torch.randn(3, 4, device=device)
    far = _far_apart(values, 0)
    assert far.stride() == (STRIDE, 1)
    assert (ENTRIES - 1) * STRIDE >= 2**31
    torch.testing.assert_close(reference.layer_norm(far), reference.layer_norm(values.bfloat16()))
