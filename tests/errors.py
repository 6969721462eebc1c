"""How wrong an operator may be: at most twice what eager PyTorch errs in the same dtype, both measured against float64.

Twice, because the order of a sum is free and either side may be lucky; and never held below a floor, because eager may be
exact by accident (one channel, one key) while any result must still be rounded to its dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# In units of the dtype's eps, relative to the largest value of the exact result. Rounding the result costs ½; half-precision
# gradients pass through one more rounded tensor (the upstream gradient times a rounded factor), which costs ½ again. float32
# also pays for sums of some hundred terms in another order than eager's.
FLOOR = {torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}

# A result that cancels (a score's gradient where a row has one key, a mask's where it is one value a row) keeps the rounding
# of the terms it is the difference of, however small it is. In units of float32's eps, times the size of those terms.
CANCELLATION = 16.0

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Comparison:
    """The largest deviation of one result from float64, ours and eager's, and what ours may be."""

    name: str
    ours: float
    eager: float
    allowed: float

    def __str__(self) -> str:
        return f"{self.name}: {self.ours:.3g} from float64, allowed {self.allowed:.3g} (eager PyTorch: {self.eager:.3g})"


def compare(name: str, ours: Tensor, eager: Tensor, exact: Tensor, magnitude: float = 1.0) -> Comparison:
    """Holds one tensor against float64 and eager, whose dtype and shape it must have.

    ``magnitude`` is the size of the terms that may cancel; the tests' random numbers and upstream gradients have size one.
    """
    assert ours.shape == exact.shape, f"{name} has shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == eager.dtype, f"{name} has dtype {ours.dtype}, expected {eager.dtype}"
    assert exact.isfinite().all(), f"the reference of {name} is not finite: a test's own mistake"
    if exact.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0)
    own = (ours.double() - exact).abs().max().item()
    theirs = (eager.double() - exact).abs()
    theirs = theirs[theirs.isfinite()].max().item() if theirs.isfinite().any() else 0.0
    floor = FLOOR[ours.dtype] * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    floor += CANCELLATION * torch.finfo(torch.float32).eps * magnitude
    return Comparison(name, own, theirs, 2 * theirs + floor)


def run(function: Callable, arguments: dict, dtype: torch.dtype | None = None, backward: bool = True) -> dict[str, Tensor]:
    """Calls ``function(**arguments)`` on fresh leaves; returns its outputs and every gradient, by name.

    ``dtype`` casts the floating-point tensors. The upstream gradients are random, the same for every call of one shape.
    """
    leaves = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach() if dtype is None else value.detach().to(dtype)
            value = value.requires_grad_(backward)
        leaves[name] = value
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}" if len(outputs) > 1 else "output": out.detach() for i, out in enumerate(outputs)}
    if not backward:
        return results
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16) for out in outputs]
    torch.autograd.backward(outputs, [g.to(out) for g, out in zip(upstream, outputs, strict=True)])
    for name, leaf in leaves.items():
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            assert leaf.grad is not None, f"{name} got no gradient"
            assert leaf.grad.dtype == leaf.dtype, f"the gradient of {name} is {leaf.grad.dtype}"
            results[f"gradient of {name}"] = leaf.grad
    return results


def assert_as_exact_as_eager(
    ours: Callable, eager: Callable, reference: Callable, arguments: dict, backward: bool = True, magnitude: float = 1.0
) -> list[Comparison]:
    """Forward and, unless told otherwise, every gradient of ``ours`` within twice eager's own error, plus the floor.

    ``arguments`` hold tensors in the dtype and layout under test; ``reference`` runs on the same values in float64.
    """
    got = run(ours, arguments, backward=backward)
    baseline = run(eager, arguments, backward=backward)
    exact = run(reference, arguments, torch.float64, backward=backward)
    comparisons = [compare(name, got[name], baseline[name], exact[name], magnitude) for name in exact]
    wrong = [str(c) for c in comparisons if not c.ours <= c.allowed]  # `not <=`, so that NaN fails
    assert not wrong, "\n".join(wrong)
    return comparisons
