"""Matrix product of few tiles and many steps: K is split among programs, and a second kernel adds up and finishes.

    out = epilogue(Σ_s A_s · B_sᵀ + bias)        A_s, B_s: the columns of split s

Epilogues, operands and shapes are those of ``linear``. Partial sums are float32 and added in a fixed order: the same bits every
time. ViT-B's second MLP linear at batch 1 is 24 tiles of 48 steps without it, on 132 multiprocessors; a weight gradient sums
over all tokens of a batch for as few tiles. Reference: ``fastvit.reference.linear``, ``mlp``.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ._launch import as_matrix, launch, row_stride, target_of
from ._pdl import prefetch_vector, wait
from ._plans import planned
from ._tuning import config, tuning
from .linear import _linear, finish, operands, row_for, row_of, tiles

MAX_SPLITS = 16
MAX_SCRATCH = 2**26  # bytes of partial sums
WORTH = 0.8  # of the time of one kernel that two have to be below


@triton.jit
def _add_up(
    partial_ptr,  # [splits, M, N] float32
    bias_ptr,  # the others as in ``_linear``
    pre_ptr,
    out_ptr,
    hidden_ptr,
    sums_ptr,
    M,
    N,
    splits,
    stride_pre_m,
    stride_out_m,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    ptrs = partial_ptr + m[:, None] * N + n[None, :]
    size = tl.full([], N, tl.int64) * M
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if PDL:
        prefetch_vector(bias_ptr, first_n, N, BLOCK_N)
        wait()
    for first in range(0, splits, 4):  # four loads on their way at a time
        for split in tl.static_range(4):
            acc += tl.load(ptrs + split * size, mask=inside & (first + split < splits), other=0.0)
        ptrs += 4 * size
    if sums_ptr is not None:
        sums_ptr += (tl.program_id(0) // blocks).to(tl.int64) * N
    # fmt: off
    finish(acc, m, first_n, bias_ptr, pre_ptr, out_ptr, hidden_ptr, M, N, stride_pre_m, stride_out_m,
           ACTIVATION, BACKWARD, EXACT, 0, sums_ptr)
    # fmt: on


def splits_of(a: torch.Tensor, b: torch.Tensor, backward: bool = False) -> int:
    """Into how many parts K is split for a [M, K] · b [N, K]ᵀ; 1 where ``launch_linear`` alone is as fast."""
    rows, depth, _ = as_matrix(a)
    find = _splits_of.__wrapped__ if tuning() else _splits_of
    return find(target_of(a), backward, a.element_size(), rows, b.shape[0], depth)


def row_tiles(a: torch.Tensor, b: torch.Tensor, backward: bool = False) -> int:
    """How many tiles of rows the kernel makes that has the epilogue of a · bᵀ: the product's, or the one that adds up splits."""
    row = config("linear_split", target_of(a)) if splits_of(a, b, backward) > 1 else row_for(a, b, backward)[1]
    return triton.cdiv(as_matrix(a)[0], row["BLOCK_M"])


@lru_cache(maxsize=4096)
def _splits_of(target: str, backward: bool, element_size: int, rows: int, columns: int, depth: int) -> int:
    """Counted in steps of a program, ``PROGRAMS`` at a time: rounds of programs times their steps; for two kernels also the
    second one, ``STEPS``, and the partial sums that are written and read, against the operands that a step reads."""
    _, row = row_of(target, backward, element_size, rows, columns, depth)
    split = config("linear_split", target)
    block_m, block_n, programs = row["BLOCK_M"], row["BLOCK_N"], split["PROGRAMS"]
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n)
    steps = triton.cdiv(depth, row["BLOCK_K"])
    sums = tiles * 8 * block_m * block_n / (programs * (block_m + block_n) * row["BLOCK_K"] * element_size)

    def time(splits: int) -> float:
        rounds = triton.cdiv(tiles * splits, programs) * triton.cdiv(steps, splits)
        return rounds if splits == 1 else (rounds + split["STEPS"] + splits * sums) / WORTH

    most = min(MAX_SPLITS, steps, MAX_SCRATCH // max(1, 4 * rows * columns))
    best = min(range(1, max(1, most) + 1), key=time)
    return triton.cdiv(steps, triton.cdiv(steps, best)) if best > 1 else 1


def launch_parts(op: str, row: dict[str, int], a: torch.Tensor, b: torch.Tensor, partial: torch.Tensor) -> None:
    """Fills partial [parts, M, N], contiguous float32, each with the sum over its part of K; ``row``: of ``op`` in the tables."""
    parts, _, n = partial.shape
    launch(
        op,
        _linear,
        (tiles(a, b, row), parts),
        a,
        row,
        bias_ptr=None,
        pre_ptr=None,
        out_ptr=partial,
        hidden_ptr=None,
        sums_ptr=None,
        depth=triton.cdiv(triton.cdiv(a.shape[-1], row["BLOCK_K"]), parts) * row["BLOCK_K"],
        stride_pre_m=0,
        stride_out_m=n,
        SPLIT=True,
        ACTIVATION="none",
        BACKWARD=False,
        **operands(a, b, row),
    )


@planned
def launch_linear_split(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    partial: torch.Tensor,
    pre: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    activation: str | None = None,
    backward: bool = False,
    sums: torch.Tensor | None = None,
) -> None:
    """Fills what ``launch_linear`` fills; partial [splits, M, N], contiguous float32, is scratch."""
    splits, m, n = partial.shape
    op, row = row_for(a, b, backward)
    launch_parts(op, row, a, b, partial)
    adding = config("linear_split", target_of(a))
    launch(
        "linear_split",
        _add_up,
        (triton.cdiv(m, adding["BLOCK_M"]) * triton.cdiv(n, adding["BLOCK_N"]),),
        a,
        adding,
        partial_ptr=partial,
        bias_ptr=bias,
        pre_ptr=pre,
        out_ptr=out,
        hidden_ptr=hidden,
        sums_ptr=sums,
        M=m,
        N=n,
        splits=splits,
        stride_pre_m=row_stride(pre),
        stride_out_m=row_stride(out),
        ACTIVATION=activation or "none",
        BACKWARD=backward,
        EXACT=a.dtype == torch.float32,
    )
