"""Operators run on tensors without memory, with shapes that together reach every row of a target's tuning table.

The hot paths of ViT and SAM come first: where one launch of each row is compiled, it is theirs.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from fastvit.kernels._tuning import table
from torch import Tensor

from fastvit.ops import attention as attention_op
from fastvit.ops import glu as glu_op
from fastvit.ops import image_attention as image_attention_op
from fastvit.ops import layer_norm as layer_norm_op
from fastvit.ops import linear as linear_op
from fastvit.ops import linear_norm as linear_norm_op
from fastvit.ops import quantized as quantized_op
from fastvit.ops import rotary as rotary_op
from fastvit.ops import rotary_attention as rotary_attention_op
from fastvit.ops.sums import ColumnSums

HALF, SINGLE = torch.bfloat16, torch.float32


def _meta(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(
    dim: int,
    dtype: torch.dtype = HALF,
    extra: str = "plain",
    tokens: int = 577,
    queries: int | None = None,
    backward: bool = True,
    batch: int = 2,
) -> None:
    """q, k, v as a ViT hands them over, slices of one (B, N, 3, H, D) tensor; ``queries`` takes only so many of them."""
    query, key, value = _meta(batch, tokens, 3, 12, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    query = query if queries is None else query[:, :, :queries]
    mask = rel_h = rel_w = None
    if extra == "boolean mask":
        mask = _meta(2, 1, 1, tokens, dtype=torch.bool)
    if extra == "additive mask":
        mask = _meta(1, 12, query.shape[2], tokens, dtype=dtype)
    if extra == "rel":
        side = math.isqrt(tokens)
        rel_h, rel_w = (_meta(2, 12, tokens, side, dtype=dtype) for _ in range(2))
    arguments = (query, key, value, mask, rel_h, rel_w)
    causal = extra == "causal"
    out, lse = attention_op.attention_forward(*arguments, causal, dim**-0.5)
    if backward:
        wants_mask = extra == "additive mask"
        attention_op.attention_backward(out, *arguments, out, lse, causal, dim**-0.5, wants_mask)


def _image_attention(dim: int, dtype: torch.dtype = HALF, window: int = 0, grid: int = 64, bare: bool = False) -> None:
    """A square image's qkv, trained with all gradients; ``bare``: no tables, padding of zeros."""
    size = [window or grid] * 2
    qkv, out_of = _meta(1, grid, grid, 3 * 12 * dim, dtype=dtype), (12, size, dim**-0.5)
    table, pad = (None, None) if bare else (_meta(2 * size[0] - 1, dim, dtype=dtype), _meta(3 * 12 * dim, dtype=dtype))
    out, *saved = image_attention_op.image_attention_forward(qkv, table, table, pad, *out_of)
    image_attention_op.image_attention_backward(out, qkv, table, table, pad, out, *saved, *out_of, not bare, not bare)


def _layer_norm(channels: int, dtype: torch.dtype = HALF, statistics: str = "token") -> None:
    x, weight, bias = _meta(8, 197, channels, dtype=dtype), _meta(channels, dtype=SINGLE), _meta(channels, dtype=SINGLE)
    y, mean, rstd = layer_norm_op.layer_norm_forward(x, weight, bias, 1e-6, statistics)
    layer_norm_op.layer_norm_backward(y, x, weight, bias, mean, rstd, statistics)


def _add_layer_norm(channels: int, dtype: torch.dtype = HALF) -> None:
    x, parameter = _meta(8, 197, channels, dtype=dtype), _meta(channels, dtype=dtype)
    y, total, mean, rstd = layer_norm_op.add_layer_norm_forward(x, x, parameter, parameter, 1e-6, parameter)
    layer_norm_op.add_layer_norm_backward(y, total, x, total, parameter, parameter, parameter, mean, rstd, dtype, dtype)


def _linear(rows: int, dtype: torch.dtype = HALF, activation: str | None = None, columns: int = 3072, depth: int = 768) -> None:
    x, weight, bias = _meta(rows, depth, dtype=dtype), _meta(columns, depth, dtype=dtype), _meta(columns, dtype=dtype)
    linear_op.linear_forward(x, weight, bias, activation, False)


