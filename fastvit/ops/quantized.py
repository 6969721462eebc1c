"""8-bit linears on the Triton kernels, for inference: raw operators, shape functions, and what may be given to them.

A format is a dtype: ``float8_e4m3fn`` ("fp8") or ``int8``. Activations come as ``Quantized``: values (..., C) and scales float32,
[rows] for a scale a token, [ceil(C / 128), rows] for one every 128 columns of it, or [1] for all. Weights come as
``QuantizedWeight``, made once, in the activations' dtype. There is no backward: a gradient that is wanted gets one clear error.
``why_not`` says what stands against a device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend, reference_quantized
from ..reference_quantized import E4M3, FORMATS, INT8
from . import dispatch
from ._common import as_rows, contiguous, define, kernels, wants_grad

MIN_COMPUTE_CAPABILITY = {"fp8": (8, 9), "int8": (8, 0)}
INT8_ON_AMD = ("gfx90a", "gfx942", "gfx950")  # what the kernels were compiled for

__all__ = ["E4M3", "FORMATS", "INT8", "Quantized", "QuantizedWeight", "why_not"]


class Quantized(NamedTuple):
    values: Tensor
    scale: Tensor


class QuantizedWeight(NamedTuple):
    """values (N, K), scale (N,) and bias (N,) float32; a LayerScale after the linear is already in the last two."""

    values: Tensor
    scale: Tensor
    bias: Tensor | None


def why_not(precision: str, device: torch.device) -> str | None:
    """None when linears in ``precision``, "fp8" or "int8", can run on ``device``, otherwise the reason why they cannot."""
    name = precision.upper()
    if precision == "fp8" and device.type == "cuda" and torch.version.hip is not None:
        return "FP8 has no kernels for AMD GPUs, whose gfx942 has another format (fnuz)"
    reason = backend.why_not_triton(device)
    if reason is not None or device.type != "cuda":
        return reason
    if torch.version.hip is not None:
        gpu = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        reason = None if gpu in INT8_ON_AMD else f"INT8 needs one of AMD's {', '.join(INT8_ON_AMD)}, this GPU is {gpu}"
    else:
        capability = torch.cuda.get_device_capability(device)
        needed = MIN_COMPUTE_CAPABILITY[precision]
        if capability < needed:
            reason = "{} needs compute capability {}.{}, this GPU has {}.{}".format(name, *needed, *capability)
    return reason


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    layer_scale: Tensor | None = None,
    rounded: tuple[Tensor, Tensor] | None = None,
) -> QuantizedWeight:
    """Weight (N, K) and bias (N,) of a linear, and the LayerScale (N,) that multiplies its output, in 8 bits.

    ``rounded``: values (N, K) and scales (N, 1) of the weight, if not those nearest to it."""
    values, scale = rounded or reference_quantized.quantize(weight, dtype)
    scale, bias = scale.squeeze(-1), None if bias is None else bias.float()
    if layer_scale is not None:
        scale, bias = scale * layer_scale.float(), None if bias is None else bias * layer_scale.float()
    return QuantizedWeight(values.contiguous(), scale.contiguous(), contiguous(bias))  # as the kernel reads them


# --- raw operators --------------------------------------------------------------------------------------------------------


def quantize_forward(
    input: Tensor,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    norm: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
):
    """Returns (values, scale, total); total is empty without a branch."""
    values, scale, total = _fake_quantize(input, branch, layer_scale, norm, weight, bias, eps, dtype)
    rows = as_rows(input)
    kernels.quantize.launch_quantize(
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


def quantize_glu(gate: Tensor, value: Tensor, activation: str, dtype: torch.dtype):
    values, scale = _fake_quantize_glu(gate, value, activation, dtype)
    rows = as_rows(gate)
    kernels.quantize.launch_quantize_glu(rows, as_rows(value), activation, values.view(rows.shape), scale)
    return values, scale


def _linear(values, scale, weight, weight_scale, bias, activation, residual, out: Tensor, out_scale: Tensor | None) -> None:
    rows = math.prod(values.shape[:-1])
    kernels.linear_8bit.launch_linear_8bit(
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


def linear_8bit(values, scale, weight, weight_scale, bias, activation: str | None, residual: Tensor | None, dtype: torch.dtype):
    out = _fake_linear(values, scale, weight, weight_scale, bias, activation, residual, dtype)
    _linear(values, scale, weight, weight_scale, bias, activation, residual, out, None)
    return out


def linear_8bit_quantized(values, scale, weight, weight_scale, bias, activation: str | None, given: Tensor | None = None):
    """Returns (out, its scales); with ``given``, the scale of all, the latter are empty."""
    out, out_scale = _fake_linear_quantized(values, scale, weight, weight_scale, bias, activation, given)
    _linear(values, scale, weight, weight_scale, bias, activation, None, out, out_scale if given is None else given)
    return out, out_scale


def _fake_quantize(input, branch, layer_scale, norm, weight, bias, eps, dtype):
    scale = input.new_empty(math.prod(input.shape[:-1]), dtype=torch.float32)
    return input.new_empty(input.shape, dtype=dtype), scale, input.new_empty(0 if branch is None else input.shape)


def _fake_quantize_glu(gate, value, activation, dtype):
    blocks = -(-gate.shape[-1] // reference_quantized.BLOCK)
    scale = gate.new_empty((blocks, math.prod(gate.shape[:-1])), dtype=torch.float32)
    return gate.new_empty(gate.shape, dtype=dtype), scale


def _fake_linear(values, scale, weight, weight_scale, bias, activation, residual, dtype):
    return values.new_empty((*values.shape[:-1], weight.shape[0]), dtype=dtype)


def _fake_linear_quantized(values, scale, weight, weight_scale, bias, activation, given):
    blocks = 0 if given is not None else -(-weight.shape[0] // reference_quantized.BLOCK)
    out_scale = values.new_empty((blocks, math.prod(values.shape[:-1])), dtype=torch.float32)
    return values.new_empty((*values.shape[:-1], weight.shape[0])), out_scale


_call_quantize = define(
    "quantize(Tensor input, Tensor? branch, Tensor? layer_scale, bool norm, Tensor? weight, Tensor? bias, float eps,"
    " ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    quantize_forward,
    _fake_quantize,
)
_call_quantize_glu = define(
    "quantize_glu(Tensor gate, Tensor value, str activation, ScalarType dtype) -> (Tensor, Tensor)",
    quantize_glu,
    _fake_quantize_glu,
)
_call_linear = define(
    "linear_8bit(Tensor values, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation,"
    " Tensor? residual, ScalarType dtype) -> Tensor",
    linear_8bit,
    _fake_linear,
)
_call_linear_quantized = define(
    "linear_8bit_quantized(Tensor values, Tensor scale, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation,"
    " Tensor? given) -> (Tensor, Tensor)",
    linear_8bit_quantized,
    _fake_linear_quantized,
)


# --- what blocks call -----------------------------------------------------------------------------------------------------


def _check(*tensors: Tensor | None) -> None:
    if wants_grad(*tensors):
        raise RuntimeError(
            "8-bit operators have no backward; run them under torch.no_grad() or torch.inference_mode(), and outside of"
            " torch.func's transforms"
        )


def quantize(input: Tensor, dtype: torch.dtype) -> Quantized:
    """(..., C) in float16, bfloat16 or float32 → 8 bits with a scale a token."""
    _check(input)
    return Quantized(*_call_quantize(input, None, None, False, None, None, 0.0, dtype)[:2])


def layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Quantized:
    """The LayerNorm over channels of the input (..., C), in 8 bits with a scale a token."""
    _check(input, weight, bias)
    return Quantized(*_call_quantize(input, None, None, True, weight, bias, eps, dtype)[:2])


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    layer_scale: Tensor | None = None,
) -> tuple[Quantized, Tensor]:
    """(norm of total in 8 bits with a scale a token, total), total = residual + layer_scale · branch in residual's dtype."""
    _check(residual, branch, weight, bias, layer_scale)
    values, scale, total = _call_quantize(residual, branch, layer_scale, True, weight, bias, eps, dtype)
    return Quantized(values, scale), total


