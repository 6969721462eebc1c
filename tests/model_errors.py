"""Tiny models of every family, and how far an accelerated one is from what it was, relative to the largest values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fastvit
from benchmarks.families import FAMILIES, TINY, output_of

OUTPUT = 2e-5  # float32: sums in another order, through some layers
GRADIENT = 5e-4
# A gradient that is zero but for rounding (a key's bias moves all scores of a query by the same, and softmax does not see
# it) has no size of its own to be relative to: below this share of the model's largest gradient, that is the measure.
VANISHING = 1e-3

# One of each mechanism: three linears, LayerScale, rotary as (cos, sin), causal and padded, packed qkv, q/k norms, rotary
# as [sin, cos] with a gated MLP, a packed gated MLP, learned rotary, and MultiheadAttention pre-norm, post-norm and alone.
MECHANISMS = [
    "hf_vit",
    "hf_dinov2",
    "hf_dinov3",
    "hf_clip_text",
    "timm_vit",
    "timm_qk_norm",
    "timm_eva02",
    "timm_eva02_packed",
    "timm_rope_mixed",
    "torchvision_vit",
    "torch_post_norm",
    "torch_cross_attention",
]


def build(key: str, batch: int = 2, **options):
    return FAMILIES[key].build(TINY, **options), FAMILIES[key].inputs(TINY, batch)


def count(key: str) -> int:
    """How many blocks a family's tiny model has."""
    return 1 if key in ("torch_attention", "torch_cross_attention") else TINY.depth


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected value."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def without_gradients(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return output_of(model(**inputs))


def gradients(model: nn.Module, inputs: dict[str, Any], forward: Callable | None = None) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the output, of every parameter and floating input that has one, by name."""
    model.zero_grad(set_to_none=True)
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items() if torch.is_tensor(t) and t.is_floating_point()}
    out = output_of((model if forward is None else forward)(**{**inputs, **leaves}))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    (out * upstream).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    found |= {f"input {name}": leaf.grad for name, leaf in leaves.items()}
    model.zero_grad(set_to_none=True)
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], allowed: float = GRADIENT) -> None:
    assert actual.keys() == expected.keys()
    floor = VANISHING * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max().item()
        assert error <= allowed * max(gradient.abs().max().item(), floor), f"{name}: {error:.1e}"


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for name, t in inputs.items()}


def fused(model: nn.Module, count: int) -> bool:
    """Whether ``count`` blocks are served, and the last call of each was on the fused path."""
    found = fastvit.report(model)
    assert not found.fallbacks, found.fallbacks
    assert not found.skipped, found.skipped
    return len(found.replaced) == count


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextmanager
def no_native_fast_path() -> Iterator[None]:
    """PyTorch's own modules by their Python forwards: their native one has arithmetic and errors of its own."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
