"""linear and mlp against float64, on both backends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastvit.kernels import linear, linear_persistent, linear_split
from fastvit.kernels._launch import record
from fastvit.kernels._tuning import config, override

import fastvit
from benchmarks import candidates, tune
from benchmarks.tuning_bench import digest
from fastvit import functional, reference
from tests.errors import DTYPES, assert_as_exact_as_eager, run
from tests.layouts import LAYOUTS, lay_out

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ACTIVATIONS = ["gelu", "gelu_tanh", "quick_gelu", "relu", None]


def _activate(x, activation):
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return reference.activate(x, activation)


def _eager(input, weight, bias=None, *, activation=None):
    return _activate(F.linear(input, weight, bias), activation)


def _eager_mlp(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, activation="gelu"):
    return F.linear(_activate(F.linear(input, fc1_weight, fc1_bias), activation), fc2_weight, fc2_bias)


def _arguments(m, n, k, dtype, device, bias=True, lead=()):
    arguments = {"input": torch.randn(*lead, m, k), "weight": torch.randn(n, k) * k**-0.5}
    if bias:
        arguments["bias"] = torch.randn(n)
    return {name: value.to(dtype).to(device) for name, value in arguments.items()}


def _mlp_arguments(shape, hidden, out, dtype, device):
    tensors = {
        "input": torch.randn(shape),
        "fc1_weight": torch.randn(hidden, shape[-1]) * shape[-1] ** -0.5,
        "fc1_bias": torch.randn(hidden),
        "fc2_weight": torch.randn(out, hidden) * hidden**-0.5,
        "fc2_bias": torch.randn(out),
    }
    return {name: value.to(dtype).to(device) for name, value in tensors.items()}


def _check(arguments, activation=None):
    return assert_as_exact_as_eager(functional.linear, _eager, reference.linear, arguments | {"activation": activation})


def _check_mlp(arguments, activation="gelu"):
    return assert_as_exact_as_eager(functional.mlp, _eager_mlp, reference.mlp, arguments | {"activation": activation})


# Every dimension at, below and above a tile's edge, and prime.
SHAPES = [(1, 1, 1), (1, 64, 64), (17, 63, 65), (64, 1, 17), (65, 130, 1), (3, 384, 48), (130, 96, 63), (70, 16, 384)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids="M{0[0]} N{0[1]} K{0[2]}".format)
def test_shapes(backend, device, dtype, shape):
    _check(_arguments(*shape, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_activations(backend, device, dtype, activation, bias):
    _check(_arguments(33, 40, 48, dtype, device, bias=bias), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a])
def test_activations_from_end_to_end(backend, device, dtype, activation):
    """Every value an activation can meet, far tails included, forward and derivative: a weight of 1 hands it through."""
    x = torch.cat([torch.linspace(-12, 12, 509), torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])])
    arguments = {"input": x[:, None].to(dtype).to(device), "weight": torch.ones(1, 1, dtype=dtype, device=device)}
    comparisons = assert_as_exact_as_eager(
        lambda **named: functional.linear(**named, activation=activation)[:509],
        lambda **named: _eager(**named, activation=activation)[:509],
        lambda **named: reference.linear(**named, activation=activation)[:509],
        {name: value if name == "weight" else value[:509] for name, value in arguments.items()},
    )
    assert comparisons
    ends = run(functional.linear, arguments | {"activation": activation})
    assert ends["output"][509:, 0].tolist() == pytest.approx([0, 0, 0, 100, float(torch.tensor(1e4).to(dtype))], abs=1e-6)
    slope = ends["gradient of input"][509:, 0]
    assert slope.isfinite().all()
    assert not slope[:2].any()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_float32_activations_are_exact(backend, device, activation):
    """The fitted GELU of half-precision outputs must not leak into float32, where its 3e-5 would show."""
    x = torch.linspace(-8, 8, 257, device=device)[:, None]
    weight = torch.ones(1, 1, device=device)
    ours = functional.linear(x, weight, activation=activation)
    exact = reference.linear(x.double(), weight.double(), activation=activation)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a])
def test_nan_and_infinity_come_through(device, dtype, activation):
    """A model that went wrong has to be seen: a maximum that drops NaN would hide it."""
    x = torch.tensor([[float("nan")], [float("inf")]], dtype=dtype, device=device)
    with fastvit.use_backend("triton"):
        out = functional.linear(x, torch.ones(1, 1, dtype=dtype, device=device), activation=activation)
    assert out[0].isnan()
    assert out[1].isposinf()


@pytest.mark.parametrize("lead", [(2, 3), (0,), (2, 0), ()], ids=str)
@pytest.mark.parametrize("activation", ["gelu", None])
def test_batch_dimensions(backend, device, lead, activation):
    arguments = _arguments(5, 24, 16, torch.float32, device, lead=lead)
    if lead == ():
        arguments["input"] = arguments["input"][0]  # a vector
    _check(arguments, activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", LAYOUTS)
def test_layouts(backend, device, layout, weight_layout):
    arguments = _arguments(7, 20, 24, torch.bfloat16, device, lead=(2,))
    arguments["input"] = lay_out(arguments["input"], layout)
    arguments["weight"] = lay_out(arguments["weight"], weight_layout)
    arguments["bias"] = lay_out(arguments["bias"], "gaps")
    _check(arguments, "gelu")


def test_an_upstream_gradient_of_any_layout(backend, device):
    arguments = _arguments(5, 24, 16, torch.float32, device, lead=(3,))

    def consumer(op):
        def function(**named):
            out = op(**named, activation="gelu")
            return out.transpose(0, 2).contiguous() * torch.arange(3.0, device=out.device), out.sum()

        return function

    assert_as_exact_as_eager(consumer(functional.linear), consumer(_eager), consumer(reference.linear), arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(backend, device, dtype, activation):
    _check_mlp(_mlp_arguments((2, 17, 24), 72, 24, dtype, device), activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("missing", [("fc1_bias",), ("fc2_bias",), ("fc1_bias", "fc2_bias")], ids=" and ".join)
def test_mlp_without_biases(backend, device, dtype, missing):
    arguments = _mlp_arguments((2, 5, 16), 40, 24, dtype, device)
    _check_mlp(arguments | dict.fromkeys(missing))


@pytest.mark.parametrize("lead", [(0,), (2, 0), (2, 3, 2), ()], ids=str)
def test_mlp_batch_dimensions(backend, device, lead):
    _check_mlp(_mlp_arguments((*lead, 16), 40, 24, torch.float32, device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mlp_layouts(backend, device, layout):
    arguments = _mlp_arguments((2, 7, 16), 40, 24, torch.bfloat16, device)
    _check_mlp({name: lay_out(value, "gaps" if value.dim() == 1 else layout) for name, value in arguments.items()})


# --- K split among programs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tiles_of_many_steps(device, dtype):
    arguments = _arguments(5, 20, 1990, dtype, device)
    with fastvit.use_backend("triton"):
        assert linear_split.splits_of(arguments["input"], arguments["weight"]) > 1
        _check(arguments, "gelu")


def test_a_weight_gradient_over_many_tokens(device):
    arguments = _arguments(1400, 16, 8, torch.bfloat16, device)
    with fastvit.use_backend("triton"):
        assert linear_split.splits_of(arguments["weight"].new_empty(1400, 16).t(), arguments["input"].t()) > 1
        _check(arguments)


def test_a_hidden_gradient_from_many_outputs(device):
    """Backward's epilogue, derivative and hidden layer, in the kernel that adds up."""
    arguments = _mlp_arguments((6, 8), 24, 2000, torch.bfloat16, device)
    with fastvit.use_backend("triton"):
        assert linear_split.splits_of(arguments["input"].new_empty(6, 2000), arguments["fc2_weight"].t(), True) > 1
        _check_mlp(arguments)