def glu(gate: Tensor, value: Tensor, activation: str, dtype: torch.dtype) -> Quantized:
    """activation(gate) · value, (..., C), in 8 bits with a scale for every 128 columns of a token."""
    _check(gate, value)
    return Quantized(*_call_quantize_glu(gate, value, activation, dtype))


def linear(
    input: Quantized,
    weight: QuantizedWeight,
    dtype: torch.dtype,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + activation(input · Wᵀ + bias) in ``dtype``, (..., K) → (..., N). A folded LayerScale admits no activation."""
    _check(residual)
    vendors = activation is None and dtype == torch.bfloat16 and _has_vendor(input, weight)
    if vendors and dispatch.linear_8bit(input.values, weight.values.shape[0], residual is not None) == "vendor":
        return _by_vendor(input, weight, residual)
    return _call_linear(*input, *weight, activation, residual, dtype)


def _has_vendor(input: Quantized, weight: QuantizedWeight) -> bool:
    """Whether PyTorch has a product of such operands: e4m3 with one scale a row, sizes in sixteens."""
    outputs, width = weight.values.shape
    return input.values.dtype == E4M3 and input.scale.dim() == 1 and not (outputs % 16 or width % 16) and input.values.numel() > 0


def _by_vendor(input: Quantized, weight: QuantizedWeight, residual: Tensor | None) -> Tensor:
    """``linear`` in bfloat16 by ``torch._scaled_mm`` (cuBLAS or CUTLASS), without promotion; the bias is rounded to bfloat16, and
    so is the product before the residual is added."""
    rows = input.values.reshape(-1, input.values.shape[-1])
    out = torch._scaled_mm(
        rows,
        weight.values.t(),
        scale_a=input.scale.expand(len(rows))[:, None].contiguous(),
        scale_b=weight.scale[None, :],
        bias=None if weight.bias is None else weight.bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    ).view(*input.values.shape[:-1], -1)
    return out if residual is None else out.add_(residual)


def linear_quantized(
    input: Quantized, weight: QuantizedWeight, activation: str | None = None, given: Tensor | None = None
) -> Quantized:
    """activation(input · Wᵀ + bias), (..., K) → (..., N), in the input's format with a scale for every 128 columns of a token,
    or, in e4m3, the ``given`` one (1,) for all, as ``reference_quantized.hidden_scale`` makes it."""
    values, scale = _call_linear_quantized(*input, *weight, activation, given)
    return Quantized(values, scale if given is None else given)
