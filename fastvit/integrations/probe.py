"""Proves a block by example: on random weights, the fused computation must give what the block's own forward gives.

Names and shapes cannot tell a pre-norm block from a parallel or a post-norm one with the same children; this can. The
probe works on a stand-in with weights of its own, on the CPU, so that models on any device (also ``meta``), in any dtype
and of any training state are proved without being touched, and without consuming random numbers. It compares in evaluation
and in training mode: dropout that is no module shows only there. And it compares once more with larger queries: a clamped
or capped score shows only where scores are large, another reach (a band, a window, the best few keys) only among many
tokens. What begins beyond these sizes is not seen.
"""

import copy
import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import decoder, grid, layouts, two_way
from .block import compute, compute_decoder, compute_multihead, compute_two_way
from .call import read_call
from .dispatched import without_hooks
from .multihead import MultiheadCall, MultiheadLayout
from .parts import AnyLayout, Layout, child, part
from .recheck import drops_attention_weights, why_not_in_windows

TOKENS = 67  # that have a position; class and register tokens come on top
KEYS = TOKENS + 4  # where others are attended to
SHARPER = 6.0  # times the queries of random weights: scores reach ±40 to ±90, and softmax is nearly one-hot
TOLERANCE = 2e-5  # of the largest value; erf and tanh GELU differ by more, float32 rounding by less
PASSES = ((False, False), (True, False), (False, True))  # training, sharper
SMALL_BUFFER = 1024  # elements; larger buffers are told apart by identity
PLAIN_VALUES = (int, float, complex, str, bytes, type(None))
OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


def signature(block: nn.Module, layout: AnyLayout) -> tuple:
    """Blocks of one signature need one proof: same kinds, same plain attributes and same buffers, of all descendants."""
    return type(block), layout, tuple((path, type(m), m.extra_repr(), *_contents(m)) for path, m in block.named_modules())


def _contents(module: nn.Module) -> Iterator[tuple]:
    for name, value in module.__dict__.items():
        if name not in OF_EVERY_MODULE:
            yield name, _plain(value)
    for name, parameter in module._parameters.items():
        yield name, None if parameter is None else parameter.shape
    for name, buffer in module._buffers.items():
        yield name, _values(buffer)


def _plain(value: Any) -> Any:
    """Plain values by value, containers of them too when they cannot change; anything else by identity."""
    if isinstance(value, tuple):
        return type(value), tuple(map(_plain, value))
    return (type(value), value) if isinstance(value, PLAIN_VALUES) else id(value)


def _values(buffer: Tensor | None) -> Any:
    if type(buffer) is not Tensor or buffer.is_meta or buffer.layout != torch.strided or buffer.numel() > SMALL_BUFFER:
        return None if buffer is None else id(buffer)
    return buffer.dtype, buffer.shape, tuple(buffer.detach().flatten().tolist())


