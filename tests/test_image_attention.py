"""image_attention against float64, on both backends: every way in which a window can meet the edge of the image."""

import copy
import re

import pytest
import torch
import torch._dynamo.testing
from fastvit.kernels import _launch, _tuning
from torch.utils.checkpoint import checkpoint

import fastvit
from fastvit import functional, reference
from fastvit.ops import image_attention, torch_backend, torch_image_attention
from tests.errors import DTYPES, assert_as_exact_as_eager, run
from tests.layouts import LAYOUTS, lay_out
from tests.test_offsets import _far_apart as far_apart
from tests.test_torch_backend import _LargestTensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _arguments(device, dtype=torch.float32, grid=(5, 6), window=0, heads=1, dim=16, batch=1, rel=True, pad=True, lengths=None):
    height, width = (window, window) if window else grid
    tokens = {"qkv": torch.randn(batch, *grid, 3 * heads * dim)}
    if rel:
        rows, columns = lengths or (2 * height - 1, 2 * width - 1)
        tokens |= {"rel_pos_h": torch.randn(rows, dim), "rel_pos_w": torch.randn(columns, dim)}
        # As large as the scores, so that neither hides an error of the other.
        tokens = {name: value * (dim**-0.25 if name.startswith("rel") else 1) for name, value in tokens.items()}
    if pad:
        tokens["pad_qkv"] = torch.randn(3 * heads * dim)
    tokens = {name: value.to(dtype).to(device) for name, value in tokens.items()}
    return tokens | {"num_heads": heads, "window_size": window}


def _check(arguments, magnitude=1.0, **options):
    ops = functional.image_attention, reference.image_attention, reference.image_attention
    return assert_as_exact_as_eager(*ops, arguments | options, magnitude=magnitude)


# Where an axis has one key, or a table one row, all keys get the same bias, which softmax ignores: the table's gradient is
# nothing but the rounding of the products dout·v (16 terms of size one) that it is the difference of.
IGNORED_BIAS = 16**0.5


# --- windows and grids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 4, 14])
@pytest.mark.parametrize("grid", [(9, 11), (7, 5), (8, 4)], ids=str)
def test_grids_and_windows(backend, device, grid, window):
    """Windows that fit, that stick out at the bottom, at the right or both, and one larger than the image."""
    _check(_arguments(device, grid=grid, window=window))


def test_a_window_that_is_mostly_padding_is_as_exact():
    """Its thousand keys without an image are one value, which rounds the same way each time that it is added."""
    torch.manual_seed(0)
    with fastvit.use_backend("torch"):
        _check(_arguments("cpu", grid=(2, 41), window=40, rel=False))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [0, 4])
def test_dtypes(backend, device, dtype, window):
    _check(_arguments(device, dtype, grid=(5, 7), window=window, heads=2, batch=2))


@pytest.mark.parametrize("dim", [1, 16, 32, 48, 64, 80, 256])
@pytest.mark.parametrize("window", [0, 4])
def test_head_dims(backend, device, dim, window):
    _check(_arguments(device, torch.bfloat16, grid=(5, 3), window=window, dim=dim))


def test_float32_beyond_192_is_two_halves(triton_backend, device):
    _check(_arguments(device, torch.float32, grid=(3, 2), window=2, dim=200))


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1)], ids=str)
@pytest.mark.parametrize("window", [0, 1, 3])
def test_a_single_row_or_column(backend, device, grid, window):
    _check(_arguments(device, grid=grid, window=window), magnitude=IGNORED_BIAS)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(2, 33), (33, 2), (3, 65), (17, 19)], ids=str)
def test_rows_wider_than_a_tile(backend, device, grid):
    _check(_arguments(device, torch.bfloat16, grid=grid))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 80])
def test_sams_windows(backend, device, dim):
    """14 × 14, the image ending 8 tokens into the second."""
    _check(_arguments(device, torch.bfloat16, grid=(14, 22), window=14, dim=dim))


def _launches(monkeypatch, op, rows, **flag):
    """The names of the launches made from here on, with ``rows`` for ``op`` and the ``flag`` that chooses it in every row."""
    table = copy.deepcopy(_tuning.table(_launch.target_of(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))))
    for row in table["ops"]["image_attention_forward"]:
        row["config"] |= flag
    table["ops"][op] = rows
    monkeypatch.setattr(_tuning, "table", lambda target: table)
    _tuning.config.cache_clear()
    names = []

    def noted(op, *arguments, **options):
        names.append(op)
        _launch.launch(op, *arguments, **options)

    for module in (op, "image_attention_forward"):
        monkeypatch.setattr(f"fastvit.kernels.{module}.launch", noted)
    return names


