"""Image attention over the whole image, forward, in so few registers that two programs share a multiprocessor.

    s[n, m] = q_n·k_m + (rel_h[n, row of m] + rel_w[n, column of m]) / scale        out_n = Σ_m softmax(scale·s)[n, m]·v_m

A step's keys are one row of the image. rel_w is the same at every step: it is what the products start from, and it waits as
pairs of 16-bit numbers, half the registers that scores take. rel_h is one number a query and step, by which the maximum is
raised. A query's sum of weights is kept in PARTS, so that threads need not add up at every step. Shapes as in
``image_attention_forward``, rel_h and rel_w in half precision. Limits: what ``serves`` says.
Reference: ``fastvit.reference.image_attention``.
"""

import math

import torch
import triton
import triton.language as tl

from ._attention import split_head_dim
from ._launch import input_precision, launch, target_of
from ._tuning import config
from .image_attention import load_rows, store_rows


@triton.jit
def _pack(tile, DTYPE: tl.constexpr):
    """[rows, columns] float32 that are numbers of the 16-bit DTYPE → two in an int32: [rows, columns / 2]."""
    even, odd = tl.split(tile.to(DTYPE).to(tl.int16, bitcast=True).reshape(tile.shape[0], tile.shape[1] // 2, 2))
    return (even.to(tl.int32) & 0xFFFF) | (odd.to(tl.int32) << 16)


@triton.jit
def _unpack(pairs, zero, DTYPE: tl.constexpr):
    """What ``_pack`` was given. ``zero`` is 0, which the compiler must not know: it would unpack once, before the loop."""
    if tl.bfloat16 == DTYPE:
        even = (pairs << (16 + zero)).to(tl.float32, bitcast=True)
        odd = (pairs & (zero - 0x10000)).to(tl.float32, bitcast=True)
    else:
        pairs += zero
        even = pairs.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
        odd = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return tl.join(even, odd).reshape(pairs.shape[0], 2 * pairs.shape[1])


@triton.jit
def _image_attention_global(
    qkv_ptr,  # [B, Hi, Wi, 3, H, D]
    rel_h_ptr,  # [B, H, Hi·Wi, Hi]
    rel_w_ptr,  # [B, H, Hi·Wi, Wi]
    out_ptr,  # [B, Hi, Wi, H, D]
    lse_ptr,  # [B, H, Hi·Wi] or None
    heads,
    height,
    tiles,
    stride_batch,
    stride_y,
    stride_x,
    factor,  # scale, for exponents of 2
    unscale,  # 1 / scale
    EXACT_UNITS: tl.constexpr,  # rel_w / scale is a number of rel_w's dtype
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # the image's width
    PARTS: tl.constexpr,  # of the sum of a row's weights
    INPUT_PRECISION: tl.constexpr,
):
    first = (tl.program_id(0) % tiles) * BLOCK_M
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // heads, batch_head % heads
    tokens = height * BLOCK_N
    channels = heads * DIM
    qkv_ptr += batch * stride_batch + head * DIM
    out_ptr += (batch * tokens + first) * channels + head * DIM
    rel_h_ptr += (batch_head * tokens + first) * height
    rel_w_ptr += (batch_head * tokens + first) * BLOCK_N
    lane = tl.arange(0, BLOCK_M)
    inside = lane < tokens - first
    row = tl.minimum(lane, tokens - first - 1)  # queries beyond the last are the last again, and never stored

    q_rows = qkv_ptr + (first + row).to(tl.int64) * stride_x
    q = load_rows(q_rows, inside, 0, MAIN, DIM, False)
    q_tail = q
    if TAIL > 0:
        q_tail = load_rows(q_rows, inside, MAIN, TAIL, DIM, False)
    acc = tl.zeros([BLOCK_M, MAIN], dtype=tl.float32)
    acc_tail = tl.zeros([BLOCK_M, TAIL if TAIL > 0 else 16], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    sums = tl.zeros([BLOCK_M, PARTS], dtype=tl.float32)

    # A product with ones on the diagonal changes nothing but where the numbers lie: as the scores do.
    place = tl.arange(0, BLOCK_N)
    rel_w = tl.load(rel_w_ptr + row[:, None] * BLOCK_N + place[None, :])
    DTYPE: tl.constexpr = rel_w.dtype
    if tl.float16 == DTYPE:  # which −inf times the zeros beside the diagonal would make NaN of a whole row
        rel_w = tl.maximum(rel_w, tl.full([], -65504.0, DTYPE), propagate_nan=tl.PropagateNan.ALL)
    rel_w = tl.dot(rel_w, (place[:, None] == place[None, :]).to(DTYPE), input_precision=INPUT_PRECISION)
    pairs = _pack(rel_w * unscale if EXACT_UNITS else rel_w, DTYPE)

    rel_h_offset = row * height
    key = place * stride_x
    tl.assume(height > 0)  # a loop that might not run would keep its products from overlapping
    for key_row in range(0, height):
        k_rows = qkv_ptr + tl.cast(key_row, tl.int64) * stride_y + channels + key
        start = _unpack(pairs, key_row >> 30, DTYPE)
        if not EXACT_UNITS:
            start *= unscale
        k = load_rows(k_rows, inside, 0, MAIN, DIM, False)
        scores = tl.dot(q, tl.trans(k), start, input_precision=INPUT_PRECISION)
        if TAIL > 0:
            k_tail = load_rows(k_rows, inside, MAIN, TAIL, DIM, False)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=INPUT_PRECISION)
        rel_h = tl.load(rel_h_ptr + key_row + rel_h_offset).to(tl.float32) * 1.4426950408889634
        high = tl.maximum(peak, tl.max(scores, axis=1) * factor + rel_h)
        weights = tl.exp2(scores * factor - (high - rel_h)[:, None])
        shrink = tl.exp2(peak - high)[:, None]
        peak = high
        sums = sums * shrink + tl.sum(weights.reshape(BLOCK_M, BLOCK_N // PARTS, PARTS), axis=1)
        v = load_rows(k_rows + channels, inside, 0, MAIN, DIM, False)
        rounded = weights.to(v.dtype)
        acc = tl.dot(rounded, v, acc * shrink, input_precision=INPUT_PRECISION)
        if TAIL > 0:
            v_tail = load_rows(k_rows + channels, inside, MAIN, TAIL, DIM, False)
            acc_tail = tl.dot(rounded, v_tail, acc_tail * shrink, input_precision=INPUT_PRECISION)

    total = tl.sum(sums, axis=1)
    if lse_ptr is not None:
        tl.store(lse_ptr + batch_head * tokens + first + lane, peak + tl.log2(total), mask=inside)
    inverse = (1.0 / total)[:, None]
    out_rows = out_ptr + lane * channels
    store_rows(out_rows, acc * inverse, inside, 0, MAIN, DIM)
    if TAIL > 0:
        store_rows(out_rows, acc_tail * inverse, inside, MAIN, TAIL, DIM)


def serves(qkv: torch.Tensor, heads: int, window: tuple[int, int], scale: float) -> bool:
    """Half precision, a window that is the image and rows of it BLOCK_N long, a head dim without padding (in float16 up to 64,
    beyond which it would spill), a scale to divide by, and tokens of a tile that are 32-bit offsets apart."""
    _, height, width, channels = qkv.shape
    dim = channels // (3 * heads)
    row = config("image_attention_global", target_of(qkv), head_dim=dim)
    apart = max(row["BLOCK_M"], row["BLOCK_N"]) * max(qkv.stride(2), channels, height)
    whole = window == (height, width) and width == row["BLOCK_N"] and qkv.stride(1) == width * qkv.stride(2)
    fits = qkv.element_size() == 2 and (qkv.dtype == torch.bfloat16 or dim <= 64) and dim == sum(split_head_dim(dim))
    return whole and fits and scale > 1e-6 and apart < 2**31


def launch_global(
    qkv: torch.Tensor,
    rel_h: torch.Tensor,
    rel_w: torch.Tensor,
    heads: int,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Fills out, and lse unless None."""
    batch, height, width, channels = qkv.shape
    dim = channels // (3 * heads)
    row = config("image_attention_global", target_of(qkv), head_dim=dim)
    main, tail = split_head_dim(dim)
    tiles = triton.cdiv(height * width, row["BLOCK_M"])
    launch(
        "image_attention_global",
        _image_attention_global,
        (batch * heads * tiles,),
        qkv,
        row,
        qkv_ptr=qkv,
        rel_h_ptr=rel_h,
        rel_w_ptr=rel_w,
        out_ptr=out,
        lse_ptr=lse,
        heads=heads,
        height=height,
        tiles=tiles,
        stride_batch=qkv.stride(0),
        stride_y=qkv.stride(1),
        stride_x=qkv.stride(2),
        factor=scale * 1.4426950408889634,
        unscale=1 / scale,
        EXACT_UNITS=qkv.dtype == torch.bfloat16 and math.frexp(scale)[0] == 0.5,
        DIM=dim,
        MAIN=main,
        TAIL=tail,
        INPUT_PRECISION=input_precision(qkv.dtype),
    )
