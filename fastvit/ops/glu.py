"""Gated linear units on the Triton kernels: raw operators, shape functions and autograd Function."""

import torch
from torch import Tensor

from ._common import Operator, apply, as_rows, define, distinct, run_backward, wants_grad


def glu_forward(gate: Tensor, value: Tensor, activation: str) -> Tensor:
    from ..kernels import glu as kernel

    out = gate.new_empty(gate.shape)
    rows = as_rows(gate)
    kernel.launch_glu_forward(rows, as_rows(value), activation, out.view(rows.shape))
    return out


def glu_backward(grad: Tensor, gate: Tensor, value: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Returns (dgate, dvalue)."""
    from ..kernels import glu as kernel

    dgate, dvalue = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    rows = as_rows(gate)
    kernel.launch_glu_backward(as_rows(grad), rows, as_rows(value), activation, dgate.view(rows.shape), dvalue.view(rows.shape))
    return dgate, dvalue


def _fake_glu_forward(gate, value, activation):
    return gate.new_empty(gate.shape)


def _fake_glu_backward(grad, gate, value, activation):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


define("glu_forward(Tensor gate, Tensor value, str activation) -> Tensor", glu_forward, _fake_glu_forward)
define(
    "glu_backward(Tensor grad, Tensor gate, Tensor value, str activation) -> (Tensor, Tensor)", glu_backward, _fake_glu_backward
)


class GLU(Operator):
    """(gate, value, activation) → activation(gate)·value."""

    @staticmethod
    def forward(gate, value, activation):
        return torch.ops.fastvit.glu_forward(gate, value, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):
        gate, value, ctx.activation = inputs
        ctx.save_for_backward(gate, value)

    @staticmethod
    def backward(ctx, grad):
        gate, value = ctx.saved_tensors
        return *run_backward(torch.ops.fastvit.glu_backward, grad, gate, value, ctx.activation), None


def glu(gate: Tensor, value: Tensor, activation: str) -> Tensor:
    if wants_grad(gate, value):
        return apply(GLU, *distinct(gate, value), activation)
    return torch.ops.fastvit.glu_forward(gate, value, activation)