def why_different(module: nn.Module, layout: AnyLayout) -> str | None:
    """None when the fused computation equals the module's own forward, otherwise what went differently."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        generator = torch.Generator().manual_seed(0)
        twins: dict[int, nn.Module] = {}
        twin = _stand_in(module, generator, twins)
        if isinstance(layout, MultiheadLayout):
            return _compare_multihead(twin, generator)
        if isinstance(layout, decoder.DecoderLayout | two_way.TwoWayLayout):
            return _compare_decoder(twin, layout, generator, twins.values())
        owner = child(twin, layout.attention.owner)
        _use_sdpa(owner)
        channels = child(twin, layout.norms.before).normalized_shape[0]
        prefix = getattr(owner, layouts.PREFIX_TOKENS, 1) if layout.rotary else 0
        shapes = ((TOKENS + prefix,),) if layout.window is None else grid.probe_shapes(layout.window)
        calls = _calls(layout, owner, generator)
        for training, sharper in PASSES:
            for m in twins.values():
                m.__dict__["training"] = training
            if training and (drops_attention_weights(owner) or why_not_in_windows(twin, layout)):  # then it runs its own forward
                continue
            if sharper:
                _sharpen(twin, layout)
            x = torch.randn(2, *shapes[-1 if sharper else 0], channels, generator=generator)
            for keywords in calls:
                reason = _compare(twin, layout, x, keywords)
                if reason is not None:
                    return _in_pass(reason, training, sharper)
        return None


def _in_pass(reason: str, training: bool, sharper: bool) -> str:
    return f"in training {reason}" if training else f"where scores are large, {reason}" if sharper else reason


def _sharpen(twin: nn.Module, layout: Layout) -> None:
    """Makes the scores of a stand-in's attention SHARPER times as large, by its queries alone.

    Norms of queries and keys undo what comes before them: they are scaled themselves, keys' too, whose scores are smaller.
    """
    names = layout.attention
    owner, norms = child(twin, names.owner), [part(twin, path) for path in (names.query_norm, names.key_norm)]
    if layout.multihead:
        _sharpen_multihead(owner)
    elif any(norm is not None for norm in norms):
        for norm, factor in zip(norms, (SHARPER, 2.0), strict=True):
            _scale(() if norm is None else norm.parameters(), factor)
    elif len(names.qkv) == 3:
        _scale(child(twin, names.qkv[0]).parameters(), SHARPER)
    elif names.qkv[0] in layout.called:  # an adapter, in which queries cannot be told from keys: both
        _scale(child(twin, names.qkv[0]).parameters(), SHARPER**0.5)
    else:
        packed = [p[: len(p) // 3] for p in child(twin, names.qkv[0]).parameters()]
        bias = getattr(owner, layouts.SEPARATE_BIASES[0], None)
        _scale(packed if bias is None else [*packed, bias], SHARPER)


def _sharpen_multihead(module: Any) -> None:
    packed = (t for t in (module.in_proj_weight, module.in_proj_bias) if t is not None)
    _scale((t[: module.embed_dim] for t in packed), SHARPER)


def _scale(tensors: Iterable[Tensor], factor: float) -> None:
    for tensor in tensors:
        tensor.mul_(factor)


def _calls(layout: Layout, owner: Any, generator: torch.Generator) -> list[dict[str, Any]]:
    """What the block is called with beside its hidden states."""
    masks: dict[str, Any] = dict.fromkeys(name for name in layouts.MASKS if name in layout.arguments)  # some demand one
    if not layout.rotary:
        return [masks]
    if layout.head_dim is None:
        return []
    halves = layouts.COS_SIN in layout.arguments or getattr(owner, layouts.ROTATES_HALVES, False)
    angle = 3 * torch.rand(TOKENS, layout.head_dim // 2, generator=generator)
    angle = torch.cat([angle, angle], dim=-1) if halves else angle.repeat_interleave(2, dim=-1)
    if layouts.COS_SIN in layout.arguments:
        return [{**masks, layouts.COS_SIN: (angle.cos(), angle.sin())}]
    return [masks, {**masks, layouts.SIN_COS: torch.cat([angle.sin(), angle.cos()], dim=-1)}]


def _compare(twin: nn.Module, layout: Layout, x: Tensor, keywords: dict[str, Any]) -> str | None:
    try:
        with _seeded(), _no_fast_path():
            expected = type(twin).forward(twin, x.clone(), **keywords)
    except Exception as failure:
        return f"its own forward does not take hidden states alone ({type(failure).__name__}: {failure})"
    if not isinstance(expected, Tensor) or expected.shape != x.shape:
        return "its forward does not return one tensor of the hidden states' shape"
    expected = expected.clone()
    try:
        call = read_call(twin, layout, (x,), keywords)
        if isinstance(call, str):
            return f"its calls cannot be read: {call}"
        with _seeded():
            actual = compute(twin, layout, call, "torch")
    except Exception as failure:
        return f"its parts do not fit the fused computation ({type(failure).__name__}: {failure})"
    if actual.shape != expected.shape:
        return "its parts do not give the hidden states' shape"
    error = (actual - expected).abs().max() / expected.abs().max()
    if not error <= TOLERANCE:
        kind = "post-norm" if layout.post_norm else "pre-norm"
        return f"its forward computes something else than a {kind} block of these parts (differs by {error:.1e} on a probe)"
    return None


def _compare_multihead(twin: Any, generator: torch.Generator) -> str | None:
    shapes = ((2, TOKENS), (2, KEYS)) if twin.batch_first else ((TOKENS, 2), (KEYS, 2))
    query, key = (torch.randn(*shape, twin.embed_dim, generator=generator) for shape in shapes)
    for sharper in (False, True):
        if sharper:
            _sharpen_multihead(twin)
        with _no_fast_path():
            expected = type(twin).forward(twin, query, key, key, need_weights=False)[0]
        actual = compute_multihead(twin, MultiheadCall(query, key, key, None, False), "torch")[0]
        error = (actual - expected).abs().max() / expected.abs().max()
        if not error <= TOLERANCE:
            return _in_pass(f"its forward computes something else (differs by {error:.1e} on a probe)", False, sharper)
    return None


def _compare_decoder(twin: Any, layout: Any, generator: torch.Generator, modules: Iterable[nn.Module]) -> str | None:
    """As ``_compare``, for what a mask decoder is made of."""
    two = isinstance(layout, two_way.TwoWayLayout)
    probe_inputs: Any = two_way.probe_inputs if two else decoder.probe_inputs
    read: Any = two_way.read_call if two else decoder.read_call
    compute_it: Any = compute_two_way if two else compute_decoder
    for module in modules:
        _use_sdpa(module)
    for training, sharper in PASSES:
        for module in modules:
            module.__dict__["training"] = training
        try:
            if sharper:
                attentions = [getattr(twin, name) for name in two_way.ATTENTIONS] if two else [twin]
                _scale((p for a in attentions for p in getattr(a, decoder.PROJECTIONS[0]).parameters()), SHARPER)
            inputs = probe_inputs(twin, layout, generator, TOKENS, KEYS)
            call = read(twin, layout, inputs, {})
            if isinstance(call, str) and training:  # then it runs its own forward
                continue
            if isinstance(call, str):
                return f"its calls cannot be read: {call}"
            with _seeded():
                expected = type(twin).forward(twin, *(t if t is None else t.clone() for t in inputs))
            with _seeded():
                actual = compute_it(twin, layout, call, "torch")
        except Exception as failure:
            return f"its parts do not fit the fused computation ({type(failure).__name__}: {failure})"
        reason = _differ(actual, expected)
        if reason is not None:
            return _in_pass(reason, training, sharper)
    return None


def _differ(actual: Any, expected: Any) -> str | None:
    """What is wrong with one tensor or a tuple of them and Nones, the attention weights that the fused path has none of."""
    pairs = list(zip(*(t if isinstance(t, tuple) else (t,) for t in (actual, expected)), strict=False))
    if isinstance(actual, tuple) != isinstance(expected, tuple) or (isinstance(actual, tuple) and len(actual) != len(expected)):
        return "its forward returns something else than a module of these parts"
    for ours, theirs in pairs:
        if ours is None and theirs is None:
            continue
        if not isinstance(theirs, Tensor) or ours is None or theirs.shape != ours.shape:
            return "its forward returns something else than a module of these parts"
        error = (ours - theirs).abs().max() / theirs.abs().max()
        if not error <= TOLERANCE:
            return f"its forward computes something else than a module of these parts (differs by {error:.1e} on a probe)"
    return None


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """Without the native forward of torch's attention modules, whose approximations and checks are its own."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers every time; those of the process stay where they were."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # of the CPU alone, unlike torch.manual_seed
            random.seed(0)
            yield
    finally:
        random.setstate(state)


