"""A product split over K whose finishing kernel adds the residual and takes the norm: against float64, as exact as eager."""

import pytest
import torch
import torch.nn.functional as F
from fastvit.kernels import linear_split_norm
from fastvit.kernels._launch import record
from fastvit.kernels._tuning import admits, committed, config, override, targets

import fastvit
from fastvit import reference
from fastvit.ops import block, dispatch
from fastvit.ops.linear_norm import linear_add_norm_forward
from tests import models_for_acceleration as models
from tests.errors import DTYPES, assert_as_exact_as_eager
from tests.layouts import LAYOUTS, lay_out
from tests.model_errors import OUTPUT, relative

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPS = 1e-6
SMALL = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}


@pytest.fixture
def split():
    """Every call by the kernels, whatever their steps count to."""
    with fastvit.use_backend("triton"), override("linear_split_norm", SMALL):
        yield


def _ours(input, weight, bias, residual, scale, norm_weight, norm_bias):
    assert linear_split_norm.parts_of(input, weight) > 1
    return linear_add_norm_forward(input, weight, bias, residual, scale, norm_weight, norm_bias, EPS)


def _eager(input, weight, bias, residual, scale, norm_weight, norm_bias):
    branch = F.linear(input, weight, bias)
    total = residual + (branch if scale is None else scale * branch)
    vectors = (None if v is None else v.to(total.dtype) for v in (norm_weight, norm_bias))
    return F.layer_norm(total, total.shape[-1:], *vectors, EPS), total


def _exact(input, weight, bias, residual, scale, norm_weight, norm_bias):
    branch = reference.linear(input, weight, bias)
    return reference.add_layer_norm(residual, branch, norm_weight, norm_bias, EPS, layer_scale=scale)


def _arguments(rows, columns, depth, dtype, device, lead=()):
    arguments = {"input": torch.randn(*lead, rows, depth), "weight": torch.randn(columns, depth) * depth**-0.5}
    arguments |= {"bias": torch.randn(columns), "residual": torch.randn(*lead, rows, columns)}
    arguments |= {name: torch.randn(columns) for name in ("scale", "norm_weight", "norm_bias")}
    return {name: tensor.to(dtype).to(device) for name, tensor in arguments.items()}


def _check(arguments):
    return assert_as_exact_as_eager(_ours, _eager, _exact, arguments, backward=False)


# Rows at a tile's edge and beyond, a row as one power of two, as two, and as neither.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 64), (17, 48, 130), (5, 63, 95), (33, 20, 200)], ids="M{0[0]} N{0[1]} K{0[2]}".format)
def test_shapes(split, device, dtype, shape):
    _check(_arguments(*shape, dtype, device))


@pytest.mark.parametrize("missing", [("bias",), ("scale",), ("norm_weight", "norm_bias"), ("norm_bias",)], ids=" and ".join)
def test_what_may_be_left_out(split, device, missing):
    _check(_arguments(5, 48, 130, torch.bfloat16, device) | dict.fromkeys(missing))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_residual_stream_in_float32(split, device, dtype):
    arguments = _arguments(5, 48, 130, dtype, device)
    arguments["residual"] = arguments["residual"].float() + 2**-12  # which 16 bits do not hold
    for comparison in _check(arguments):
        assert comparison.ours < 0.1, comparison


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(split, device, layout):
    arguments = _arguments(5, 24, 130, torch.bfloat16, device, lead=(2,))
    _check({name: lay_out(value, "gaps" if value.dim() == 1 else layout) for name, value in arguments.items()})


@pytest.mark.parametrize("served", ["kernel", "vendor"])
@pytest.mark.parametrize("scaled", [True, False], ids=["LayerScale", "plain"])
def test_the_sum_alone(split, device, served, scaled, monkeypatch):
    """Of a model's last block, whose norm is not known."""
    arguments = _arguments(5, 48, 130, torch.float32, device) | ({} if scaled else {"scale": None})
    expected = _exact(**arguments)[1]
    monkeypatch.setattr(dispatch, "linear_add_norm", lambda a, b: served)
    y, total = linear_add_norm_forward(*list(arguments.values())[:5], None, None, None)
    assert y is None
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("served", ["kernel", "vendor"])
@pytest.mark.parametrize("scaled", [True, False], ids=["LayerScale", "plain"])
def test_the_sum_alone_keeps_a_float32_residual(split, device, served, scaled, monkeypatch):
    arguments = _arguments(5, 48, 130, torch.bfloat16, device) | ({} if scaled else {"scale": None})
    arguments["residual"] = arguments["residual"].float() + 2**-12  # which 16 bits do not hold
    arguments |= {name: torch.zeros_like(arguments[name]) for name in ("input", "bias")}
    monkeypatch.setattr(dispatch, "linear_add_norm", lambda a, b: served)
    total = linear_add_norm_forward(*list(arguments.values())[:5], None, None, None)[1]
    assert total.dtype == torch.float32
    assert torch.equal(total, arguments["residual"])