@pytest.fixture
def one_pass(triton_backend, monkeypatch):
    """Windows whose keys are held all at once, as on GPUs with the memory for it; the names of the launches made."""
    config = {"BLOCK_M": 64, "BLOCK_N": 64, "MIN_PROGRAMS": 4, "num_warps": 4, "num_stages": 1}
    yield _launches(monkeypatch, "image_attention_window", [{"when": {}, "config": config}], TABLE=32, ONE_PASS=1)
    _tuning.config.cache_clear()


@pytest.fixture
def by_rows(triton_backend, monkeypatch):
    """Whole images by rows of 16 keys, positions in pairs; the names of the launches made."""
    config = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    rows = [{"when": {"head_dim": 16}, "config": config | {"PARTS": 8}}, {"when": {}, "config": config | {"PARTS": 1}}]
    yield _launches(monkeypatch, "image_attention_global", rows, TABLE=0, PAIRS=1)
    _tuning.config.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "window", "dim", "dtype"),
    [
        ((14, 17), 14, 80, torch.bfloat16),
        ((9, 11), 4, 16, torch.float32),
        ((5, 11), 4, 16, torch.float16),
        ((10, 3), 9, 48, torch.bfloat16),
        ((7, 5), 7, 64, torch.float16),
        ((11, 2), 0, 32, torch.bfloat16),
    ],
    ids=str,
)
def test_a_window_in_one_pass(one_pass, device, grid, window, dim, dtype):
    """One to four pieces of keys, the last of them narrower or not, with and without padding."""
    _check(_arguments(device, dtype, grid=grid, window=window, dim=dim, heads=2))
    assert one_pass[0] == "image_attention_window"


@pytest.mark.slow
@pytest.mark.parametrize("pad", [False, True], ids=["zeros", "pad"])
def test_a_window_in_one_pass_gives_what_one_by_tiles_gives(one_pass, device, pad, monkeypatch):
    """The output, and the lse that backward wants."""
    arguments = _arguments(device, grid=(7, 9), window=6, pad=pad, batch=2)
    call = (*(arguments.get(name) for name in ("qkv", "rel_pos_h", "rel_pos_w", "pad_qkv")), 1, (6, 6), 0.25)
    results = [image_attention.image_attention_forward(*call)]
    monkeypatch.setattr("fastvit.kernels.image_attention_forward.serves", lambda *arguments: False)
    results.append(image_attention.image_attention_forward(*call))
    assert one_pass == ["image_attention_window", "image_attention_forward"]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["one_pass", "triton_backend"])
def test_backward_weighs_by_the_positions_that_forward_summed(request, device, kernel):
    """Positions are rounded in memory, where backward reads them: a sum of others would leave every weight of a query too large
    or too small, which the gradients of values and of the padding add up."""
    request.getfixturevalue(kernel)
    arguments = _arguments(device, torch.bfloat16, grid=(9, 10), window=8, heads=2)
    _check(arguments | {name: 4 * arguments[name] for name in ("rel_pos_h", "rel_pos_w")})


@pytest.mark.parametrize("option", ["no tables", "a scale of nothing", "a negative scale", "a padded head dim", "a large window"])
@pytest.mark.slow
def test_what_one_pass_does_not_serve_goes_by_tiles(one_pass, device, option):
    window = 17 if option == "a large window" else 3
    arguments = _arguments(device, grid=(4, 3), window=window, rel=option != "no tables", dim=8 if "head dim" in option else 16)
    _check(arguments, scale={"a scale of nothing": 0.0, "a negative scale": -0.5}.get(option))
    assert one_pass[0] != "image_attention_window"


@pytest.mark.parametrize(
    ("rows", "dim", "dtype", "scale"),
    [
        (3, 16, torch.bfloat16, None),
        (3, 48, torch.bfloat16, None),
        (5, 16, torch.float16, None),
        (1, 16, torch.bfloat16, 2.0),
        (2, 80, torch.bfloat16, 0.3),
    ],
    ids=str,
)
def test_an_image_by_rows(by_rows, device, rows, dim, dtype, scale):
    """Scales that are powers of two and others, blocks of queries that are whole and one that is not."""
    _check(_arguments(device, dtype, grid=(rows, 16), dim=dim, heads=2, batch=2 if rows == 1 else 1), scale=scale)
    assert by_rows[0] == "image_attention_global"


