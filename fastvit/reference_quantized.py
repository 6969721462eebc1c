"""8-bit linears in eager PyTorch, one equation a line: the specification of the kernels, and how they are simulated on a CPU.

    scale = max(amax, 1e-30) / L,   values = round(x · L / max(amax, 1e-30)),   x ≈ values · scale

Two formats: e4m3 is ``torch.float8_e4m3fn``, 3 bits of mantissa, L = 448, no infinity (Micikevicius et al. 2022); int8 is
symmetric, L = 127 (Jacob et al. 2018, without a zero point). Rounding is to nearest, ties to even. amax is taken over a row (a
token, an output channel), or over each block of 128 columns of a row, or is a bound that was known before (``hidden_scale``).
A row (block) of zeros stays zeros. A NaN or an infinity makes NaN of every product its row is in. Weights may be rounded with
their errors fed back instead, for inputs like those of a calibration (``quantize_fitted``).

Sums are float32's, or where asked for a model of those that Hopper's tensor cores make of e4m3 products (``hopper_product``).
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
DAMPING = 0.01  # of a mean square, added to every channel's where weights are fitted
LEAST = 2.0**-4  # of a scale: four times the least number that e4m3 has all its bits for
STEP = 32  # products that an instruction of Hopper's tensor cores adds to a sum
FRACTION = 13  # bits after the point that it keeps


def quantize(input: Tensor, dtype: torch.dtype, block: int | None = None, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(..., C) → values (..., C) and scales (..., 1) float32; with ``block``, scales (..., ceil(C / block)). ``given``, (1,): the
    scale of all, of e4m3 alone, whose steps are relative: what is below it loses nothing down to 2⁻⁶ of it."""
    if given is not None:
        return (input.float() * (1 / given)).to(dtype), given.expand(*input.shape[:-1], 1)
    blocks = _blocks(input.float(), block)
    amax = blocks.abs().nan_to_num(0.0 if dtype == E4M3 else torch.inf, torch.inf).amax(-1, keepdim=True).clamp(min=SMALLEST)
    factor, scale = LARGEST[dtype] / amax, amax / LARGEST[dtype]
    if dtype == E4M3:  # which has a NaN of its own
        values = (blocks * factor).to(E4M3)
    else:  # rounded once: the product is exact in float64
        values = (blocks.double() * factor).round().nan_to_num(0.0).to(INT8)
        scale = scale.masked_fill(scale.isinf(), torch.nan)
    return values.flatten(-2)[..., : input.shape[-1]], scale.squeeze(-1)


