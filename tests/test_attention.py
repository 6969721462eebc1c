"""attention against float64, on both backends.

Shapes are small because the interpreter is slow, and chosen where kernels break: one row, a tile exactly full, one row more.
"""

import copy

import pytest
import torch
import triton
import triton.language as tl
from fastvit.kernels import _tuning, attention_forward
from fastvit.kernels._attention_backward import load_statistics
from fastvit.kernels._launch import record

import fastvit
from fastvit import functional, reference
from tests.conftest import in_the_interpreter
from tests.errors import DTYPES, assert_as_exact_as_eager, run
from tests.layouts import LAYOUTS, embedded, lay_out

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SLOW = pytest.mark.slow
FLOAT16 = pytest.param(torch.float16, marks=SLOW)


def _arguments(device, dtype=torch.float32, batch=1, heads=1, key_heads=None, n=17, m=None, dim=16, value_dim=None, **extra):
    m, value_dim, key_heads = m or n, value_dim or dim, key_heads or heads
    arguments = {
        "query": torch.randn(batch, heads, n, dim),
        "key": torch.randn(batch, key_heads, m, dim),
        "value": torch.randn(batch, key_heads, m, value_dim),
    }
    if "rel" in extra:
        rows, columns = extra.pop("rel")
        arguments["rel_h"] = torch.randn(batch, heads, n, rows)
        arguments["rel_w"] = torch.randn(batch, heads, n, columns)
    arguments = {name: value.to(dtype).to(device) for name, value in arguments.items()}
    return arguments | {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in extra.items()}


def _check(arguments, magnitude=1.0, **options):
    ops = functional.attention, reference.attention, reference.attention
    return assert_as_exact_as_eager(*ops, arguments | options, magnitude=magnitude)


# --- sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 16, 63, 64, 65, pytest.param(196, marks=SLOW), 197, pytest.param(257, marks=SLOW)])
def test_tokens(backend, device, n):
    _check(_arguments(device, torch.bfloat16, n=n, dim=32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT16], ids=str)
@pytest.mark.parametrize("dim", [1, 5, 32, 40, 48, 64, 72, 80, 96, 128, 256])
def test_head_dims(backend, device, dtype, dim):
    _check(_arguments(device, dtype, n=19, m=35, dim=dim))


@pytest.mark.parametrize(("dim", "value_dim"), [(32, 64), (80, 16), (16, 1), (48, 96), (16, 256)], ids=str)
def test_values_of_another_width(backend, device, dim, value_dim):
    _check(_arguments(device, torch.bfloat16, n=9, m=21, dim=dim, value_dim=value_dim))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 70), (70, 1), (5, 64), (66, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT16], ids=str)
def test_cross_attention(backend, device, dtype, n, m):
    _check(_arguments(device, dtype, n=n, m=m, batch=2, heads=2))


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 1), (4, 2), (6, 2)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_grouped_queries(backend, device, heads, key_heads, is_causal):
    arguments = _arguments(device, batch=2, heads=heads, key_heads=key_heads, n=9, m=12)
    _check(arguments, is_causal=is_causal)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("heads", [0, 1, 3])
def test_batches(backend, device, batch, heads):
    if heads == 0:  # a number of heads must divide by the keys' number of heads, which is then one
        arguments = _arguments(device, batch=batch, heads=1, n=5)
        arguments["query"] = arguments["query"][:, :0]
        results = run(functional.attention, arguments)
        assert results["output"].shape == (batch, 0, 5, 16)
        assert not results["gradient of key"].any()
    else:
        _check(_arguments(device, batch=batch, heads=heads, n=5))


def test_an_empty_batch_with_every_extra(backend, device):
    arguments = _arguments(device, batch=0, heads=2, n=5, m=6, rel=(2, 3), attn_mask=torch.randn(2, 1, 6))
    results = run(functional.attention, arguments)
    assert results["gradient of rel_h"].shape == (0, 2, 5, 2)
    assert not results["gradient of attn_mask"].any()
    assert results["gradient of attn_mask"].shape == (2, 1, 6)


# --- scale and range ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 1e-3])
def test_scale(backend, device, scale):
    _check(_arguments(device, n=9, m=12), scale=scale)


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_scale_with_a_mask(backend, device, scale, kind):
    """A scale of 0 times a masked score of −∞ is NaN; a negative one turns the largest product into the smallest score."""
    mask = torch.randn(9, 20) if kind == "additive" else torch.rand(9, 20) > 0.3
    mask[::3] = -torch.inf if kind == "additive" else False
    _check(_arguments(device, n=9, m=20, attn_mask=mask), scale=scale)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scale_with_rel(backend, device, scale):
    _check(_arguments(device, n=15, rel=(3, 5)), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1], ids=["+", "-"])
