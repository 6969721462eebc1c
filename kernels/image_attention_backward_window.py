"""Image attention in small windows, backward in one pass: one program meets each key of a window with BLOCK_M queries at once.

    P = 2^(S − lse)       dV = Pᵀ·dout       dS = P ∘ (dout·Vᵀ − delta)       dK = scale · dSᵀ·Q       delta = Σ_d out·dout
    [drel_h | drel_w] = dS·E       dQ = scale · dS·K + drel_h·R_h[y − k] + drel_w·R_w[x − k]       dR_h[y − k] = Σ_n drel_h·Q

A program is a window and head, and goes in rounds over its queries: q and dout of a round stay in shared memory, dQ and drel in
registers, while a loop goes over the keys, BLOCK_N places a step, a row of the window being KEY_COLUMNS of them. dK and dV of a
step are complete but for other rounds' queries: they stay in float32 until the last round has added its own. E [keys, 2 · SIDE]
says in which row and column of the window a key lies, so that scores begin with a product of it and positions' gradients are
another: five products where two passes take seven, and no launches for positions. Every sum has one owner and one order: no
atomics. Shapes as in ``image_attention_backward_query``, the tables [2h − 1, D] and [2w − 1, D] in place of rel_h and rel_w.
The tables' gradients and the padding's leave as partial sums, to be added up over their first dimension. Limits: windows of 16
by 16 at most, and what ``serves`` says. Reference: ``fastvit.reference.image_attention``.
"""

import math

import torch
import triton
import triton.language as tl

from ._attention import split_head_dim
from ._attention_backward import row_products
from ._launch import launch, target_of
from ._plans import planned
from ._tuning import config
from .image_attention import load_rows, row_for, store_rows, window_arguments, window_corner, windows_of

SIDE = 16  # of a window, at most
TABLE = 32  # rows of a table, of which a window's side of 16 has 31
MAX_DIM = 80  # channels of a head whose sums the registers hold
# E holds 1 / scale in 16 bits, and a position times that has to stay far from the −2³⁰ of keys that the window has not.
SCALES = 2.0**-12, 2.0**12


@triton.jit
def _load(rows, inside, DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr):
    """(columns of MAIN, columns of TAIL, or of MAIN again) at the addresses ``rows``."""
    main = load_rows(rows, inside, 0, MAIN, DIM, MASKED)
    tail = main
    if TAIL > 0:
        tail = load_rows(rows, inside, MAIN, TAIL, DIM, MASKED)
    return main, tail


@triton.jit
def _products(a, a_tail, b, b_tail, start, TAIL: tl.constexpr, INPUT_PRECISION: tl.constexpr):
    """start + a·bᵀ."""
    products = tl.dot(a, tl.trans(b), start, input_precision=INPUT_PRECISION)
    if TAIL > 0:
        products = tl.dot(a_tail, tl.trans(b_tail), products, input_precision=INPUT_PRECISION)
    return products