def quantize_fitted(weight: Tensor, dtype: torch.dtype, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (N, K) → values (N, K) and ``quantize``'s scales (N, 1), for inputs with E[x · xᵀ] = ``moment`` (K, K), which
    is their covariance where the bias takes the mean's error (Nagel et al. 2019).

    Minimizes ‖(W − Ŵ) · x‖² greedily, as GPTQ does (Frantar et al. 2022): channels are rounded one by one, those that are largest
    in x first, and what rounding channel k errs by, e, is taken out of the channels to come, w ← w − e · u_k / u_kk, where u_k is
    the k-th row of U, Uᵀ · U = (moment + 1 % of its mean diagonal)⁻¹.
    """
    scale = quantize(weight, dtype)[1]
    order = moment.diagonal().argsort(descending=True)
    damped = moment.double()[order][:, order]
    damped.diagonal().add_(DAMPING * damped.diagonal().mean() + SMALLEST)
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()
    rest, values = weight.float()[:, order], torch.empty_like(weight, dtype=dtype)
    for start in range(0, rest.shape[1], BLOCK):
        block, errors = slice(start, start + BLOCK), []
        for k in range(start, min(start + BLOCK, rest.shape[1])):
            units = (rest[:, k] / scale[:, 0]).clamp(-LARGEST[dtype], LARGEST[dtype])
            rounded = units.to(E4M3) if dtype == E4M3 else units.round().nan_to_num(0.0).to(INT8)
            values[:, order[k]] = rounded
            errors.append((rest[:, k] - rounded.float() * scale[:, 0]) / spread[k, k])
            rest[:, block] -= errors[-1][:, None] * spread[k, block]
        rest[:, start + BLOCK :] -= torch.stack(errors, 1) @ spread[block, start + BLOCK :]
    return values, scale


def dequantize(values: Tensor, scale: Tensor, block: int | None = None) -> Tensor:
    """What ``quantize`` made values and scale of, in float32."""
    product = _blocks(values.float(), block) * scale.unsqueeze(-1)
    return product.flatten(-2)[..., : values.shape[-1]]


def _blocks(input: Tensor, block: int | None) -> Tensor:
    """(..., C) → (..., number of blocks, columns of a block), the last filled up with zeros."""
    block = block or max(input.shape[-1], 1)
    return F.pad(input, (0, -input.shape[-1] % block)).unflatten(-1, (-1, block))


def hidden_scale(weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None) -> Tensor | None:
    """(1,): an e4m3 scale that |act(W · LayerNorm(x) + b)| / 448 stays below, whatever x (..., C) is; weight (hidden, C).

    A LayerNorm is γ ∘ z + β with ‖z‖ ≤ √C, so by Cauchy and Schwarz |w · (γ ∘ z + β) + b| ≤ √C · ‖w ∘ γ‖ + |w · β + b|;
    rounding both operands adds at most 13 % of √C · ‖w ∘ γ‖ + Σ|w ∘ β|. |act(h)| ≤ |h|. None where a few rows' bound lies so far
    above the others' that half of the rows have values, some ‖w ∘ γ‖, below ``LEAST`` scales: e4m3 would lose their last bits.
    """
    weight = weight.float()
    gained = weight if norm_weight is None else weight * norm_weight.float()
    shift = torch.zeros_like(weight[:, :1]) if norm_bias is None else weight * norm_bias.float()
    constant = shift.sum(-1) if bias is None else shift.sum(-1) + bias.float()
    usual = gained.norm(dim=-1)
    length = weight.shape[-1] ** 0.5 * usual
    bound = length + constant.abs() + 0.13 * (length + shift.abs().sum(-1))
    scale = bound.amax().clamp(min=SMALLEST) / LARGEST[E4M3]
    return scale.view(1) if usual.median() >= LEAST * scale else None


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
    given: Tensor | None = None,
    promote: int | None = None,
    rounded: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """residual + layer_scale · activation(x · Wᵀ + bias) of input (..., K) and weight (N, K) rounded to ``dtype``, in float32.

    The weight has a scale an output channel, the input one a token, or with ``block`` one for every so many columns, or the
    ``given`` one. ``rounded``: values and scales that the weight was rounded to before. ``promote``, of e4m3: sums are
    ``hopper_product``'s, and those of every so many products (0: of all; a block's with ``block``) are added in float32.
    """
    (x, x_scale), (w, w_scale) = quantize(input, dtype, block, given), rounded or quantize(weight, dtype)
    if promote is None:
        x, w = dequantize(x, x_scale, block), dequantize(w, w_scale)
        out = reference.linear(x, w, None if bias is None else bias.float(), activation=activation)
    else:
        every = block or promote or max(input.shape[-1], 1)
        parts = [hopper_product(*pair) for pair in zip(x.split(every, -1), w.split(every, -1), strict=True)]
        out = torch.stack([p * s for p, s in zip(parts, x_scale.split(1, -1) if block else [x_scale] * len(parts), strict=True)])
        out = out.sum(0) * w_scale.t()
        out = reference.activate(out if bias is None else out + bias.float(), activation)
    if layer_scale is not None:
        out = out * layer_scale.float()
    return out if residual is None else residual.float() + out


def hopper_product(a: Tensor, b: Tensor) -> Tensor:
    """a · bᵀ of e4m3 values (..., K) and (N, K), summed as Hopper's tensor cores sum them: (..., N) float32.

    An instruction takes 32 products and the sum so far, cuts each off 13 bits below the largest exponent among them, adds what
    is left, and cuts the sum off after 13 bits of fraction. That is a model of hardware whose maker does not describe it:
    13 bits, as Zhang et al. 2024 (SageAttention2) found and the report on DeepSeek-V3 (2024, 3.5.2; it says 14, counting
    the leading one); the steps as in Xie et al. 2025 (MMA-Sim), which had the bits of an H100. Ada takes 16 products at a time.
    """
    rows, b = a.float().reshape(-1, a.shape[-1]), b.float()
    some = max(1, 2**14 // max(1, len(b)))  # rows whose 32 products with every column fit a CPU's cache
    sums = [torch.zeros(len(part), len(b), device=a.device) for part in rows.split(some)]
    for index, part in enumerate(rows.split(some)):
        for x, w in zip(part.split(STEP, -1), b.split(STEP, -1), strict=True):
            largest = (_power(x, -6)[:, None] * _power(w, -6)).amax(-1).maximum(_power(sums[index])).clamp(min=2.0**-100)
            unit = largest * 2.0**-FRACTION
            units = ((x[:, None] * w) / unit[..., None]).trunc().sum(-1) + (sums[index] / unit).trunc()
            sums[index] = ((units * unit).view(torch.int32) & -(2 ** (23 - FRACTION))).view(torch.float32)
    return torch.cat(sums).view(*a.shape[:-1], len(b))


def _power(x: Tensor, least: int = -126) -> Tensor:
    """The power of two below a float32 number's magnitude, at least 2 ** least; 0 of 0."""
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp(min=2.0**least)
    return torch.where(x == 0, 0.0, power)
