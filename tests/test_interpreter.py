"""The repairs that make Triton's interpreter an honest witness: each of these fails on the stock interpreter."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.conftest import ON_GPU

pytestmark = pytest.mark.skipif(ON_GPU, reason="a GPU needs no interpreter")


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + lanes), tl.load(y_ptr + lanes)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "subtract":
        out = x - y
    elif OPERATION == "multiply":
        out = x * y
    elif OPERATION == "maximum":
        out = tl.maximum(x, y)
    else:
        out = tl.where(x < y, x, y)
    tl.store(out_ptr + lanes, out)


@pytest.mark.parametrize("operation", ["add", "subtract", "multiply", "maximum", "minimum by comparison"])
def test_bfloat16_arithmetic_is_torch_bit_for_bit(operation):
    x, y = torch.randn(2, 1024).to(torch.bfloat16)
    out = torch.empty_like(x)
    _arithmetic[(1,)](x, y, out, OPERATION=operation, BLOCK=1024)
    torch_operation = {"add": torch.add, "subtract": torch.sub, "multiply": torch.mul, "maximum": torch.maximum}
    expected = torch_operation.get(operation, torch.minimum)(x, y)
    assert torch.equal(out, expected)


@triton.jit
def _fused(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.fma(tl.load(x_ptr + lanes), tl.load(y_ptr + lanes), tl.load(z_ptr + lanes)))


def test_a_fused_multiply_add_rounds_once():
    x, y = torch.randn(2, 1024)
    z, out = -(x * y), torch.empty(1024)
    _fused[(1,)](x, y, z, out, BLOCK=1024)
    assert torch.equal(out, (x.double() * y.double() + z.double()).float())
    assert out.any(), "what rounding the product loses"


@triton.jit
def _cast(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_casts_round_to_nearest_even(source, target):
    halfway = 1 + torch.arange(64) * 2.0**-8 + 2.0**-9  # every second value lies between two bfloat16s
    x = torch.cat([halfway, -halfway, torch.randn(896) * 1e3]).to(source)
    out = torch.empty(1024, dtype=target)
    _cast[(1,)](x, out, BLOCK=1024)
    assert torch.equal(out, x.to(target))


def test_casts_to_e4m3_round_to_nearest_even():
    """All 254 finite values, what lies halfway between neighbours, and NaN."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = values[values.isfinite()].sort().values
    x = torch.cat([values, (finite[1:] + finite[:-1]) / 2, torch.randn(515) * 1e-2])
    out = torch.empty(1024, dtype=torch.float8_e4m3fn)
    _cast[(1,)](x, out, BLOCK=1024)
    assert torch.equal(out.view(torch.uint8), x.to(out.dtype).view(torch.uint8))
    back = torch.empty(1024)
    _cast[(1,)](out, back, BLOCK=1024)
    assert torch.equal(back.nan_to_num(7.0), out.float().nan_to_num(7.0))


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + row * SIZE + column), tl.load(b_ptr + row * SIZE + column), input_precision="ieee")
    tl.store(out_ptr + row * SIZE + column, product)


def test_bfloat16_dot_accumulates_in_float32():
    a, b = torch.randn(2, 32, 32).to(torch.bfloat16)
    out = torch.empty(32, 32)
    _dot[(1,)](a, b, out, SIZE=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@triton.jit
def _masked_sum(x_ptr, out_ptr, count, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    if OTHER:
        x = tl.load(x_ptr + lanes, mask=lanes < count, other=0.0)
    else:
        x = tl.load(x_ptr + lanes, mask=lanes < count)
    tl.store(out_ptr, tl.sum(x.to(tl.float32), axis=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_masked_load_without_other_reads_nan(dtype):
    x, out = torch.ones(16, dtype=dtype), torch.zeros(1)
    _masked_sum[(1,)](x, out, 10, OTHER=False, BLOCK=16)
    assert out.isnan().all()


def test_a_masked_load_with_other_reads_it():
    x, out = torch.ones(16), torch.zeros(1)
    _masked_sum[(1,)](x, out, 10, OTHER=True, BLOCK=16)
    assert out.item() == 10


@triton.jit
def _masked_index(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes, mask=lanes < count))


def test_a_masked_integer_load_without_other_reads_no_zero():
    x, out = torch.zeros(16, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    _masked_index[(1,)](x, out, 10, BLOCK=16)
    assert (out[:10] == 0).all()
    assert (out[10:] == torch.iinfo(torch.int32).max).all()


@triton.jit
def _offset(out_ptr, stride, WIDE: tl.constexpr):
    row = tl.program_id(0) + 3
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out_ptr, row * stride)


def test_a_32_bit_offset_that_wraps_raises():
    with pytest.raises(InterpreterError, match="int32 overflow"):
        _offset[(1,)](torch.zeros(1, dtype=torch.int64), 2**30, WIDE=False)


def test_a_64_bit_offset_does_not_raise():
    out = torch.zeros(1, dtype=torch.int64)
    _offset[(1,)](out, 2**30, WIDE=True)
    assert out.item() == 3 * 2**30


@triton.jit
def _assertion(value):
    tl.device_assert(value > 0, "value is positive")


def test_device_assert_raises():
    _assertion[(1,)](1)
    with pytest.raises(InterpreterError, match="value is positive"):
        _assertion[(1,)](-1)
