"""The two-way blocks of Segment Anything's mask decoder (Kirillov et al. 2023, appendix A, figure 14).

Tokens attend to themselves and then to the image, go through an MLP, and the image attends to the tokens; every step ends
with a sum and its norm. Positions are added to queries and keys anew at every step, not to values.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import decoder, layouts
from .decoder import DecoderLayout

ATTENTIONS = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
NORMS = (("norm1", "norm2", "norm3", "norm4"), ("layer_norm1", "layer_norm2", "layer_norm3", "layer_norm4"))
FIRST = "skip_first_layer_pe"  # of a block whose tokens are nothing but positions: they attend without residual
ACTIVATION_NAMES = {"gelu": "GELU", "gelu_tanh": "tanh GELU", "quick_gelu": "quick GELU", "relu": "ReLU"}


@dataclass(frozen=True)
class TwoWayLayout:
    """``attentions``: to the tokens themselves, of the tokens to the image, and back. ``prompts``: whether it is transformers':
    given (B, P, N, C), it gives the last attention's output beside tokens and image. Others: as in ``parts.Layout``."""

    norms: tuple[str, ...]
    attentions: tuple[DecoderLayout, ...]
    mlp: layouts.Mlp | None
    activation: str | None
    arguments: tuple[str, ...]
    kinds: tuple[tuple[str, type], ...]
    own: tuple[tuple[str, str], ...] = ()
    gating: None = None

    called: tuple[str, ...] = field(init=False)  # made once: a compiler that takes the layout for constant reads fields alone
    prompts: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "called", tuple(path for path, _ in self.own))
        object.__setattr__(self, "prompts", self.attentions[0].prompts)

    def describe(self) -> str:
        mlp = "own MLP" if self.mlp is None else f"{ACTIVATION_NAMES[self.activation or '']} MLP"
        return f"fused attention both ways + add+LayerNorm + {mlp}" + "".join(f"; {path} {reason}" for path, reason in self.own)


@dataclass(frozen=True)
class TwoWayCall:
    """Tokens and their positions (..., N, C), the image's and theirs (..., M, C)."""

    tokens: Tensor
    image: Tensor
    token_positions: Tensor
    image_positions: Tensor


def looks_like(module: nn.Module) -> bool:
    """Whether a module has the three attentions of a two-way block."""
    return module._modules.keys() >= set(ATTENTIONS)


def find_layout(
    block: Any, mlp: layouts.Mlp | None, activation: str | None, own: dict[str, str], arguments: tuple[str, ...]
) -> TwoWayLayout | str:
    """The layout of a module that looks like a two-way block, or why it is not served as a whole."""
    norms = next((names for names in NORMS if block._modules.keys() >= set(names)), None)
    if norms is None or (mlp is None and layouts.OPAQUE_MLP not in block._modules):
        return "its norms and its MLP have none of the known layouts"
    if any(type(getattr(block, name)) is not nn.LayerNorm or len(getattr(block, name).normalized_shape) != 1 for name in norms):
        return "its norms are no plain LayerNorms over the channels"
    attentions = []
    for name in ATTENTIONS:
        found = decoder.find_layout(getattr(block, name)) if decoder.looks_like(getattr(block, name)) else "is of another kind"
        if isinstance(found, str):
            return f"{name}: {found}"
        attentions.append(found)
    if len({found.prompts for found in attentions}) > 1 or len(arguments) < 4:
        return "its forward does not take tokens, an image and the positions of both"
    projections = [f"{name}.{path}" for name, found in zip(ATTENTIONS, attentions, strict=True) for path, _ in found.kinds]
    parts: set[str | None] = {*norms, *ATTENTIONS, *projections}
    if mlp is not None:
        parts |= {mlp.fc1, mlp.activation, mlp.fc2, layouts.OPAQUE_MLP}
    kinds = []
    for path, module in block.named_modules():
        if not path or any(path == c or path.startswith(f"{c}.") for c in own):
            continue
        if path not in parts:
            return f"unknown child {path!r} ({type(module).__name__})"
        kinds.append((path, type(module)))
    return TwoWayLayout(norms, tuple(attentions), mlp, activation, arguments, tuple(kinds), tuple(own.items()))


def read_call(block: Any, layout: TwoWayLayout, args: tuple, kwargs: dict) -> TwoWayCall | str:
    """What the block was called with, or why the fused path does not serve the call."""
    if len(args) > len(layout.arguments):
        return f"it was called with {len(args)} positional arguments"
    values = {**dict(zip(layout.arguments, args, strict=False)), **kwargs}
    given = [values.pop(name, None) for name in layout.arguments[:4]]
    rank, shape = (4, "(batch, prompts, tokens, channels)") if layout.prompts else (3, "(batch, tokens, channels)")
    if not all(isinstance(t, Tensor) and t.dim() == rank and not t.is_nested for t in given):
        return f"tokens, image and positions are not four tensors of shape {shape}"
    tokens, image, token_positions, image_positions = given
    if token_positions.shape != tokens.shape or image_positions.shape != image.shape:
        return "positions are not of the shape of what they are added to"
    if tokens.shape[:-2].numel() != image.shape[:-2].numel():
        return "tokens and image are not of one batch"
    for name, other in values.items():
        if other is not None and other is not False and name not in layouts.HARMLESS:
            return f"it was called with {name}"
    for name in ATTENTIONS:
        reason = decoder.why_not_now(getattr(block, name), weights_wanted=False)
        if reason is not None:
            return f"{name}: {reason}"
    return TwoWayCall(*given)


def compute(
    block: Any, layout: TwoWayLayout, ops: Any, call: TwoWayCall, add_norm: Callable[..., Tensor], mlp: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """(tokens, image), in transformers' blocks with the image's attention output as a third, as the block's own forward.

    ``add_norm(residual, branch, norm, owned)``: the norm of their sum; ``owned`` allows to write over the branch.
    """

    def attend(which: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return decoder.attend(getattr(block, ATTENTIONS[which]), layout.attentions[which], ops, query, key, value)

    norms = [getattr(block, name) for name in layout.norms]
    tokens = call.tokens
    if getattr(block, FIRST, False):
        tokens = attend(0, tokens, tokens, tokens)
        tokens = ops.layer_norm(tokens, norms[0].weight, norms[0].bias, norms[0].eps)
    else:
        query = tokens + call.token_positions
        tokens = add_norm(tokens, attend(0, query, query, tokens), norms[0], True)
    placed = call.image + call.image_positions
    branch = attend(1, tokens + call.token_positions, placed, call.image)
    tokens = add_norm(tokens, branch, norms[1], True)
    owned = layout.mlp is not None and layout.mlp.fc2 not in layout.called
    tokens = add_norm(tokens, mlp(tokens), norms[2], owned)
    branch = attend(2, placed, tokens + call.token_positions, tokens)
    image = add_norm(call.image, branch, norms[3], not layout.prompts)
    return (tokens, image, branch) if layout.prompts else (tokens, image)


def probe_inputs(
    block: Any, layout: TwoWayLayout, generator: torch.Generator, tokens: int, keys: int
) -> tuple[Tensor | None, ...]:
    """Random arguments for a stand-in's forward."""
    batch = (2, 2) if layout.prompts else (2,)
    width = getattr(block, layout.norms[0]).normalized_shape[0]
    given = [torch.randn(*batch, count, width, generator=generator) for count in (tokens, keys, tokens, keys)]
    return *given, *(None for _ in layout.arguments[4:])
