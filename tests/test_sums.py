"""Column sums, which end every backward pass with parameters: their numbers, and that a pass launches them once."""

import pytest
import torch
from fastvit.kernels import reduce
from fastvit.kernels._launch import record

from fastvit.ops import block, layer_norm, linear, rotary
from fastvit.ops.block_backward import FIXED, block_backward
from fastvit.ops.sums import ColumnSums, strip_sums, sum_partials

from .layouts import embedded

MATRICES = [(1, 5), (300, 17), (264, 70), (40, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _matrices(device, count=4):
    return [embedded(torch.randn(MATRICES[i % len(MATRICES)], device=device)) for i in range(count)]


@pytest.mark.parametrize("dtypes", [1, 3], ids=["one dtype", "three dtypes"])
@pytest.mark.parametrize("count", [1, 2, 4, reduce.MATRICES, reduce.MATRICES + 1])
def test_matrices_of_other_sizes(device, count, dtypes):
    matrices = _matrices(device, count)
    likes = [torch.empty(0, dtype=DTYPES[i % dtypes]) for i in range(count)]
    for matrix, like, ours in zip(matrices, likes, sum_partials(matrices, likes), strict=True):
        assert ours.dtype == like.dtype
        assert ours.shape == matrix.shape[1:]
        exact = matrix.double().sum(0)
        eps = max(torch.finfo(like.dtype).eps, 8 * torch.finfo(torch.float32).eps)
        assert (ours - exact).abs().max() <= eps * matrix.double().abs().sum(0).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 300])
def test_products_beside_sums(device, rows, dtype):
    """Each a sum over rows of x · factor, as the gradient of LayerScale is; two strips beyond 256 rows."""
    a, b, c = (embedded(torch.randn(rows, 70, device=device)) for _ in range(3))
    factors = [b.bfloat16(), c.t().contiguous().t()]  # another dtype; rows side by side
    sums, half = ColumnSums(), embedded(c.to(dtype))
    found = [sums.of_rows(half, torch.float32), *(sums.of_rows(a, torch.float32, factor) for factor in factors)]
    sums.finish()
    exact = [half.double().sum(0), *((a.double() * factor.double()).sum(0) for factor in factors)]
    for ours, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5 * rows**0.5)


def test_what_is_beside_a_matrix_does_not_change_its_bits(device):
    matrices = _matrices(device)
    together = sum_partials(matrices, matrices)
    for matrix, ours in zip(matrices, together, strict=True):
        alone = sum_partials([None, torch.ones_like(matrix), matrix], [matrix, None, matrix])
        assert alone[:2] == [None, None]
        assert torch.equal(alone[2], ours)


def test_more_matrices_than_a_launch_takes_are_refused(device):
    count = reduce.MATRICES + 1
    with pytest.raises(ValueError, match=rf"{count} matrices .* at most {count - 1}"):
        reduce.launch_column_sums(*[torch.ones(2, 3, device=device)] * count, *[torch.empty(3, device=device)] * count)


def test_more_dtypes_than_a_launch_takes_are_refused(device):
    matrices = [torch.ones(2, 3, device=device, dtype=dtype) for dtype in DTYPES]
    with pytest.raises(TypeError, match=r"3 dtypes .* at most 2"):
        reduce.launch_column_sums(*matrices, *[torch.empty(3, device=device)] * 3)


def test_no_rows_sum_to_zero(device):
    empty, full = torch.empty(0, 7, device=device), torch.ones(3, 2, device=device)
    ours = sum_partials([empty, full], [empty.bfloat16(), full])
    assert ours[0].dtype == torch.bfloat16
    assert ours[0].tolist() == [0] * 7
    assert ours[1].tolist() == [3, 3]


@pytest.mark.parametrize("rows", [256, 257, 2000])
def test_strips(device, rows):
    x = embedded(torch.randn(rows, 9, device=device))
    partial = strip_sums(x)
    assert partial is x if rows == 256 else partial.shape == (reduce.strips_for(rows, x), 9)
    torch.testing.assert_close(sum_partials([partial], [x])[0].double(), x.double().sum(0), rtol=0, atol=1e-5 * rows**0.5)


def _meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm():
    x, p, rows = _meta(2, 197, 64), _meta(64), _meta(394, dtype=torch.float32)
    layer_norm.layer_norm_backward(x, x, p, p, rows, rows, "token")