@triton.jit
def _place_of(index, columns):
    """(row, column) of a window's queries, exact for fewer than 4096 of them in at most 16 columns, and no division each."""
    row = (index * (65535 // columns + 1)) >> 16
    return row, index - row * columns


@triton.jit
def _positions(
    q,
    q_tail,
    table_ptr,
    position,
    size,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    SIDE: tl.constexpr,
    TABLE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """Relative positions of queries at ``position``, rounded to q's dtype as forward's are, −2¹⁵ from ``size`` on.

    No infinity where fp16 ends: the zeros of E would make NaN of it, for every key.
    """
    LARGEST: tl.constexpr = 65504.0 if q.dtype == tl.float16 else float("inf")
    line = tl.arange(0, TABLE)
    table, table_tail = _load(table_ptr + line * DIM, line < 2 * size - 1, DIM, MAIN, TAIL, True)
    start = tl.zeros([q.shape[0], TABLE], dtype=tl.float32)
    products = _products(q, q_tail, table, table_tail, start, TAIL, INPUT_PRECISION)
    key = tl.arange(0, SIDE)[None, :]
    # Queries beyond the window wrap around the table, and weigh nothing.
    rel = tl.gather(products, ((size - 1 + position)[:, None] - key) & (TABLE - 1), axis=1)
    # A minimum in float32: a choice would be made among 16-bit numbers, which have to be unpacked for it.
    rel = tl.minimum(rel, tl.where(key < size, LARGEST, -32768.0), propagate_nan=tl.PropagateNan.ALL)
    if q.dtype == tl.float16:
        rel = tl.maximum(rel, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return rel.to(q.dtype)


@triton.jit
def _dproducts(drel, position, size, TABLE: tl.constexpr, dtype: tl.constexpr):
    """The gradient of each query's products with a table's rows, from that of its positions: [BLOCK_M, TABLE]."""
    key = (size - 1 + position)[:, None] - tl.arange(0, TABLE)[None, :]
    gathered = tl.gather(drel, key & (drel.shape[1] - 1), axis=1)
    return tl.where((key >= 0) & (key < size), gathered, 0.0).to(dtype)


@triton.jit
def _slots(row, column, window_h, window_w, one, SIDE: tl.constexpr, dtype: tl.constexpr):
    """E: ``one`` in slot 2 · row and slot 2 · column + 1 of each key, [keys, 2 · SIDE].

    2¹⁵ in slots that are of no row or column of the window: times the queries' −2¹⁵ there, it leaves keys that the window has not
    without weight, and is no infinity that a zero would meet.
    """
    slot = tl.arange(0, 2 * SIDE)[None, :]
    is_row = slot % 2 == 0
    value = tl.where(slot // 2 < tl.where(is_row, window_h, window_w), one, 32768.0)
    return tl.where(tl.where(is_row, row[:, None], column[:, None]) == slot // 2, value, 0.0).to(dtype)


@triton.jit
def _store_sums(rows, tile, mask, again, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Stores ``tile`` at the addresses ``rows``, added to what is there if ``again``: no branch, which would take registers."""
    ptrs = rows[:, None] + (FIRST + tl.arange(0, WIDTH))[None, :]
    tile += tl.load(ptrs, mask=(mask & again)[:, None], other=0.0).to(tl.float32)
    tl.store(ptrs, tile.to(rows.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _add_round(rows, sums, tile, mask, again, last, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Stores ``tile`` and, if ``again``, the sums of the rounds before: at ``rows`` in the last round, else at ``sums``.

    There is one round where ``sums`` is None. No branches here either.
    """
    channel = (FIRST + tl.arange(0, WIDTH))[None, :]
    if sums is not None:
        ptrs = sums[:, None] + channel
        tile += tl.load(ptrs, mask=(mask & again)[:, None], other=0.0)
        tl.store(ptrs, tile, mask=(mask & (last == 0))[:, None])
        mask = mask & last
    tl.store(rows[:, None] + channel, tile.to(rows.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _store_padded(row, tile, padded, cut, again, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Stores the sum of the ``padded`` keys' rows of ``tile``, added to what is there if ``again``; zeros unless ``cut``."""
    ptrs = row + FIRST + tl.arange(0, WIDTH)
    if cut:
        total = tl.sum(tl.where(padded[:, None], tile, 0.0), axis=0)
        tl.store(ptrs, total + tl.load(ptrs, mask=(tl.arange(0, WIDTH) >= 0) & again, other=0.0))
    else:
        tl.store(ptrs, tl.zeros([WIDTH], dtype=tl.float32))


@triton.jit
def _image_attention_backward_window(
    qkv_ptr,  # [B, Hi, Wi, 3, H, D]
    pad_ptr,  # [3, H, D] or None
    table_h_ptr,  # [2h − 1, D]
    table_w_ptr,  # [2w − 1, D]
    out_ptr,  # [B, Hi, Wi, H, D]
    dout_ptr,  # [B, Hi, Wi, H, D]
    lse_ptr,  # [B, H, Hi·Wi]
    dqkv_ptr,  # [B, Hi, Wi, 3, H, D]
    dkv_ptr,  # [B · windows · H, 2, h · KEY_COLUMNS, D] float32, or None where one round takes all queries
    dtables_ptr,  # [B · windows · H, 2, TABLE, D] or None
    dpad_ptr,  # [B · windows · steps, 2, H, D] or None
    heads,
    height,
    width,
    window_h,
    window_w,
    windows,
    windows_across,
    stride_batch,
    stride_y,
    stride_x,
    scale,
    unscale,  # 1 / scale
    factor,  # scale · log2(e): arguments take no registers
    PAD: tl.constexpr,
    EVEN: tl.constexpr,  # the places are the window's own, no more
    EXACT: tl.constexpr,  # the scale is a power of two
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,
    TABLE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    KEY_ROWS: tl.constexpr = BLOCK_N // KEY_COLUMNS
    NARROW: tl.constexpr = TAIL if TAIL > 0 else 16
    MASKED: tl.constexpr = PAD == "zeros" or not EVEN
    program = tl.program_id(0)
    head = program % heads
    window = (program // heads) % windows
    batch = (program // heads // windows).to(tl.int64)
    top, left, rows, columns = window_corner(window, windows_across, window_h, window_w, height, width)
    queries = rows * columns
    channels = heads * DIM
    corner = batch * height * width + top.to(tl.int64) * width + left
    # At the window's first token; from here on 32-bit offsets, which ``serves`` sees to.
    qkv_ptr += batch * stride_batch + top.to(tl.int64) * stride_y + left.to(tl.int64) * stride_x + head * DIM
    out_ptr += corner * channels + head * DIM
    dout_ptr += corner * channels + head * DIM
    dqkv_ptr += corner * 3 * channels + head * DIM
    lse_ptr += (batch * (heads - 1) + head) * height * width + corner

    # Addresses kept across the loops would take the registers of the tiles.
    for first in tl.range(0, queries, BLOCK_M, disable_licm=True):
        index = first + tl.arange(0, BLOCK_M)
        inside = index < queries
        query_row, query_column = _place_of(index, columns)
        token = query_row * width + query_column
        q, q_tail = _load(qkv_ptr + query_row * stride_y + query_column * stride_x, inside, DIM, MAIN, TAIL, True)
        dout, dout_tail = _load(dout_ptr + token * channels, inside, DIM, MAIN, TAIL, True)
        out, out_tail = _load(out_ptr + token * channels, inside, DIM, MAIN, TAIL, True)
        delta = row_products(out, out_tail, dout, dout_tail, TAIL)
        # Queries beyond the end have lse = +inf and so weight 0.
        lse = tl.load(lse_ptr + token, mask=inside, other=float("inf"))
        # fmt: off
        rel_h = _positions(q, q_tail, table_h_ptr, query_row, window_h, DIM, MAIN, TAIL, SIDE, TABLE, INPUT_PRECISION)
        rel_w = _positions(q, q_tail, table_w_ptr, query_column, window_w, DIM, MAIN, TAIL, SIDE, TABLE, INPUT_PRECISION)
        # fmt: on
        rel = tl.join(rel_h, rel_w).reshape(BLOCK_M, 2 * SIDE)
        dq = tl.zeros([BLOCK_M, MAIN], dtype=tl.float32)
        dq_tail = tl.zeros([BLOCK_M, NARROW], dtype=tl.float32)
        drel = tl.zeros([BLOCK_M, 2 * SIDE], dtype=tl.float32)

        steps = 0
        tl.assume(window_h > 0)
        for key_row in tl.range(0, window_h, KEY_ROWS, disable_licm=True):
            lane = tl.arange(0, BLOCK_N)
            row, column = key_row + lane // KEY_COLUMNS, lane % KEY_COLUMNS
            exists = (row < window_h) & (column < window_w)
            real = (row < rows) & (column < columns)
            k_rows = qkv_ptr + channels + row * stride_y + column * stride_x
            if pad_ptr is not None:
                k_rows = tl.where(real, k_rows, pad_ptr + channels + head * DIM)
            loaded = real if PAD == "zeros" else exists
            k, k_tail = _load(k_rows, loaded, DIM, MAIN, TAIL, MASKED)
            v, v_tail = _load(k_rows + channels, loaded, DIM, MAIN, TAIL, MASKED)
            slots = _slots(row, column, window_h, window_w, unscale if EXACT else 1.0, SIDE, k.dtype)
            scores = tl.dot(rel, tl.trans(slots), input_precision=INPUT_PRECISION)
            if not EXACT:
                scores *= unscale
            scores = _products(q, q_tail, k, k_tail, scores, TAIL, INPUT_PRECISION)
            weights = tl.exp2(scores * factor - lse[:, None])
            # dV before dout·Vᵀ: the weights are rounded, and their registers free, before the next product takes some.
            rounded = tl.trans(weights.to(dout.dtype))
            dv = tl.dot(rounded, dout, input_precision=INPUT_PRECISION)
            dv_tail = dv
            if TAIL > 0:
                dv_tail = tl.dot(rounded, dout_tail, input_precision=INPUT_PRECISION)
            start = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            dweights = _products(dout, dout_tail, v, v_tail, start, TAIL, INPUT_PRECISION)
            dscores = (weights * (dweights - delta[:, None])).to(q.dtype)
            dk = tl.dot(tl.trans(dscores), q, input_precision=INPUT_PRECISION) * scale
            dk_tail = dk
            if TAIL > 0:
                dk_tail = tl.dot(tl.trans(dscores), q_tail, input_precision=INPUT_PRECISION) * scale
            dq = tl.dot(dscores, k, dq, input_precision=INPUT_PRECISION)
            if TAIL > 0:
                dq_tail = tl.dot(dscores, k_tail, dq_tail, input_precision=INPUT_PRECISION)
            drel = tl.dot(dscores, slots, drel, input_precision=INPUT_PRECISION)
            steps += 1
            dk_rows = dqkv_ptr + (row * width + column) * 3 * channels + channels
            dk_sums = dkv_ptr
            dv_sums = dkv_ptr
            if dkv_ptr is not None:
                places = window_h * KEY_COLUMNS
                dk_sums = dkv_ptr + program.to(tl.int64) * 2 * places * DIM + (key_row * KEY_COLUMNS + lane) * DIM
                dv_sums = dk_sums + places * DIM
            last = first + BLOCK_M >= queries
            _add_round(dk_rows, dk_sums, dk, real, first > 0, last, 0, MAIN)
            _add_round(dk_rows + channels, dv_sums, dv, real, first > 0, last, 0, MAIN)
            part = (batch * windows + window) * tl.cdiv(window_h, KEY_ROWS) + key_row // KEY_ROWS
            pad_row = dpad_ptr
            padded = exists & (real == 0)
            cut = (rows < window_h) | (columns < window_w)
            if dpad_ptr is not None:
                pad_row = dpad_ptr + part * 2 * channels + head * DIM
                _store_padded(pad_row, dk, padded, cut, first > 0, 0, MAIN)
                _store_padded(pad_row + channels, dv, padded, cut, first > 0, 0, MAIN)
            if TAIL > 0:
                _add_round(dk_rows, dk_sums, dk_tail, real, first > 0, last, MAIN, TAIL)
                _add_round(dk_rows + channels, dv_sums, dv_tail, real, first > 0, last, MAIN, TAIL)
                if dpad_ptr is not None:
                    _store_padded(pad_row, dk_tail, padded, cut, first > 0, MAIN, TAIL)
                    _store_padded(pad_row + channels, dv_tail, padded, cut, first > 0, MAIN, TAIL)

        # Zero, but not to the compiler: addresses are made again instead of being kept across the loop.
        none = steps >> 16
        index = first + none + tl.arange(0, BLOCK_M)
        inside = index < queries
        query_row, query_column = _place_of(index, columns)
        if EXACT:
            drel *= scale  # E was in units of 1 / scale
        drel_h, drel_w = tl.split(drel.reshape(BLOCK_M, SIDE, 2))
        dproducts_h = _dproducts(drel_h, query_row, window_h, TABLE, q.dtype)
        dproducts_w = _dproducts(drel_w, query_column, window_w, TABLE, q.dtype)
        # Lines of the two tables in turns, as slots are.
        dproducts = tl.join(dproducts_h, dproducts_w).reshape(BLOCK_M, 2 * TABLE)
        line = none + tl.arange(0, 2 * TABLE)
        is_row = line % 2 == 0
        there = line // 2 < 2 * tl.where(is_row, window_h, window_w) - 1
        table_rows = tl.where(is_row, table_h_ptr, table_w_ptr) + line // 2 * DIM
        table, table_tail = _load(table_rows, there, DIM, MAIN, TAIL, True)
        dq_rows = dqkv_ptr + (query_row * width + query_column) * 3 * channels
        if TAIL > 0:
            dq_tail = tl.dot(dproducts, table_tail, dq_tail * scale, input_precision=INPUT_PRECISION)
            store_rows(dq_rows, dq_tail, inside, MAIN, TAIL, DIM)
        store_rows(dq_rows, tl.dot(dproducts, table, dq * scale, input_precision=INPUT_PRECISION), inside, 0, MAIN, DIM)
        if dtables_ptr is not None:
            dtable_rows = dtables_ptr + (program + none).to(tl.int64) * 2 * TABLE * DIM + (line % 2 * TABLE + line // 2) * DIM
            dtable = tl.dot(tl.trans(dproducts), q, input_precision=INPUT_PRECISION)
            _store_sums(dtable_rows, dtable, there, first > 0, 0, MAIN)
            if TAIL > 0:
                dtable_tail = tl.dot(tl.trans(dproducts), q_tail, input_precision=INPUT_PRECISION)
                _store_sums(dtable_rows, dtable_tail, there, first > 0, MAIN, TAIL)
        tl.debug_barrier()  # what one round stored, threads of the next one read


def serves(qkv: torch.Tensor, heads: int, window: tuple[int, int], scale: float) -> bool:
    """16 bits, a head dim of at most MAX_DIM without padding, a scale within SCALES, and a window whose tokens are 32-bit offsets
    apart."""
    if not row_for("image_attention_backward_query", qkv, heads, window)[0].get("ONE_PASS"):
        return False
    _, _, width, channels = qkv.shape
    dim = channels // (3 * heads)
    apart = window[0] * max(qkv.stride(1), width * channels) + window[1] * max(qkv.stride(2), channels) + channels
    filled = dim == sum(split_head_dim(dim, qkv.element_size())) <= MAX_DIM
    return filled and qkv.element_size() == 2 and max(window) <= SIDE and SCALES[0] <= scale <= SCALES[1] and apart < 2**31


def _steps(window: tuple[int, int], block: int) -> tuple[int, int]:
    """(KEY_COLUMNS, how many steps a window's rows take)."""
    columns = max(block // SIDE, triton.next_power_of_2(window[1]))
    return columns, triton.cdiv(window[0], block // columns)


def partial_sums(qkv: torch.Tensor, heads: int, window: tuple[int, int]) -> tuple[int, int, int]:
    """The first dimensions of dtables and dpad, and the rows of a program in dkv: 0 where it is to be None."""
    row = config("image_attention_backward_window", target_of(qkv))
    down, across = windows_of(qkv, window)
    columns, steps = _steps(window, row["BLOCK_N"])
    queries = min(window[0], qkv.shape[1]) * min(window[1], qkv.shape[2])
    places = 2 * window[0] * columns if queries > row["BLOCK_M"] else 0
    return qkv.shape[0] * down * across * heads, qkv.shape[0] * down * across * steps, places


@planned
def launch_image_attention_backward_window(
    qkv: torch.Tensor,
    pad: torch.Tensor | None,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
    heads: int,
    window: tuple[int, int],
    scale: float,
    out: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    dqkv: torch.Tensor,
    dkv: torch.Tensor | None,
    dtables: torch.Tensor | None,
    dpad: torch.Tensor | None,
) -> None:
    """Fills dqkv and, unless they are None, dtables and dpad; their sizes and that of dkv, scratch: ``partial_sums``."""
    row = config("image_attention_backward_window", target_of(qkv))
    down, across = windows_of(qkv, window)
    columns, steps = _steps(window, row["BLOCK_N"])
    launch(
        "image_attention_backward_window",
        _image_attention_backward_window,
        (qkv.shape[0] * down * across * heads,),
        qkv,
        row,
        table_h_ptr=table_h,
        table_w_ptr=table_w,
        out_ptr=out,
        dout_ptr=dout,
        lse_ptr=lse,
        dqkv_ptr=dqkv,
        dkv_ptr=dkv,
        dtables_ptr=dtables,
        dpad_ptr=dpad,
        windows=down * across,
        windows_across=across,
        scale=scale,
        unscale=1.0 / scale,
        factor=scale * math.log2(math.e),
        EVEN=window[1] == columns and steps * row["BLOCK_N"] == window[0] * columns,
        EXACT=math.frexp(scale)[0] == 0.5,
        KEY_COLUMNS=columns,
        SIDE=SIDE,
        TABLE=TABLE,
        **window_arguments(qkv, heads, window, pad),
    )