@pytest.mark.parametrize("save", [False, True])
def test_an_image_by_rows_gives_what_one_by_tiles_gives(by_rows, device, save, monkeypatch):
    """The output, and the lse that backward wants."""
    arguments = _arguments(device, torch.bfloat16, grid=(4, 16), batch=2)
    call = (arguments["qkv"], arguments["rel_pos_h"], arguments["rel_pos_w"], None, 1, (4, 16), 0.25, save)
    results = [image_attention.image_attention_forward(*call)]
    monkeypatch.setattr("fastvit.kernels.image_attention_forward.serves_global", lambda *arguments: False)
    results.append(image_attention.image_attention_forward(*call))
    assert by_rows == ["image_attention_global", "image_attention_forward"]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2**-7, atol=2**-8)
    assert not save or torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


def test_an_image_by_rows_with_a_position_beyond_float16(by_rows, device):
    """A key at −inf has no weight, and the other keys have theirs."""
    arguments = _arguments(device, torch.float16, grid=(2, 16))
    arguments["qkv"][0, 0, 5, :16] = 200.0
    arguments["rel_pos_w"][12] = -30.0  # of keys three places to the right
    _check(arguments, scale=0.01)
    assert by_rows[0] == "image_attention_global"


@pytest.mark.parametrize("option", ["no tables", "float32", "a negative scale", "a padded head dim", "other rows", "a window"])
def test_what_is_not_served_by_rows_goes_by_tiles(by_rows, device, option):
    dtype = torch.float32 if option == "float32" else torch.bfloat16
    grid, window = (2, 15 if option == "other rows" else 16), 16 if option == "a window" else 0
    dim = 8 if option == "a padded head dim" else 16
    arguments = _arguments(device, dtype, grid, window, dim=dim, rel=option != "no tables")
    _check(arguments, scale=-0.5 if option == "a negative scale" else None)
    assert "image_attention_global" not in by_rows


@pytest.mark.slow
def test_a_window_of_several_blocks_of_queries(backend, device):
    _check(_arguments(device, torch.bfloat16, grid=(20, 21), window=18))


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("rel", [False, True], ids=["no tables", "tables"])
@pytest.mark.parametrize("pad", [False, True], ids=["zeros", "pad"])
def test_what_may_be_left_out(backend, device, window, rel, pad):
    _check(_arguments(device, grid=(5, 6), window=window, rel=rel, pad=pad))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("window", [0, 4])
def test_batches(backend, device, batch, window):
    arguments = _arguments(device, batch=batch, grid=(3, 5), window=window, heads=3)
    if batch:
        _check(arguments)
        return
    results = run(functional.image_attention, arguments)
    assert results["output"].shape == (0, 3, 5, 48)
    assert results["gradient of qkv"].shape == (0, 3, 5, 144)
    assert all(not results[f"gradient of {name}"].any() for name in ("rel_pos_h", "rel_pos_w", "pad_qkv"))


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(backend, device, scale):
    """The bias comes from the unscaled query: it stays where the scale takes the scores away."""
    _check(_arguments(device, grid=(5, 3), window=4), scale=scale)


def test_padded_keys_are_attended_to(backend, device):
    """As in SAM, where the padding is the bias of the projection; leaving it out would change the result."""
    arguments = _arguments(device, grid=(5, 6), window=4)
    other = arguments | {"pad_qkv": arguments["pad_qkv"] + 1}
    ours, others = (functional.image_attention(**each) for each in (arguments, other))
    assert torch.equal(ours[:, :4, :4], others[:, :4, :4])
    assert (ours[:, 4:] != others[:, 4:]).any(-1).all()
    assert (ours[:, :, 4:] != others[:, :, 4:]).any(-1).all()


def test_padding_that_no_window_needs_has_a_gradient_of_zeros(backend, device):
    results = run(functional.image_attention, _arguments(device, grid=(4, 4), window=4))
    assert not results["gradient of pad_qkv"].any()