@pytest.mark.parametrize(
    ("shape", "split"),
    [((197, 768, 3072), True), ((257, 1280, 5120), True), ((197, 3072, 768), False), ((50432, 768, 3072), False)],
    ids=["ViT-B fc2, batch 1", "ViT-H fc2, batch 1", "ViT-B fc1, batch 1", "ViT-B fc2, batch 256"],
)
def test_what_is_split(shape, split):
    """Where programs are fewer than multiprocessors and K is long; no part is empty."""
    parts, row = linear_split._splits_of("sm_90", False, 2, *shape), config("linear", "sm_90", element_size=2, **_named(*shape))
    assert (parts > 1) == split
    steps = -(-shape[2] // row["BLOCK_K"])
    assert (parts - 1) * -(-steps // parts) < steps


def _named(rows, columns, depth):
    return {"rows": rows, "columns": columns, "depth": depth}


# --- programs that stay ------------------------------------------------------------------------------------------------------

TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}


@pytest.fixture
def three_multiprocessors(monkeypatch):
    monkeypatch.setattr(linear_persistent, "multiprocessors", lambda tensor: 3)


@pytest.mark.parametrize(
    ("shape", "dtype", "activation", "each"),
    [
        ((40, 97, 16), torch.float32, "gelu", 1),
        ((64, 128, 32), torch.bfloat16, "gelu", 2),
        ((1, 250, 48), torch.bfloat16, None, 1),
    ],
    ids=["edges", "whole tiles, two programs a multiprocessor", "one row"],
)
def test_programs_that_stay_give_the_same_bits(device, three_multiprocessors, shape, dtype, activation, each):
    """As one program a tile: output and pre-activation, edges, a number of tiles that the programs do not divide."""
    x, weight, bias = _arguments(*shape, dtype, device).values()
    found = []
    for knob, kernel in ((0, linear._linear), (each, linear_persistent._linear_persistent)):
        for with_bias, keep in ((bias, True), (None, False)):
            out, pre = (torch.full(shape[:2], float("nan"), dtype=dtype, device=device) for _ in range(2))
            arguments = x, weight, with_bias, out, pre if keep else None, None, activation
            with override("linear", TILE | {"HALVINGS": 1, "PERSISTENT": knob}):
                with record("sm_90") as launches:
                    linear.launch_linear(*arguments)
                linear.launch_linear(*arguments)
            assert [launch.kernel for launch in launches] == [kernel]
            assert launches[0].grid == ((3 * each,) if knob else (linear.tiles(x, weight, TILE),))
            assert out.isfinite().all()
            found.append((out, pre.nan_to_num()))
    for plain, staying in zip(found[:2], found[2:], strict=True):
        assert all(map(torch.equal, plain, staying))


@pytest.mark.parametrize(
    ("shape", "transposed"),
    [((64, 32, 16), ""), ((128, 64, 40), ""), ((128, 64, 32), "input"), ((128, 64, 32), "weight"), ((0, 64, 32), "")],
    ids=["a tile a program at most", "rows that begin at no multiple of 16", "input transposed", "weight transposed", "batch 0"],
)
def test_what_programs_do_not_stay_for(device, three_multiprocessors, shape, transposed):
    """One program a tile there, the very same launch: to the tuner a candidate that was measured already."""
    x, weight, bias = _arguments(*shape, torch.bfloat16, device).values()
    x, weight = (t.t().contiguous().t() if name == transposed else t for name, t in (("input", x), ("weight", weight)))
    digests = []
    for knob in (0, 1):
        with override("linear", TILE | {"PERSISTENT": knob}), record("sm_90") as launches:
            linear.launch_linear(x, weight, bias, x.new_empty(shape[:2]), None, None, "gelu")
        assert all(launch.kernel is linear._linear for launch in launches)
        assert len(launches) == bool(shape[0])
        digests.append(digest(launches))
    assert digests[0] == digests[1]


def test_the_tuner_measures_programs_that_stay():
    """Among the near candidates of the large product's row, at the tile that is worth it."""
    committed = config("linear", "sm_90", element_size=2, **_named(65792, 5120, 1280))
    near = candidates.grid(committed, "linear")[: tune.NEAR]
    assert any(found["PERSISTENT"] and found["BLOCK_N"] == 256 for found in near)
    assert not committed["PERSISTENT"]


COMPILED = """
import torch
from benchmarks.static import compilation, inspection
from fastvit.kernels import linear
from fastvit.kernels._launch import record
from fastvit.kernels._tuning import config, override

shapes = (65792, 1280), (5120, 1280), (5120,), (65792, 5120), (65792, 5120)
x, weight, bias, out, pre = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
row = config("linear", "sm_90", element_size=2, rows=65792, columns=5120, depth=1280)
with override("linear", row | {"BLOCK_N": 256, "PERSISTENT": 1}), record("sm_90") as launches:
    linear.launch_linear(x, weight, bias, out, pre, None, "gelu")
job = compilation.Job(launches[0], *compilation.specialize(launches[0], "sm_90"), asked_by=["fc1"])
report = compilation.compile_job(job, "sm_90")
print(report.kernel, report.stack, report.tensor_core["HGMMA"], report.shared >= 3 * 2 * 64 * (128 + 256))
print(*inspection.problems(report, 232448, []))
"""


@pytest.mark.slow
@pytest.mark.aot
def test_programs_that_stay_compile_for_hopper():
    """ViT-H's fc1 in training: no stack, wgmma, and in shared memory the three stages without which nothing is loaded ahead."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=root,
        env=environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.stdout == "_linear_persistent 0 4 True\n\n", ran.stdout + ran.stderr


@pytest.mark.parametrize("op", ["linear", "linear_backward"])
def test_an_epilogue_in_parts_gives_the_same_bits(device, op):
    arguments = _mlp_arguments((70, 16), 72, 24, torch.bfloat16, device)
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 8, "num_warps": 4, "num_stages": 2}
    found = []
    for halvings in range(3):
        with fastvit.use_backend("triton"), override(op, tile | {"HALVINGS": halvings}):
            found.append(run(functional.mlp, arguments))
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


@pytest.mark.parametrize("op", ["linear", "mlp"])
@pytest.mark.parametrize("frozen", ["input", "weight", "bias", "all but the input"])
def test_frozen_arguments(backend, device, op, frozen):
    """What needs no gradient gets none, and the others' do not change (each skips a different product)."""
    if op == "linear":
        arguments, function = _arguments(9, 24, 16, torch.float32, device) | {"activation": "gelu"}, functional.linear
    else:
        arguments, function = _mlp_arguments((9, 16), 24, 16, torch.float32, device), functional.mlp
    full = run(function, arguments)
    leaves = {}
    for name, value in arguments.items():
        fixed = name != "input" if frozen == "all but the input" else name.endswith(frozen)
        leaves[name] = value.detach().requires_grad_(not fixed) if isinstance(value, torch.Tensor) else value
    out = function(**leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16)
    out.backward(upstream.to(out))
    for name, leaf in leaves.items():
        if isinstance(leaf, torch.Tensor):
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, full[f"gradient of {name}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", ["linear", "mlp"])
def test_the_same_bits_twice(backend, device, op):
    if op == "linear":
        arguments, function = _arguments(130, 70, 48, torch.bfloat16, device) | {"activation": "gelu"}, functional.linear
    else:
        arguments, function = _mlp_arguments((130, 16), 70, 16, torch.bfloat16, device), functional.mlp
    first, second = (run(function, arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inference_gives_what_training_gives(backend, device):
    """The two paths save different things; the result must not depend on which was taken."""
    arguments = _mlp_arguments((9, 16), 24, 16, torch.bfloat16, device)
    trained = run(functional.mlp, arguments)["output"]
    with torch.no_grad():
        assert torch.equal(functional.mlp(**arguments), trained)


def test_inputs_are_left_alone(backend, device):
    """The torch backend writes activations in place in inference: over its own tensors only."""
    arguments = _mlp_arguments((9, 16), 24, 16, torch.float32, device)
    copies = {name: value.clone() for name, value in arguments.items()}
    with torch.no_grad():
        for activation in ACTIVATIONS:
            functional.mlp(**arguments, activation=activation)
            functional.linear(arguments["input"], arguments["fc1_weight"], activation=activation)
    assert all(torch.equal(arguments[name], copies[name]) for name in arguments)


def test_float32_products_are_exact_unless_pytorch_allows_tf32(device):
    """TF32 keeps 10 bits: a product of 1 + 2⁻¹² tells it from float32. The interpreter knows no TF32; a GPU does."""
    x = torch.full((16, 64), 1 + 2.0**-12, device=device)
    with fastvit.use_backend("triton"):
        assert functional.linear(x, torch.eye(64, device=device)).eq(1 + 2.0**-12).all()
