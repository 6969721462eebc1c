"""What a Vision Transformer attends to: the attention matrices that fused kernels never hold, a few rows at a time.

For ``fastvit.models`` and for every model whose blocks ``fastvit.accelerate`` knows, accelerated or not: hooks take what each
block is called with, and softmax(scale·QKᵀ) follows from the block's own norm and projections. The model is left as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .integrations import probe, swap
from .integrations.branches import queries_and_keys
from .integrations.call import read_call
from .integrations.matching import find_layout
from .integrations.parts import Layout, is_no_encoder_block
from .nn import EncoderBlock

__all__ = ["attention_maps", "attention_rollout"]

ROWS = 256  # rows of an attention matrix held at one time


@torch.no_grad()
def attention_maps(model: nn.Module, *inputs: Any, query: int = 0, **keywords: Any) -> list[Tensor]:
    """How one token attends to all, layer by layer: softmax(scale·q_query·Kᵀ), in float32 (float64 for a float64 model).

    Args:
        model: a Vision Transformer of ``fastvit.models`` or of a family that ``fastvit.accelerate`` serves. It runs once,
            without gradients, in the mode it is in.
        inputs, keywords: what the model is called with.
        query: the token, 0 being the class token where there is one; negative numbers count from the end.

    Returns:
        A tensor (B, heads, tokens) for every layer, in order of execution. Rows sum to 1.

    Raises ``ValueError`` for a model without layers whose attention is known, or with one that is not, and for a ``query``
    beyond the tokens; ``TypeError`` for one that is no int.
    """
    if not isinstance(query, int) or isinstance(query, bool):
        raise TypeError(f"query is {query!r}; expected the number of a token")
    maps: list[Tensor] = []

    def keep(attention: "_Attention") -> None:
        tokens = attention.query.shape[2]
        if not -tokens <= query < tokens:
            raise ValueError(f"query is {query}; expected the number of one of {tokens} tokens, from {-tokens} to {tokens - 1}")
        maps.append(attention.rows(query % tokens, query % tokens + 1)[:, :, 0])

    _run(model, inputs, keywords, keep)
    return maps


@torch.no_grad()
def attention_rollout(model: nn.Module, *inputs: Any, **keywords: Any) -> Tensor:
    """How much of every input token reaches the class token: its row of Π_l ½(A_l + I), last layer leftmost, A_l being the mean
    of the heads (Abnar & Zuidema 2020, eq. 1).

    The product is taken as a row vector times one matrix after another, from the last layer to the first, and each matrix by
    blocks of its rows: queries and keys of all layers are kept, no N×N matrix is.

    Args:
        model, inputs, keywords: as in ``attention_maps``.

    Returns:
        (B, tokens), in float32 (float64 for a float64 model); rows sum to 1. In a model without a class token it is the row
        of the first token.

    Raises ``ValueError`` as ``attention_maps``.
    """
    layers: list[_Attention] = []
    _run(model, inputs, keywords, layers.append)
    batch, _, tokens, _ = layers[-1].query.shape
    reached = layers[-1].query.new_zeros(batch, tokens, dtype=layers[-1].dtype)
    reached[:, 0] = 1
    rows = 1  # of which `reached` is not zero: before the last layer's matrix, the class token's alone
    while layers:
        attention = layers.pop()
        passed_on = torch.zeros_like(reached)
        for start in range(0, rows, ROWS):
            stop = min(start + ROWS, rows)
            passed_on += torch.einsum("bn,bhnm->bm", reached[:, start:stop], attention.rows(start, stop))
        reached = (passed_on / attention.query.shape[1] + reached) / 2
        rows = tokens
    return reached


class _Attention:
    """One layer's softmax(scale·QKᵀ + mask): query (B, H, N, D), key (B, Hk, N, D)."""

    def __init__(self, query: Tensor, key: Tensor, scale: float, attn_mask: Tensor | None = None, is_causal: bool = False):
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.query, self.key, self.scale = query, key, scale
        self.attn_mask, self.is_causal = attn_mask, is_causal

    def rows(self, start: int, stop: int) -> Tensor:
        """The rows from ``start`` to ``stop``, (B, H, stop − start, N); a token that may attend to nothing has zeros."""
        key = self.key.to(self.dtype).repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        with torch.autocast(key.device.type, enabled=False):
            scores = self.query[:, :, start:stop].to(self.dtype) @ key.transpose(-2, -1) * self.scale
        if self.attn_mask is not None:
            mask = self.attn_mask.expand(*scores.shape[:2], self.query.shape[2], -1)[:, :, start:stop]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if self.is_causal:
            row = torch.arange(start, stop, device=scores.device)[:, None]
            scores = scores.masked_fill(torch.arange(scores.shape[3], device=scores.device) > row, -torch.inf)
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        return torch.softmax(scores.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)


