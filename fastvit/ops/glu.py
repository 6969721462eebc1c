"""Gated linear units on the Triton kernels: raw operators, shape functions and autograd Function."""

from torch import Tensor

from ._common import Operator, apply, as_rows, define, distinct, kernels, matrix, run_backward, wants_grad


def glu_forward(gate: Tensor, value: Tensor, activation: str) -> Tensor:
    out = gate.new_empty(gate.shape)
    kernels.glu.launch_glu_forward(matrix(gate), matrix(value), activation, out)
    return out


def glu_backward(grad: Tensor, gate: Tensor, value: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Returns (dgate, dvalue)."""
    dgate, dvalue = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    rows = as_rows(gate)
    kernels.glu.launch_glu_backward(
        as_rows(grad), rows, as_rows(value), activation, dgate.view(rows.shape), dvalue.view(rows.shape)
    )
    return dgate, dvalue


def _fake_glu_forward(gate, value, activation):
    return gate.new_empty(gate.shape)


def _fake_glu_backward(grad, gate, value, activation):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


call_glu_forward = define("glu_forward(Tensor gate, Tensor value, str activation) -> Tensor", glu_forward, _fake_glu_forward)
call_glu_backward = define(
    "glu_backward(Tensor grad, Tensor gate, Tensor value, str activation) -> (Tensor, Tensor)", glu_backward, _fake_glu_backward
)


class GLU(Operator):
    """(gate, value, activation) → activation(gate)·value."""

    @staticmethod
    def forward(gate, value, activation):
        return call_glu_forward(gate, value, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gate, value, ctx.activation = inputs
        ctx.save_for_backward(gate, value)

    @staticmethod
    def backward(ctx, grad):
        gate, value = ctx.saved_tensors
        return *run_backward(call_glu_backward, grad, gate, value, ctx.activation), None


def glu(gate: Tensor, value: Tensor, activation: str) -> Tensor:
    if wants_grad(gate, value):
        return apply(GLU, *distinct(gate, value), activation)
    return call_glu_forward(gate, value, activation)
