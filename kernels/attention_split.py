"""Attention of few queries over many keys, forward: the keys are split among programs, whose results are combined.

    lse = log2 Σ_s 2^lse_s        out = Σ_s 2^(lse_s − lse)·out_s        (Dao et al. 2023, Flash-Decoding)

out_s and lse_s are those of ``attention_forward`` over split s, float32, in a fixed order: the same bits every time. 7 tokens
of SAM's mask decoder over 4096 keys are 8 programs without it. Shapes as in ``attention_forward``, with masks; relative
positions and causal attention are not split. Reference: ``fastvit.reference.attention``.
"""

import torch
import triton
import triton.language as tl

from ._attention_arguments import forward_arguments, row_for
from ._launch import launch, target_of
from ._plans import planned
from ._tuning import config
from .attention_forward import _attention_forward

FEWEST = 4


@triton.jit
def _combine(
    partial_ptr,  # [splits, B, H, N, Dv]
    partial_lse_ptr,  # [splits, B, H, N]
    out_ptr,  # [B, H, N, Dv]
    lse_ptr,  # [B, H, N] or None
    rows,
    heads,
    queries,
    splits,
    stride_out_batch,
    stride_out_head,
    stride_out_row,
    NATURAL: tl.constexpr,  # lse is a natural logarithm
    VALUE_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    unit = 1.4426950408889634 if NATURAL else 1.0
    part = tl.load(partial_lse_ptr + split * rows + index, mask=split < splits, other=float("inf"))
    some = part < float("inf")  # +inf: nothing to attend to in this split, or no split
    peak = tl.max(tl.where(some, part, float("-inf")), axis=0)
    weights = tl.where(some, tl.exp2((part - peak) * unit), 0.0)
    total = tl.sum(weights, axis=0)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    if lse_ptr is not None:
        tl.store(lse_ptr + index, tl.where(total == 0.0, float("inf"), peak - tl.log2(inverse) / unit))
    inside = (split < splits)[:, None] & (column < VALUE_DIM)[None, :]
    values = tl.load(partial_ptr + (split * rows + index)[:, None] * VALUE_DIM + column[None, :], mask=inside, other=0.0)
    out = tl.sum(values * weights[:, None], axis=0) * inverse
    batch, head, row = index // queries // heads, index // queries % heads, index % queries
    out_ptr += batch * stride_out_batch + head * stride_out_head + row * stride_out_row
    tl.store(out_ptr + column, out.to(out_ptr.dtype.element_ty), mask=column < VALUE_DIM)


def splits_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, rel_h: torch.Tensor | None, is_causal: bool
) -> int:
    """Into how many the keys are split: as many as fill the GPU, of MIN_KEYS at least; 1 for ``attention_forward`` itself, as
    two or three would not pay for a launch more and float32 results between."""
    batch, heads, queries, _ = q.shape
    if is_causal or rel_h is not None or batch * heads * queries == 0:
        return 1
    limits = config("attention_split", target_of(q))
    wanted = min(limits["PROGRAMS"] // (batch * heads), k.shape[2] // limits["MIN_KEYS"])
    if wanted < FEWEST:
        return 1
    row = row_for("attention_forward", q, v, mask, None)
    blocks = triton.cdiv(k.shape[2], row["BLOCK_N"])
    wanted = min(wanted, blocks, limits["PROGRAMS"] // (batch * heads * triton.cdiv(queries, row["BLOCK_M"])))
    return triton.cdiv(blocks, triton.cdiv(blocks, wanted)) if wanted >= FEWEST else 1


@planned
def launch_attention_split(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fills out, and lse unless None; partial and partial_lse, contiguous float32 with the splits first, are scratch."""
    splits, batch, heads, queries, dim = partial.shape
    row = row_for("attention_forward", q, v, mask, None)
    launch(
        "attention_forward",
        _attention_forward,
        (batch * heads * triton.cdiv(queries, row["BLOCK_M"]), splits),
        q,
        row,
        rel_h_ptr=None,
        rel_w_ptr=None,
        out_ptr=partial,
        lse_ptr=partial_lse,
        stride_out_batch=partial.stride(1),
        stride_out_head=partial.stride(2),
        stride_out_row=partial.stride(3),
        together=1,
        CAUSAL=False,
        SPLIT=True,
        EVEN_COLUMNS=False,
        **forward_arguments(_attention_forward, q, k, v, mask, None, scale),
    )
    launch(
        "attention_split",
        _combine,
        (batch * heads * queries,),
        q,
        config("attention_split", target_of(q)),
        partial_ptr=partial,
        partial_lse_ptr=partial_lse,
        out_ptr=out,
        lse_ptr=lse,
        rows=batch * heads * queries,
        heads=heads,
        queries=queries,
        splits=splits,
        stride_out_batch=out.stride(0),
        stride_out_head=out.stride(1),
        stride_out_row=out.stride(2),
        NATURAL=mask is not None and mask.dtype != torch.uint8,
        VALUE_DIM=dim,
        BLOCK_S=triton.next_power_of_2(splits),
        BLOCK_D=triton.next_power_of_2(dim),
    )
