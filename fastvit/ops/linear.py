"""Linear and MLP on the Triton kernels: raw operators, shape functions and autograd Functions.

What backward keeps: linear keeps its input and, with an activation, the value before it; mlp keeps its input and the hidden
value before the activation, and recomputes the hidden layer in the epilogue of the product that needs it anyway.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from ._common import Operator, apply, contiguous, define, distinct, fill, kernels, run_backward, scratch, wants_grad
from .sums import ColumnSums, summing


def _rows(tensor: Tensor) -> Tensor:
    """A contiguous tensor as it is, which the kernel reads as a matrix; of any other, ``_matrix``."""
    return tensor if tensor.is_contiguous() else _matrix(tensor)


def _matrix(tensor: Tensor) -> Tensor:
    """(..., K) → (rows, K), a view wherever the strides allow one; either stride may be 1."""
    if tensor.dim() == 2:
        return tensor if 1 in tensor.stride() else tensor.contiguous()
    matrix = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    shape: Sequence[int] | None = None,
    pre: Tensor | None = None,
    hidden: Tensor | None = None,
    activation: str | None = None,
    backward: bool = False,
    sums: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """a [M, K] · b [N, K]ᵀ + bias → [M, N], or ``shape`` of as many elements: allocated so, since a result that is a view
    refuses to be written over. With nothing to fuse, ``auto`` leaves the product to the vendor's library. Backward, ``sums`` of
    ``_tile_sums`` gets the column sums of each tile of the result. ``dtype``: of the result, a's or float32."""
    out = a.new_empty((a.shape[0], b.shape[0]) if shape is None else shape, dtype=dtype)
    if activation is None and pre is None and hidden is None and left_to_vendor(a, b):
        a = _matrix(a)
        rows = out if out.dim() == 2 else out.view(a.shape[0], b.shape[0])
        mm = torch.mm if out.dtype == a.dtype else _mm_to_float32
        fill(rows, mm, a, b.t()) if bias is None else fill(rows, torch.addmm, bias, a, b.t())
        return out
    splits = kernels.linear_split.splits_of(a, b, backward)
    if splits == 1:
        kernels.linear.launch_linear(a, b, contiguous(bias), out, pre, hidden, activation, backward, sums)
    else:
        partial = scratch(a.new_empty(splits, out.numel() // b.shape[0], b.shape[0], dtype=torch.float32))
        arguments = (a, b, contiguous(bias), out, partial, pre, hidden, activation, backward, sums)
        kernels.linear_split.launch_linear_split(*arguments)
    return out


def _mm_to_float32(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """a · b of half precision as float32 has summed it up; PyTorch has no such product on a CPU."""
    if out.device.type == "cpu":
        torch.mm(a.float(), b.float(), out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a [M, K] · b [N, K]ᵀ"""
    if left_to_vendor(a, b):
        fill(out, torch.addmm, out, a, b.t())
    else:
        fill(out, torch.add, out, scratch(_product(a, b)))


def left_to_vendor(a: Tensor, b: Tensor) -> bool:
    """Whether a product with nothing to fuse goes to the vendor's library: on ``auto``, by the rules."""
    return not kernels._launch.recording() and dispatch.product(a, b) != "kernel"


def _weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """dyᵀ · x: [rows, N], [rows, K] → [N, K]; zeros for no rows."""
    if dy.shape[0] == 0:
        return dy.new_zeros(dy.shape[1], x.shape[1], dtype=dtype)
    return _product(dy.t(), x.t(), dtype=dtype)


def _tile_sums(a: Tensor, b: Tensor) -> Tensor:
    """What ``_product`` backward leaves a bias's gradient in, to be added up: (tiles of rows, N) float32."""
    return scratch(a.new_empty(kernels.linear_split.row_tiles(a, b, backward=True), b.shape[0], dtype=torch.float32))


def _activation_gradient(dy: Tensor, pre: Tensor, activation: str) -> Tensor:
    dpre = scratch(pre.new_empty(pre.shape))
    kernels.linear.launch_activation_backward(dy.contiguous(), pre, dpre, activation)
    return dpre


# --- linear -------------------------------------------------------------------------------------------------------------


def linear_forward(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, save: bool):
    """Returns (out, pre); pre is None unless ``save`` and there is an activation."""
    shape = (*input.shape[:-1], weight.shape[0])
    pre = input.new_empty(shape) if save and activation else None
    return _product(_rows(input), _matrix(weight), bias, shape, pre, activation=activation), pre


@summing
def linear_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    pre: Tensor | None,
    activation: str | None,
    has_bias: bool,
    wants: list[bool],
    dtype: torch.dtype | None = None,
    *,
    sums: ColumnSums,
):
    """Returns (dinput, dweight, dbias), each None where ``wants`` says so; the latter two of ``dtype``, theirs or float32."""
    dy, x, w = _matrix(grad), _matrix(input), _matrix(weight)
    if activation and pre is not None:
        dy = _activation_gradient(dy, pre.view(dy.shape), activation)
    dinput = _product(dy, w.t(), shape=input.shape) if wants[0] else None
    dweight = _weight_gradient(dy, x, dtype) if wants[1] else None
    dbias = sums.of_rows(dy, dtype or dy.dtype) if wants[2] and has_bias else None
    return dinput, dweight, dbias


def _fake_linear_forward(input, weight, bias, activation, save):
    shape = (*input.shape[:-1], weight.shape[0])
    return input.new_empty(shape), input.new_empty(shape if save and activation else 0)


def _fake_linear_backward(grad, input, weight, pre, activation, has_bias, wants):
    shapes = (input.shape, weight.shape, weight.shape[:1])
    wants = (wants[0], wants[1], wants[2] and has_bias)
    return tuple(input.new_empty(shape if want else 0) for shape, want in zip(shapes, wants, strict=True))


call_linear_forward = define(
    "linear_forward(Tensor input, Tensor weight, Tensor? bias, str? activation, bool save) -> (Tensor, Tensor)",
    linear_forward,
    _fake_linear_forward,
)
call_linear_backward = define(
    "linear_backward(Tensor grad, Tensor input, Tensor weight, Tensor? pre, str? activation, bool has_bias, bool[] wants)"
    " -> (Tensor, Tensor, Tensor)",
    linear_backward,
    _fake_linear_backward,
)


class Linear(Operator):
    """(input, weight, bias, activation) → (out, pre); pre carries no gradient."""

    @staticmethod
    def forward(input, weight, bias, activation):
        return call_linear_forward(input, weight, bias, activation, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, ctx.activation = inputs
        ctx.has_bias = bias is not None
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(input, weight, output[1])

    @staticmethod
    def backward(ctx, grad, _pre):
        if grad is None:
            return (None,) * 4
        input, weight, pre = ctx.saved_tensors
        wants = list(ctx.needs_input_grad[:3])
        grads = run_backward(call_linear_backward, grad, input, weight, pre, ctx.activation, ctx.has_bias, wants)
        return *(g if want else None for g, want in zip(grads, wants, strict=True)), None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if wants_grad(input, weight, bias):
        return apply(Linear, *distinct(input, weight, bias), activation)[0]
    return call_linear_forward(input, weight, bias, activation, False)[0]


# --- mlp ----------------------------------------------------------------------------------------------------------------


def mlp_forward(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation: str | None, save: bool):
    """Returns (out, pre): pre (..., hidden) before the activation, None unless ``save``."""
    hidden, pre = linear_forward(input, fc1_weight, fc1_bias, activation, save)
    scratch(hidden)
    if save and activation is None:
        pre = hidden
    return linear_forward(hidden, fc2_weight, fc2_bias, None, False)[0], pre


@summing
def mlp_backward(
    grad: Tensor,
    input: Tensor,
    fc1_weight: Tensor,
    fc2_weight: Tensor,
    pre: Tensor,
    activation: str | None,
    has_fc1_bias: bool,
    has_fc2_bias: bool,
    wants: list[bool],
    dtype: torch.dtype | None = None,
    *,
    sums: ColumnSums,
):
    """Returns (dinput, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias), each None where ``wants`` says so; those of parameters
    of ``dtype``, theirs or float32."""
    dy, x, w1, w2 = _matrix(grad), _matrix(input), _matrix(fc1_weight), _matrix(fc2_weight)
    pre = pre.view(-1, w1.shape[0])
    hidden = None
    if wants[3]:
        hidden = pre if activation is None else scratch(pre.new_empty(pre.shape))
    dfc2_bias = sums.of_rows(dy, dtype or dy.dtype) if wants[4] and has_fc2_bias else None
    dpre_sums = _tile_sums(dy, w2.t()) if wants[2] and has_fc1_bias else None
    kept = None if activation is None else hidden
    dpre = scratch(_product(dy, w2.t(), activation=activation, backward=True, pre=pre, hidden=kept, sums=dpre_sums))
    dfc2_weight = None if hidden is None else _weight_gradient(dy, hidden, dtype)
    del hidden, kept
    dinput = _product(dpre, w1.t(), shape=input.shape) if wants[0] else None
    dfc1_weight = _weight_gradient(dpre, x, dtype) if wants[1] else None
    dfc1_bias = sums.of_partials(dpre_sums, dtype or dy.dtype)
    return dinput, dfc1_weight, dfc1_bias, dfc2_weight, dfc2_bias


def _fake_mlp_forward(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, save):
    lead = input.shape[:-1]
    return input.new_empty(*lead, fc2_weight.shape[0]), input.new_empty((*lead, fc1_weight.shape[0]) if save else 0)


def _fake_mlp_backward(grad, input, fc1_weight, fc2_weight, pre, activation, has_fc1_bias, has_fc2_bias, wants):
    shapes = (input.shape, fc1_weight.shape, fc1_weight.shape[:1], fc2_weight.shape, fc2_weight.shape[:1])
    wants = (wants[0], wants[1], wants[2] and has_fc1_bias, wants[3], wants[4] and has_fc2_bias)
    return tuple(input.new_empty(shape if want else 0) for shape, want in zip(shapes, wants, strict=True))


call_mlp_forward = define(
    "mlp_forward(Tensor input, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, str? activation,"
    " bool save) -> (Tensor, Tensor)",
    mlp_forward,
    _fake_mlp_forward,
)
call_mlp_backward = define(
    "mlp_backward(Tensor grad, Tensor input, Tensor fc1_weight, Tensor fc2_weight, Tensor pre, str? activation,"
    " bool has_fc1_bias, bool has_fc2_bias, bool[] wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    mlp_backward,
    _fake_mlp_backward,
)


class MLP(Operator):
    """(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation) → (out, pre); pre carries no gradient."""

    @staticmethod
    def forward(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation):
        return call_mlp_forward(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, ctx.activation = inputs
        ctx.has_bias = fc1_bias is not None, fc2_bias is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(input, fc1_weight, fc2_weight, output[1])

    @staticmethod
    def backward(ctx, grad, _pre):
        if grad is None:
            return (None,) * 6
        input, fc1_weight, fc2_weight, pre = ctx.saved_tensors
        wants = list(ctx.needs_input_grad[:5])
        grads = run_backward(call_mlp_backward, grad, input, fc1_weight, fc2_weight, pre, ctx.activation, *ctx.has_bias, wants)
        return *(g if want else None for g, want in zip(grads, wants, strict=True)), None


def mlp(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    if wants_grad(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
        return apply(MLP, *distinct(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias), activation)[0]
    return call_mlp_forward(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, activation, False)[0]
