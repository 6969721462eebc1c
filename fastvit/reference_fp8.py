"""FP8 linears in eager PyTorch, one equation a line: the specification of the kernels, and how FP8 is simulated on a CPU.

    scale = max(amax, 1e-30) / 448,   values = e4m3(x · 448 / max(amax, 1e-30)),   x ≈ values · scale

e4m3 is ``torch.float8_e4m3fn``: 3 bits of mantissa, largest value 448, no infinity (Micikevicius et al. 2022); rounding is to
nearest, ties to even. amax is taken over a row (a token, an output channel), or over each block of 128 columns of a row. A row
(block) of zeros stays zeros. A NaN or an infinity makes NaN of every product its row is in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

LARGEST = 448.0  # of e4m3
SMALLEST = 1e-30  # what amax counts as where it is less: keeps 448 / amax and the scale normal float32 numbers
BLOCK = 128  # columns that share a scale


def quantize(input: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
    """(..., C) → values (..., C) float8_e4m3fn and scales (..., 1) float32; with ``block``, scales (..., ceil(C / block))."""
    blocks = _blocks(input.float(), block)
    amax = blocks.abs().nan_to_num(0.0, torch.inf).amax(-1, keepdim=True).clamp(min=SMALLEST)
    values = (blocks * (LARGEST / amax)).to(torch.float8_e4m3fn)
    return values.flatten(-2)[..., : input.shape[-1]], (amax / LARGEST).squeeze(-1)


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
    activation: str | None = None,
    block: int | None = None,
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """residual + layer_scale · activation(x · Wᵀ + bias) of the input (..., K) and weight (N, K) rounded to e4m3, in float32.

    The weight has a scale an output channel, the input one a token, or with ``block`` one for every so many columns.
    """
    x, w = dequantize(*quantize(input, block), block), dequantize(*quantize(weight))
    out = reference.linear(x, w, None if bias is None else bias.float(), activation=activation)
    if layer_scale is not None:
        out = out * layer_scale.float()
    return out if residual is None else residual.float() + out