def test_the_same_bits_every_time(split, device):
    arguments = _arguments(17, 48, 200, torch.bfloat16, device)
    first, second = _ours(**arguments), _ours(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- what is split ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "parts"),
    [((197, 768, 768), 3), ((197, 768, 3072), 6), ((197, 1024, 4096), 4), ((257, 1280, 1280), 2), ((257, 1280, 5120), 5)],
    ids=["ViT-B proj", "ViT-B fc2", "ViT-L fc2", "ViT-H proj", "ViT-H fc2"],
)
def test_one_image_is_split(shape, parts):
    """So far that programs are no more than multiprocessors; no part is empty."""
    assert linear_split_norm._parts_of("sm_90", 2, *shape) == parts


@pytest.mark.parametrize(
    "shape", [(50432, 768, 3072), (1576, 768, 768), (197, 8192, 1024), (0, 768, 768), (197, 768, 64)], ids=str
)
def test_what_is_not(shape):
    for target in (*targets(), "default"):
        assert linear_split_norm._parts_of(target, 2, *shape) == 1


@pytest.mark.parametrize("target", [*targets(), "default"])
def test_no_part_is_empty(target):
    for columns, depth in ((384, 1536), (768, 768), (768, 3072), (1024, 4096), (1280, 5120), (1000, 4010)):
        parts = linear_split_norm._parts_of(target, 2, 197, columns, depth)
        shape = {"element_size": 2, "rows": 197, "columns": columns, "depth": depth}
        steps = -(-depth // config("linear_split_norm", target, **shape)["BLOCK_K"])
        assert (parts - 1) * -(-steps // parts) < steps


def test_two_launches_for_three():
    """Of a bare product over few tiles, the sum and its norm."""
    shapes = ((197, 3072), (768, 3072), (197, 768))
    x, weight, residual = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    vector = residual[0]
    with record("sm_90") as launches:
        linear_add_norm_forward(x, weight, vector, residual, None, vector, vector, EPS)
    assert [launch.op for launch in launches] == ["linear_split_norm", "split_norm"]
    assert [launch.grid for launch in launches] == [(12, 6), (197,)]


# --- who serves -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*targets(), "default"])
@pytest.mark.parametrize(
    ("rows", "dtype", "way"), [(257, "half", "kernel"), (394, "half", "vendor"), (197, "float32", "vendor")], ids=str
)
def test_what_is_predicted(target, rows, dtype, way):
    call = {"dtype": dtype, "rows": rows, "width": 3072, "outputs": 768}
    found = committed(target)["dispatch"]["linear_add_norm"]
    assert next(rule["serve"] for rule in found if admits(rule["when"], call)) == way


@pytest.mark.parametrize("served", ["kernel", "vendor"])
def test_a_rule_decides_on_auto(split, device, served):
    arguments = _arguments(5, 48, 130, torch.bfloat16, device)
    with fastvit.use_backend("auto"), override("dispatch linear_add_norm", {"serve": served}), dispatch.collect() as found:
        y, total = _ours(**arguments)
    assert found.pop("linear_add_norm: half, rows 5, width 130, outputs 48") == f"{served}: asked for"
    assert all(name.startswith("linear: none") for name in found)
    for ours, exact in zip((y, total), _exact(**{k: v.double() for k, v in arguments.items()}), strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=0.1, rtol=0.02)


@pytest.mark.parametrize("options", [{}, {"init_values": None}], ids=["LayerScale", "plain"])
def test_the_blocks_of_a_model(split, options, device, monkeypatch):
    """The first block's fc2 is finished with the second's norm, the second's with the sum alone."""
    model = models.timm_vit(embed_dim=32, depth=2, num_heads=2, **options).to(device)
    picture, ended, own = models.image().to(device), [], block.linear_add_norm_forward

    def infer(tensors, options, normalized, following):
        return block.block_inference(*tensors, *options, normalized, *(following or (None, None, None)))

    def end(x, weight, *more):
        ended.append((linear_split_norm.parts_of(x, weight) > 1, more[-1] is not None))
        return own(x, weight, *more)

    monkeypatch.setattr(block, "infer", infer)
    monkeypatch.setattr(block, "linear_add_norm_forward", end)
    with torch.no_grad(), override("linear_split_norm", SMALL | {"BLOCK_K": 16}):
        expected = model(picture)
        assert relative(fastvit.accelerate(model)(picture), expected) <= OUTPUT
    assert ended == [(True, True), (True, True), (True, True), (True, False)]


@pytest.mark.parametrize("place", [3, 10], ids=["proj", "fc2"])
def test_a_block_refuses_a_sum_of_other_widths(device, place):
    x, square = torch.randn(1, 3, 16, device=device), torch.randn(16, 16, device=device)
    tensors = [x, None, None, square, None, None, None, None, square, None, square, *[None] * 4, torch.randn(48, 16), None]
    tensors[place] = square[:8]
    with fastvit.use_backend("triton"), pytest.raises(ValueError, match="branch has shape"):
        block.block_inference(*tensors, *block.Options(2, EPS, EPS, 0.25, "gelu"), None, None, None, None)
