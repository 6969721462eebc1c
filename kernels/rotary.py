"""Norm of queries and keys, then rotary positions (Dehghani et al. 2023; Su et al. 2021).

    x̂ = (x − mean) · rstd, rstd = 1/sqrt(var + eps)          norm "layer", over the head dim
    x̂ = x · rstd, rstd = 1/sqrt(mean(x²) + eps)              norm "rms"
    y = x̂ · weight + bias
    (a, b) → (a·cos_a − b·sin_a, b·cos_b + a·sin_b)           every pair (a, b) of y, but for the first tokens' − tables' rows

Shapes: query [B, H, N, D], key [B, Hk, N, D], last stride 1; cos, sin [1 or B, T, D], T ≤ N, last stride 1; weights and
biases [D]; results laid out [B, N, H, D]. A pair is (i, i + D/2), or (2i, 2i+1) interleaved. A row is held as two tiles, the
first and the second members of its pairs, so that a rotation needs no exchange between lanes; only ``_load_pair`` and
``_store_pair`` know which columns these are. Everything is float32 between one read and one write; a program keeps its
tokens' cos and sin in registers for GROUP heads. Queries and keys share a launch.

Backward is ``rotary_backward``, and without a norm this kernel with the rotation transposed.
Reference: ``fastvit.reference.qk_norm_rope``. Limits: D ≤ 256, even where it is rotated.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch, target_of
from ._plans import planned
from ._tuning import config


@triton.jit
def _load_pair(ptr, row, valid, stride_row, other, DIM: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Two float32 tiles [rows, BLOCK]: the first and the second members of the pairs; ``other`` where there is nothing."""
    ptrs = ptr + row[:, None] * stride_row
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)
        x = tl.load(ptrs + column[None, :], mask=valid[:, None] & (column < DIM)[None, :], other=other)
        first, second = tl.split(tl.reshape(x, [x.shape[0], BLOCK, 2]))
    else:
        HALF: tl.constexpr = (DIM + 1) // 2
        column = tl.arange(0, BLOCK)
        first = tl.load(ptrs + column[None, :], mask=valid[:, None] & (column < HALF)[None, :], other=other)
        second = tl.load(ptrs + HALF + column[None, :], mask=valid[:, None] & (column < DIM - HALF)[None, :], other=other)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pair(ptr, first, second, row, valid, stride_row, DIM: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    ptrs = ptr + row[:, None] * stride_row
    first, second = first.to(ptr.dtype.element_ty), second.to(ptr.dtype.element_ty)
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)
        x = tl.reshape(tl.join(first, second), [first.shape[0], 2 * BLOCK])
        tl.store(ptrs + column[None, :], x, mask=valid[:, None] & (column < DIM)[None, :])
    else:
        HALF: tl.constexpr = (DIM + 1) // 2
        column = tl.arange(0, BLOCK)
        tl.store(ptrs + column[None, :], first, mask=valid[:, None] & (column < HALF)[None, :])
        tl.store(ptrs + HALF + column[None, :], second, mask=valid[:, None] & (column < DIM - HALF)[None, :])