def _linear_add_norm(columns: int, depth: int, rows: int = 197, dtype: torch.dtype = HALF, last: bool = False) -> None:
    """proj or fc2 of one image, the sum and its norm; ``last``: the sum alone, no LayerScale."""
    x, weight, residual = _meta(rows, depth, dtype=dtype), _meta(columns, depth, dtype=dtype), _meta(rows, columns, dtype=dtype)
    vector = _meta(columns, dtype=dtype)
    if last:
        linear_norm_op.linear_add_norm_forward(x, weight, vector, residual, None, None, None, None)
    else:
        linear_norm_op.linear_add_norm_forward(x, weight, vector, residual, vector, vector, vector, 1e-6)


def _linear_training(rows: int, dtype: torch.dtype, activation: str) -> None:
    x, weight, bias = _meta(rows, 768, dtype=dtype), _meta(3072, 768, dtype=dtype), _meta(3072, dtype=dtype)
    out, pre = linear_op.linear_forward(x, weight, bias, activation, True)
    linear_op.linear_backward(out, x, weight, pre, activation, True, [True] * 3)


def _mlp_training(rows: int, dtype: torch.dtype = HALF) -> None:
    x, fc1, fc2 = _meta(rows, 768, dtype=dtype), _meta(3072, 768, dtype=dtype), _meta(768, 3072, dtype=dtype)
    fc1_bias, fc2_bias = _meta(3072, dtype=dtype), _meta(768, dtype=dtype)
    out, pre = linear_op.mlp_forward(x, fc1, fc1_bias, fc2, fc2_bias, "gelu", True)
    linear_op.mlp_backward(out, x, fc1, fc2, pre, "gelu", True, True, [True] * 5)