def test_logits_of_ten_thousand(backend, device, dtype, sign):
    """All scores near ±10⁴, which overflow without the running maximum, and their differences still tell keys apart."""
    arguments = _arguments(device, dtype, n=9, m=20, dim=16)
    arguments["query"] = torch.full_like(arguments["query"], 100.0 * sign)
    arguments["key"] = torch.full_like(arguments["key"], 25.0)
    arguments["key"][..., 0] += torch.arange(20.0, device=device).to(dtype) / 128
    results = run(functional.attention, arguments)
    exact = run(reference.attention, arguments, torch.float64)
    for name in ("output", "gradient of value"):
        # float32 scores of 10⁴ are known to 5e-4, each, which their exponentials inherit.
        tolerance = {torch.float32: 4e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(results[name].double(), exact[name], rtol=tolerance, atol=tolerance)
    assert all(value.isfinite().all() for value in results.values())


def test_one_key_far_above_the_rest_arriving_last(backend, device):
    """The running maximum jumps in the last tile: everything summed before must be scaled to nothing."""
    arguments = _arguments(device, n=3, m=70, dim=16)
    arguments["key"][:, :, 69] = arguments["query"].mean(2).sign() * 100
    _check(arguments, magnitude=100.0)


# --- masks ----------------------------------------------------------------------------------------------------------------

BROADCASTS = [
    (2, 3, 5, 7), (1, 3, 5, 7), (2, 1, 5, 7), (2, 3, 1, 7), (2, 3, 5, 1), (1, 1, 5, 7), (2, 1, 1, 7), (1, 3, 1, 7), (1, 1, 1, 7),
    (2, 3, 1, 1), (1, 1, 1, 1), (3, 1, 7), (5, 7), (),
    *(pytest.param(shape, marks=SLOW) for shape in [(3, 5, 7), (1, 5, 7), (1, 7), (5, 1), (7,), (1,)]),
]  # fmt: skip


@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_mask_broadcasts(backend, device, shape, kind):
    mask = torch.randn(shape) if kind == "additive" else torch.rand(shape) > 0.3
    _check(_arguments(device, batch=2, heads=3, n=5, m=7, attn_mask=mask))


@pytest.mark.parametrize("shape", [(40, 70), (2, 1, 1, 70), (2, 2, 40, 1), (2, 1, 40, 70), (1, 2, 1, 70)], ids=str)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=SLOW)], ids=str)
def test_masks_of_several_tiles(backend, device, dtype, shape, kind):
    mask = torch.randn(shape).to(dtype) if kind == "additive" else torch.rand(shape) > 0.3
    _check(_arguments(device, dtype, batch=2, heads=2, n=40, m=70, attn_mask=mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_mask_beside_half_precision(backend, device, dtype):
    """The gradient of the mask comes back in the mask's own dtype."""
    arguments = _arguments(device, dtype, n=9, m=12, attn_mask=torch.randn(9, 12))
    results = run(functional.attention, arguments)
    exact = run(reference.attention, arguments, torch.float64)
    assert results["gradient of attn_mask"].dtype == torch.float32
    for name in results:
        tolerance = 4 * torch.finfo(dtype).eps * max(1.0, exact[name].abs().max().item())
        assert (results[name].double() - exact[name]).abs().max() <= tolerance, name


def _fully_masked(kind, dtype, n, m):
    mask = torch.zeros(n, m, dtype=dtype) if kind == "additive" else torch.ones(n, m, dtype=torch.bool)
    mask[::3] = -torch.inf if kind == "additive" else False
    return mask


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fully_masked_rows_give_zeros_and_zero_gradients(backend, device, dtype, kind):
    arguments = _arguments(device, dtype, n=20, m=70, dim=16, attn_mask=_fully_masked(kind, dtype, 20, 70))
    comparisons = assert_as_exact_as_eager(
        functional.attention, reference.attention, reference.attention, arguments | {"is_causal": False}
    )
    assert comparisons
    results = run(functional.attention, arguments)
    assert not results["output"][:, :, ::3].any()
    assert not results["gradient of query"][:, :, ::3].any()
    assert all(value.isfinite().all() for value in results.values())


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_everything_masked(backend, device, kind):
    mask = torch.zeros(1, 1, dtype=torch.bool) if kind == "boolean" else torch.full((1, 1), -torch.inf)
    results = run(functional.attention, _arguments(device, n=5, m=66, attn_mask=mask))
    for name, value in results.items():
        assert not value.any(), name


def test_fully_masked_rows_with_rel(backend, device):
    arguments = _arguments(device, n=12, m=12, rel=(3, 4), attn_mask=_fully_masked("boolean", None, 12, 12))
    _check(arguments)
    results = run(functional.attention, arguments)
    assert not results["gradient of rel_h"][:, :, ::3].any()
    assert not results["gradient of rel_w"][:, :, ::3].any()


def test_a_masked_tile_before_an_open_one(backend, device):
    """The first 66 keys are masked: the running maximum stays at −∞ through whole tiles, and −∞ − (−∞) is NaN."""
    mask = torch.zeros(1, 70, dtype=torch.bool)
    mask[:, 66:] = True
    _check(_arguments(device, n=5, m=70, attn_mask=mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finfo_min_masks(backend, device, dtype):
    """What transformers builds: the lowest finite number, not −∞. Added to a negative score it must not become NaN."""
    mask = torch.zeros(1, 1, 9, 20, dtype=dtype)
    mask[..., 12:] = torch.finfo(dtype).min
    arguments = _arguments(device, dtype, n=9, m=20, attn_mask=mask)
    with_mask = run(functional.attention, arguments)
    boolean = run(functional.attention, arguments | {"attn_mask": (mask == 0).to(device)})
    for name in boolean:
        tolerance = 8 * torch.finfo(dtype).eps  # two paths of PyTorch's own on the torch backend
        torch.testing.assert_close(with_mask[name], boolean[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_finfo_min_attends_to_something_finite(backend, device, dtype):
    """Every key at the lowest finite number is not "nothing to attend to"; a uniform average is what eager gives."""
    mask = torch.full((9, 20), torch.finfo(dtype).min, dtype=dtype)
    results = run(functional.attention, _arguments(device, dtype, n=9, m=20, attn_mask=mask))
    assert all(value.isfinite().all() for value in results.values())
    if backend == "triton":
        assert results["output"].any()


@pytest.mark.parametrize(("n", "m"), [(9, 9), (5, 12), (12, 5), (70, 40), (40, 70), (1, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_causal(backend, device, dtype, n, m):
    """Query n attends to keys m ≤ n, aligned top left, also where N ≠ M."""
    _check(_arguments(device, dtype, heads=2, n=n, m=m), is_causal=True)


def test_few_keys_of_many_causal_queries_overflow_no_program(triton_backend):
    """Tiles times the heads taken together, a product of 32 bits in the kernel."""
    q, k = (torch.empty(1, 1, tokens, 1, dtype=torch.bfloat16, device="meta") for tokens in (2**20, 1))
    with record("sm_90") as launches:
        attention_forward.launch_attention_forward(q, k, k, None, None, None, True, 1.0, q, None)
    assert launches[0].grid[0] * launches[0].arguments["together"] < 2**31


@in_the_interpreter
def test_causal_takes_heads_together_in_any_number(triton_backend, device, monkeypatch):
    """The order of programs, of which the last may be of fewer heads, changes no result."""
    q, k, v = (torch.randn(1, 5, 70, 16, device=device) for _ in range(3))
    results = []
    for heads in (1, 2, 5, 9):
        monkeypatch.setattr("fastvit.kernels.attention_forward.L2_BYTES", heads * 70 * 32 * 4)
        results.append(functional.attention(q, k, v, is_causal=True))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_causal_with_a_mask(backend, device, kind):
    """Together they leave some rows with nothing: query 0 may see key 0 only, which the mask forbids."""
    mask = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    mask[..., 0] = False
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    arguments = _arguments(device, batch=2, heads=2, n=9, m=12, attn_mask=mask)
    _check(arguments, is_causal=True)
    assert not run(functional.attention, arguments | {"is_causal": True})["output"][:, :, 0].any()


def test_gradient_of_a_mask_that_needs_none(backend, device):
    arguments = _arguments(device, n=9, m=12, attn_mask=torch.randn(9, 12))
    leaves = {name: value.requires_grad_(name != "attn_mask") for name, value in arguments.items()}
    functional.attention(**leaves).sum().backward()
    assert leaves["attn_mask"].grad is None
    assert leaves["query"].grad is not None


# --- decomposed relative positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT16], ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (3, 5), (5, 14), (14, 5), (9, 8)], ids=str)
def test_rel(backend, device, dtype, grid):
    rows, columns = grid
    heads = 2 if rows * columns < 64 else 1  # several of either, not both: each is its own part of the offsets
    _check(_arguments(device, dtype, heads=heads, n=rows * columns, dim=16, rel=grid))


@pytest.mark.parametrize("dim", [64, 80])
def test_rel_with_sams_head_dims(backend, device, dim):
    _check(_arguments(device, torch.bfloat16, n=35, dim=dim, rel=(5, 7)))


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(14, 14), (2, 64), (3, 65)], ids=["SAM's window", "64 columns", "65 columns"])
def test_rel_with_sams_grids(backend, device, grid):
    """A window of 14×14 tokens; rows of 64 keys fill a tile exactly, rows of 65 do not."""
    rows, columns = grid
    _check(_arguments(device, torch.bfloat16, n=rows * columns, dim=32, rel=grid))


@pytest.mark.parametrize("n", [1, 20])
def test_rel_with_other_queries_than_keys(backend, device, n):
    _check(_arguments(device, heads=2, n=n, m=15, rel=(3, 5)))


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_rel_with_a_mask(backend, device, kind, is_causal):
    mask = torch.randn(2, 1, 15, 15) if kind == "additive" else torch.rand(2, 1, 15, 15) > 0.3
    _check(_arguments(device, batch=2, heads=2, n=15, rel=(3, 5), attn_mask=mask), is_causal=is_causal)


def test_rel_with_grouped_queries(backend, device):
    _check(_arguments(device, batch=2, heads=4, key_heads=2, n=15, rel=(3, 5)))


@in_the_interpreter
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_rel_with_rows_of_a_users_table(triton_backend, device, monkeypatch, is_causal):
    """More parts of a sum than a row has keys, and key blocks of another size where attention is causal."""
    table = copy.deepcopy(_tuning.table("interpreter"))
    config = {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    table["ops"]["attention_forward"] = [{"when": {}, "config": config | {"PARTS": 32}}]
    rows = [{"when": {"causal": 0}, "config": config}, {"when": {}, "config": config | {"BLOCK_N": 16}}]
    table["ops"]["attention_backward_query"] = rows
    monkeypatch.setattr(_tuning, "table", lambda target: table)
    _tuning.config.cache_clear()
    try:
        _check(_arguments(device, n=36, rel=(2, 18)), is_causal=is_causal)
    finally:
        _tuning.config.cache_clear()


# --- layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [16, 40])
def test_layouts(backend, device, layout, dim):
    """NaN lies beside every element that is not the tensor's own."""
    arguments = _arguments(device, torch.bfloat16, batch=2, heads=2, n=9, m=12, dim=dim, rel=(3, 4))
    arguments |= {name: lay_out(value, layout) for name, value in arguments.items()}
    _check(arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_mask_layouts(backend, device, layout, kind):
    mask = torch.randn(2, 2, 9, 12) if kind == "additive" else torch.rand(2, 2, 9, 12) > 0.3
    arguments = _arguments(device, batch=2, heads=2, n=9, m=12)
    arguments["attn_mask"] = lay_out(mask.to(device), layout)
    _check(arguments)


@pytest.mark.parametrize("order", ["B N 3 H D", "B N H 3 D", "3 B H N D"])
def test_packed_qkv(backend, device, order):
    """Slices of one qkv tensor, as models make them; gradients arrive in one tensor again."""
    batch, heads, n, dim = 2, 3, 17, 16
    shapes = {
        "B N 3 H D": (batch, n, 3, heads, dim),
        "B N H 3 D": (batch, n, heads, 3, dim),
        "3 B H N D": (3, batch, heads, n, dim),
    }
    orders = {"B N 3 H D": (2, 0, 3, 1, 4), "B N H 3 D": (3, 0, 2, 1, 4), "3 B H N D": (0, 1, 2, 3, 4)}

    def packed(op):
        return lambda qkv: op(*qkv.permute(orders[order]).unbind(0)).transpose(1, 2).flatten(2)

    arguments = {"qkv": embedded(torch.randn(shapes[order], device=device))}
    assert_as_exact_as_eager(packed(functional.attention), packed(reference.attention), packed(reference.attention), arguments)


def test_the_output_lies_as_the_next_linear_wants_it(triton_backend, device):
    """(B, H, N, D) over (B, N, H, D) memory: merging the heads is a view."""
    out = functional.attention(**_arguments(device, batch=2, heads=3, n=5))
    assert out.transpose(1, 2).is_contiguous()


def test_an_upstream_gradient_of_any_layout(backend, device):
    arguments = _arguments(device, batch=2, heads=2, n=9, m=12)

    def consumer(op):
        def function(**named):
            out = op(**named)
            return out.permute(3, 2, 1, 0).contiguous() * torch.arange(2.0, device=out.device), out.sum()

        return function

    assert_as_exact_as_eager(
        consumer(functional.attention), consumer(reference.attention), consumer(reference.attention), arguments
    )


def test_one_tensor_thrice(backend, device):
    """q, k and v are the same tensor: its gradient is the sum of three."""
    arguments = {"x": torch.randn(1, 2, 17, 16, device=device)}

    def same(op):
        return lambda x: op(x, x, x)

    assert_as_exact_as_eager(same(functional.attention), same(reference.attention), same(reference.attention), arguments)


# --- the rest -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", ["plain", "additive mask", "rel"])
def test_the_same_bits_twice(backend, device, extra):
    """Backward included, which is where atomics would show. A mask broadcast over batch and heads sums over both."""
    mask = {"batch": 2, "heads": 2, "attn_mask": torch.randn(1, 70).bfloat16()}
    options = {"additive mask": mask, "rel": {"rel": (7, 10)}}.get(extra, {})
    arguments = _arguments(device, torch.bfloat16, n=70, **options)
    first, second = (run(functional.attention, arguments) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@triton.jit
def _statistics(lse_ptr, delta_ptr, out_ptr, rows, COPIES: tl.constexpr, ROWS: tl.constexpr, BOUNDED: tl.constexpr):
    row = tl.arange(0, ROWS).to(tl.int64)
    lse, delta = load_statistics(lse_ptr, delta_ptr, row, row < rows, COPIES, ROWS, BOUNDED)
    tl.store(out_ptr + row, lse)
    tl.store(out_ptr + ROWS + row, delta)


@pytest.mark.parametrize("rows", [16, 13])
@pytest.mark.parametrize("copies", [0, 1, 2, 8])
def test_statistics_are_read_in_turns(device, copies, rows):
    if copies and torch.version.hip:
        pytest.skip("AMD's compiler takes no choice between two pointers")
    saved = torch.randn(2, 16, device=device)
    saved[:, rows:] = float("nan")
    out = torch.empty_like(saved)
    _statistics[(1,)](saved[0], saved[1], out, rows, COPIES=copies, ROWS=16, BOUNDED=rows < 16)
    assert torch.equal(out, saved.nan_to_num(0.0))


@pytest.mark.parametrize("name", ["query", "key", "value", "rel_h", "rel_w"])
def test_only_one_needs_a_gradient(backend, device, name):
    arguments = _arguments(device, heads=2, n=12, rel=(3, 4))
    full = run(functional.attention, arguments)
    leaves = {key: value.detach().requires_grad_(key == name) for key, value in arguments.items()}
    out = functional.attention(**leaves)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(out))
    torch.testing.assert_close(leaves[name].grad, full[f"gradient of {name}"], rtol=1e-4, atol=1e-5)
    assert all(leaf.grad is None for key, leaf in leaves.items() if key != name)


def test_the_backends_agree(device):
    arguments = _arguments(device, heads=2, n=35, m=70, attn_mask=torch.randn(35, 70))
    results = []
    for name in ("triton", "torch"):
        with fastvit.use_backend(name):
            results.append(run(functional.attention, arguments))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "block"),
    [(1, 16, 1370, 64), (1, 12, 577, 64), (1, 12, 1370, 128), (1, 12, 4096, 128), (64, 12, 577, 128), (2, 16, 1370, 128)],
)
def test_tiles_are_smaller_where_multiprocessors_would_have_one_more_than_others(batch, heads, tokens, block):
    """Recorded, nothing computed: 132 multiprocessors, and whole numbers of programs on each."""
    q, out = (torch.empty(batch, heads, tokens, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with record("sm_90") as launches:
        attention_forward.launch_attention_forward(q, q, q, None, None, None, False, 0.125, out, None)
    (launch,) = launches
    assert launch.arguments["BLOCK_M"] == block == 16 * launch.options["num_warps"]
    assert launch.grid == (batch * heads * triton.cdiv(tokens, block),)
