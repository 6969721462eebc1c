"""Attention of few queries over many keys, split among programs, against float64."""

import copy

import pytest
import torch
from fastvit.kernels import _launch, _tuning
from fastvit.kernels.attention_split import splits_of

from fastvit import functional, reference
from tests.errors import DTYPES, assert_as_exact_as_eager, run
from tests.layouts import LAYOUTS, lay_out

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory", "triton_backend")]


@pytest.fixture
def grids(monkeypatch, device):
    """Splits from 64 keys on, in steps of 16; (operator, grid) of the launches made."""
    table = copy.deepcopy(_tuning.table(_launch.target_of(torch.empty(0, device=device))))
    small = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    table["ops"]["attention_forward"] = [{"when": {}, "config": small}]
    table["ops"]["attention_split"] = [{"when": {}, "config": {"PROGRAMS": 48, "MIN_KEYS": 16, "num_warps": 1}}]
    monkeypatch.setattr(_tuning, "table", lambda target: table)
    _tuning.config.cache_clear()
    made = []

    def noted(op, kernel, grid, *arguments, **options):
        made.append((op, grid))
        _launch.launch(op, kernel, grid, *arguments, **options)

    for module in ("attention_split", "attention_forward"):
        monkeypatch.setattr(f"fastvit.kernels.{module}.launch", noted)
    yield made
    _tuning.config.cache_clear()


def _tensors(device, dtype=torch.float32, batch=1, heads=2, key_heads=None, n=3, m=70, dim=16, value_dim=None):
    value_dim, key_heads = value_dim or dim, key_heads or heads
    shapes = {"query": (heads, n, dim), "key": (key_heads, m, dim), "value": (key_heads, m, value_dim)}
    return {name: torch.randn(batch, *shape).to(dtype).to(device) for name, shape in shapes.items()}


def _check(arguments, **options):
    ops = functional.attention, reference.attention, reference.attention
    return assert_as_exact_as_eager(*ops, arguments | options)


@pytest.mark.parametrize(("m", "splits"), [(63, 1), (64, 4), (65, 3), (197, 7), (257, 9)])
def test_keys(grids, device, m, splits):
    """No split is empty: 65 keys are five steps, two to each of three programs at most, not four."""
    _check(_tensors(device, torch.bfloat16, m=m))
    assert grids[0] == ("attention_forward", (2, splits) if splits > 1 else (2,))
    assert (("attention_split", (6,)) in grids) == (splits > 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (40, 40), (80, 96), (32, 1)], ids=str)
def test_head_dims(grids, device, dtype, dim, value_dim):
    _check(_tensors(device, dtype, dim=dim, value_dim=value_dim))
    assert len(grids[0][1]) == 2


@pytest.mark.parametrize(("batch", "heads", "key_heads", "n"), [(2, 4, 2, 3), (1, 1, 1, 17), (0, 2, 2, 3)], ids=str)
def test_batches_heads_and_query_tiles(grids, device, batch, heads, key_heads, n):
    _check(_tensors(device, batch=batch, heads=heads, key_heads=key_heads, n=n))


def test_programs_enough_are_not_split(grids, device):
    _check(_tensors(device, batch=4, heads=4))
    assert grids[0] == ("attention_forward", (16,))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks(grids, device, dtype, kind):
    """Row 0 is masked altogether, row 1 up to the last split, row 2 within every split."""
    allowed = torch.rand(3, 70) > 0.3
    allowed[0], allowed[1, :66], allowed[1, 69] = False, False, True
    mask = allowed if kind == "boolean" else torch.randn(3, 70).masked_fill(~allowed, -torch.inf).to(dtype)
    arguments = _tensors(device, dtype) | {"attn_mask": mask.to(device)}
    _check(arguments)
    assert len(grids[0][1]) == 2
    assert not run(functional.attention, arguments)["output"][:, :, 0].any()


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scale(grids, device, scale):
    _check(_tensors(device), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1], ids=["+", "-"])
def test_logits_of_ten_thousand(grids, device, dtype, sign):
    arguments = _tensors(device, dtype)
    arguments["query"] = torch.full_like(arguments["query"], 100.0 * sign)
    arguments["key"] = torch.full_like(arguments["key"], 25.0)
    arguments["key"][..., 0] += torch.arange(70.0, device=device).to(dtype) / 128
    output = run(functional.attention, arguments, backward=False)["output"]
    exact = run(reference.attention, arguments, torch.float64, backward=False)["output"]
    # float32 scores of 10⁴ are known to 5e-4, each, which their exponentials inherit.
    tolerance = {torch.float32: 4e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(grids, device, layout):
    """NaN lies beside every element that is not the tensor's own."""
    arguments = _tensors(device, torch.bfloat16, batch=2)
    _check({name: lay_out(value, layout) for name, value in arguments.items()})


@pytest.mark.parametrize("mask", [None, "additive"])
def test_lse_and_the_same_bits_twice(grids, device, mask):
    """Backward is handed the lse that one program would have found."""
    mask = None if mask is None else torch.randn(1, 1, 3, 70, device=device)
    arguments = (*_tensors(device).values(), mask, None, None, False, 0.25)
    first, second = (torch.ops.fastvit.attention_forward(*arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    _tuning.table("any")["ops"]["attention_split"][0]["config"]["PROGRAMS"] = 1
    _tuning.config.cache_clear()
    whole = torch.ops.fastvit.attention_forward(*arguments)
    assert [len(grid) for op, grid in grids if op == "attention_forward"] == [2, 2, 1]
    for a, b in zip(first, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_causal_and_relative_positions_are_not_split(grids, device):
    _check(_tensors(device), is_causal=True)
    rel = {"rel_h": torch.randn(1, 2, 3, 7, device=device), "rel_w": torch.randn(1, 2, 3, 10, device=device)}
    _check(_tensors(device) | rel)
    assert all(len(grid) == 1 for op, grid in grids if op == "attention_forward")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_sams_mask_decoder(target):
    """7 tokens to 4096 keys, one picture: many splits; a picture's 4096 tokens to 7 keys, and a batch of 64: none."""
    tokens, picture = (torch.empty(1, 8, n, 16, dtype=torch.bfloat16, device="meta") for n in (7, 4096))
    with _launch.record(target):
        assert 8 <= splits_of(tokens, picture, picture, None, None, False) <= 16
        assert splits_of(picture, tokens, tokens, None, None, False) == 1
        many = [t.expand(64, -1, -1, -1) for t in (tokens, picture)]
        assert splits_of(many[0], many[1], many[1], None, None, False) == 1
