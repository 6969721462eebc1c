"""Layer norm with one mean and variance an image, over all its tokens and channels, forward and backward.

    y  = (x − mean) · rstd · weight + bias                  mean, var over (tokens, channels) of the image
    dx = rstd · (g − mean(g) − x̂ · mean(g · x̂))             g = dy · weight,  x̂ = (x − mean) · rstd

Shapes: x, y, dy, dx [images, tokens, channels], last stride 1; weight, bias [channels]; mean, rstd [images] float32, saved
for the backward pass. An image is cut into strips of tokens: one pass leaves each strip's statistics, a second combines
them (Chan, Golub & LeVeque 1979) and writes, so each tensor is read twice and written once. Weight gradients leave as
partial sums [images · strips, channels]. Reference: ``fastvit.reference.layer_norm(statistics="image")``.
"""

import torch
import triton
import triton.language as tl

from ._launch import launch, target_of
from ._plans import planned
from ._tuning import config


@triton.jit
def _image_statistics(
    x_ptr,  # [images, tokens, channels]
    strip_mean_ptr,  # [images, strips]
    strip_squares_ptr,  # [images, strips]
    tokens,
    channels,
    strips,
    tokens_per_strip,
    stride_x_image,
    stride_x_token,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image, strip = program // strips, program % strips
    first = strip * tokens_per_strip
    last = tl.minimum(first + tokens_per_strip, tokens)
    mean = 0.0
    squares = 0.0
    seen = 0.0
    for start in range(first, last, BLOCK_ROWS):
        token = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        rows = tl.minimum(BLOCK_ROWS, last - start)
        for left in range(0, channels, BLOCK_C):
            column = left + tl.arange(0, BLOCK_C)
            mask = (token < last)[:, None] & (column < channels)[None, :]
            offset = image * stride_x_image + token[:, None] * stride_x_token + column[None, :]
            x = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
            count = (rows * tl.minimum(BLOCK_C, channels - left)).to(tl.float32)
            block_mean = tl.sum(tl.sum(x, axis=1), axis=0) / count
            centred = tl.where(mask, x - block_mean, 0.0)
            delta = block_mean - mean
            share = count / (seen + count)
            mean += delta * share
            squares += tl.sum(tl.sum(centred * centred, axis=1), axis=0) + delta * delta * seen * share
            seen += count
    tl.store(strip_mean_ptr + program, mean)
    tl.store(strip_squares_ptr + program, squares)


@triton.jit
def _image_normalize(
    x_ptr,  # [images, tokens, channels]
    weight_ptr,  # [channels] or None
    bias_ptr,  # [channels] or None
    strip_mean_ptr,  # [images, strips]
    strip_squares_ptr,  # [images, strips]
    y_ptr,  # [images, tokens, channels]
    mean_ptr,  # [images]
    rstd_ptr,  # [images]
    tokens,
    channels,
    strips,
    tokens_per_strip,
    stride_x_image,
    stride_x_token,
    eps,
    STRIPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image, strip = program // strips, program % strips
    index = tl.arange(0, STRIPS)
    present = index < strips
    strip_mean = tl.load(strip_mean_ptr + image * strips + index, mask=present, other=0.0)
    strip_squares = tl.load(strip_squares_ptr + image * strips + index, mask=present, other=0.0)
    count = tl.maximum(tl.minimum(tokens_per_strip, tokens - index * tokens_per_strip), 0).to(tl.float32) * channels
    count = tl.where(present, count, 0.0)
    size = tl.sum(count, axis=0)
    mean = tl.sum(strip_mean * count, axis=0) / size
    spread = strip_mean - mean
    squares = tl.sum(strip_squares + count * spread * spread, axis=0)
    rstd = 1.0 / tl.sqrt_rn(squares / size + eps)
    first = strip * tokens_per_strip
    last = tl.minimum(first + tokens_per_strip, tokens)
    for start in range(first, last, BLOCK_ROWS):
        token = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        for left in range(0, channels, BLOCK_C):
            column = left + tl.arange(0, BLOCK_C)
            inside = column < channels
            mask = (token < last)[:, None] & inside[None, :]
            offset = image * stride_x_image + token[:, None] * stride_x_token + column[None, :]
            y = (tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
            if weight_ptr is not None:
                y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            if bias_ptr is not None:
                y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            out = (image * tokens + token[:, None]) * channels + column[None, :]
            tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)
    if strip == 0:
        tl.store(mean_ptr + image, mean)
        tl.store(rstd_ptr + image, rstd)


@triton.jit
def _image_backward_sums(
    dy_ptr,  # [images, tokens, channels]
    x_ptr,  # [images, tokens, channels]
    weight_ptr,  # [channels] or None
    mean_ptr,  # [images]
    rstd_ptr,  # [images]
    strip_g_ptr,  # [images, strips]: Σ g
    strip_projection_ptr,  # [images, strips]: Σ g · x̂
    dweight_ptr,  # [images · strips, channels] or None
    dbias_ptr,  # [images · strips, channels] or None
    tokens,
    channels,
    strips,
    tokens_per_strip,
    stride_dy_image,
    stride_dy_token,
    stride_x_image,
    stride_x_token,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image, strip = program // strips, program % strips
    mean = tl.load(mean_ptr + image)
    rstd = tl.load(rstd_ptr + image)
    first = strip * tokens_per_strip
    last = tl.minimum(first + tokens_per_strip, tokens)
    g_total = 0.0
    projection = 0.0
    for left in range(0, channels, BLOCK_C):
        column = left + tl.arange(0, BLOCK_C)
        inside = column < channels
        dweight = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
        dbias = tl.zeros([BLOCK_ROWS, BLOCK_C], dtype=tl.float32)
        for start in range(first, last, BLOCK_ROWS):
            token = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
            mask = (token < last)[:, None] & inside[None, :]
            x_offset = image * stride_x_image + token[:, None] * stride_x_token + column[None, :]
            dy_offset = image * stride_dy_image + token[:, None] * stride_dy_token + column[None, :]
            normalized = (tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
            dy = tl.load(dy_ptr + dy_offset, mask=mask, other=0.0).to(tl.float32)
            dweight += dy * normalized
            dbias += dy
        dweight_sum = tl.sum(dweight, axis=0)
        dbias_sum = tl.sum(dbias, axis=0)
        if dweight_ptr is not None:
            tl.store(dweight_ptr + program * channels + column, dweight_sum, mask=inside)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + program * channels + column, dbias_sum, mask=inside)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
            dweight_sum *= weight
            dbias_sum *= weight
        projection += tl.sum(dweight_sum, axis=0)
        g_total += tl.sum(dbias_sum, axis=0)
    tl.store(strip_g_ptr + program, g_total)
    tl.store(strip_projection_ptr + program, projection)


@triton.jit
def _image_backward_input(
    dy_ptr,  # [images, tokens, channels]
    x_ptr,  # [images, tokens, channels]
    weight_ptr,  # [channels] or None
    mean_ptr,  # [images]
    rstd_ptr,  # [images]
    strip_g_ptr,  # [images, strips]
    strip_projection_ptr,  # [images, strips]
    dx_ptr,  # [images, tokens, channels]
    tokens,
    channels,
    strips,
    tokens_per_strip,
    stride_dy_image,
    stride_dy_token,
    stride_x_image,
    stride_x_token,
    STRIPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image, strip = program // strips, program % strips
    index = tl.arange(0, STRIPS)
    present = index < strips
    size = 1.0 * tokens * channels
    g_mean = tl.sum(tl.load(strip_g_ptr + image * strips + index, mask=present, other=0.0), axis=0) / size
    projection = tl.sum(tl.load(strip_projection_ptr + image * strips + index, mask=present, other=0.0), axis=0) / size
    mean = tl.load(mean_ptr + image)
    rstd = tl.load(rstd_ptr + image)
    first = strip * tokens_per_strip
    last = tl.minimum(first + tokens_per_strip, tokens)
    for start in range(first, last, BLOCK_ROWS):
        token = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        for left in range(0, channels, BLOCK_C):
            column = left + tl.arange(0, BLOCK_C)
            inside = column < channels
            mask = (token < last)[:, None] & inside[None, :]
            x_offset = image * stride_x_image + token[:, None] * stride_x_token + column[None, :]
            dy_offset = image * stride_dy_image + token[:, None] * stride_dy_token + column[None, :]
            normalized = (tl.load(x_ptr + x_offset, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
            g = tl.load(dy_ptr + dy_offset, mask=mask, other=0.0).to(tl.float32)
            if weight_ptr is not None:
                g *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            dx = rstd * (g - g_mean - normalized * projection)
            out = (image * tokens + token[:, None]) * channels + column[None, :]
            tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def image_strips(x: torch.Tensor) -> int:
    """How many strips of tokens an image of x [images, tokens, channels] is cut into."""
    row = config("layer_norm_image", target_of(x))
    return max(1, min(triton.cdiv(x.shape[1], row["BLOCK_ROWS"]), row["MAX_STRIPS"]))


def _shape(x: torch.Tensor, strips: int) -> dict[str, int]:
    tokens_per_strip = triton.cdiv(x.shape[1], strips)
    return {"tokens": x.shape[1], "channels": x.shape[2], "strips": strips, "tokens_per_strip": tokens_per_strip}


@planned
def launch_image_forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    strip_mean: torch.Tensor,
    strip_squares: torch.Tensor,
) -> None:
    """Fills y, mean, rstd; strip_mean and strip_squares [images, ``image_strips(x)``] are scratch."""
    row = config("layer_norm_image", target_of(x))
    strips = strip_mean.shape[1]
    grid = (x.shape[0] * strips,)
    shared = _shape(x, strips) | {"stride_x_image": x.stride(0), "stride_x_token": x.stride(1)}
    scratch = {"strip_mean_ptr": strip_mean, "strip_squares_ptr": strip_squares}
    launch("layer_norm_image", _image_statistics, grid, x, row, x_ptr=x, **scratch, **shared)
    launch(
        "layer_norm_image",
        _image_normalize,
        grid,
        x,
        row,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        y_ptr=y,
        mean_ptr=mean,
        rstd_ptr=rstd,
        eps=eps,
        STRIPS=triton.next_power_of_2(strips),
        **scratch,
        **shared,
    )


@planned
def launch_image_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dx: torch.Tensor,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    strip_g: torch.Tensor,
    strip_projection: torch.Tensor,
) -> None:
    """Fills dx and the partial sums dweight, dbias [images · strips, channels]; the strip tensors are scratch."""
    row = config("layer_norm_image", target_of(x))
    strips = strip_g.shape[1]
    grid = (x.shape[0] * strips,)
    shared = _shape(x, strips) | {
        "dy_ptr": dy,
        "x_ptr": x,
        "weight_ptr": weight,
        "mean_ptr": mean,
        "rstd_ptr": rstd,
        "strip_g_ptr": strip_g,
        "strip_projection_ptr": strip_projection,
        "stride_dy_image": dy.stride(0),
        "stride_dy_token": dy.stride(1),
        "stride_x_image": x.stride(0),
        "stride_x_token": x.stride(1),
    }
    launch("layer_norm_image", _image_backward_sums, grid, x, row, dweight_ptr=dweight, dbias_ptr=dbias, **shared)
    launch(
        "layer_norm_image",
        _image_backward_input,
        grid,
        x,
        row,
        dx_ptr=dx,
        STRIPS=triton.next_power_of_2(strips),
        **shared,
    )