@triton.jit
def _load_parameter(ptr, DIM: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A weight or bias [D] as a pair of tiles [1, BLOCK]."""
    row = tl.arange(0, 1)
    return _load_pair(ptr, row, row == 0, 0, 0.0, DIM, BLOCK, INTERLEAVED)


@triton.jit
def _load_tables(
    cos_ptr,  # [1 or B, T, D]
    sin_ptr,  # [1 or B, T, D]
    batch,
    token,
    tokens,
    prefix,
    stride_cos_batch,
    stride_cos_row,
    stride_sin_batch,
    stride_sin_row,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The angles of the tokens, none (cos 1, sin 0) for the first ``prefix``: cos_a, cos_b, sin_a, sin_b."""
    row = token - prefix
    valid = (token >= prefix) & (token < tokens)
    cos_a, cos_b = _load_pair(cos_ptr + batch * stride_cos_batch, row, valid, stride_cos_row, 1.0, DIM, BLOCK, INTERLEAVED)
    sin_a, sin_b = _load_pair(sin_ptr + batch * stride_sin_batch, row, valid, stride_sin_row, 0.0, DIM, BLOCK, INTERLEAVED)
    return cos_a, cos_b, sin_a, sin_b


@triton.jit
def _normalize(a, b, valid, eps, DIM: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr):
    """(x̂ as a pair, rstd [rows, 1]); zeros beyond the rows."""
    if NORM == "layer":
        HALF: tl.constexpr = (DIM + 1) // 2
        lane = tl.arange(0, BLOCK)[None, :]
        mean = ((tl.sum(a, axis=1) + tl.sum(b, axis=1)) / DIM)[:, None]
        a = tl.where(lane < HALF, a - mean, 0.0)
        b = tl.where(lane < DIM - HALF, b - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(a * a + b * b, axis=1) / DIM + eps)
    rstd = tl.where(valid, rstd, 0.0)[:, None]
    return a * rstd, b * rstd, rstd


@triton.jit
def _forward_head(
    x_ptr,  # [N, D]: one head
    weight_ptr,  # [D] or None
    bias_ptr,  # [D] or None
    out_ptr,  # [N, D]: its place in the result
    stride_x_row,
    stride_out_row,
    token,
    tokens,
    angles,  # cos_a, cos_b, sin_a, sin_b; or None
    eps,
    NORM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    valid = token < tokens
    a, b = _load_pair(x_ptr, token, valid, stride_x_row, 0.0, DIM, BLOCK, INTERLEAVED)
    if NORM != "none":
        a, b, _ = _normalize(a, b, valid, eps, DIM, BLOCK, NORM)
        if weight_ptr is not None:
            weight_a, weight_b = _load_parameter(weight_ptr, DIM, BLOCK, INTERLEAVED)
            a, b = a * weight_a, b * weight_b
        if bias_ptr is not None:
            bias_a, bias_b = _load_parameter(bias_ptr, DIM, BLOCK, INTERLEAVED)
            a, b = a + bias_a, b + bias_b
    if angles is not None:
        cos_a, cos_b, sin_a, sin_b = angles
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    _store_pair(out_ptr, a, b, token, valid, stride_out_row, DIM, BLOCK, INTERLEAVED)


@triton.jit
def _qk_norm_rope(
    query_ptr,  # [B, H, N, D]
    key_ptr,  # [B, Hk, N, D]
    cos_ptr,  # [1 or B, T, D] or None
    sin_ptr,  # [1 or B, T, D] or None
    query_weight_ptr,  # [D] or None
    query_bias_ptr,  # [D] or None
    key_weight_ptr,  # [D] or None
    key_bias_ptr,  # [D] or None
    query_out_ptr,  # [B, N, H, D]
    key_out_ptr,  # [B, N, Hk, D]
    heads,
    key_heads,
    tokens,
    prefix,  # tokens before the first that is rotated
    stride_query_batch,
    stride_query_head,
    stride_query_row,
    stride_key_batch,
    stride_key_head,
    stride_key_row,
    stride_cos_batch,
    stride_cos_row,
    stride_sin_batch,
    stride_sin_row,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the other way round, which is the gradient of a rotation without a norm
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    groups = tl.cdiv(heads + key_heads, GROUP)
    blocks = tl.cdiv(tokens, BLOCK_ROWS)
    program = tl.program_id(0)
    group, place = program % groups, program // groups
    batch = (place // blocks).to(tl.int64)
    token = (place % blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    angles = None
    if cos_ptr is not None:
        strides = (stride_cos_batch, stride_cos_row, stride_sin_batch, stride_sin_row)
        tables = (cos_ptr, sin_ptr, batch, token, tokens, prefix)
        cos_a, cos_b, sin_a, sin_b = _load_tables(*tables, *strides, DIM, BLOCK, INTERLEAVED)
        angles = (cos_a, cos_b, -sin_b, -sin_a) if TRANSPOSED else (cos_a, cos_b, sin_a, sin_b)
    for number in range(group * GROUP, tl.minimum((group + 1) * GROUP, heads + key_heads)):
        if number < heads:
            head = tl.cast(number, tl.int64)
            query_head = query_ptr + batch * stride_query_batch + head * stride_query_head
            query_out_head = query_out_ptr + (batch * tokens * heads + head) * DIM
            query = (query_head, query_weight_ptr, query_bias_ptr, query_out_head, stride_query_row, heads * DIM)
            _forward_head(*query, token, tokens, angles, eps, NORM, DIM, BLOCK, INTERLEAVED)
        else:
            head = tl.cast(number - heads, tl.int64)
            key_head = key_ptr + batch * stride_key_batch + head * stride_key_head
            key_out_head = key_out_ptr + (batch * tokens * key_heads + head) * DIM
            key = (key_head, key_weight_ptr, key_bias_ptr, key_out_head, stride_key_row, key_heads * DIM)
            _forward_head(*key, token, tokens, angles, eps, NORM, DIM, BLOCK, INTERLEAVED)


def _strides(tensor: torch.Tensor | None, name: str) -> dict[str, int]:
    """The strides of a [B, H, N, D] tensor, or of a [1 or B, T, D] table, under the kernels' names."""
    dims = ("batch", "row") if tensor is None or tensor.dim() == 3 else ("batch", "head", "row")
    strides = [0, 0] if tensor is None else list(tensor.stride()[:-1])
    if tensor is not None and tensor.shape[0] == 1:
        strides[0] = 0  # one table for every image
    return {f"stride_{name}_{dim}": stride for dim, stride in zip(dims, strides, strict=True)}


def _shapes(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor | None) -> dict[str, int]:
    _, heads, tokens, dim = query.shape
    prefix = 0 if cos is None else tokens - cos.shape[1]
    block = max(8, triton.next_power_of_2(triton.cdiv(dim, 2)))
    return dict(heads=heads, key_heads=key.shape[1], tokens=tokens, prefix=prefix, DIM=dim, BLOCK=block)


@planned
def launch_qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
    norm: str | None,
    query_weight: torch.Tensor | None,
    query_bias: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    eps: float,
    transposed: bool,
    query_out: torch.Tensor,
    key_out: torch.Tensor,
) -> None:
    """Fills query_out [B, N, H, D] and key_out [B, N, Hk, D], both contiguous. ``transposed`` rotates the other way."""
    batch, heads, tokens, dim = query.shape
    row = config("qk_norm_rope", target_of(query), dim=dim, element_size=query.element_size())
    groups = triton.cdiv(heads + key.shape[1], row["GROUP"])
    tensors = dict(query=query, key=key, cos=cos, sin=sin, query_out=query_out, key_out=key_out)
    tensors |= dict(query_weight=query_weight, query_bias=query_bias, key_weight=key_weight, key_bias=key_bias)
    launch(
        "qk_norm_rope",
        _qk_norm_rope,
        (batch * triton.cdiv(tokens, row["BLOCK_ROWS"]) * groups,),
        query,
        row,
        **{f"{name}_ptr": tensor for name, tensor in tensors.items()},
        **_shapes(query, key, cos),
        **_strides(query, "query"),
        **_strides(key, "key"),
        **_strides(cos, "cos"),
        **_strides(sin, "sin"),
        eps=eps,
        NORM=norm or "none",
        INTERLEAVED=interleaved,
        TRANSPOSED=transposed,
    )
