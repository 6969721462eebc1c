"""What SAM's three parts share: norms over channels, MLPs, and sums that inference writes over a branch nobody else holds."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ... import functional
from ...backend import resolve
from ...nn import _ACTIVATE, LayerNorm, Linear, _is_plain
from ...ops import torch_backend


class LayerNorm2d(LayerNorm):
    """Layer norm over the channels of (B, C, H, W); the result lies channels last in memory."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MLPBlock(nn.Module):
    """activation(x·W1ᵀ + b1)·W2ᵀ + b2, (..., dim) → (..., dim), ``nn.MLP`` under Segment Anything's names.

    Args:
        dim: channels of input and output.
        hidden_dim: channels between ``lin1`` and ``lin2``.
        activation: "gelu" or "relu".
    """

    def __init__(self, dim: int, hidden_dim: int, activation: str, *, device: Any = None, dtype: Any = None):
        super().__init__()
        self.activation = activation
        self.lin1 = Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.lin2 = Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        lin1, lin2 = self.lin1, self.lin2
        if is_untouched(lin1, Linear) and is_untouched(lin2, Linear):
            return functional.mlp(input, lin1.weight, lin1.bias, lin2.weight, lin2.bias, activation=self.activation)
        return lin2(_ACTIVATE[self.activation](lin1(input)))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class MLP(nn.Module):
    """``num_layers`` linears with ReLU between them, (..., input_dim) → (..., output_dim)."""

    def __init__(
        self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int, *, device: Any = None, dtype: Any = None
    ):
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        layers = (Linear(*pair, device=device, dtype=dtype) for pair in itertools.pairwise(widths))
        self.layers = nn.ModuleList(layers)

    def forward(self, input: Tensor) -> Tensor:
        layers: list[Any] = list(self.layers)
        for layer in layers[:-1]:
            if is_untouched(layer, Linear):
                input = functional.linear(input, layer.weight, layer.bias, activation="relu")
            else:
                input = torch.relu(layer(input))
        return layers[-1](input)


def add_layer_norm(residual: Tensor, branch: Tensor, norm: nn.Module, owned: bool) -> tuple[Tensor, Tensor]:
    """(norm(total), total) of total = residual + branch, written over the branch where it is ``owned`` and that is allowed."""
    if not is_token_norm(norm):
        total = add(residual, branch, owned)
        return norm(total), total
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    if owned and _may_write(residual, branch) and resolve(branch) == "torch":
        return torch_backend.add_layer_norm_(residual, branch, weight, bias, eps, None)  # type: ignore[arg-type]
    return functional.add_layer_norm(residual, branch, weight, bias, eps)  # type: ignore[arg-type]


def add(residual: Tensor, branch: Tensor, owned: bool) -> Tensor:
    """residual + branch, written over the branch where it is ``owned`` and that is allowed."""
    return torch_backend.add_(residual, branch, None) if owned and _may_write(residual, branch) else residual + branch


def is_untouched(module: Any, kind: type) -> bool:
    """Whether a child is what it was made as, and no hook sees its calls, so that they may be fused with others."""
    return _is_plain(module, kind) and not _has_any_global_hook()


def is_token_norm(norm: Any) -> bool:
    """Whether a norm is the one that ``functional.add_layer_norm`` computes, with nothing looking at it."""
    return is_untouched(norm, LayerNorm) and norm.statistics == "token"


def is_own(module: Any, kind: type, last: str) -> bool:
    """Whether what a module returned, made by its linear ``last``, is held by nobody else."""
    return is_untouched(module, kind) and is_untouched(getattr(module, last), Linear)


def _may_write(residual: Tensor, branch: Tensor) -> bool:
    if type(branch) is not Tensor or residual.dtype != branch.dtype or residual.shape != branch.shape:
        return False
    return torch_backend._may_write(residual, branch)
