"""Attention over few keys in one pass, wherever the table allows it, against float64."""

import copy

import pytest
import torch
from fastvit.kernels import _launch, _tuning
from fastvit.kernels.attention_short import pieces

from fastvit import functional, reference
from tests.errors import DTYPES, assert_as_exact_as_eager, run
from tests.layouts import LAYOUTS, lay_out

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory", "triton_backend")]

LIMIT = 320


@pytest.fixture
def launched(monkeypatch):
    """Lets the one-pass kernel serve up to LIMIT keys here, in tiles that suit an interpreter; the names of the launches made."""
    table = copy.deepcopy(_tuning.table(_launch.target_of(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))))
    for row in table["ops"]["attention_forward"]:
        row["config"]["SHORT_KEYS"] = LIMIT
    table["ops"]["attention_short"] = [
        {"when": {}, "config": {"BLOCK_M": 64, "MIN_PROGRAMS": 4, "num_warps": 4, "num_stages": 1}}
    ]
    monkeypatch.setattr(_tuning, "table", lambda target: table)
    _tuning.config.cache_clear()
    names = []

    def noted(op, *arguments, **options):
        names.append(op)
        _launch.launch(op, *arguments, **options)

    for module in ("attention_short", "attention_forward"):
        monkeypatch.setattr(f"fastvit.kernels.{module}.launch", noted)
    yield names
    _tuning.config.cache_clear()


def _tensors(device, dtype=torch.float32, batch=1, heads=1, key_heads=None, n=17, m=None, dim=16, value_dim=None):
    m, value_dim, key_heads = m or n, value_dim or dim, key_heads or heads
    shapes = {"query": (heads, n, dim), "key": (key_heads, m, dim), "value": (key_heads, m, value_dim)}
    return {name: torch.randn(batch, *shape).to(dtype).to(device) for name, shape in shapes.items()}


def _check(arguments, **options):
    ops = functional.attention, reference.attention, reference.attention
    return assert_as_exact_as_eager(*ops, arguments | options)


def test_pieces_hold_the_keys_with_little_to_spare():
    for keys in range(1, 1025):
        used = [piece for piece in pieces(keys) if piece]
        assert all(piece >= 16 and piece & (piece - 1) == 0 for piece in used), keys
        assert sorted(used, reverse=True) == used, keys
        assert keys <= sum(used) <= max(keys + 15, 4 / 3 * keys), keys
        assert sum(used[:-1]) < keys, f"{keys}: only the last piece may lack keys, no other is bounded"


@pytest.mark.parametrize("n", [1, 16, 63, 64, 65, 112, 196, 197, 257, pytest.param(320, marks=pytest.mark.slow)])
def test_tokens(launched, device, n):
    _check(_tensors(device, torch.bfloat16, n=n, dim=32))
    assert launched[0] == "attention_short"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 48, 64, 80, 256])
def test_head_dims(launched, device, dtype, dim):
    _check(_tensors(device, dtype, n=19, m=35, dim=dim))


@pytest.mark.parametrize(("dim", "value_dim"), [(32, 64), (80, 16), (48, 96)], ids=str)
def test_values_of_another_width(launched, device, dim, value_dim):
    _check(_tensors(device, torch.bfloat16, n=9, m=21, dim=dim, value_dim=value_dim))


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 2)], ids=str)
def test_batches_and_grouped_queries(launched, device, batch, heads, key_heads):
    """One to twelve heads on four programs: one program a head, or several that share its query tiles."""
    _check(_tensors(device, batch=batch, heads=heads, key_heads=key_heads, n=66, m=12))


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-3])
@pytest.mark.parametrize("m", [16, 20])
def test_scale(launched, device, scale, m):
    _check(_tensors(device, n=9, m=m), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1], ids=["+", "-"])
def test_logits_of_ten_thousand(launched, device, dtype, sign):
    arguments = _tensors(device, dtype, n=9, m=40)
    arguments["query"] = torch.full_like(arguments["query"], 100.0 * sign)
    arguments["key"] = torch.full_like(arguments["key"], 25.0)
    arguments["key"][..., 0] += torch.arange(40.0, device=device).to(dtype) / 128
    output, exact = (run(op, arguments, as_, backward=False)["output"] for op, as_ in _PRECISIONS)
    # float32 scores of 10⁴ are known to 5e-4, each, which their exponentials inherit.
    tolerance = {torch.float32: 4e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=tolerance)


_PRECISIONS = ((functional.attention, None), (reference.attention, torch.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(launched, device, layout):
    """NaN lies beside every element that is not the tensor's own."""
    arguments = _tensors(device, torch.bfloat16, batch=2, heads=2, n=9, m=84, dim=48)
    _check({name: lay_out(value, layout) for name, value in arguments.items()})


def test_the_same_as_key_by_key(launched, device, monkeypatch):
    """Both kernels give backward the same lse, and the output that belongs to it."""
    arguments = (*_tensors(device, heads=2, n=70, m=100).values(), None, None, None, False, 0.25)
    one_pass = torch.ops.fastvit.attention_forward(*arguments)
    for row in _tuning.table("any")["ops"]["attention_forward"]:
        row["config"]["SHORT_KEYS"] = 0
    _tuning.config.cache_clear()
    key_by_key = torch.ops.fastvit.attention_forward(*arguments)
    assert launched == ["attention_short", "attention_forward"]
    for a, b in zip(one_pass, key_by_key, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", ["mask", "causal", "rel", "too many keys", "a padded head dim"])
def test_what_it_does_not_serve_goes_to_the_other_kernel(launched, device, option):
    arguments = _tensors(device, n=15, m=LIMIT + 1 if option == "too many keys" else 15)
    if option == "a padded head dim":
        arguments = _tensors(device, n=9, dim=40)
    if option == "mask":
        arguments["attn_mask"] = torch.rand(15, 15, device=device) > 0.3
    if option == "rel":
        arguments |= {"rel_h": torch.randn(1, 1, 15, 3, device=device), "rel_w": torch.randn(1, 1, 15, 5, device=device)}
    _check(arguments, is_causal=option == "causal")
    assert launched[0] == "attention_forward"