def test_padding_as_amd_gpus_read_it(triton_backend, device, monkeypatch):
    """After the load instead of by address; keys that the window itself has not stay zeros, whatever the padding holds."""
    from fastvit.kernels import image_attention as kernel

    monkeypatch.setattr(kernel, "target_of", lambda tensor: "gfx942")
    arguments = _arguments(device, torch.bfloat16, grid=(5, 6), window=5, dim=48)
    assert kernel.pad_kind(arguments["qkv"], (5, 5), arguments["pad_qkv"]) == "value"
    _check(arguments)


# --- tables ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(5, 27), (13, 3)], ids=str)
@pytest.mark.parametrize("window", [0, 4])
def test_tables_of_another_length(backend, device, dtype, lengths, window):
    _check(_arguments(device, dtype, grid=(5, 6), window=window, lengths=lengths))


def test_a_table_of_one_row(backend, device):
    _check(_arguments(device, grid=(5, 3), lengths=(1, 9)), magnitude=IGNORED_BIAS)


# --- layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 4])
def test_layouts(backend, device, layout, window):
    """NaN lies beside every element that is not the tensor's own."""
    arguments = _arguments(device, torch.bfloat16, batch=2, heads=2, grid=(5, 3), window=window)
    for name in ("qkv", "rel_pos_h", "rel_pos_w"):
        arguments[name] = lay_out(arguments[name], layout)
    _check(arguments)


def test_a_crop_of_a_larger_image(backend, device):
    """Rows and columns of any stride: no copy of the image is needed to look at a part of it."""
    arguments = _arguments(device, grid=(5, 6), window=4)
    larger = torch.full((1, 9, 13, 48), torch.nan, device=device)
    crop = larger[:, 2:7, 1:13:2]
    arguments["qkv"] = crop.copy_(arguments["qkv"])
    _check(arguments)


def test_the_result_is_fresh_and_contiguous(backend, device):
    out = functional.image_attention(**_arguments(device, batch=2, heads=2, window=4))
    assert out.is_contiguous()
    out += 1


# --- range ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 4])
def test_large_scores(backend, device, window):
    """Biases of ±10⁴, which overflow without the running maximum."""
    arguments = _arguments(device, grid=(5, 6), window=window)
    arguments["rel_pos_h"] *= 2000
    results = run(functional.image_attention, arguments)
    exact = run(reference.image_attention, arguments, torch.float64)
    # float32 scores of 10⁴ are known to 5e-4, each, which their exponentials inherit.
    torch.testing.assert_close(results["output"].double(), exact["output"], rtol=5e-3, atol=5e-3)
    assert all(value.isfinite().all() for value in results.values())


# --- gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "tables and pad"])
def test_gradcheck(window, extras):
    arguments = _arguments("cpu", torch.float64, grid=(4, 5), window=window, dim=3, rel=extras, pad=extras)
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]

    def function(*tensors):
        return functional.image_attention(**(arguments | dict(zip(names, tensors, strict=True))))

    with fastvit.use_backend("torch"):
        assert torch.autograd.gradcheck(function, [arguments[name].requires_grad_() for name in names])


@pytest.mark.parametrize("wanted", ["qkv", "rel_pos_h", "rel_pos_w", "pad_qkv"])
def test_one_gradient_alone(backend, device, wanted):
    arguments = _arguments(device, grid=(5, 3), window=4)
    everything = run(functional.image_attention, arguments)
    arguments[wanted] = arguments[wanted].requires_grad_()
    out = functional.image_attention(**arguments)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(out)
    (gradient,) = torch.autograd.grad(out, arguments[wanted], upstream)
    torch.testing.assert_close(gradient, everything[f"gradient of {wanted}"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 4])
def test_the_same_bits_twice(backend, device, window):
    arguments = _arguments(device, torch.bfloat16, batch=2, heads=2, grid=(5, 6), window=window)
    first, second = (run(functional.image_attention, arguments) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- inside PyTorch -------------------------------------------------------------------------------------------------------


class _Layer(torch.nn.Module):
    """A projection to packed qkv and SAM's attention, as a model calls it: the padding is the projection's bias."""

    def __init__(self, window):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 96)
        size = (window, window) if window else (3, 5)
        self.rel_pos_h, self.rel_pos_w = (torch.nn.Parameter(torch.randn(2 * s - 1, 16)) for s in size)
        self.window = window

    def forward(self, x):
        tables = {"rel_pos_h": self.rel_pos_h, "rel_pos_w": self.rel_pos_w}
        pad = self.qkv.bias
        return functional.image_attention(self.qkv(x), num_heads=2, window_size=self.window, pad_qkv=pad, **tables)