def _block_sums(images: int, dtype: torch.dtype = HALF) -> None:
    """The column sums of a ViT-B's block in training with LayerScale: biases of fc2, proj and qkv, fc1's, scales, norms."""
    sums, x = ColumnSums(), _meta(images * 197, 768, dtype=dtype)
    sums.of_rows(x, dtype, x)
    for columns in (768, 768, 2304):
        sums.of_rows(_meta(len(x), columns, dtype=dtype), dtype)
    for strips, columns in ((-(-len(x) // 128), 3072), *[(264, 768)] * 5):
        sums.of_partials(_meta(strips, columns, dtype=SINGLE), dtype)
    sums.finish()


def _8bit(rows: int, channels: int, dtype: torch.dtype) -> None:
    """What a block does in 8 bits: norm1 and qkv, norm2, fc1 and fc2."""
    x, parameter = _meta(rows, channels), _meta(channels)
    qkv, fc1, fc2 = (
        quantized_op.QuantizedWeight(_meta(n, k, dtype=dtype), _meta(n, dtype=SINGLE), _meta(n, dtype=SINGLE))
        for n, k in ((3 * channels, channels), (4 * channels, channels), (channels, 4 * channels))
    )
    values, scale, _ = quantized_op.quantize_forward(x, None, None, True, parameter, parameter, 1e-6, dtype)
    quantized_op.linear_8bit(values, scale, *qkv, None, None, HALF)
    values, scale, total = quantized_op.quantize_forward(x, x, parameter, True, parameter, parameter, 1e-6, dtype)
    given = _meta(1, dtype=SINGLE) if dtype == quantized_op.E4M3 else None
    hidden, blocks = quantized_op.linear_8bit_quantized(values, scale, *fc1, "gelu", given)
    quantized_op.linear_8bit(hidden, blocks if given is None else given, *fc2, None, total, HALF)
    if given is not None:  # a gated MLP's hidden layer
        blocks = _meta(-(-hidden.shape[-1] // 128), rows, dtype=SINGLE)
        quantized_op.linear_8bit(hidden, blocks, *fc2, None, total, HALF)


def _quantize_glu(rows: int, channels: int, dtype: torch.dtype) -> None:
    gate, value = _meta(rows, 2 * channels).chunk(2, dim=-1)
    quantized_op.quantize_glu(gate, value, "silu", dtype)


def _glu(channels: int, dtype: torch.dtype = HALF, activation: str = "silu") -> None:
    """Gate and value as the halves of one packed tensor."""
    gate, value = _meta(8, 197, 2 * channels, dtype=dtype).chunk(2, dim=-1)
    out = glu_op.glu_forward(gate, value, activation)
    glu_op.glu_backward(out, gate, value, activation)


def _qk_norm_rope(dim: int, norm: str | None, interleaved: bool, dtype: torch.dtype = HALF, rotate: bool = True) -> None:
    """q and k as slices of one (B, N, 3, H, D) tensor, one class token before the rotated ones."""
    query, key, _ = _meta(2, 197, 3, 12, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    cos, sin = (_meta(1, 196, dim, dtype=SINGLE) if rotate else None for _ in range(2))
    weight, bias = (_meta(dim, dtype=SINGLE) if wanted else None for wanted in (norm, norm == "layer"))
    shared = (cos, sin, interleaved, norm, weight, bias, weight, bias, 1e-6)
    out = rotary_op.qk_norm_rope_forward(query, key, *shared, False)
    if norm is None:
        rotary_op.qk_norm_rope_forward(*out, *shared, True)
    else:
        rotary_op.qk_norm_rope_backward(*out, query, key, *shared)


def _rotary_attention(dim: int, norm: str | None, interleaved: bool, dtype: torch.dtype = HALF, rotate: bool = True) -> None:
    """As above with the values, of so few tokens that every row's kernel serves them."""
    query, key, value = _meta(2, 37, 3, 12, dim, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    cos, sin = (_meta(1, 36, dim, dtype=SINGLE) if rotate else None for _ in range(2))
    weight, bias = (_meta(dim, dtype=SINGLE) if wanted else None for wanted in (norm, norm == "layer"))
    parameters = (weight, bias, weight, bias)
    rotary_attention_op.rotary_attention_forward(query, key, value, cos, sin, interleaved, norm, *parameters, 1e-6, dim**-0.5)


def _one_image(channels: int) -> None:
    """Norm and linears of a ViT's block for one image, whose small grids may be dependent launches."""
    x, parameter, hidden = _meta(1, 197, channels), _meta(channels), _meta(1, 197, 4 * channels)
    layer_norm_op.add_layer_norm_forward(x, x, parameter, parameter, 1e-6, None, False)
    products = (x, 3 * channels, None), (x, channels, None), (x, 4 * channels, "gelu"), (hidden, channels, None)
    for given, columns, activation in products:
        linear_op.linear_forward(given, _meta(columns, given.shape[-1]), _meta(columns), activation, False)


def _bounds(target: str, name: str, ops: tuple[str, ...], beyond: int) -> list[int]:
    """One value of the shape number ``name`` for every row of ``ops``: each row's bound, and one beyond them all."""
    rows = [row for op, rows in table(target)["ops"].items() if op in ops for row in rows]
    return sorted({row["when"][name] for row in rows if name in row["when"]} | {beyond})


def workloads(target: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """(description, operators run forward and backward); some come twice."""
    yield "attention bf16 D=64", partial(_attention, 64)
    for dim, tokens in ((48, 175), (64, 175), (64, 197), (64, 257), (80, 175), (80, 197), (80, 257)):
        yield f"attention bf16 D={dim}, {tokens} tokens", partial(_attention, dim, tokens=tokens, backward=False)
    for name, dtype in (("bf16", HALF), ("fp32", SINGLE)):
        yield f"attention {name} D=32, 7 queries of 4096 tokens", partial(_attention, 32, dtype, "plain", 4096, 7, False)
    for dim, tokens in ((64, 197), (64, 257), (32, 197)):
        yield f"attention bf16 D={dim}, {tokens} tokens of 16 images", partial(_attention, dim, tokens=tokens, batch=16)
    yield "attention bf16 D=80", partial(_attention, 80)
    for dim in (48, 64):
        yield f"attention bf16 D={dim}, 577 tokens of 8 images", partial(_attention, dim, backward=False, batch=8)
    for dim in (64, 80):
        yield f"image attention bf16 D={dim}, 64×64 of 64×64 tokens", partial(_image_attention, dim)
        yield f"image attention bf16 D={dim}, 14×14 of 64×64 tokens", partial(_image_attention, dim, window=14)
    yield "attention bf16 D=64 rel, 64×64 tokens", partial(_attention, 64, extra="rel", tokens=4096)
    yield "add_layer_norm bf16 C=768", partial(_add_layer_norm, 768)
    yield "linear bf16 M=16384 gelu", partial(_linear, 16384, activation="gelu")
    yield "mlp bf16 M=16384 training", partial(_mlp_training, 16384)
    yield "rotary_attention bf16 D=64", partial(_rotary_attention, 64, None, False)

    whens = [row["when"] for op, rows in table(target)["ops"].items() if op.startswith("attention") for row in rows]
    corners = {(when.get("element_size", 4), when.get("head_dim", 256), when.get("queries")) for when in whens}
    for element_size, dim, queries in sorted(corners, key=str):
        name, dtype = ("bf16", HALF) if element_size == 2 else ("fp32", SINGLE)
        few = f", {queries} queries" if queries else ""
        yield f"attention {name} D={dim}{few}", partial(_attention, dim, dtype, queries=queries, backward=not queries)
    for extra in ("boolean mask", "additive mask", "causal"):
        yield f"attention bf16 D=64 {extra}", partial(_attention, 64, extra=extra)
    for dim in (64, 80):
        yield f"attention bf16 D={dim} rel, 64×64 tokens", partial(_attention, dim, extra="rel", tokens=4096)
    yield "attention bf16 D=64 rel, 14×14 tokens", partial(_attention, 64, extra="rel", tokens=196, backward=False)
    yield "attention bf16 D=80", partial(_attention, 80, backward=False)
    yield "attention bf16 D=128 boolean mask", partial(_attention, 128, extra="boolean mask", backward=False)
    yield "attention fp32 D=128", partial(_attention, 128, SINGLE, backward=False)
    for dtype, name in ((SINGLE, "fp32"), (HALF, "bf16")):
        for dim in _bounds(target, "head_dim", ("attention_backward_mask",), 256):
            yield f"attention {name} D={dim} additive mask", partial(_attention, dim, dtype, extra="additive mask")

    image_ops = [rows for op, rows in table(target)["ops"].items() if op.startswith("image_attention")]
    whens = [row["when"] for rows in image_ops for row in rows]
    corners = {(when.get("element_size", 4), when.get("head_dim", 256), when.get("keys", 4096)) for when in whens}
    for element_size, dim, keys in sorted(corners | {(2, dim, keys) for dim in (64, 80) for keys in (196, 4096)}):
        name, dtype, window = "bf16" if element_size == 2 else "fp32", HALF if element_size == 2 else SINGLE, math.isqrt(keys)
        run = partial(_image_attention, dim, dtype, 0 if window == 64 else window)
        yield f"image attention {name} D={dim}, {window}×{window} of 64×64 tokens", run
    yield "image attention bf16 D=64 bare, 14×14 of 64×64 tokens", partial(_image_attention, 64, window=14, bare=True)
    yield "image attention bf16 D=64, 100×100 tokens", partial(_image_attention, 64, grid=100)

    layer_norm_ops = ("layer_norm_forward", "layer_norm_backward")
    for channels in _bounds(target, "channels", layer_norm_ops, 16384):
        yield f"add_layer_norm bf16 C={channels}", partial(_add_layer_norm, channels)
    unscaled = [row["when"] for row in table(target)["ops"]["layer_norm_backward"] if "sums" in row["when"]]
    for channels in sorted({when["channels"] for when in unscaled} | {768}):
        yield f"layer_norm bf16 C={channels}", partial(_layer_norm, channels)
    yield "layer_norm fp32 C=768", partial(_layer_norm, 768, SINGLE)
    yield "add_layer_norm bf16 C=20000", partial(_add_layer_norm, 20000)
    yield "layer_norm bf16 C=768 image statistics", partial(_layer_norm, 768, statistics="image")

    for rows in _bounds(target, "rows", ("linear", "linear_backward"), 16384):
        yield f"linear bf16 M={rows}", partial(_linear, rows)
        yield f"linear bf16 M={rows} gelu", partial(_linear, rows, activation="gelu")
        yield f"linear bf16 M={rows} N=768", partial(_linear, rows, columns=768)
        yield f"mlp bf16 M={rows} training", partial(_mlp_training, rows)
    for channels in (384, 768, 1280):
        yield f"one image bf16 C={channels}", partial(_one_image, channels)
    yield "linear bf16 M=257 N=5120 K=1280 gelu", partial(_linear, 257, activation="gelu", columns=5120, depth=1280)
    yield "linear fp32 M=16384 gelu", partial(_linear, 16384, SINGLE, "gelu")
    yield "mlp fp32 M=16384 training", partial(_mlp_training, 16384, SINGLE)
    yield "linear bf16 M=16384 quick_gelu training", partial(_linear_training, 16384, HALF, "quick_gelu")

    yield "block bf16 sums, 64 images", partial(_block_sums, 64)
    yield "block bf16 sums, one image", partial(_block_sums, 1)
    yield "block fp32 sums, 64 images", partial(_block_sums, 64, SINGLE)

    for columns, depth in ((384, 384), (768, 768), (384, 1536), (768, 3072), (1280, 5120), (2560, 8192)):
        yield f"linear_add_norm bf16 N={columns} K={depth}", partial(_linear_add_norm, columns, depth)
    yield "linear_add_norm bf16 N=768 K=3072, the sum alone", partial(_linear_add_norm, 768, 3072, last=True)
    yield "linear_add_norm fp32 N=768 K=3072", partial(_linear_add_norm, 768, 3072, 37, SINGLE)

    for name, dtype in quantized_op.FORMATS.items():
        if f"linear_{name}" not in table(target)["ops"]:
            continue
        for rows in _bounds(target, "rows", (f"linear_{name}", f"linear_{name}_quantized"), 16384):
            yield f"block {name} M={rows}", partial(_8bit, rows, 1024, dtype)
        for channels in _bounds(target, "channels", ("quantize",), 16384):
            yield f"block {name} C={channels}", partial(_8bit, 16384, channels, dtype)
        for channels in (384, 768, 1280):
            yield f"one image {name} C={channels}", partial(_8bit, 197, channels, dtype)
        yield f"quantize_glu {name}", partial(_quantize_glu, 16384, 4096, dtype)

    for activation in ("silu", "gelu", "sigmoid"):
        yield f"glu bf16 C=2048 {activation}", partial(_glu, 2048, HALF, activation)
    yield "glu fp32 C=2048 gelu", partial(_glu, 2048, SINGLE, "gelu")

    for dim in _bounds(target, "dim", ("qk_norm_rope", "qk_norm_rope_backward"), 256):
        yield f"qk_norm_rope bf16 D={dim}", partial(_qk_norm_rope, dim, None, False)
        yield f"qk_norm_rope bf16 D={dim} layer interleaved", partial(_qk_norm_rope, dim, "layer", True)
        yield f"qk_norm_rope fp32 D={dim} layer", partial(_qk_norm_rope, dim, "layer", False, SINGLE)
    yield "qk_norm_rope bf16 D=80 layer", partial(_qk_norm_rope, 80, "layer", False)
    yield "qk_norm_rope bf16 D=64 rms, not rotated", partial(_qk_norm_rope, 64, "rms", False, rotate=False)

    whens = [row["when"] for row in table(target)["ops"]["rotary_attention"]]
    corners = {(when.get("element_size", 4), when.get("head_dim", 256)) for when in whens}
    for element_size, dim in sorted(corners | {(2, 64), (2, 80)}):
        name, dtype = ("bf16", HALF) if element_size == 2 else ("fp32", SINGLE)
        yield f"rotary_attention {name} D={dim}", partial(_rotary_attention, dim, None, False, dtype)
        yield f"rotary_attention {name} D={dim} interleaved", partial(_rotary_attention, dim, None, True, dtype)
        yield f"rotary_attention {name} D={dim} layer interleaved", partial(_rotary_attention, dim, "layer", True, dtype)
    yield "rotary_attention bf16 D=64 layer", partial(_rotary_attention, 64, "layer", False)
    yield "rotary_attention bf16 D=64 rms, not rotated", partial(_rotary_attention, 64, "rms", False, rotate=False)
