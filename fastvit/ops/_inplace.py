"""When an operator on PyTorch's own may write over a tensor that is its alone, and the activations that do."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._state import forward_ad_active, transforms


def _transformed() -> bool:
    """Inside a torch.func transform, where vmap has no rule for in-place activations."""
    return not torch.compiler.is_compiling() and transforms()


def may_write(*tensors: Tensor | None) -> bool:
    """Whether an operator on these may compute in place in tensors of its own: run as it is, no gradient wanted."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed() or forward_ad_active():
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def activate(x: Tensor, activation: str | None) -> Tensor:
    """The activation of a tensor that nothing else holds: written over it when no gradient is wanted."""
    # A trace is one graph, whether gradients are wanted or not.
    inplace = not (torch.is_grad_enabled() and x.requires_grad) and not _transformed() and not torch.jit.is_tracing()
    if activation is None:
        return x
    if activation == "relu":
        return torch.relu_(x) if inplace else torch.relu(x)
    if activation == "quick_gelu":
        gate = torch.sigmoid(1.702 * x)
        return x.mul_(gate) if inplace else x * gate
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_(x, approximate=approximate) if inplace else F.gelu(x, approximate=approximate)
