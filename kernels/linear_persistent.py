"""Matrix product with its epilogue, by programs that stay: each takes tile after tile until none is left.

    out = activate(A · Bᵀ + bias), and optionally the value before activation (pre)

Equations, shapes, dtypes and bits are those of ``linear``'s forward; tiles come in the same order, dealt out to the programs in
turn. The loop over tiles is flattened into the loop over K, so that the first loads of a tile run while the tile before is
finished: what two programs a multiprocessor hide from each other, a tile too large for two hides so in part. A "linear" row of
the tuning tables asks for it: PERSISTENT programs a multiprocessor, 0 or absent for ``linear``, which also serves what
``programs_of`` leaves to it: transposed operands and rows that begin at no multiple of 16, whose loads the compiler does not
pipeline here.
Reference: ``fastvit.reference.linear``.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from ._launch import row_stride, target_of
from ._linear import finish, place, products
from ._tuning import config


@triton.jit
def _linear_persistent(
    a_ptr,  # [M, K]
    b_ptr,  # [N, K]
    bias_ptr,  # [N] or None
    pre_ptr,  # [M, N] or None
    out_ptr,  # [M, N]
    M,
    N,
    K,
    stride_a_m,
    stride_b_n,
    stride_pre_m,
    stride_out_m,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    EXACT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = place(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        # fmt: off
        acc = products(a_ptr, b_ptr, m, n, M, N, K, 0, K, stride_a_m, 1, stride_b_n, 1,
                       False, False, EVEN_K, INPUT_PRECISION, BLOCK_K)
        finish(acc, m, tile_n.to(tl.int64) * BLOCK_N, bias_ptr, pre_ptr, out_ptr, None, M, N, stride_pre_m, stride_out_m,
               ACTIVATION, False, EXACT, HALVINGS)
        # fmt: on


def programs_of(a: torch.Tensor, b: torch.Tensor, tiles: int, row: dict[str, int]) -> int:
    """How many programs share the tiles of a [M, K] · b [N, K]ᵀ; 0 where ``linear`` serves: where the row does not ask for
    programs that stay, where each would have one tile, and operands of other layouts than the kernel's."""
    wanted = row.get("PERSISTENT", 0)
    if not wanted or a.stride(-1) != 1 or b.stride(1) != 1 or row_stride(a) % 16 or row_stride(b) % 16:
        return 0
    programs = wanted * multiprocessors(a)
    return programs if programs < tiles else 0


def multiprocessors(tensor: torch.Tensor) -> int:
    """Of the GPU that ``tensor`` is on; what the tables hold its target for, where there is no such GPU."""
    return _of_device(tensor.get_device()) if tensor.is_cuda else config("linear_split", target_of(tensor))["PROGRAMS"]


@cache
def _of_device(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
