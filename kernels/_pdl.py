"""Programmatic dependent launch: a kernel begins while the one ahead of it in the stream ends (GPUs of sm_90 and later).

``_launch`` decides which launches are dependent: those of at most PDL programs, a number in the rows of the tuning tables.
Their kernels are compiled with PDL true, and keep to one rule: before ``wait`` addresses are made and parameters are asked
into the L2 cache; all that is read into registers or shared memory, and all that is written, comes after it. Why that is
right, whatever runs ahead or behind: docs/performance.md, "Programmatic dependent launch".
"""

import triton
import triton.language as tl

# LINE below is the bytes of a line of the L2 cache: an argument, since launches of kernels that read a global are not kept.


@triton.jit
def wait():
    """Until every kernel ahead is done and what it wrote can be read. Only then may the one behind begin, so that no more than
    one ever waits beside the one that computes."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(ptrs):
    """Asks for the lines at ``ptrs``, addresses that exist, in the L2 cache, where later writes reach them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [ptrs.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_with(a_ptr, b_ptr, c_ptr):
    """``wait`` with three addresses made: left to itself the compiler puts what makes them, divisions among it, after the wait.
    So a line of each is asked for, which the kernel ahead may be writing: in the L2 cache that is one and the same line."""
    prefetch(a_ptr)
    prefetch(b_ptr)
    prefetch(c_ptr)
    wait()


@triton.jit
def prefetch_vector(ptr, first, count, LENGTH: tl.constexpr, LINE: tl.constexpr = 128):
    """``prefetch`` of the elements ``first`` … ``first + LENGTH`` of a vector of ``count``, or of those of them that exist; of
    nothing where there is no vector."""
    if ptr is not None:
        EACH: tl.constexpr = LINE * 8 // ptr.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = LENGTH // EACH if LENGTH > EACH else 1
        prefetch(ptr + tl.minimum(first + tl.arange(0, LINES) * EACH, count - 1))


@triton.jit
def prefetch_share(ptr, part, count, LINE: tl.constexpr = 128):
    """``prefetch`` of the ``part``-th line of a vector of ``count``, the last where it has fewer: of many programs that all need
    the whole of it, each asks for one."""
    if ptr is not None:
        EACH: tl.constexpr = LINE * 8 // ptr.dtype.element_ty.primitive_bitwidth
        prefetch(ptr + tl.minimum(part * EACH, count - 1))


@triton.jit
def prefetch_rows(ptr, row, stride_row, first_k, last_k, part, parts, LINE: tl.constexpr = 128):
    """``prefetch`` of the columns ``first_k`` … ``last_k`` of the rows ``row`` (int64), last stride 1: ``part``'s share of them
    where ``parts`` programs need the same."""
    EACH: tl.constexpr = LINE * 8 // ptr.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = 4  # at a time: a lane has work where rows are fewer than lanes
    line = tl.arange(0, LINES) * EACH
    for start in range(first_k + part * LINES * EACH, last_k, parts * LINES * EACH):
        prefetch(ptr + row[:, None] * stride_row + tl.minimum(start + line, last_k - 1)[None, :])
