"""Image attention on the Triton kernels: raw operators, shape functions and the autograd Function.

qkv is read where it lies, any strides but the last, and its gradient is written in one packed tensor. Backward keeps qkv,
the output and one float32 a row (lse), never a score; relative positions are computed again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import (
    Operator,
    apply,
    contiguous,
    define,
    direct,
    distinct,
    fill,
    kernels,
    run_backward,
    scratch,
    wants_grad,
    with_unit_stride,
)
from .sums import strip_sums


def image_attention_forward(
    qkv: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    pad_qkv: Tensor | None,
    num_heads: int,
    window: Sequence[int],
    scale: float,
    save: bool = True,
):
    """Returns (out, lse), lse only to ``save``; ``window`` (h, w), tables (2h − 1, D) and (2w − 1, D)."""
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty(batch, height, width, channels // 3)
    lse = qkv.new_empty(batch, num_heads, height * width, dtype=torch.float32) if save else None
    qkv, pad, size = with_unit_stride(qkv), contiguous(pad_qkv), (window[0], window[1])
    rel: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if rel_pos_h is not None and rel_pos_w is not None:
        rel = rel_pos_h.contiguous(), rel_pos_w.contiguous()
        if not kernels.image_attention_forward.table_size(qkv, num_heads, size):
            rel = _positions(qkv, rel, num_heads, size)
    kernels.image_attention_forward.launch_image_attention_forward(qkv, pad, *rel, num_heads, size, scale, out, lse)
    return out, lse


def _positions(qkv: Tensor, tables: tuple[Tensor, Tensor], num_heads: int, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """rel_h (B, H, Hi·Wi, h) and rel_w (B, H, Hi·Wi, w)."""
    batch, height, width, _ = qkv.shape
    rel_h, rel_w = (scratch(qkv.new_empty(batch, num_heads, height * width, size)) for size in window)
    kernels.image_attention_positions.launch_positions(qkv, *tables, num_heads, window, rel_h, rel_w)
    return rel_h, rel_w


def image_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    pad_qkv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    window: list[int],
    scale: float,
    wants_tables: bool,
    wants_pad: bool,
):
    """Returns (dqkv, drel_pos_h, drel_pos_w, dpad_qkv), all but the first None where not wanted."""
    batch, height, width, channels = qkv.shape
    tables = None if rel_pos_h is None or rel_pos_w is None else (rel_pos_h.contiguous(), rel_pos_w.contiguous())
    likes = (rel_pos_h if wants_tables else None, rel_pos_w if wants_tables else None, pad_qkv if wants_pad else None)
    dqkv = qkv.new_empty(qkv.shape)
    if batch == 0:
        return dqkv, *(None if like is None else like.new_zeros(like.shape) for like in likes)
    dtable_h = dtable_w = dpad = None
    qkv, pad, size, dout = with_unit_stride(qkv), contiguous(pad_qkv), (window[0], window[1]), grad.contiguous()
    if tables is not None and kernels.image_attention_backward_window.serves(qkv, num_heads, size, scale):
        return dqkv, *_in_one_pass(qkv, pad, tables, num_heads, size, scale, out.contiguous(), dout, lse, dqkv, likes)
    delta = scratch(torch.empty_like(lse))
    rel = None if tables is None else _positions(qkv, tables, num_heads, size)
    inputs = (qkv, pad, *(rel or (None, None)), num_heads, size, scale)
    saved = (dout, lse, delta, dqkv)
    if tables is None or rel is None:
        kernels.image_attention_backward_query.launch_image_attention_backward_query(
            *inputs, out.contiguous(), *saved, None, None
        )
    else:
        rel_h, rel_w = rel
        passes = kernels.image_attention_backward_query.passes_of(qkv, num_heads, size)
        parts = rel_h.new_empty(passes, *rel_h.shape, dtype=rel_h.dtype if passes == 1 else torch.float32)
        drel_w = rel_w.new_empty(rel_w.shape)
        kernels.image_attention_backward_query.launch_image_attention_backward_query(
            *inputs, out.contiguous(), *saved, parts, drel_w
        )
        drel_h = parts[0] if passes == 1 else parts.sum(0).to(rel_h.dtype)
        kernels.image_attention_positions.launch_positions_backward(qkv, *tables, num_heads, size, drel_h, drel_w, dqkv)
        if wants_tables:
            query = qkv.unflatten(3, (3, num_heads, -1))[:, :, :, 0]
            drel_h, drel_w = (drel.unflatten(2, (height, width)) for drel in (drel_h, drel_w))
            dtable_h = _table_gradient(torch.einsum("bnyxk,byxnd->ykd", drel_h, query), size[0])
            dtable_w = _table_gradient(torch.einsum("bnyxk,byxnd->xkd", drel_w, query), size[1])
    sums = None
    if wants_pad:
        count = kernels.image_attention_backward_key.pad_parts(qkv, num_heads, size)
        sums = scratch(qkv.new_empty(count, 2 * channels // 3, dtype=torch.float32))
    kernels.image_attention_backward_key.launch_image_attention_backward_key(*inputs, *saved, sums)
    if sums is not None:
        dpad = _pad_gradient(qkv)
        kernels.reduce.launch_column_sums(sums, dpad[channels // 3 :])
    return dqkv, dtable_h, dtable_w, dpad


def _pad_gradient(qkv: Tensor) -> Tensor:
    """The padding's gradient, to be filled but for that of its query, which is nobody's."""
    dpad = qkv.new_empty(qkv.shape[3])
    fill(dpad[: qkv.shape[3] // 3], _zero)
    return dpad


def _in_one_pass(
    qkv: Tensor,
    pad: Tensor | None,
    tables: tuple[Tensor, Tensor],
    num_heads: int,
    window: tuple[int, int],
    scale: float,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    dqkv: Tensor,
    likes: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(drel_pos_h, drel_pos_w, dpad_qkv), each None where ``likes`` has none; fills dqkv."""
    kernel = kernels.image_attention_backward_window
    dkv = dtables = sums = dpad = None
    programs, parts, places = kernel.partial_sums(qkv, num_heads, window)
    if places:
        dkv = scratch(qkv.new_empty(programs, places, tables[0].shape[1], dtype=torch.float32))
    if likes[0] is not None:
        dtables = scratch(qkv.new_empty(programs, 2, kernel.TABLE * tables[0].shape[1], dtype=torch.float32))
    padded = qkv.shape[1] % window[0] or qkv.shape[2] % window[1]
    if likes[2] is not None and padded:
        sums = scratch(qkv.new_empty(parts, 2 * qkv.shape[3] // 3, dtype=torch.float32))
    kernel.launch_image_attention_backward_window(
        qkv, pad, *tables, num_heads, window, scale, out, dout, lse, dqkv, dkv, dtables, sums
    )
    partials, results = [], []
    dtable_h = dtable_w = None
    if dtables is not None:
        dtable_h, dtable_w = (torch.empty_like(table) for table in tables)
        partials += [strip_sums(dtables[:, axis, : table.numel()]) for axis, table in enumerate(tables)]
        results += [dtable_h.view(-1), dtable_w.view(-1)]
    if likes[2] is not None and not padded:
        dpad = qkv.new_empty(qkv.shape[3])
        fill(dpad, _zero)
    if sums is not None:
        dpad = _pad_gradient(qkv)
        partials.append(strip_sums(sums))
        results.append(dpad[qkv.shape[3] // 3 :])
    if partials:
        kernels.reduce.launch_column_sums(*partials, *results)
    return dtable_h, dtable_w, dpad


def _zero(*, out: Tensor) -> None:
    out.zero_()


def _table_gradient(lines: Tensor, size: int) -> Tensor:
    """lines[p, k] (lines of the image, size, D), the gradient of table[p % size − k + size − 1], gathered by table rows.

    A gather and a sum instead of a scatter, whose order would not be the same twice.
    """
    position = torch.arange(lines.shape[0], device=lines.device)
    key = (position % size)[:, None] + size - 1 - torch.arange(2 * size - 1, device=lines.device)[None, :]
    there = (key >= 0) & (key < size)
    gathered = lines[position[:, None], key.clamp(0, size - 1)]
    return gathered.masked_fill(~there[:, :, None], 0).sum(0)


def _fake_forward(qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window, scale):
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty(batch, height, width, channels // 3)
    return out, qkv.new_empty(batch, num_heads, height * width, dtype=torch.float32)


def _fake_backward(grad, qkv, rel_pos_h, rel_pos_w, pad_qkv, out, lse, num_heads, window, scale, wants_tables, wants_pad):
    likes = (rel_pos_h if wants_tables else None, rel_pos_w if wants_tables else None, pad_qkv if wants_pad else None)
    return qkv.new_empty(qkv.shape), *(qkv.new_empty(0 if like is None else like.shape) for like in likes)


call_image_attention_forward = define(
    "image_attention_forward(Tensor qkv, Tensor? rel_pos_h, Tensor? rel_pos_w, Tensor? pad_qkv, SymInt num_heads,"
    " SymInt[] window, float scale) -> (Tensor, Tensor)",
    image_attention_forward,
    _fake_forward,
)
call_image_attention_backward = define(
    "image_attention_backward(Tensor grad, Tensor qkv, Tensor? rel_pos_h, Tensor? rel_pos_w, Tensor? pad_qkv, Tensor out,"
    " Tensor lse, SymInt num_heads, SymInt[] window, float scale, bool wants_tables,"
    " bool wants_pad) -> (Tensor, Tensor, Tensor, Tensor)",
    image_attention_backward,
    _fake_backward,
)


class ImageAttention(Operator):
    """(qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window, scale) → (out, lse); lse carries no gradient."""

    @staticmethod
    def forward(qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window, scale):
        return call_image_attention_forward(qkv, rel_pos_h, rel_pos_w, pad_qkv, num_heads, window, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.num_heads, ctx.window, ctx.scale = inputs
        ctx.set_materialize_grads(False)  # no zeros for what has no gradient
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, grad, _lse):
        if grad is None:
            return (None,) * 7
        wants = ctx.needs_input_grad
        options = (ctx.num_heads, ctx.window, ctx.scale, wants[1] or wants[2], wants[3])
        grads = run_backward(call_image_attention_backward, grad, *ctx.saved_tensors, *options)
        return *(g if want else None for g, want in zip(grads, wants[:4], strict=True)), None, None, None


def image_attention(
    qkv: Tensor,
    num_heads: int,
    rel_pos_h: Tensor | None,
    rel_pos_w: Tensor | None,
    window: tuple[int, int],
    pad_qkv: Tensor | None,
    scale: float,
) -> Tensor:
    tensors = qkv, rel_pos_h, rel_pos_w, pad_qkv
    if wants_grad(*tensors):
        return apply(ImageAttention, *distinct(*tensors), num_heads, list(window), scale)[0]
    if direct(*tensors):
        return image_attention_forward(*tensors, num_heads, window, scale, save=False)[0]
    return call_image_attention_forward(*tensors, num_heads, list(window), scale)[0]
