"""Image attention's backward in small windows, in one pass wherever the table allows it, against float64."""

import copy

import pytest
import torch
from fastvit.kernels import _launch, _plans, _tuning
from fastvit.kernels.image_attention_backward_window import serves

from fastvit import functional
from fastvit.ops import image_attention
from tests.test_image_attention import _arguments, _check

pytestmark = pytest.mark.usefixtures("poisoned_memory", "triton_backend")


@pytest.fixture
def one_pass(monkeypatch):
    """Lets one pass serve; sets the queries of a round; names the launches of backward."""
    table = copy.deepcopy(_tuning.table(_launch.target_of(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))))
    for row in table["ops"]["image_attention_backward_query"]:
        row["config"]["ONE_PASS"] = 1
    monkeypatch.setattr(_tuning, "table", lambda target: table)
    monkeypatch.setattr(_plans, "_known", False)  # what is launched again is to be seen too
    names = []

    def noted(op, *arguments, **options):
        names.append(op)
        _launch.launch(op, *arguments, **options)

    for module in ("window", "query", "key"):
        monkeypatch.setattr(f"fastvit.kernels.image_attention_backward_{module}.launch", noted)

    def in_rounds_of(queries):
        config = {"BLOCK_M": queries, "BLOCK_N": 64, "num_warps": 8 if queries > 64 else 4, "num_stages": 2}
        table["ops"]["image_attention_backward_window"] = [{"when": {}, "config": config}]
        _tuning.config.cache_clear()
        return names

    yield in_rounds_of
    _tuning.config.cache_clear()


@pytest.mark.parametrize(
    ("grid", "window", "dim", "queries"),
    [
        ((5, 6), 4, 16, 64),
        pytest.param((7, 9), 7, 64, 64, marks=pytest.mark.slow),
        ((5, 3), 4, 80, 32),
        ((3, 5), 0, 32, 64),
        ((4, 4), 4, 16, 64),
        ((2, 7), 5, 48, 64),
    ],
    ids=str,
)
def test_grids_and_windows(one_pass, device, grid, window, dim, queries):
    """Windows that fit and that stick out at either side, scales that are powers of two and others, a head dim in two pieces."""
    names = one_pass(queries)
    _check(_arguments(device, torch.bfloat16, grid=grid, window=window, dim=dim))
    assert names == ["image_attention_backward_window"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "window", "dim", "dtype"),
    [
        ((14, 11), 14, 80, torch.bfloat16),
        ((16, 16), 16, 16, torch.bfloat16),
        ((13, 3), 9, 64, torch.float16),
    ],
    ids=str,
)
def test_several_rounds_and_steps(one_pass, device, grid, window, dim, dtype):
    """Queries beyond a round, whose dK, dV and tables are added to those of the round before."""
    names = one_pass(128 if window > 9 else 64)
    _check(_arguments(device, dtype, grid=grid, window=window, dim=dim))
    assert names == ["image_attention_backward_window"]


@pytest.mark.slow
def test_the_same_bits_twice_and_nearly_those_of_two_passes(one_pass, device):
    names = one_pass(64)
    arguments = _arguments(device, torch.bfloat16, grid=(6, 7), window=6, heads=2)
    tensors = [value.requires_grad_() for value in arguments.values() if isinstance(value, torch.Tensor)]
    out = functional.image_attention(**arguments)
    upstream = torch.randn_like(out)
    once, again = (torch.autograd.grad(out, tensors, upstream, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))
    for row in _tuning.table("any")["ops"]["image_attention_backward_query"]:
        row["config"]["ONE_PASS"] = 0
    _tuning.config.cache_clear()
    for one, two in zip(once, torch.autograd.grad(out, tensors, upstream), strict=True):
        torch.testing.assert_close(one.float(), two.float(), rtol=2**-6, atol=2**-6 * two.float().abs().max().item())
    assert names == ["image_attention_backward_window"] * 2 + ["image_attention_backward_query", "image_attention_backward_key"]


@pytest.mark.parametrize("pad", [False, True], ids=["zeros", "pad"])
@pytest.mark.parametrize("wanted", ["qkv", "all"])
def test_what_is_not_wanted_is_not_summed(one_pass, device, pad, wanted):
    names = one_pass(64)
    arguments = _arguments(device, torch.bfloat16, grid=(5, 3), window=4, pad=pad)
    call = [arguments.get(name) for name in ("qkv", "rel_pos_h", "rel_pos_w", "pad_qkv")]
    out, lse = image_attention.image_attention_forward(*call, 1, (4, 4), 0.25)
    wants = wanted == "all"
    found = image_attention.image_attention_backward(out, *call, out, lse, 1, [4, 4], 0.25, wants, wants and pad)
    assert [gradient is not None for gradient in found] == [True, wants, wants, wants and pad]
    assert all(gradient.isfinite().all() for gradient in found if gradient is not None)
    assert names == ["image_attention_backward_window"]


