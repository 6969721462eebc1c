"""Device functions shared by the kernels: activations and their derivatives. Values are float32 throughout.

GELU on half-precision outputs uses x·σ(2q(x)) with a fitted odd polynomial q (largest absolute error 2.6e-5, a tenth of
bf16's rounding at 1): eight instructions, where the library's erf branches and costs as much as the matrix product it
follows. float32 keeps the exact erf.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * 1.4426950408889634))


@triton.jit
def normal_cdf(x, EXACT: tl.constexpr):
    """Φ(x), the standard normal distribution function."""
    if EXACT:
        return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    square = tl.minimum(x * x, 20.25)
    q = x * (0.797502876 + square * (0.0370101854 - square * 0.000352250985))
    return sigmoid(2.0 * q)


@triton.jit
def tanh_gate(x):
    """½(1 + tanh(√(2/π)(x + 0.044715x³))) as a sigmoid, which cannot overflow."""
    return sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """The activation named by ACTIVATION ("none", "relu", "gelu", "gelu_tanh", "quick_gelu")."""
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        return x * normal_cdf(x, EXACT)
    elif ACTIVATION == "gelu_tanh":
        return x * tanh_gate(x)
    elif ACTIVATION == "quick_gelu":
        return x * sigmoid(1.702 * x)
    else:
        return x


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """d activate(x) / dx."""
    if ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)
        return normal_cdf(x, EXACT) + x * density
    elif ACTIVATION == "gelu_tanh":
        gate = tanh_gate(x)
        return gate + x * gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "quick_gelu":
        gate = sigmoid(1.702 * x)
        return gate + 1.702 * x * gate * (1.0 - gate)
    else:
        return x * 0.0 + 1.0
