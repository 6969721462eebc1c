"""On ``auto``: which of an operator's ways serves a call, by the rules ("dispatch") in the tables of ``kernels/tables``.

``triton`` asks no rule: it means the kernels. Two promises go before every rule: calls whose gradients have to be deterministic,
and those whose scale is not positive, stay with the kernels. What was decided, and why, is there to read under ``collect``.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import get_backend
from . import torch_backend
from ._state import exporting, kernels, wants_grad

FUSED_BY_VENDOR = ("relu", "gelu_tanh")  # activations that cuBLASLt's epilogue computes exactly
LIBRARIES = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}

MAX_DECIDED = 4096

Call = dict[str, Any]  # words and numbers that rules go by

_decided: dict[tuple, str] = {}  # by all that a decision goes by; making one takes some microseconds


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    rel_h: Tensor | None,
    is_causal: bool,
    scale: float,
    *more: Tensor | None,
    op: str = "attention",
) -> str:
    """``"kernel"`` or ``"sdpa"``; ``more``: other tensors that may want a gradient. All have passed the checks."""
    if get_backend() != "auto":
        return "kernel"
    training = wants_grad(query, key, value, attn_mask, rel_h, *more)
    promise = None
    if training and torch.are_deterministic_algorithms_enabled():
        promise = "deterministic gradients were asked for, which SDPA's backward does not give"
    elif scale <= 0:
        promise = "SDPA's kernels take the maximum of scores before they scale them: no scale that is not positive"
    shapes = query.shape, key.shape, value.shape
    signature = (op, query.get_device(), query.dtype, shapes, attn_mask is None, rel_h is None, is_causal, training, promise)
    if not torch.compiler.is_compiling() and _is_decided(signature):
        return _decided[signature]
    call = {
        "kind": _kind(query, key, value, attn_mask, rel_h, is_causal),
        "dtype": "float32" if query.dtype == torch.float32 else "half",
        "pass": "training" if training else "inference",
        "head_dim": max(query.shape[3], value.shape[3]),
        "queries": query.shape[2],
        "keys": key.shape[2],
    }
    return _way(op, query, call, signature, promise)


def _kind(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, rel_h: Tensor | None, is_causal: bool) -> str:
    if rel_h is not None:
        return "positions"
    if attn_mask is not None:
        return "masked"
    dim = query.shape[3]
    if dim != value.shape[3] or dim % 8 or query.shape[1] != key.shape[1]:
        return "irregular"
    return "causal" if is_causal else "plain"


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> str:
    """``"kernel"``, ``"vendor"`` or ``"vendor_fused"`` for activation(x·Wᵀ + b); ``linear_by`` computes the latter two."""
    if get_backend() != "auto":
        return "kernel"
    training = activation is not None and wants_grad(input, weight, bias)
    outputs, width = weight.shape
    return _product(input, input.numel() // max(width, 1), outputs, width, activation, training)


def product(a: Tensor, b: Tensor) -> str:
    """``linear`` for a product inside a backward pass: a [M, K] · b [N, K]ᵀ, nothing to fuse."""
    outputs, width = b.shape
    return _product(a, a.numel() // max(width, 1), outputs, width, None, False) if get_backend() == "auto" else "kernel"


def _product(like: Tensor, rows: int, outputs: int, width: int, activation: str | None, training: bool) -> str:
    signature = ("linear", like.get_device(), like.dtype, rows, outputs, width, activation, training)
    if not torch.compiler.is_compiling() and _is_decided(signature):
        return _decided[signature]
    call: Call = {"activation": activation or "none", "dtype": "float32" if like.dtype == torch.float32 else "half"}
    if activation is not None:  # what is kept for backward is another matter with one; a bare product is the same product
        call["pass"] = "training" if training else "inference"
    return _way("linear", like, call | {"rows": rows, "width": width, "outputs": outputs}, signature)


def linear_by(way: str, input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The vendor's product with its own epilogue where there is such a one (inference alone), else an activation after it."""
    exact = activation == "relu" or (activation == "gelu_tanh" and input.is_cuda)  # GELU is erf's on a CPU
    if activation is None:
        return F.linear(input, weight, bias)
    if way == "vendor_fused" and exact and bias is not None and input.numel() and not wants_grad(input, weight, bias):
        matrix = input.reshape(-1, input.shape[-1])
        out = torch._addmm_activation(bias, matrix, weight.t(), use_gelu=activation != "relu")
        return out.view(*input.shape[:-1], weight.shape[0])
    return torch_backend.linear(input, weight, bias, activation)


def linear_add_norm(a: Tensor, b: Tensor) -> str:
    """``"kernel"``, or ``"vendor"`` for whatever serves the product a [M, K] · b [N, K]ᵀ alone, sum and norm after it."""
    if get_backend() != "auto":
        return "kernel"
    outputs, width = b.shape
    rows = a.numel() // max(width, 1)
    signature = ("linear_add_norm", a.get_device(), a.dtype, rows, outputs, width)
    if not torch.compiler.is_compiling() and _is_decided(signature):
        return _decided[signature]
    dtype = "float32" if a.dtype == torch.float32 else "half"
    return _way("linear_add_norm", a, {"dtype": dtype, "rows": rows, "width": width, "outputs": outputs}, signature)


def linear_8bit(input: Tensor, outputs: int, adds: bool) -> str:
    """``"kernel"`` or ``"vendor"`` for e4m3 input (..., K) with a scale a row, to ``outputs`` columns of bfloat16; ``adds``: to a
    residual. What PyTorch's product does not compute is not asked."""
    if get_backend() != "auto":
        return "kernel"
    width = input.shape[-1]
    rows = input.numel() // max(width, 1)
    signature = ("linear_8bit", input.get_device(), rows, outputs, width, adds)
    if not torch.compiler.is_compiling() and _is_decided(signature):
        return _decided[signature]
    call: Call = {"adds": "residual" if adds else "nothing", "rows": rows, "width": width, "outputs": outputs}
    return _way("linear_8bit", input, call, signature)


