"""Triton's CPU interpreter, repaired until a kernel that passes in it deserves to pass.

The stock interpreter (3.6 to 3.9) computes bfloat16 on its bits as if they were integers, truncates where a GPU rounds,
rounds to e4m3 half up instead of half to even and loses the carry, rounds a fused multiply-add twice, hands 0 to a masked load
that names no ``other=`` (a GPU hands over whatever the register held), lets a 32-bit offset wrap around in silence and ignores
``tl.device_assert``. ``repair()`` mends these; ``test_interpreter.py`` shows each of them.
"""

import dataclasses

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

# Triton's types that NumPy lacks → what they are here, and the integers that the memory access routines take them for.
SHORT = {tl.bfloat16: np.dtype(ml_dtypes.bfloat16), tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn)}
BITS = {dtype: (np.dtype(f"uint{dtype.itemsize * 8}"), getattr(tl, f"uint{dtype.itemsize * 8}")) for dtype in SHORT.values()}

_repaired = False


def repair() -> None:
    """Repairs the interpreter of this process; calling it again changes nothing."""
    global _repaired
    if _repaired:
        return
    _repaired = True
    _make_short_floats_real()
    _make_masked_loads_honest()
    _check_overflow_and_assertions()


def _raw(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(BITS[array.dtype][0]) if array.dtype in BITS else array


def _make_short_floats_real() -> None:
    """bfloat16 and e4m3 values live in ``ml_dtypes`` arrays, whose arithmetic, comparisons and casts round as hardware does.

    Where a GPU's cast to e4m3 saturates, this one gives NaN, as PyTorch's does: what relies on saturation shows.
    """
    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle
    stock = {name: getattr(builder, name) for name in ("create_masked_store", "create_dot", "create_fp_to_fp", "cast_impl")}
    stock_numpy_dtype = interpreter._get_np_dtype

    def numpy_dtype(dtype):
        scalar = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return stock_numpy_dtype(dtype) if scalar.is_ptr() else SHORT.get(scalar) or stock_numpy_dtype(dtype)

    def cast(self, source, dtype):
        if any(not t.scalar.is_ptr() and t.scalar in SHORT for t in (source.dtype, dtype)):
            return handle(source.data.astype(numpy_dtype(dtype.scalar)), dtype.scalar)
        return stock["cast_impl"](self, source, dtype)

    def convert_with_rounding(self, source, dtype, rounding_mode):
        mended = (tl.float16, *SHORT)
        if dtype.scalar in mended or source.dtype.scalar in mended:
            with np.errstate(over="ignore", invalid="ignore"):
                return handle(source.data.astype(numpy_dtype(dtype.scalar)), dtype.scalar)
        return stock["create_fp_to_fp"](self, source, dtype, rounding_mode)

    def masked_store(self, pointers, value, mask, *hints):
        if value.data.dtype in BITS:
            value = handle(_raw(value.data), BITS[value.data.dtype][1])
        return stock["create_masked_store"](self, pointers, value, mask, *hints)

    def fused(self, x, y, z):  # products of two float32 are exact in float64
        wide = (t.data.astype(np.float64) for t in (x, y, z)) if x.data.dtype == np.float32 else (x.data, y.data, z.data)
        a, b, c = wide
        with np.errstate(invalid="ignore"):
            return handle((a * b + c).astype(z.data.dtype), z.dtype.scalar)

    def dot(self, a, b, accumulator, *options):
        if a.data.dtype in BITS:
            a, b = (handle(x.data.astype(np.float32), tl.float32) for x in (a, b))
        return stock["create_dot"](self, a, b, accumulator, *options)

    interpreter._get_np_dtype = numpy_dtype
    builder.get_bf16 = lambda self, value: handle(np.array([value], dtype=SHORT[tl.bfloat16]), tl.bfloat16)
    builder.create_masked_store = masked_store
    builder.create_dot = dot
    builder.create_fma = fused
    builder.create_fp_to_fp = convert_with_rounding
    builder.cast_impl = cast  # the other casts call this one by name


def _make_masked_loads_honest() -> None:
    """Lanes that a mask turns off read NaN, or the type's largest integer, unless the kernel says ``other=``."""
    handle = interpreter.TensorHandle

    def poison(dtype: np.dtype):
        if dtype.kind == "b":
            return True
        return np.iinfo(dtype).max if dtype.kind in "iu" else np.nan

    def read(pointers, mask, other):
        element = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        if other is None:
            filler = np.full(pointers.data.shape, poison(dtype), dtype=dtype)
        else:
            filler = np.array(np.broadcast_to(other.data, pointers.data.shape), dtype=dtype)
        raw = _raw(filler)
        data = interpreter._interpreter.load(pointers.data, mask, raw, raw.dtype)
        return handle(data.view(dtype), element)

    def masked_load(self, pointers, mask, other, *hints, **named_hints):
        mask = mask.data if isinstance(mask, handle) else mask  # descriptors hand over a bare array
        return read(pointers, mask, other)

    def load(self, pointers, *hints, **named_hints):
        return read(pointers, np.ones_like(pointers.data, dtype=bool), None)

    interpreter.InterpreterBuilder.create_masked_load = masked_load
    interpreter.InterpreterBuilder.create_load = load


def _check_overflow_and_assertions() -> None:
    """Integer arithmetic narrower than 64 bits raises when it leaves its type, and ``tl.device_assert`` raises."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=True)
