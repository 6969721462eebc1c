"""Proves a block by example: on random weights, the fused computation must give what the block's own forward gives.

Names and shapes cannot tell a pre-norm block from a parallel or a post-norm one with the same children; this can. The
probe works on a stand-in with weights of its own, on the CPU, so that models on any device (also ``meta``), in any dtype
and of any training state are proved without being touched, and without consuming random numbers.
"""

import copy
import types
from typing import Any

import torch
from torch import Tensor, nn

from .block import compute
from .parts import Layout, child

TOKENS = 3
TOLERANCE = 2e-5  # of the largest value; erf and tanh GELU differ by more, float32 rounding by less


def signature(block: nn.Module, layout: Layout) -> tuple:
    """Blocks of one signature need one proof."""
    return type(block), layout, tuple((path, type(m), m.extra_repr()) for path, m in block.named_modules())


def why_different(block: nn.Module, layout: Layout) -> str | None:
    """None when the fused computation equals the block's own forward, otherwise what went differently."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        generator = torch.Generator().manual_seed(0)
        twin = _stand_in(block, generator, {})
        _use_sdpa(child(twin, layout.attention.owner))
        channels = child(twin, layout.norms.before).normalized_shape[0]
        x = torch.randn(2, TOKENS, channels, generator=generator)
        try:
            expected = type(block).forward(twin, x.clone())
        except Exception as failure:
            return f"its own forward does not take hidden states alone ({type(failure).__name__}: {failure})"
        if not isinstance(expected, Tensor) or expected.shape != x.shape:
            return "its forward does not return one tensor of the hidden states' shape"
        error = (compute(twin, layout, x, "torch") - expected).abs().max() / expected.abs().max()
    if not error <= TOLERANCE:
        return f"its forward computes something else than a pre-norm block of these parts (differs by {error:.1e} on a probe)"
    return None


def _stand_in(module: nn.Module, generator: torch.Generator, memo: dict[int, nn.Module]) -> nn.Module:
    """A copy in evaluation mode, without hooks, with random float32 weights on the CPU; ``module`` is only read."""
    if id(module) in memo:
        return memo[id(module)]
    twin = memo[id(module)] = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    for name in ("forward", "_old_forward"):
        if isinstance(twin.__dict__.get(name), types.MethodType | types.FunctionType):
            del twin.__dict__[name]
    fresh = nn.Module()
    for name, value in fresh.__dict__.items():
        if "hooks" in name:
            twin.__dict__[name] = value
    twin.__dict__["training"] = False
    twin.__dict__["_parameters"] = {n: None if p is None else _random(p, generator) for n, p in module._parameters.items()}
    twin.__dict__["_buffers"] = {
        n: None if b is None else torch.zeros(b.shape, dtype=b.dtype) if b.is_meta else b.detach().cpu()
        for n, b in module._buffers.items()
    }
    twin.__dict__["_modules"] = {
        n: None if child is None else _stand_in(child, generator, memo) for n, child in module._modules.items()
    }
    return twin


def _use_sdpa(owner: Any) -> None:
    """Attention implementations of other kinds may need a GPU, or be the user's own: whether one is asked for is looked at
    in every call, the probe proves the rest of the block."""
    config = getattr(owner, "config", None)
    if hasattr(config, "_attn_implementation"):
        owner.__dict__["config"] = copy.copy(config)
        owner.config._attn_implementation = "sdpa"


def _random(parameter: Tensor, generator: torch.Generator) -> nn.Parameter:
    fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
    return nn.Parameter(torch.randn(parameter.shape, generator=generator) / max(fan_in, 1) ** 0.5, requires_grad=False)