def _run(model: nn.Module, inputs: tuple, keywords: dict[str, Any], use: Callable[[_Attention], None]) -> None:
    """Calls the model, and ``use`` with the attention of each of its layers as they are entered."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    layers = _layers(model)
    tokens: dict[str, torch.Size] = {}

    def enter(name: str, layout: Layout | None) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            attention = _attention(name, module, layout, args, kwargs)
            tokens[name] = attention.query.shape[::2]
            if len(set(tokens.values())) > 1:
                raise ValueError(f"{name} attends over other tokens than the layers before it; expected one encoder, not several")
            use(attention)

        return hook

    with ExitStack() as hooks:
        for name, module, layout in layers:
            hooks.callback(module.register_forward_pre_hook(enter(name, layout), with_kwargs=True).remove)
        model(*inputs, **keywords)
    names = ", ".join(name for name, _, _ in layers if name not in tokens)
    if names:
        raise ValueError(f"the model did not call {names}; expected every layer to run (a compiled model: pass the original)")


def _layers(model: nn.Module) -> list[tuple[str, nn.Module, Layout | None]]:
    """Every encoder block by name, with its layout where it is not our own. Raises where the attention of one is unknown."""
    layers: list[tuple[str, nn.Module, Layout | None]] = []
    unknown: dict[str, str] = {}
    proofs: dict[Any, str | None] = {}
    for name, module in _outermost(model):
        if isinstance(module, EncoderBlock):
            layers.append((name, module, None))
            continue
        layout = _layout(module, proofs)
        if isinstance(layout, str):
            unknown[name] = layout
        else:
            layers.append((name, module, layout))
    encoders = {_parent(name) for name, _, _ in layers}
    for name, reason in unknown.items():
        if not layers or _parent(name) in encoders:
            raise ValueError(f"the attention of {name or 'the model'} is not known: {reason}; expected blocks that are")
    if not layers:
        raise ValueError(f"{type(model).__name__} has no transformer block that fastvit knows; expected a Vision Transformer")
    if len(encoders) > 1:
        names = ", ".join(sorted(encoders))
        raise ValueError(f"{type(model).__name__} has several encoders ({names}); expected one: pass the module that holds it")
    return layers


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are blocks or look like one, none inside another that is one. An attention alone (a pooling head's) is none:
    what goes around it is not known."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if is_no_encoder_block(module) or any(name.startswith(f"{block}.") or not block for block in inside):
            continue
        found = isinstance(module, EncoderBlock) or swap.is_served(module) or find_layout(module)
        if found:
            yield name, module
        if found and not isinstance(found, str):
            inside.append(name)


def _layout(module: nn.Module, proofs: dict[Any, str | None]) -> Layout | str:
    """A block's layout, proved to be what its forward computes; a reason otherwise."""
    served = swap.is_served(module)
    layout: Any = module.__dict__[swap.ATTRIBUTE].layout if served else find_layout(module)
    if not isinstance(layout, str) and layout.window is not None:
        return "it attends on an image, by windows or with relative positions"
    if isinstance(layout, str) or served:
        return layout
    key = probe.signature(module, layout)
    if key not in proofs:
        proofs[key] = probe.why_different(module, layout)
    return proofs[key] or layout


def _attention(name: str, module: Any, layout: Layout | None, args: tuple, kwargs: dict[str, Any]) -> _Attention:
    """The attention of a block that is called with ``args`` and ``kwargs``."""
    if layout is None:
        return _own_attention(name, module, *args, **kwargs)
    call = read_call(module, layout, args, kwargs)
    if isinstance(call, str):
        raise ValueError(f"the attention of {name or 'the model'} is not known: {call}")
    return _Attention(*queries_and_keys(module, layout, call), attn_mask=call.attn_mask, is_causal=call.is_causal)


def _own_attention(
    name: str, module: EncoderBlock, input: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> _Attention:
    if module.attn.on_grid:
        raise ValueError(f"{name or 'the model'} attends on a grid, by windows or with relative positions; expected a sequence")
    return _Attention(*module.attn.queries_and_keys(module.norm1(input)), attn_mask=attn_mask, is_causal=is_causal)
