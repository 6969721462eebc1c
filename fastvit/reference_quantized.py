"""8-bit linears in eager PyTorch, one equation a line: the specification of the kernels, and how they are simulated on a CPU.

    scale = max(amax, 1e-30) / L,   values = round(x · L / max(amax, 1e-30)),   x ≈ values · scale

Two formats: e4m3 is ``torch.float8_e4m3fn``, 3 bits of mantissa, L = 448, no infinity (Micikevicius et al. 2022); int8 is
symmetric, L = 127 (Jacob et al. 2018, without a zero point). Rounding is to nearest, ties to even. amax is taken over a row (a
token, an output channel), or over each block of 128 columns of a row. A row (block) of zeros stays zeros. A NaN or an infinity
makes NaN of every product its row is in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

E4M3, INT8 = torch.float8_e4m3fn, torch.int8
FORMATS = {"fp8": E4M3, "int8": INT8}
LARGEST = {E4M3: 448.0, INT8: 127.0}
SMALLEST = 1e-30  # what amax counts as where it is less: keeps L / amax and the scale normal float32 numbers
BLOCK = 128  # columns that share a scale


def quantize(input: Tensor, dtype: torch.dtype, block: int | None = None) -> tuple[Tensor, Tensor]:
    """(..., C) → values (..., C) and scales (..., 1) float32; with ``block``, scales (..., ceil(C / block))."""
    blocks = _blocks(input.float(), block)
    amax = blocks.abs().nan_to_num(0.0 if dtype == E4M3 else torch.inf, torch.inf).amax(-1, keepdim=True).clamp(min=SMALLEST)
    factor, scale = LARGEST[dtype] / amax, amax / LARGEST[dtype]
    if dtype == E4M3:  # which has a NaN of its own
        values = (blocks * factor).to(E4M3)
    else:  # rounded once: the product is exact in float64
        values = (blocks.double() * factor).round().nan_to_num(0.0).to(INT8)
        scale = scale.masked_fill(scale.isinf(), torch.nan)
    return values.flatten(-2)[..., : input.shape[-1]], scale.squeeze(-1)


def dequantize(values: Tensor, scale: Tensor, block: int | None = None) -> Tensor:
    """What ``quantize`` made values and scale of, in float32."""
    product = _blocks(values.float(), block) * scale.unsqueeze(-1)
    return product.flatten(-2)[..., : values.shape[-1]]


def _blocks(input: Tensor, block: int | None) -> Tensor:
    """(..., C) → (..., number of blocks, columns of a block), the last filled up with zeros."""
    block = block or max(input.shape[-1], 1)
    return F.pad(input, (0, -input.shape[-1] % block)).unflatten(-1, (-1, block))


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    activation: str | None = None,
    block: int | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """residual + layer_scale · activation(x · Wᵀ + bias) of input (..., K) and weight (N, K) rounded to ``dtype``, in float32.

    The weight has a scale an output channel, the input one a token, or with ``block`` one for every so many columns.
    """
    x, w = dequantize(*quantize(input, dtype, block), block), dequantize(*quantize(weight, dtype))
    out = reference.linear(x, w, None if bias is None else bias.float(), activation=activation)
    if layer_scale is not None:
        out = out * layer_scale.float()
    return out if residual is None else residual.float() + out