def image_attention(qkv: Tensor, window: int) -> None:
    """Only noted: no vendor's operator computes this."""
    if collecting() and get_backend() == "auto":
        _way("image_attention", qkv, {"kind": "windows" if window else "global", "tokens": qkv.shape[1] * qkv.shape[2]}, ())


def block(x: Tensor, weights: int) -> str:
    """``"kernel"`` or ``"original"`` for a transformer block of so many weights that a compiler traces, given x (B, N, C): by our
    operators, or by its own forward. An exported graph is to keep what is fused: nobody asks for one."""
    if get_backend() != "auto":
        return "kernel"
    batch, tokens, channels = x.shape
    return _traced("block", x, {"products": batch * tokens * (weights + 2 * tokens * channels)})


# --- rules ----------------------------------------------------------------------------------------------------------------


def _is_decided(signature: tuple) -> bool:
    """Whether ``_decided`` holds for a call: nobody has to see each decision, or holds them to something else."""
    watched = _thread.collected is not None or _thread.taken is not None or kernels._tuning.tuning()
    return not watched and signature in _decided


def _way(op: str, like: Tensor, call: Call, signature: tuple, promise: str | None = None) -> str:
    if torch.compiler.is_compiling():
        return "kernel" if promise else _traced(op, like, call)
    override = kernels._tuning.overridden(f"dispatch {op}")
    if override is not None:
        way, why = str(override["serve"]), "asked for"
    elif promise:
        way, why = "kernel", promise
    else:
        call = {name: value if isinstance(value, str) else int(value) for name, value in call.items()}
        target = kernels._launch.target_of(like)
        way, why = _choose(op, target, _library(like.get_device()), tuple(call.items()))
    if override is None:
        if len(_decided) >= MAX_DECIDED:
            _decided.clear()
        _decided[signature] = way
    if _thread.taken is not None:
        _thread.taken.append((op, call, way))
    if _thread.collected is not None:
        words = ", ".join(str(value) if isinstance(value, str) else f"{name} {value}" for name, value in call.items())
        _thread.collected[f"{op}: {words}"] = f"{way}: {why}"
    return way


@lru_cache(maxsize=4096)
def _choose(op: str, target: str, library: str, items: tuple) -> tuple[str, str]:
    call = dict(items) | {"library": library}
    for rule in kernels._tuning.rules(op, target):
        if kernels._tuning.admits(rule["when"], call):
            return rule["serve"], f"{rule['why']} ({rule['basis']})"
    raise LookupError(f"no rule of {op} for {target} admits {call}: every table's must end in one without conditions")


def _traced(op: str, like: Tensor, call: Call) -> str:
    """``_choose`` for a compiler, in its language. A graph to export holds for every size: it goes by the smallest."""
    smallest = exporting()
    for when, serve in _rules(op, like.get_device()):
        holds = True
        for name, word, low, high in when:
            value = call.get(name)
            if value is None:
                holds = False
            elif word is not None:
                holds = holds and value == word
            else:
                size = 1 if smallest else value
                holds = holds and (low is None or size >= low) and (high is None or size <= high)
        if holds:
            return serve
    return "kernel"


def _rules(op: str, index: int) -> tuple:
    """((name, word, low, high), …), way of each rule that can hold on GPU ``index``: constants to a compiler."""
    found = []
    for rule in kernels._tuning.rules(op, kernels._launch.target_of_device(index)):
        when = dict(rule["when"])
        if when.pop("library", None) in (None, _library(index)):
            found.append((tuple((name, *_range(bound)) for name, bound in when.items()), rule["serve"]))
    return tuple(found)


_rules._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see backend._why_not_gpu


def _range(bound: Any) -> tuple[str | None, int | None, int | None]:
    if isinstance(bound, str):
        return bound, None, None
    return (None, None, bound) if isinstance(bound, int) else (None, *bound)


@lru_cache
def _library(index: int) -> str:
    """Which of its implementations PyTorch's fused attention prefers on GPU ``index``: "cudnn", "flash", …; "none" on a CPU."""
    if index < 0 or not torch.cuda.is_available():
        return "none"
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        probe = torch.empty(1, 1, 197, 64, dtype=torch.float16, device=f"cuda:{index}")
        return LIBRARIES.get(torch._fused_sdp_choice(probe, probe, probe), "none")


# --- what is said of it ---------------------------------------------------------------------------------------------------


class _Thread(threading.local):
    taken: list[tuple[str, Call, str]] | None = None
    collected: dict[str, str] | None = None


_thread = _Thread()


def collecting() -> bool:
    return _thread.collected is not None


def forget() -> None:
    """Decides anew: for tables that changed."""
    _decided.clear()
    _choose.cache_clear()


@contextmanager
def collect() -> Iterator[dict[str, str]]:
    """Collects, of the operators that this thread calls inside on ``auto``, what was called → the way that served it, and why."""
    outer, found = _thread.collected, {}  # type: ignore[var-annotated]
    _thread.collected = found
    try:
        yield found
    finally:
        _thread.collected = outer


@contextmanager
def taken() -> Iterator[list[tuple[str, Call, str]]]:
    """(operator, what rules go by, way) of the decisions made inside, in order."""
    outer, found = _thread.taken, []  # type: ignore[var-annotated]
    _thread.taken = found
    try:
        yield found
    finally:
        _thread.taken = outer