def _stand_in(module: nn.Module, generator: torch.Generator, memo: dict[int, nn.Module]) -> nn.Module:
    """A copy in evaluation mode, without hooks, with random float32 weights on the CPU; ``module`` is only read."""
    if id(module) in memo:
        return memo[id(module)]
    twin = memo[id(module)] = module.__class__.__new__(module.__class__)
    twin.__dict__.update(without_hooks(module.__dict__, module))
    fresh = nn.Module()
    for name, value in fresh.__dict__.items():
        if "hooks" in name:
            twin.__dict__[name] = value
    twin.__dict__["training"] = False
    twin.__dict__["_parameters"] = {n: None if p is None else _random(p, generator) for n, p in module._parameters.items()}
    twin.__dict__["_buffers"] = {
        n: None if b is None else torch.zeros(b.shape, dtype=b.dtype) if b.is_meta else b.detach().cpu().clone()
        for n, b in module._buffers.items()
    }
    twin.__dict__["_modules"] = {
        n: None if child is None else _stand_in(child, generator, memo) for n, child in module._modules.items()
    }
    for name in twin.__dict__.keys() - OF_EVERY_MODULE:
        twin.__dict__[name] = _detached(twin.__dict__[name], memo)
    return twin


def _detached(value: Any, memo: dict[int, nn.Module]) -> Any:
    """An attribute's value for a stand-in to change: tensors and containers copied, modules those of the stand-in."""
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if type(value) in (Tensor, nn.Parameter) and not value.is_meta:
        return value.detach().cpu().clone()
    if type(value) is tuple:
        return tuple(_detached(item, memo) for item in value)
    if not isinstance(value, dict | list | set | deque | bytearray):
        return value
    fresh: Any = copy.copy(value)
    for key, item in fresh.items() if isinstance(fresh, dict) else enumerate(fresh) if isinstance(fresh, list | deque) else ():
        fresh[key] = _detached(item, memo)
    return fresh


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
