"""Column sums, which end every backward pass with parameters: their numbers, and that a pass launches them once."""

import pytest
import torch
from fastvit.kernels import reduce
from fastvit.kernels._launch import record

from fastvit.ops import layer_norm, linear, rotary
from fastvit.ops.sums import strip_sums, sum_partials

from .layouts import embedded

MATRICES = [(1, 5), (300, 17), (264, 40), (40, 3)]


def _matrices(device):
    return [embedded(torch.randn(shape, device=device)) for shape in MATRICES]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_of_other_sizes_in_one_launch(device, count):
    matrices = _matrices(device)[:count]
    likes = [torch.empty(0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32)[:count]]
    for matrix, like, ours in zip(matrices, likes, sum_partials(matrices, likes), strict=True):
        assert ours.dtype == like.dtype
        assert ours.shape == matrix.shape[1:]
        exact = matrix.double().sum(0)
        eps = max(torch.finfo(like.dtype).eps, 8 * torch.finfo(torch.float32).eps)
        assert (ours - exact).abs().max() <= eps * matrix.double().abs().sum(0).max()


def test_what_is_beside_a_matrix_does_not_change_its_bits(device):
    matrices = _matrices(device)
    together = sum_partials(matrices, matrices)
    for matrix, ours in zip(matrices, together, strict=True):
        alone = sum_partials([None, torch.ones_like(matrix), matrix], [matrix, None, matrix])
        assert alone[:2] == [None, None]
        assert torch.equal(alone[2], ours)


def test_more_matrices_than_a_launch_takes_are_refused(device):
    with pytest.raises(ValueError, match=r"5 matrices .* at most 4"):
        sum_partials([torch.ones(2, 3, device=device)] * 5, [torch.ones(1)] * 5)


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


@pytest.mark.parametrize(
    ("run", "launches"),
    [
        (_norm, [(1, 2)]),
        (_norm_of_images, [(1, 2)]),
        (_sum_and_norm, [(1, 3)]),
        (_norms_of_queries_and_keys, [(1, 4)]),
        (_mlp, [(2, 1), (1, 2)]),  # strips of rows for fc2's bias; fc1's gradient comes summed up by tiles out of the product
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_backward_pass_adds_up_in_one_launch(run, launches):
    """(strips, matrices) of each launch."""
    with record("sm_90") as recorded:
        run()
    assert [(launch.grid[0], launch.grid[2]) for launch in recorded if launch.op == "column_sum"] == launches