@pytest.fixture(params=[0, 4], ids=["global", "windows"])
def layer(request, device):
    return _Layer(request.param).to(device)


def _step(layer, x):
    layer.zero_grad()
    out = layer(x)
    out.square().sum().backward()
    return [out.detach(), *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.slow
def test_compile_fullgraph_forward_and_backward(backend, device, layer):
    torch._dynamo.reset()
    x = torch.randn(2, 3, 5, 16, device=device)
    expected = [t.clone() for t in _step(layer, x)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_step(compiled, x), expected, rtol=1e-4, atol=1e-4)


def test_compiled_on_the_torch_backend_it_is_one_call(device):
    """However many windows and blocks of rows: traced, each would be compiled by itself, minutes a layer."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.EagerAndRecordGraphs()
    with fastvit.use_backend("torch"), torch.no_grad():
        layer, x = _Layer(4).to(device), torch.randn(1, 30, 22, 16, device=device)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend=graphs)(x), layer(x))
    calls = [node.target for graph in graphs.graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert calls[-1] is torch.ops.fastvit.torch_image_attention_forward
    assert len(calls) == 2, "the projection and the attention"


@pytest.mark.parametrize("frozen", ["", "rel_pos", "qkv"])
def test_compiled_on_the_torch_backend_gradients_are_the_same(device, frozen):
    torch._dynamo.reset()
    layer, x = _Layer(4).to(device), torch.randn(2, 5, 7, 16, device=device)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    found = []
    with fastvit.use_backend("torch"):
        for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            layer.zero_grad()
            given = x.clone().requires_grad_(frozen == "rel_pos")
            call(given).square().sum().backward()
            found.append([given.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_compile_takes_images_of_another_size(triton_backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(_Layer(4).to(device), fullgraph=True, backend="aot_eager")
    for grid in ((3, 5), (6, 4), (9, 7)):
        x = torch.randn(1, *grid, 16, device=device)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), compiled._orig_mod(x), rtol=1e-4, atol=1e-5)


def test_export_keeps_the_operator_by_name(triton_backend, device, layer):
    x = torch.randn(2, 3, 5, 16, device=device)
    with torch.no_grad():
        program = torch.export.export(layer, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), layer(x))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "fastvit.image_attention_forward.default" in targets


def test_export_on_the_torch_backend_needs_nothing_of_ours(device, layer):
    x = torch.randn(2, 3, 5, 16, device=device)
    with torch.no_grad(), fastvit.use_backend("torch"):
        program = torch.export.export(layer, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), layer(x))
    assert not any("fastvit" in str(node.target) for node in program.graph.nodes)


def test_autocast(backend, device, layer):
    """Tables in float32 beside a half-precision qkv, as in any model under autocast; gradients in the parameters' dtype."""
    x = torch.randn(2, 3, 5, 16, device=device)
    exact = _step(layer, x)
    exact = [t.clone() for t in exact]
    with torch.autocast(device, dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact[0], rtol=0.1, atol=0.1)
    layer.zero_grad()
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.slow
def test_checkpointing(backend, device, layer):
    x = torch.randn(2, 3, 5, 16, device=device)
    expected = [t.clone() for t in _step(layer, x)]
    checkpointed = _step(_Checkpointed(layer), x)
    assert all(torch.equal(a, b) for a, b in zip(checkpointed, expected, strict=True))


class _Checkpointed(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


# --- memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 14])
@pytest.mark.parametrize("backward", [False, True], ids=["inference", "training"])
def test_no_bias_matrix_in_memory(window, backward):
    """On the torch backend no tensor is larger than a block of query rows times the keys, or than qkv itself."""
    grid, heads, dim = 48, 2, 8
    arguments = _arguments("cpu", grid=(grid, grid), window=window, heads=heads, dim=dim)
    if backward:
        arguments = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with fastvit.use_backend("torch"), _LargestTensor() as largest, torch.set_grad_enabled(backward):
        out = functional.image_attention(**arguments)
        if backward:
            out.sum().backward()
    block = torch_image_attention.WINDOW_SCORES if window else torch_backend.BIAS_ROWS * grid**2
    assert largest.elements <= max(heads * block, arguments["qkv"].numel())
    assert heads * block < heads * grid**2 * (window or grid) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "row", "column"])
