"""Device functions shared by the kernels: activations and their derivatives. Values are float32 throughout.

GELU on half-precision outputs takes Φ(−|x|) as 2 to a fitted polynomial (largest absolute error of GELU 1.9e-6, of its derivative
3.4e-5, a hundredth of bf16's rounding at 1): nine instructions with one exponential, where the library's erf branches and costs
as much as the matrix product it follows. float32 keeps the exact erf. NaN stays NaN.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x, EXACT: tl.constexpr = True):
    if EXACT:
        return 1.0 / (1.0 + tl.exp2(-x * 1.4426950408889634))
    root = tl.rsqrt(1.0 + tl.exp2(-x * 1.4426950408889634))  # its square is the inverse, without a division's care for ranges
    return root * root


@triton.jit
def magnitude(x):
    """|x|, no further than 16: there ``normal_tail`` is 0, and infinity would make it NaN."""
    return tl.minimum(tl.abs(x), 16.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def normal_tail(t):
    """Φ(−t) for t ≥ 0, Φ the standard normal distribution function: its logarithm is smooth, and errors shrink with it."""
    power = -0.461774111 + t * (-0.0500019714 + t * (0.00629095547 - t * 0.000352063304))
    return tl.exp2(-1.0001142 + t * (-1.15009248 + t * power))


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """x·Φ(x)."""
    if EXACT:
        return x * (0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)))
    t = magnitude(x)
    return tl.maximum(x, 0.0) - t * normal_tail(t)


@triton.jit
def gelu_derivative(x, EXACT: tl.constexpr):
    """Φ(x) + x·φ(x). Its value at −t is Φ(−t)·(1 − t·φ(t)/Φ(−t)), the second factor fitted too; at t, 1 less that."""
    if EXACT:
        density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)
        return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density
    t = magnitude(x)
    factor = -0.645250639 + t * (-0.0948382735 + t * 0.0115467557)
    tail = normal_tail(t) * (1.00001334 + t * (-0.796429123 + t * factor))
    return tl.where(x > 0.0, 1.0 - tail, tail)


@triton.jit
def tanh_gate(x, EXACT: tl.constexpr):
    """½(1 + tanh(√(2/π)(x + 0.044715x³))) as a sigmoid, which cannot overflow."""
    return sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x), EXACT)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """The activation named by ACTIVATION ("none", "relu", "gelu", "gelu_tanh", "quick_gelu")."""
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "gelu":
        return gelu(x, EXACT)
    elif ACTIVATION == "gelu_tanh":
        return x * tanh_gate(x, EXACT)
    elif ACTIVATION == "quick_gelu":
        return x * sigmoid(1.702 * x, EXACT)
    else:
        return x


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """d activate(x) / dx."""
    if ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        return gelu_derivative(x, EXACT)
    elif ACTIVATION == "gelu_tanh":
        gate = tanh_gate(x, EXACT)
        return gate + x * gate * (1.0 - gate) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif ACTIVATION == "quick_gelu":
        gate = sigmoid(1.702 * x, EXACT)
        return gate + 1.702 * x * gate * (1.0 - gate)
    else:
        return x * 0.0 + 1.0