def test_large_scores_below_zero_leave_missing_keys_without_weight(one_pass, device):
    """e^(0 − lse) of a place that the window has not would be more than float32 holds."""
    names = one_pass(64)
    arguments = _arguments(device, torch.float16, grid=(3, 3), window=3)
    arguments["qkv"][..., 0], arguments["qkv"][..., 16] = 20.0, -10.0  # of queries and of keys
    arguments["pad_qkv"] = None
    _check({name: value for name, value in arguments.items() if value is not None}, scale=1.0)
    assert names == ["image_attention_backward_window"]


@pytest.mark.parametrize(
    ("dtype", "one", "first", "second"), [(torch.float16, 8000, 8000, -7900), (torch.bfloat16, 1 + 2**-7, 1, -1)], ids=str
)
def test_sums_between_rounds_are_not_rounded(one_pass, device, dtype, one, first, second):
    """One key has all weight, and the rounds' shares of its dV nearly cancel: 32 · 8000 is no fp16, 32 + 2⁻⁷ no bf16."""
    names = one_pass(32)
    qkv, upstream = torch.zeros(1, 8, 8, 48), torch.full((1, 8, 8, 16), float(first))
    qkv[..., 0], qkv[0, 0, 0, 16] = 4.0, 40.0
    upstream[0, 0, 0], upstream[0, 4:] = one, second
    qkv, upstream = qkv.to(dtype).to(device).requires_grad_(), upstream.to(dtype).to(device)
    table = torch.zeros(15, 16, dtype=dtype, device=device)
    out = functional.image_attention(qkv, num_heads=1, rel_pos_h=table, rel_pos_w=table)
    (gradient,) = torch.autograd.grad(out, qkv, upstream)
    expected = upstream.float().sum((0, 1, 2)).to(dtype)
    assert expected.abs().min() > 0
    torch.testing.assert_close(gradient[0, 0, 0, 32:], expected)
    assert gradient.isfinite().all()
    assert names == ["image_attention_backward_window"]


def test_positions_beyond_fp16_leave_the_other_keys_alone(one_pass, device):
    names = one_pass(64)
    arguments = _arguments(device, torch.float16, grid=(3, 3), window=3)
    del arguments["pad_qkv"]
    arguments["qkv"][..., 0], arguments["rel_pos_h"][0, 0] = 100.0, -1000.0
    tensors = [value.requires_grad_() for value in arguments.values() if isinstance(value, torch.Tensor)]
    out = functional.image_attention(**arguments)
    found = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in found)
    assert names == ["image_attention_backward_window"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", ["no tables", "float32", "a negative scale", "a small scale", "a padded head dim", "a large window"]
)
def test_what_one_pass_does_not_serve_takes_two(one_pass, device, option):
    names = one_pass(64)
    dtype = {"float32": torch.float32, "a small scale": torch.float16}.get(option, torch.bfloat16)
    window = 17 if option == "a large window" else 3
    dim = 8 if option == "a padded head dim" else 16
    arguments = _arguments(device, dtype, grid=(4, 3), window=window, rel=option != "no tables", dim=dim)
    _check(arguments, scale={"a negative scale": -0.5, "a small scale": 2.0**-17}.get(option))
    assert names == ["image_attention_backward_query", "image_attention_backward_key"]


def test_tokens_too_far_apart_for_its_offsets_take_two_passes(one_pass):
    one_pass(64)
    for stride, served in ((2**26, True), (2**30, False)):
        qkv = torch.empty_strided((1, 6, 6, 48), (0, stride, 48, 1), dtype=torch.bfloat16, device="meta")
        assert serves(qkv, 1, (6, 6), 0.25) is served


def test_scales_that_16_bits_cannot_be_divided_by_take_two_passes(one_pass):
    one_pass(64)
    qkv = torch.empty(1, 6, 6, 48, dtype=torch.float16, device="meta")
    served = {power: serves(qkv, 1, (6, 6), 2.0**power) for power in (-25, -16, -13, -12, -2, 12, 13, 25)}
    assert served == {power: -12 <= power <= 12 for power in served}
