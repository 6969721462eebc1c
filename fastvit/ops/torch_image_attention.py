"""image_attention on PyTorch's own operators: window by window, a block of query rows at a time, differentiable by autograd.

The image is split, never partitioned into a tensor of windows: each block gathers its own queries, keys and values, pads the
keys and values alone, and adds its relative positions to a bias of at most BIAS_ROWS query rows, or of a few small windows. In
inference the blocks share one buffer for it: fresh memory of this size costs as much in page faults as the sum itself.

For ``torch.compile`` it is one operator: traced, the dozens of blocks would take minutes a layer to compile, and every one would
be the same few calls. ``torch.export`` traces it nevertheless, so that an exported program needs nothing of ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import onednn, onednn_attention
from ._common import Operator, apply, define, distinct, run_backward, wants_grad
from ._state import exporting
from .torch_backend import BIAS_ROWS

# Query rows at a time where oneDNN attends: it holds no bias, and copies a head's keys and values for each block.
ONEDNN_ROWS = 1024

# Scores of a head that windows side by side may have together. One window of 14×14 tokens at a time is 25 calls an image, each
# with its own threads to wait for; six are as many as a strip of a 64×64 image has.
WINDOW_SCORES = 2**18


def resized_table(table: Tensor, size: int) -> Tensor:
    """A table of relative positions (L, D) as (2·size − 1, D): itself, or interpolated linearly as SAM does.

    Written out because F.interpolate adds up its gradient on GPUs in no fixed order.
    """
    length, wanted = table.shape[0], 2 * size - 1
    if length == wanted:
        return table
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    place = (torch.arange(wanted, device=table.device, dtype=wide.dtype) + 0.5) * (length / wanted) - 0.5
    place = place.clamp(0, length - 1)
    below = place.long()
    return torch.lerp(wide[below], wide[(below + 1).clamp(max=length - 1)], (place - below)[:, None]).to(table.dtype)


def image_attention(
    qkv: Tensor,
    num_heads: int,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    window: tuple[int, int],
    pad_qkv: Tensor | None,
    scale: float,
) -> Tensor:
    """qkv (B, Hi, Wi, 3·C) → (B, Hi, Wi, C); ``window`` (h, w) tokens, tables (2h − 1, D) and (2w − 1, D)."""
    tensors = qkv, rel_pos_h, rel_pos_w, pad_qkv
    if not torch.compiler.is_compiling() or exporting():
        return _by_blocks(*tensors, num_heads, window, scale)
    if wants_grad(*tensors):
        return apply(_Compiled, *distinct(*tensors), num_heads, list(window), scale)
    return torch.ops.fastvit.torch_image_attention_forward(*tensors, num_heads, list(window), scale)


def _by_blocks(
    qkv: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    pad_qkv: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    scale: float,
) -> Tensor:
    batch, height, width, channels = qkv.shape
    inputs = (qkv, rel_pos_h, rel_pos_w, pad_qkv)
    if batch == 0:
        nothing = 0 * torch.stack([t.sum() for t in inputs if t is not None]).sum()  # every gradient is zeros, none is None
        return qkv.new_zeros(0, height, width, channels // 3) + nothing
    # In float32, so that a block's gradients are rounded once and then added up exactly enough.
    wide = torch.promote_types(qkv.dtype, torch.float32)
    table_h, table_w = (None if t is None else t.to(wide).flip(0) for t in (rel_pos_h, rel_pos_w))
    pad = None if pad_qkv is None else pad_qkv.to(wide).view(3, 1, num_heads, 1, 1, -1)[1:]
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    buffer = None if needs_grad else _Buffer()
    strips = qkv.unflatten(3, (3, num_heads, -1)).split(list(_extents(height, window[0])), dim=1)
    images = []
    for image in zip(*(strip.unbind(0) for strip in strips), strict=True):
        rows = []
        for strip in image:
            # Small windows go together; a narrower one at the edge goes alone.
            scores = strip.shape[0] * window[1] * window[0] * window[1]
            together = max(1, WINDOW_SCORES // scores) * window[1]
            whole = width // window[1] * window[1]
            parts = strip.split([*_extents(whole, together), *_extents(width - whole, window[1])], dim=1)
            rows.append(_cat([_windows(part, table_h, table_w, window, pad, scale, buffer) for part in parts], 1))
        images.append(_cat(rows, 0))
    return torch.stack(images)


def _extents(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


class _Buffer:
    """One piece of memory for the bias of block after block."""

    memory: Tensor | None = None

    def take(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        if self.memory is None or self.memory.numel() < count:
            self.memory = like.new_empty(count)
        return self.memory[:count].view(shape)


def _windows(
    part: Tensor,  # (rows, n · columns, 3, H, D): what the image has of n windows side by side
    table_h: Tensor | None,
    table_w: Tensor | None,
    window: tuple[int, int],
    pad: Tensor | None,  # (2, 1, H, 1, 1, D)
    scale: float,
    buffer: _Buffer | None,
) -> Tensor:
    """(rows, n · columns, C)."""
    rows, columns = part.shape[0], min(part.shape[1], window[1])
    tokens = min(rows * columns, window[0] * window[1])
    alone = buffer is not None and part.shape[1] == columns
    by_onednn = alone and onednn.serves_attention(tokens, part, table_h, table_w, pad)
    query, key_value = part.unflatten(1, (-1, columns)).permute(3, 1, 4, 0, 2, 5).split([1, 2])
    query = query[0]  # (n, H, rows, columns, D)
    blocks = []
    first = 0
    # Blocks are whole rows of the window, so that their tables are slices.
    size = ONEDNN_ROWS if by_onednn else BIAS_ROWS
    for block in query.split(max(1, size // columns) if query.shape[0] == 1 else rows, dim=2):
        arguments = (block, key_value, table_h, table_w, first, window, pad, scale)
        if buffer is None:
            blocks.append(checkpoint(_attend, *arguments, None, False, use_reentrant=False, preserve_rng_state=False))
        else:
            blocks.append(_attend(*arguments, buffer, by_onednn))
        first += block.shape[2]
    return _cat(blocks, 2).permute(2, 0, 3, 1, 4).reshape(rows, part.shape[1], -1)


def _attend(
    query: Tensor,  # (n, H, block rows, columns, D), from row ``first`` of their windows on
    key_value: Tensor,  # (2, n, H, rows, columns, D)
    table_h: Tensor | None,
    table_w: Tensor | None,
    first: int,
    window: tuple[int, int],
    pad: Tensor | None,
    scale: float,
    buffer: _Buffer | None,
    by_onednn: bool,
) -> Tensor:
    rows, columns = query.shape[2], query.shape[3]
    centre = None
    if pad is not None and pad.dtype == query.dtype and key_value.shape[3:5] != window:
        # Weights add up to one: values less those of the padding, which many keys share, give the result less them. Thousands of
        # the same number, added up one by one, are rounded the same way each time.
        centre = torch.stack([torch.zeros_like(pad[0]), pad[1]])
        key_value, pad = key_value - centre, pad - centre
    key, value = _padded(key_value, window, pad).flatten(3, 4)
    flat = query.flatten(2, 3).contiguous()
    height = width = bias = None
    if table_h is not None and table_w is not None:
        reach_h = table_h[window[0] - first - rows : 2 * window[0] - 1 - first]
        table = torch.cat([reach_h, table_w[window[1] - columns :]]).to(query.dtype)
        height, width = relative_positions(flat.unflatten(2, (rows, columns)), table, window)
    if by_onednn:
        rel = [None if t is None else t.flatten(2, 3) for t in (height, width)]
        out = onednn_attention.attention(flat, key, value, scale, *rel)
    else:
        if height is not None and width is not None:
            memory = None if buffer is None else buffer.take(query, (*query.shape[:4], *window))
            bias = torch.add(height.unsqueeze(-1), width.unsqueeze(-2), out=memory).flatten(2, 3).flatten(3, 4)
        out = F.scaled_dot_product_attention(flat, key, value, attn_mask=bias, scale=scale)
    out = out.unflatten(2, (rows, columns))
    return out if centre is None else out + centre[1]


def _padded(key_value: Tensor, window: tuple[int, int], pad: Tensor | None) -> Tensor:
    """(2, n, H, rows, columns, D) with the rows and columns that its window has beyond the image."""
    rows, columns = key_value.shape[3:5]
    if (rows, columns) == window and (pad is None or not pad.requires_grad):
        return key_value  # where pad wants a gradient, joining nothing of it makes that gradient zeros instead of None
    if pad is None:
        return F.pad(key_value, (0, 0, 0, window[1] - columns, 0, window[0] - rows))
    front, back = key_value.shape[:3], key_value.shape[5:]
    right = pad.expand(*front, rows, window[1] - columns, *back).to(key_value.dtype)
    bottom = pad.expand(*front, window[0] - rows, window[1], *back).to(key_value.dtype)
    return torch.cat([torch.cat([key_value, right], dim=4), bottom], dim=3)


def relative_positions(query: Tensor, table: Tensor, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """rel_h[y, x, k] = q_yx · table[rows − 1 − y + k] and rel_w[y, x, k] = q_yx · table[rows + h − 1 + columns − 1 − x + k].

    query (…, rows, columns, D); table: rows + h − 1 reversed rows of one, then columns + w − 1 of the other. One product with
    all of it; what a query needs starts one place earlier than what its neighbour needs, so both results are views of the
    product, one of them with a shorter stride from row to row, the other from column to column.
    """
    rows, columns = query.shape[-3:-1]
    length = table.shape[0]
    products = (query.reshape(-1, query.shape[-1]) @ table.t()).view(*query.shape[:-1], length)
    row = (columns - 1) * length + window[0]
    lines = products.flatten(-3)[..., rows - 1 :].unfold(-1, row, columns * length - 1)[..., :rows, :]
    along = products.flatten(-2)[..., rows + window[0] - 1 + columns - 1 :]
    return lines.unfold(-1, window[0], length), along.unfold(-1, window[1], length - 1)[..., :columns, :]


def torch_image_attention_forward(qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window, scale):
    with torch.no_grad():
        return _by_blocks(qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, (window[0], window[1]), scale)


def torch_image_attention_backward(grad, qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window, scale, wanted):
    """The gradients of the four tensors, empty where not ``wanted``. Nothing was kept: the blocks are computed again."""
    given: list[Any] = [qkv, rel_pos_h, rel_pos_w, pad_qkv]
    with _recording():
        given = [t if t is None else t.detach().requires_grad_(want) for t, want in zip(given, wanted, strict=True)]
        qkv, rel_pos_h, rel_pos_w, pad_qkv = given
        out = _by_blocks(qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, (window[0], window[1]), scale)
        found = iter(torch.autograd.grad(out, [t for t, want in zip(given, wanted, strict=True) if want], grad))
    return tuple(next(found).contiguous() if want else qkv.new_empty(0) for want in wanted)


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd, also within an operator that was called beneath a TorchDispatchMode, where the dispatcher is past autograd."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _fake_forward(qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window, scale):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


def _fake_backward(grad, qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window, scale, wanted):
    return tuple(
        t.new_empty(t.shape) if want else qkv.new_empty(0)
        for t, want in zip((qkv, rel_pos_h, rel_pos_w, pad_qkv), wanted, strict=True)
    )


_ARGUMENTS = "Tensor qkv, Tensor? rel_pos_h, Tensor? rel_pos_w, Tensor? pad_qkv, SymInt num_heads, SymInt[] window, float scale"
define(
    f"torch_image_attention_forward({_ARGUMENTS}) -> Tensor",
    torch_image_attention_forward,
    _fake_forward,
    keys=("CompositeExplicitAutograd",),
)
define(
    f"torch_image_attention_backward(Tensor grad, {_ARGUMENTS}, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    torch_image_attention_backward,
    _fake_backward,
    keys=("CompositeExplicitAutograd",),
)


class _Compiled(Operator):
    """(qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window, scale) → out."""

    @staticmethod
    def forward(*args):
        return torch.ops.fastvit.torch_image_attention_forward(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.num_heads, ctx.window, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        wanted = list(ctx.needs_input_grad[:4])
        options = ctx.num_heads, ctx.window, ctx.scale, wanted
        grads = run_backward(torch.ops.fastvit.torch_image_attention_backward, grad, *ctx.saved_tensors, *options)
        return *(g if want else None for g, want in zip(grads, wanted, strict=True)), None, None, None