@pytest.mark.parametrize("window", [0, 2])
def test_strides_beyond_32_bits(triton_backend, device, dim, window):
    arguments = _arguments(device, torch.bfloat16, batch=3, grid=(3, 3), window=window)
    expected = run(functional.image_attention, arguments)
    far = run(functional.image_attention, arguments | {"qkv": far_apart(arguments["qkv"], dim)})
    assert all(torch.equal(far[name], expected[name]) for name in expected)


# --- wrong input ----------------------------------------------------------------------------------------------------------


def _zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


WRONG = {
    "no tensor": ({"qkv": [[1.0]]}, TypeError, "qkv is list"),
    "integers": ({"qkv": _zeros(1, 3, 5, 96, dtype=torch.int64)}, TypeError, "qkv of shape (1, 3, 5, 96) has dtype torch.int64"),
    "rank 3": ({"qkv": _zeros(15, 5, 96)}, ValueError, "qkv has shape (15, 5, 96)"),
    "no rows": ({"qkv": _zeros(1, 0, 5, 96)}, ValueError, "qkv has shape (1, 0, 5, 96)"),
    "no columns": ({"qkv": _zeros(1, 3, 0, 96)}, ValueError, "qkv has shape (1, 3, 0, 96)"),
    "channels that do not divide": ({"qkv": _zeros(1, 3, 5, 97)}, ValueError, "qkv has shape (1, 3, 5, 97)"),
    "no channels": ({"qkv": _zeros(1, 3, 5, 0)}, ValueError, "qkv has shape (1, 3, 5, 0)"),
    "heads of 257": ({"qkv": _zeros(1, 3, 5, 2 * 3 * 257), "pad_qkv": None}, ValueError, "a head_dim of 257"),
    "num_heads a float": ({"num_heads": 2.0}, TypeError, "num_heads is 2.0"),
    "num_heads of 0": ({"num_heads": 0}, ValueError, "num_heads is 0"),
    "window_size a bool": ({"window_size": True}, TypeError, "window_size is True"),
    "window_size negative": ({"window_size": -1}, ValueError, "window_size is -1"),
    "window_size a pair": ({"window_size": (14, 14)}, TypeError, "window_size is (14, 14)"),
    "scale no number": ({"scale": "1"}, TypeError, "scale is '1'"),
    "one table": ({"rel_pos_w": None}, ValueError, "rel_pos_w is None"),
    "the other table": ({"rel_pos_h": None}, ValueError, "rel_pos_h is None"),
    "a table of rank 3": ({"rel_pos_h": _zeros(1, 7, 16)}, ValueError, "rel_pos_h has shape (1, 7, 16)"),
    "a table of another width": ({"rel_pos_w": _zeros(7, 8)}, ValueError, "rel_pos_w has shape (7, 8)"),
    "an empty table": ({"rel_pos_w": _zeros(0, 16)}, ValueError, "rel_pos_w has shape (0, 16)"),
    "a table of another dtype": ({"rel_pos_h": _zeros(7, 16, dtype=torch.float16)}, TypeError, "rel_pos_h of shape (7, 16)"),
    "pad_qkv of another width": ({"pad_qkv": _zeros(32)}, ValueError, "pad_qkv has shape (32,)"),
    "pad_qkv of rank 2": ({"pad_qkv": _zeros(1, 96)}, ValueError, "pad_qkv has shape (1, 96)"),
    "pad_qkv of another dtype": ({"pad_qkv": _zeros(96, dtype=torch.float64)}, TypeError, "pad_qkv of shape (96,)"),
    "pad_qkv elsewhere": ({"pad_qkv": _zeros(96, device="meta")}, ValueError, "pad_qkv of shape (96,) is on meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(backend, case):
    change, error, message = WRONG[case]
    good = {"qkv": _zeros(1, 3, 5, 96), "num_heads": 2, "window_size": 4, "pad_qkv": _zeros(96)}
    good |= {"rel_pos_h": _zeros(7, 16), "rel_pos_w": _zeros(7, 16)}
    with pytest.raises(error, match=re.escape(message)):
        functional.image_attention(**(good | change))


def test_triton_refuses_float64(triton_backend, device):
    with pytest.raises(ValueError, match="float64"):
        functional.image_attention(_zeros(1, 3, 5, 48, dtype=torch.float64, device=device), num_heads=1)
