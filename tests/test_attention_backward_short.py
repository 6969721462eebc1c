"""Attention's backward over few tokens in one pass, wherever the table allows it, against float64."""

import copy

import pytest
import torch
from fastvit.kernels import _launch, _plans, _tuning
from fastvit.kernels.attention_backward_short import pieces_of, serves

from fastvit import functional, reference
from tests.errors import DTYPES, assert_as_exact_as_eager
from tests.layouts import LAYOUTS, lay_out

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory", "triton_backend")]

LIMIT = 272


@pytest.fixture
def launched(monkeypatch):
    """Lets the one-pass kernel serve up to LIMIT tokens of two heads or more; the names of backward's launches."""
    table = copy.deepcopy(_tuning.table(_launch.target_of(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))))
    for row in table["ops"]["attention_backward_query"]:
        row["config"]["SHORT_KEYS"] = LIMIT
    config = {"BLOCK_M": 64, "BLOCK_N": 32, "MIN_PROGRAMS": 2, "num_warps": 4, "num_stages": 2}
    table["ops"]["attention_backward_short"] = [{"when": {}, "config": config}]
    monkeypatch.setattr(_tuning, "table", lambda target: table)
    _tuning.config.cache_clear()
    monkeypatch.setattr(_plans, "_known", False)  # what is launched again is to be seen too
    names = []

    def noted(op, *arguments, **options):
        names.append(op)
        _launch.launch(op, *arguments, **options)

    for module in ("attention_backward_short", "attention_backward_query", "attention_backward_key", "attention_backward_mask"):
        monkeypatch.setattr(f"fastvit.kernels.{module}.launch", noted)
    yield names
    _tuning.config.cache_clear()


def _tensors(device, dtype=torch.float32, batch=1, heads=2, key_heads=None, n=17, m=None, dim=16, value_dim=None):
    m, value_dim, key_heads = m or n, value_dim or dim, key_heads or heads
    shapes = {"query": (heads, n, dim), "key": (key_heads, m, dim), "value": (key_heads, m, value_dim)}
    return {name: torch.randn(batch, *shape).to(dtype).to(device) for name, shape in shapes.items()}


def _check(arguments, magnitude=1.0, **options):
    ops = functional.attention, reference.attention, reference.attention
    return assert_as_exact_as_eager(*ops, arguments | options, magnitude=magnitude)


def test_pieces_hold_the_queries_with_little_to_spare():
    for block in (16, 64, 128):
        for queries in range(1, 300):
            first, pieces = pieces_of(queries, block)
            rows = first + (pieces - 1) * block
            assert first in (16, 32, 64, 128), queries
            assert first <= block, queries
            assert queries <= rows < queries + max(16, block // 2), queries
            assert pieces == 1 or rows - block < queries, f"{queries}: only the last piece is bounded"


@pytest.mark.parametrize("n", [1, 16, 33, 64, 65, 197, 257])
def test_tokens(launched, device, n):
    _check(_tensors(device, torch.bfloat16, n=n, dim=32))
    assert launched == ["attention_backward_short"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_head_dims(launched, device, dtype, dim):
    _check(_tensors(device, dtype, n=19, m=35, dim=dim))
    assert launched == ["attention_backward_short"]


@pytest.mark.parametrize(("n", "m"), [(1, 70), (70, 1), (20, 64)], ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(32, 16), (16, 64)], ids=str)
def test_keys_and_values_of_other_sizes(launched, device, n, m, dim, value_dim):
    # With one key delta and dout·v, sums of value_dim terms, cancel: the gradients of queries and keys are zeros.
    _check(_tensors(device, torch.bfloat16, n=n, m=m, dim=dim, value_dim=value_dim), magnitude=value_dim**0.5 if m == 1 else 1.0)
    assert launched == ["attention_backward_short"]


@pytest.mark.parametrize("scale", [0.0, -0.3, 1e-3])
def test_scale(launched, device, scale):
    _check(_tensors(device, n=9, m=20), scale=scale)
    assert launched == ["attention_backward_short"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_keys_that_do_not_exist_outweigh_none_that_do(launched, device, dtype):
    """Every score near −200, so that e^(0 − lse) of a key of zeros beyond the end is more than the dtype holds."""
    arguments = _tensors(device, dtype, n=9, m=20)
    arguments["query"][..., 0], arguments["key"][..., 0] = 20.0, -10.0
    _check(arguments, scale=1.0)
    assert launched == ["attention_backward_short"]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nan_in_a_query_reaches_every_key_and_no_other_query(launched, device):
    q, k, v = (t.requires_grad_() for t in _tensors(device, n=9, m=20).values())
    with torch.no_grad():
        q[0, 0, 3, 5] = float("nan")
    functional.attention(q, k, v).sum().backward()
    assert launched == ["attention_backward_short"]
    assert k.grad[0, 0].isnan().all()
    assert v.grad[0, 0].isnan().all()
    assert k.grad[0, 1].isfinite().all()
    assert q.grad.isnan().any(-1).nonzero().tolist() == [[0, 0, 3]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(launched, device, layout):
    """NaN lies beside every element that is not the tensor's own."""
    arguments = _tensors(device, torch.bfloat16, batch=2, n=9, m=36)
    _check({name: lay_out(value, layout) for name, value in arguments.items()})
    assert launched == ["attention_backward_short"]


def test_the_same_bits_twice_and_nearly_those_of_two_passes(launched, device):
    q, k, v = (t.requires_grad_() for t in _tensors(device, n=70, m=40).values())
    out = functional.attention(q, k, v)
    upstream = torch.randn_like(out)
    once, again = (torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))
    for row in _tuning.table("any")["ops"]["attention_backward_query"]:
        row["config"]["SHORT_KEYS"] = 0
    _tuning.config.cache_clear()
    torch.testing.assert_close(once, torch.autograd.grad(out, (q, k, v), upstream), rtol=1e-5, atol=1e-5)
    assert launched == ["attention_backward_short"] * 2 + ["attention_backward_query", "attention_backward_key"]


@pytest.mark.parametrize("option", ["mask", "causal", "rel", "grouped", "too many keys", "too few heads", "a padded head dim"])
def test_what_it_does_not_serve_takes_two_passes(launched, device, option):
    shapes = {
        "grouped": {"key_heads": 1},
        "too many keys": {"m": LIMIT + 1},
        "too few heads": {"heads": 1},
        "a padded head dim": {"dim": 48},
    }
    arguments = _tensors(device, **{"n": 15} | shapes.get(option, {}))
    if option == "mask":
        arguments["attn_mask"] = torch.rand(15, 15, device=device) > 0.3
    if option == "rel":
        arguments |= {"rel_h": torch.randn(1, 2, 15, 3, device=device), "rel_w": torch.randn(1, 2, 15, 5, device=device)}
    _check(arguments, is_causal=option == "causal")
    assert launched == ["attention_backward_query", "attention_backward_key"]


@pytest.mark.parametrize("name", ["query", "key", "value", "out", "dout", "dq", "dk", "dv"])
def test_rows_too_far_apart_for_its_offsets_take_two_passes(launched, name):
    tensors = _tensors("meta", torch.bfloat16, n=9)
    tensors |= {other: tensors["query"] for other in ("out", "dout", "dq", "dk", "dv")}

    def served():
        q, k, v, *others = tensors.values()
        return serves(q, k, v, None, None, False, *others)

    assert served()
    tensors[name] = torch.empty_strided((1, 2, 9, 16), (0, 16, 2**25, 1), dtype=torch.bfloat16, device="meta")
    assert not served()
