"""A float32 linear in training on oneDNN: out = x·Wᵀ + b, dx = g·W, dW = gᵀ·x, db = Σ g.

oneDNN multiplies rows by rows, so that backward lays W, or g and x, out anew: from some tens of rows on that is far less than
what MKL loses on AMD. ``onednn.trains_linear`` says where it serves. Second derivatives are made of PyTorch's own products.
"""

from typing import Any

import torch
from torch import Tensor

from . import onednn

# Rows from which on oneDNN's product with what it takes to lay its operands out is the faster one (measured on AMD).
ROWS_FOR_INPUT, ROWS_FOR_WEIGHT = 64, 16


class Linear(torch.autograd.Function):
    """x (..., K), W (N, K) contiguous, b (N) or None → (..., N)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        rows, inputs = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
        mine = not torch.is_grad_enabled() and type(grad) is Tensor and onednn.undisturbed()
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad
        d_input = d_weight = None
        if wants_input:
            by_onednn = mine and len(rows) >= ROWS_FOR_INPUT
            d_input = (_product(rows, weight.t()) if by_onednn else rows @ weight).view_as(input)
        if wants_weight:
            by_onednn = mine and len(rows) >= ROWS_FOR_WEIGHT
            d_weight = _product(rows.t(), inputs.t()) if by_onednn else rows.t() @ inputs
        return d_input, d_weight, rows.sum(0) if wants_bias else None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a·bᵀ."""
    return _linear(a, b.contiguous(), None)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    serve = torch.ops.fastvit.onednn_linear if torch.compiler.is_compiling() else onednn.linear
    return serve(input, weight, bias, None)