def _norm_of_images():
    x, p, images = _meta(2, 197, 64), _meta(64), _meta(2, dtype=torch.float32)
    layer_norm.layer_norm_backward(x, x, p, p, images, images, "image")


def _sum_and_norm():
    x, p, rows = _meta(2, 197, 64), _meta(64), _meta(394, dtype=torch.float32)
    layer_norm.add_layer_norm_backward(x, x, x, x, p, p, p, rows, rows, x.dtype, x.dtype)


def _norms_of_queries_and_keys():
    query, key, p = _meta(2, 4, 50, 32), _meta(2, 2, 50, 32), _meta(32)
    rotary.qk_norm_rope_backward(query, key, query, key, None, None, False, "layer", p, p, p, p, 1e-6)


def _mlp():
    x, pre = _meta(2, 197, 64), _meta(2, 197, 256)
    linear.mlp_backward(x, x, _meta(256, 64), _meta(64, 256), pre, "gelu", True, True, [True] * 5)


def _train(images, dtype=torch.bfloat16, apart=False, scaled=True, frozen=(), dropping=False, residual=None):
    """A block's forward and backward, of ``apart`` three projections; ``frozen``: places of what wants no gradient; ``residual``:
    the dtype of hidden states and norms under autocast."""
    wide = residual or dtype
    x, parameter = _meta(images, 197, 64, dtype=wide), _meta(64, dtype=wide)
    scale, mask = parameter if scaled else None, _meta(images, 1, 1, dtype=wide) if dropping else None
    norm, options = (parameter, parameter), block.Options(2, 1e-6, 1e-6, 0.125, "gelu")

    def layer(columns, depth=64):
        return _meta(columns, depth, dtype=dtype), _meta(columns, dtype=dtype)

    qkv = 3 * layer(64) if apart else layer(192)
    tensors = [x, *norm, *layer(64), scale, *norm, *layer(256), *layer(64, 256), scale, None, None, *qkv]
    out, *kept = block.block_forward(*tensors, *options, mask, mask)
    wants = [tensor is not None and place not in frozen for place, tensor in enumerate(tensors)]
    used = x, *norm, tensors[3], *tensors[5:9], tensors[10], scale, None, None, None, mask, mask
    grads = block_backward(out, *used, wants, 2, 0.125, "gelu", None, wide, *kept, *tensors[FIXED::2])
    assert [grad is not None for grad in grads[FIXED + 1 :: 2]] == wants[FIXED + 1 :: 2]


def _block(*args, **options):
    def run():
        _train(*args, **options)

    run.__name__ = ", ".join(f"{name}={value}" for name, value in {"block": args, **options}.items())
    return run


@pytest.mark.parametrize(
    ("run", "launches"),
    [
        (_norm, [(1, 2)]),
        (_norm_of_images, [(1, 2)]),
        (_sum_and_norm, [(1, 3)]),
        (_norms_of_queries_and_keys, [(1, 4)]),
        (_mlp, [(2, 1), (1, 2)]),  # strips of rows for fc2's bias; fc1's gradient comes summed up by tiles out of the product
        # Of the biases of fc2, proj and qkv, then of these, fc1's and the norms'.
        (_block(2, scaled=False), [(2, 3), (1, 8)]),
        (_block(2), [(2, 4), (1, 10)]),
        (_block(2, apart=True), [(2, 6), (1, 12)]),
        (_block(2, dropping=True), [(2, 4), (1, 10)]),
        (_block(2, residual=torch.float32), [(2, 4), (1, 10)]),  # LayerScale's of float32, biases' of bfloat16
        (_block(2, frozen=(4, 12, 16)), [(2, 1), (1, 7)]),
        (_block(2, frozen=(0, 1, 2, 15, 16)), [(2, 3), (1, 7)]),  # nothing is asked for below the first branch's end
        (_block(1), [(1, 10)]),  # without strips, of bfloat16 and float32
        (_block(1, torch.float32), [(1, 10)]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_backward_pass_adds_up_in_one_launch_a_step(run, launches):
    """(strips, matrices) of each launch."""
    with record("sm_90") as recorded:
        run()
    sums = [launch for launch in recorded if launch.op == "column_sum"]
    matrices = [
        sum(type(argument) is torch.Tensor for name, argument in launch.arguments.items() if name[0] == "x") for launch in sums
    ]
    assert [(launch.grid[0], count) for launch, count in zip(sums, matrices, strict=True)] == launches
