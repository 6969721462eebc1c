"""The specification itself, where nothing else holds it: image_attention against transformers' Segment Anything encoder."""

import pytest
import torch
import torch.nn.functional as F

from fastvit import reference
from fastvit._torchvision import ensure_importable

ensure_importable()

pytest.importorskip("transformers")
from transformers import SamVisionConfig  # noqa: E402
from transformers.models.sam.modeling_sam import SamVisionAttention, SamVisionLayer  # noqa: E402

GRID, CHANNELS, HEADS = 8, 32, 4  # the configured grid; tables of another one are interpolated


def _config():
    return SamVisionConfig(
        hidden_size=CHANNELS,
        num_attention_heads=HEADS,
        image_size=GRID * 16,
        patch_size=16,
        mlp_dim=2 * CHANNELS,
        attn_implementation="eager",
    )


def _random(module):
    """Every parameter, the position tables that start as zeros included, from the seeded generator."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module.double().eval()


def _image_attention(attention, x, window_size):
    qkv = attention.qkv(x)
    tables = {"rel_pos_h": attention.rel_pos_h, "rel_pos_w": attention.rel_pos_w}
    # a window is padded behind the norm with zeros, of which the projection leaves its bias
    out = reference.image_attention(qkv, num_heads=HEADS, window_size=window_size, pad_qkv=attention.qkv.bias, **tables)
    return attention.proj(out)


def _error(ours, theirs):
    return (ours - theirs).norm() / theirs.norm()


@pytest.mark.parametrize("grid", [(GRID, GRID), (GRID + 3, GRID + 3), (GRID, GRID - 3), (5, 9)], ids=str)
def test_image_attention_over_the_whole_image(grid):
    """On the configured grid and on others, square or not, for which the tables are interpolated."""
    attention = _random(SamVisionAttention(_config(), window_size=0))
    x = torch.randn(2, *grid, CHANNELS, dtype=torch.float64)
    with torch.no_grad():
        theirs, ours = attention(x)[0], _image_attention(attention, x, 0)
        attention.rel_pos_h.zero_()
        without = attention(x)[0]
    assert _error(ours, theirs) <= 1e-5
    assert _error(without, theirs) > 1e-2  # the tables matter


@pytest.mark.parametrize("window", [4, 3, 5, 11], ids="window {}".format)
@pytest.mark.parametrize("grid", [(8, 8), (7, 9)], ids=str)
def test_image_attention_in_windows(grid, window):
    """Windows that divide the grid, that do not, and one larger than the grid."""
    layer = _random(SamVisionLayer(_config(), window_size=window))
    x = torch.randn(2, *grid, CHANNELS, dtype=torch.float64)
    with torch.no_grad():
        hidden = x + _image_attention(layer.attn, layer.layer_norm1(x), window)
        ours = hidden + layer.mlp(layer.layer_norm2(hidden))
        theirs = layer(x)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert _error(ours, theirs) <= 1e-5


def test_a_table_of_another_size_is_interpolated():
    table = torch.randn(2 * GRID - 1, 6, dtype=torch.float64)
    resized = F.interpolate(table.t()[None], size=2 * 5 - 1, mode="linear")[0].t()
    ours = reference.relative_position_table(table, 5)
    assert ours.shape == (5, 5, 6)
    for y in range(5):
        for k in range(5):
            torch.testing.assert_close(ours[y, k], resized[y - k + 4])


@pytest.mark.parametrize("window", [0, 2])
def test_no_images_have_no_attention(window):
    assert reference.image_attention(torch.zeros(0, 3, 5, 24), num_heads=2, window_size=window).shape == (0, 3, 5, 8)
