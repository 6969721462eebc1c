"""Every functional operator against its definition in ``fastvit.reference``, forward and backward.

Both compute from the same rounded inputs; the definition in float64 is the truth. An operator passes when it errs at most
twice as much as eager PyTorch does in the operator's own dtype, plus a floor of a few roundings.

``python -m fastvit.cli.selfcheck`` prints the results as JSON, for ``fastvit doctor --kernels``.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import functional, reference

FLOOR = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # some roundings of a value near 1, relative


@dataclass
class Case:
    operator: str
    detail: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[[Any, list[Tensor]], Any]  # (fastvit.functional or fastvit.reference, tensors) -> result


@dataclass
class Outcome:
    operator: str
    detail: str
    dtype: str
    error: float  # relative, the worse of forward and backward
    eager_error: float
    passed: bool
    problem: str = ""


class _PyTorch:
    """What a model calls today: PyTorch's own layer norm, whose bf16 weight gradients err more than its definition's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    @staticmethod
    def layer_norm(input: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, statistics: str = "token") -> Tensor:
        if statistics == "image":
            return reference.layer_norm(input, weight, bias, eps, statistics=statistics)
        return torch.nn.functional.layer_norm(input, weight.shape, weight, bias, eps)

    def add_layer_norm(
        self, residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, *, layer_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = residual + layer_scale * branch
        return self.layer_norm(total, weight, bias, eps), total


def _linear(activation: str | None) -> Callable[[Any, list[Tensor]], Any]:
    return lambda operators, tensors: operators.linear(*tensors, activation=activation)


def _rotary(norm: str | None, interleaved: bool) -> Callable[[Any, list[Tensor]], Any]:
    """Query, key and, with a norm, their weights; the first token is not rotated."""

    def call(operators: Any, tensors: list[Tensor]) -> Any:
        query, key, *weights = tensors
        tokens, dim = query.shape[2] - 1, query.shape[3]
        angle = torch.arange(tokens, device=query.device)[:, None] * torch.logspace(0, -3, dim, device=query.device)
        named = dict(zip(("query_weight", "key_weight"), weights, strict=False))
        return operators.qk_norm_rope(query, key, angle.cos(), angle.sin(), interleaved=interleaved, norm=norm, **named)

    return call


def _glu(activation: str) -> Callable[[Any, list[Tensor]], Any]:
    return lambda operators, tensors: operators.glu(*tensors[0].chunk(2, dim=-1), activation=activation)


def _cases(tiny: bool) -> list[Case]:
    n, m, d, c, f = (17, 19, 16, 48, 64) if tiny else (197, 65, 64, 192, 768)
    heads = 2 if tiny else 3
    q, k = (2, heads, n, d), (2, heads, m, d)
    cases = [
        Case("attention", "plain", (q, q, q), lambda op, t: op.attention(*t)),
        Case("attention", "cross, additive mask", (q, k, k, (1, 1, n, m)), lambda op, t: op.attention(*t)),
        Case("attention", "causal", (q, q, q), lambda op, t: op.attention(*t, is_causal=True)),
        Case("attention", "grouped queries", (q, (2, 1, m, d), (2, 1, m, d)), lambda op, t: op.attention(*t)),
        Case("layer_norm", "per token", ((2, n, c), (c,), (c,)), lambda op, t: op.layer_norm(*t)),
        Case("layer_norm", "per image", ((2, n, c), (c,), (c,)), lambda op, t: op.layer_norm(*t, statistics="image")),
        Case(
            "add_layer_norm",
            "with LayerScale",
            ((2, n, c), (2, n, c), (c,), (c,), (c,)),
            lambda op, t: op.add_layer_norm(*t[:4], layer_scale=t[4]),
        ),
    ]
    for activation in (None, "gelu", "gelu_tanh", "quick_gelu", "relu"):
        cases.append(Case("linear", activation or "no activation", ((2, n, c), (f, c), (f,)), _linear(activation)))
    cases.append(Case("mlp", "gelu", ((2, n, c), (f, c), (f,), (c, f), (c,)), lambda op, t: op.mlp(*t)))
    cases.append(Case("qk_norm_rope", "halves", (q, (2, 1, n, d)), _rotary(None, False)))
    cases.append(Case("qk_norm_rope", "interleaved, layer norm", (q, q, (d,), (d,)), _rotary("layer", True)))
    cases.append(Case("qk_norm_rope", "halves, rms norm", (q, q, (d,), (d,)), _rotary("rms", False)))
    for activation in ("silu", "gelu"):
        cases.append(Case("glu", activation, ((2, n, 2 * c),), _glu(activation)))
    return cases


def _results(case: Case, operators: Any, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The outputs, then the gradient of every input."""
    inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    outputs = case.call(operators, inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(out.shape, generator=generator).to(out.device, torch.bfloat16).to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, inputs, seeds)
    return [tensor.detach().double() for tensor in (*outputs, *gradients)]


def _error(results: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in zip(results, truth, strict=True)]


def check(case: Case, dtype: torch.dtype, device: torch.device) -> Outcome:
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for index, shape in enumerate(case.shapes):
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 1.0  # a weight matrix keeps its outputs near 1
        inputs.append((torch.randn(shape, generator=generator) * scale + (index == 1 and len(shape) == 1)).to(dtype).to(device))
    name = str(dtype).removeprefix("torch.")
    truth = _results(case, reference, inputs, torch.float64)
    eager = [
        max(pair)
        for pair in zip(
            _error(_results(case, reference, inputs, dtype), truth),
            _error(_results(case, _PyTorch(), inputs, dtype), truth),
            strict=True,
        )
    ]
    try:
        errors = _error(_results(case, functional, inputs, dtype), truth)
    except Exception as error:  # the point of a self-check is to report whatever goes wrong
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Outcome(case.operator, case.detail, name, float("inf"), max(eager), False, problem)
    passed = all(ours <= 2 * theirs + FLOOR[dtype] for ours, theirs in zip(errors, eager, strict=True))  # NaN fails
    return Outcome(case.operator, case.detail, name, max(errors), max(eager), passed)


def check_all(device: torch.device, dtypes: list[torch.dtype], tiny: bool = False) -> list[Outcome]:
    return [check(case, dtype, device) for case in _cases(tiny) for dtype in dtypes]


if __name__ == "__main__":
    results = check_all(torch.device("cpu"), [torch.float32], tiny=True)
    json.dump([asdict(outcome) for outcome in results], sys.stdout)
