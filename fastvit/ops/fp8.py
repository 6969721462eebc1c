"""FP8 (e4m3) linears on the Triton kernels, for inference: raw operators, shape functions, and what may be given to them.

Activations come as ``Quantized``: values (..., C) float8_e4m3fn and scales float32, [rows] for a scale a token or
[ceil(C / 128), rows] for one every 128 columns of it. Weights come as ``Fp8Weight``, quantized once. There is no backward:
a gradient that is wanted gets one clear error. Needs compute capability 8.9; ``why_not`` says what stands against a device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend, reference_fp8
from ._common import as_rows, contiguous, define, wants_grad

E4M3 = torch.float8_e4m3fn
MIN_COMPUTE_CAPABILITY = (8, 9)


class Quantized(NamedTuple):
    values: Tensor
    scale: Tensor


class Fp8Weight(NamedTuple):
    """values (N, K) e4m3, scale (N,) and bias (N,) float32; a LayerScale after the linear is already in the last two."""

    values: Tensor
    scale: Tensor
    bias: Tensor | None


def why_not(device: torch.device) -> str | None:
    """None when FP8 linears can run on ``device``, otherwise the reason why they cannot."""
    if device.type == "cuda" and torch.version.hip is not None:
        return "FP8 has no kernels for AMD GPUs, whose gfx942 has another format (fnuz)"
    reason = backend.why_not_triton(device)
    if reason is None and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_COMPUTE_CAPABILITY:
            reason = "FP8 needs compute capability {}.{}, this GPU has {}.{}".format(*MIN_COMPUTE_CAPABILITY, *capability)
    return reason


@torch.no_grad()
def quantize_weight(weight: Tensor, bias: Tensor | None = None, layer_scale: Tensor | None = None) -> Fp8Weight:
    """Weight (N, K) and bias (N,) of a linear, and the LayerScale (N,) that multiplies its output, in FP8."""
    values, scale = reference_fp8.quantize(weight)
    scale, bias = scale.squeeze(-1), None if bias is None else bias.float()
    if layer_scale is not None:
        scale, bias = scale * layer_scale.float(), None if bias is None else bias * layer_scale.float()
    return Fp8Weight(values, scale, bias)


# --- raw operators --------------------------------------------------------------------------------------------------------


def fp8_quantize(
    input: Tensor,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    norm: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
):
    """Returns (values, scale, total); total is empty without a branch."""
    from ..kernels import quantize as kernel

    rows = as_rows(input)
    values, total = input.new_empty(input.shape, dtype=E4M3), input.new_empty(0 if branch is None else input.shape)
    scale = input.new_empty(rows.shape[0], dtype=torch.float32)
    kernel.launch_quantize(
        rows,
        None if branch is None else as_rows(branch),
        contiguous(layer_scale),
        norm,
        contiguous(weight),
        contiguous(bias),
        eps,
        values.view(rows.shape),
        scale,
        None if branch is None else total.view(rows.shape),
    )
    return values, scale, total


def _linear(values, scale, weight, weight_scale, bias, activation, residual, out: Tensor, out_scale: Tensor | None) -> None:
    from ..kernels import linear_fp8 as kernel

    rows = scale.shape[-1]
    kernel.launch_linear_fp8(
        values.reshape(rows, values.shape[-1]),
        scale,
        weight,
        weight_scale,
        bias,
        out.view(rows, weight.shape[0]),
        activation,
        None if residual is None else as_rows(residual),
        out_scale,
    )


def fp8_linear(values, scale, weight, weight_scale, bias, activation: str | None, residual: Tensor | None, dtype: torch.dtype):
    out = _fake_linear(values, scale, weight, weight_scale, bias, activation, residual, dtype)
    _linear(values, scale, weight, weight_scale, bias, activation, residual, out, None)
    return out


def fp8_linear_quantized(values, scale, weight, weight_scale, bias, activation: str | None):
    out, out_scale = _fake_linear_quantized(values, scale, weight, weight_scale, bias, activation)
    _linear(values, scale, weight, weight_scale, bias, activation, None, out, out_scale)
    return out, out_scale


def _fake_quantize(input, branch, layer_scale, norm, weight, bias, eps):
    scale = input.new_empty(math.prod(input.shape[:-1]), dtype=torch.float32)
    return input.new_empty(input.shape, dtype=E4M3), scale, input.new_empty(0 if branch is None else input.shape)


def _fake_linear(values, scale, weight, weight_scale, bias, activation, residual, dtype):
    return values.new_empty((*values.shape[:-1], weight.shape[0]), dtype=dtype)


def _fake_linear_quantized(values, scale, weight, weight_scale, bias, activation):
    blocks = -(-weight.shape[0] // reference_fp8.BLOCK)
    out_scale = values.new_empty((blocks, math.prod(values.shape[:-1])), dtype=torch.float32)
    return values.new_empty((*values.shape[:-1], weight.shape[0])), out_scale


define(
    "fp8_quantize(Tensor input, Tensor? branch, Tensor? layer_scale, bool norm, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    fp8_quantize,
    _fake_quantize,
)
define(
    "fp8_linear(Tensor values, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation,"
    " Tensor? residual, ScalarType dtype) -> Tensor",
    fp8_linear,
    _fake_linear,
)
define(
    "fp8_linear_quantized(Tensor values, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation)"
    " -> (Tensor, Tensor)",
    fp8_linear_quantized,
    _fake_linear_quantized,
)


# --- what blocks call -----------------------------------------------------------------------------------------------------


def _check(*tensors: Tensor | None) -> None:
    if wants_grad(*tensors):
        raise RuntimeError("FP8 operators have no backward; run them under torch.no_grad() or torch.inference_mode()")


def quantize(input: Tensor) -> Quantized:
    """(..., C) in float16, bfloat16 or float32 → e4m3 with a scale a token."""
    _check(input)
    return Quantized(*torch.ops.fastvit.fp8_quantize(input, None, None, False, None, None, 0.0)[:2])


def layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Quantized:
    """The LayerNorm over channels of the input (..., C), in e4m3 with a scale a token."""
    _check(input, weight, bias)
    return Quantized(*torch.ops.fastvit.fp8_quantize(input, None, None, True, weight, bias, eps)[:2])


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer_scale: Tensor | None = None,
) -> tuple[Quantized, Tensor]:
    """(norm of total in e4m3 with a scale a token, total), total = residual + layer_scale · branch in residual's dtype."""
    _check(residual, branch, weight, bias, layer_scale)
    values, scale, total = torch.ops.fastvit.fp8_quantize(residual, branch, layer_scale, True, weight, bias, eps)
    return Quantized(values, scale), total


def linear(
    input: Quantized,
    weight: Fp8Weight,
    dtype: torch.dtype,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + activation(input · Wᵀ + bias) in ``dtype``, (..., K) → (..., N). A folded LayerScale admits no activation."""
    _check(residual)
    return torch.ops.fastvit.fp8_linear(*input, *weight, activation, residual, dtype)


def linear_quantized(input: Quantized, weight: Fp8Weight, activation: str | None = None) -> Quantized:
    """activation(input · Wᵀ + bias), (..., K) → (..., N), in e4m3 with a scale for every 128 columns of a token."""
    return Quantized(*torch.ops.fastvit.fp8_linear_quantized(*input, *weight, activation))
