"""On ``auto``, which way serves a call: rules, promises that go before them, what is said of it.

Without a GPU ``functional.resolve`` is told that Triton serves the CPU. Rules are those of a user's table, or committed.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from fastvit.kernels import _launch, _tuning

import fastvit
from fastvit import acceleration, functional
from fastvit.ops import _recipes, dispatch
from tests.conftest import ON_GPU

DEVICE = "cuda" if ON_GPU else "cpu"
SDPA = {"when": {"queries": [5, None]}, "serve": "sdpa", "why": "long", "basis": "measured"}
KERNEL = {"when": {}, "serve": "kernel", "why": "short", "basis": "measured"}


def _forget():
    for remembered in (_tuning.committed, _tuning.table, _tuning.config):
        remembered.cache_clear()
    dispatch.forget()
    _recipes.forget()


@pytest.fixture
def rules(monkeypatch, tmp_path):
    """``rules(op, *rows)`` writes the user's rules to ``.path``; Triton serves the device on ``auto``."""
    target = _launch.target_of(torch.empty(0, device=DEVICE))

    def write(op, *rows):
        table = {"target": target, "provenance": "a test", "ops": {}, "dispatch": {op: list(rows)}}
        write.path.write_text(json.dumps(table))
        monkeypatch.setenv("FASTVIT_TABLES", str(tmp_path))
        _forget()

    write.path = tmp_path / f"{target}.json"
    monkeypatch.setattr(functional, "resolve", lambda tensor: "triton" if fastvit.get_backend() != "torch" else "torch")
    with fastvit.use_backend("auto"):
        yield write
    monkeypatch.undo()
    _forget()


@pytest.fixture
def sdpa_calls(monkeypatch):
    """One entry a call of PyTorch's fused attention."""
    calls, own = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[0].shape) or own(*a, **k))
    return calls


def _randn(*shape, **options):
    return torch.randn(*shape, device=DEVICE, **options)


def _qkv(queries=6, dim=16, heads=2, **options):
    return [_randn(1, heads, queries, dim, **options) for _ in range(3)]


# --- conditions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "holds"),
    [
        ({}, True),
        ({"queries": 6}, True),
        ({"queries": 5}, False),
        ({"queries": [6, None]}, True),
        ({"queries": [7, None]}, False),
        ({"queries": [None, 5]}, False),
        ({"queries": [6, 6]}, True),
        ({"kind": "plain"}, True),
        ({"kind": "masked"}, False),
        ({"kind": "plain", "queries": 5}, False),
        ({"nosuch": 5}, False),
        ({"kind": 5}, False),
    ],
)
def test_conditions(when, holds):
    assert _tuning.admits(when, {"kind": "plain", "queries": 6}) is holds


@pytest.mark.parametrize("target", [*_tuning.targets(), "default"])
def test_committed_rules(target):
    table = _tuning.committed(target)["dispatch"]
    assert table.keys() == _tuning.WAYS.keys()
    for op, rows in table.items():
        assert rows[-1]["when"] == {}, op
        assert all(row["serve"] in _tuning.WAYS[op] and row["why"] and row["basis"] == "predicted" for row in rows), op


def _committed(target, op, **call):
    call = {"library": "cudnn", "dtype": "half", "kind": "plain", "pass": "inference", "activation": "none"} | call
    return next(row["serve"] for row in _tuning.committed(target)["dispatch"][op] if _tuning.admits(row["when"], call))


@pytest.mark.parametrize(
    ("target", "way", "call"),
    [
        ("sm_90", "kernel", {"head_dim": 64, "queries": 197, "keys": 197}),
        ("sm_90", "sdpa", {"head_dim": 64, "queries": 4097, "keys": 4097}),
        ("sm_90", "kernel", {"head_dim": 64, "queries": 4097, "keys": 4097, "library": "flash"}),
        ("sm_90", "kernel", {"head_dim": 80, "queries": 4096, "keys": 4096}),
        ("sm_90", "kernel", {"head_dim": 64, "queries": 7, "keys": 4096}),
        ("sm_90", "kernel", {"head_dim": 64, "queries": 4096, "keys": 4096, "kind": "masked"}),
        ("sm_90", "sdpa", {"head_dim": 64, "queries": 1370, "keys": 1370, "pass": "training"}),
        ("sm_90", "sdpa", {"head_dim": 64, "queries": 7, "keys": 7, "kind": "masked", "dtype": "float32"}),
        ("sm_90", "kernel", {"head_dim": 64, "queries": 7, "keys": 7, "kind": "positions", "dtype": "float32"}),
        ("default", "kernel", {"head_dim": 64, "queries": 4097, "keys": 4097}),
    ],
)
def test_what_is_predicted_for_attention(target, way, call):
    assert _committed(target, "attention", **call) == way


def test_products_with_nothing_to_fuse_and_in_float32_are_the_vendors():
    for target in [*_tuning.targets(), "default"]:
        sizes = {"rows": 12608, "width": 768, "outputs": 3072}
        assert _committed(target, "linear", **sizes) == "vendor"
        assert _committed(target, "linear", **sizes, activation="gelu") == "kernel"
        assert _committed(target, "linear", **sizes, activation="gelu", dtype="float32") == "vendor"


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (SDPA | {"serve": "flash"}, "serves 'flash', which is none of kernel, sdpa"),
        (SDPA | {"when": {"queries": [1]}}, "no number, word or pair of numbers"),
        ({"when": {}, "serve": "sdpa", "basis": "measured"}, "no operator or entry 'why'"),
    ],
)
def test_rules_that_are_none_are_refused_by_name(rules, rule, message):
    rules("attention", rule)
    with pytest.raises(ValueError, match=message) as caught:
        functional.attention(*_qkv())
    assert str(rules.path) in str(caught.value)


# --- attention ------------------------------------------------------------------------------------------------------------


def test_attention_goes_where_the_rule_says(rules, sdpa_calls):
    rules("attention", SDPA, KERNEL)
    for queries, served in ((4, 0), (5, 1)):
        q, k, v = _qkv(queries)
        out = functional.attention(q, k, v)
        assert len(sdpa_calls) == served
        torch.testing.assert_close(out, fastvit.reference.attention(q, k, v))


def test_gradients_are_sdpas_own(rules, sdpa_calls):
    rules("attention", SDPA, KERNEL)
    tensors = _qkv(requires_grad=True)
    upstream = _randn(1, 2, 6, 16)
    grads = torch.autograd.grad(functional.attention(*tensors, is_causal=True), tensors, upstream)
    assert len(sdpa_calls) == 1
    expected = torch.autograd.grad(fastvit.reference.attention(*tensors, is_causal=True), tensors, upstream)
    for ours, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, exact)


def test_named_backends_ask_no_rule(rules, sdpa_calls):
    rules("attention", SDPA)
    with fastvit.use_backend("triton"):
        functional.attention(*_qkv())
    assert sdpa_calls == []
    with fastvit.use_backend("torch"):
        functional.attention(*_qkv(1))
    assert len(sdpa_calls) == 1


def test_promises_go_before_rules(rules, sdpa_calls):
    rules("attention", SDPA | {"when": {}})
    tensors = _qkv(requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        functional.attention(*tensors)
        assert sdpa_calls == []
        functional.attention(*(t.detach() for t in tensors))
        assert len(sdpa_calls) == 1
    finally:
        torch.use_deterministic_algorithms(False)
    for scale in (-0.5, 0.0):
        functional.attention(*_qkv(), scale=scale)
    assert len(sdpa_calls) == 1


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("plain", dict),
        ("causal", lambda: {"is_causal": True}),
        ("masked", lambda: {"attn_mask": torch.ones(6, 6, dtype=torch.bool, device=DEVICE), "is_causal": True}),
        ("positions", lambda: {"rel_h": torch.zeros(1, 2, 6, 2, device=DEVICE), "rel_w": torch.zeros(1, 2, 6, 3, device=DEVICE)}),
    ],
)
def test_kinds(rules, kind, call):
    rules("attention", KERNEL)
    with dispatch.collect() as found:
        functional.attention(*_qkv(), **call())
    assert found == {f"attention: {kind}, float32, inference, head_dim 16, queries 6, keys 6": "kernel: short (measured)"}


def test_what_sdpa_has_no_fast_kernel_for_is_irregular(rules):
    rules("attention", KERNEL)
    q, k, v = _qkv()
    for tensors in ((q, k[:, :1], v[:, :1]), (q, k, v[..., :8]), (q[..., :12], k[..., :12], v[..., :12])):
        with dispatch.collect() as found:
            functional.attention(*tensors)
        assert next(iter(found)).startswith("attention: irregular")


def test_empty_batches_and_masked_rows_keep_the_contract(rules, sdpa_calls):
    rules("attention", SDPA | {"when": {}})
    q, k, v = _qkv()
    assert functional.attention(q[:0], k[:0], v[:0]).shape == (0, 2, 6, 16)
    mask = torch.ones(6, 6, dtype=torch.bool, device=DEVICE)
    mask[2] = False
    assert functional.attention(q, k, v, mask)[:, :, 2].eq(0).all()
    assert len(sdpa_calls) == 1


def test_compiled_graphs_are_dispatched_by_the_same_rules(rules):
    rules("attention", SDPA, KERNEL)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(functional.attention, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for queries in (3, 6, 4, 7):
            q, k, v = _qkv(queries)
            torch.testing.assert_close(compiled(q, k, v), fastvit.reference.attention(q, k, v))
    assert [any("scaled_dot_product" in name for name in names) for names in graphs] == [False, True]


def test_an_exported_graph_goes_by_the_smallest_size(rules):
    rules("attention", SDPA, KERNEL)

    class Block(torch.nn.Module):
        def forward(self, q, k, v):
            return functional.attention(q, k, v)

    tokens = torch.export.Dim("tokens", max=64)
    shapes = {name: {2: tokens} for name in "qkv"}
    program = torch.export.export(Block(), tuple(_qkv(6)), dynamic_shapes=shapes)
    assert "fastvit.attention_forward" in str(program.graph)


# --- rotary attention, linears --------------------------------------------------------------------------------------------


def test_rotary_attention_comes_apart_where_sdpa_serves(rules, sdpa_calls):
    rules("rotary_attention", SDPA, KERNEL)
    cos, sin = torch.rand(6, 16, device=DEVICE), torch.rand(6, 16, device=DEVICE)
    q, k, v = _qkv()
    with dispatch.collect() as found:
        functional.rotary_attention(q, k, v, cos, sin)
        functional.rotary_attention(q[:, :, :4], k[:, :, :4], v[:, :, :4], cos[:4], sin[:4])
    ways = [way.split(":")[0] for what, way in found.items() if what.startswith("rotary")]
    assert ways == ["sdpa", "kernel"]


LINEAR = {"why": "a test", "basis": "measured"}


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "quick_gelu", "relu"])
@pytest.mark.parametrize("way", ["kernel", "vendor", "vendor_fused"])
def test_linears_by_every_way(rules, way, activation):
    rules("linear", {"when": {}, "serve": way} | LINEAR)
    x, w, b = _randn(2, 3, 8), _randn(5, 8), _randn(5)
    exact = fastvit.reference.linear(x, w, b, activation=activation)
    with dispatch.collect() as found:
        torch.testing.assert_close(functional.linear(x, w, b, activation=activation), exact, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(functional.linear(x, w, activation=activation).shape, exact.shape)
    kind = "none, float32" if activation is None else f"{activation}, float32, inference"
    assert found == {f"linear: {kind}, rows 6, width 8, outputs 5": f"{way}: a test (measured)"}


def test_the_vendors_epilogue_serves_inference_alone(rules, monkeypatch):
    rules("linear", {"when": {}, "serve": "vendor_fused"} | LINEAR)
    calls, own = [], torch._addmm_activation
    monkeypatch.setattr(torch, "_addmm_activation", lambda *a, **k: calls.append(1) or own(*a, **k))
    x, w, b = _randn(3, 8), _randn(5, 8, requires_grad=True), _randn(5)
    functional.linear(x, w, b, activation="relu").sum().backward()
    assert w.grad is not None
    assert calls == []
    functional.linear(x, w.detach(), b, activation="relu")
    assert len(calls) == 1
    functional.linear(x, w.detach(), activation="relu")
    functional.linear(x, w.detach(), b, activation="gelu")
    assert len(calls) == 1


def test_an_mlp_in_training_follows_its_first_linear(rules, monkeypatch):
    rules(
        "linear",
        {"when": {"outputs": [16, None], "pass": "training"}, "serve": "vendor"} | LINEAR,
        {"when": {}, "serve": "kernel"} | LINEAR,
    )
    fused = []
    own = functional._linear_op.mlp
    monkeypatch.setattr(functional._linear_op, "mlp", lambda *a: fused.append(1) or own(*a))
    for hidden, served in ((8, 1), (16, 1)):
        x, w1, w2 = _randn(3, 4, requires_grad=True), _randn(hidden, 4), _randn(4, hidden)
        functional.mlp(x, w1, None, w2, None).sum().backward()
        assert len(fused) == served


def test_products_of_a_backward_pass_follow_their_rules(rules):
    rules("linear", {"when": {"outputs": 8}, "serve": "kernel"} | LINEAR, {"when": {}, "serve": "vendor"} | LINEAR)
    x, w = _randn(16, 8, requires_grad=True), _randn(24, 8, requires_grad=True)
    with dispatch.collect() as found:
        functional.linear(x, w, None, activation="relu").sum().backward()
    assert len(found) >= 1
    with dispatch.collect() as found:
        assert dispatch.product(_randn(3, 4), _randn(8, 4)) == "kernel"
        assert dispatch.product(_randn(3, 4), _randn(9, 4)) == "vendor"
    assert len(found) == 2


# --- what is said of it ---------------------------------------------------------------------------------------------------


def test_image_attention_is_noted(rules):
    with dispatch.collect() as found:
        functional.image_attention(_randn(1, 2, 2, 96), num_heads=2)
    ((what, way),) = found.items()
    assert what == "image_attention: global, tokens 4"
    assert way.startswith("kernel: no operator of a vendor's")


def test_nothing_is_collected_outside(rules):
    with dispatch.collect() as found:
        pass
    functional.attention(*_qkv())
    assert found == {}


def test_an_override_goes_before_rules(rules, sdpa_calls):
    rules("attention", KERNEL)
    with _tuning.override("dispatch attention", {"serve": "sdpa"}):
        functional.attention(*_qkv())
    assert len(sdpa_calls) == 1
    functional.attention(*_qkv())
    assert len(sdpa_calls) == 1


def test_the_report_says_what_served_a_model_and_why(rules, monkeypatch):
    monkeypatch.setattr(fastvit.backend, "resolve", lambda tensor, setting=None: "triton")
    monkeypatch.setattr(acceleration, "_kernels_serve", lambda model: True)
    rules("attention", SDPA, KERNEL)
    torch.manual_seed(0)
    block = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, activation="gelu").eval().to(DEVICE)
    fastvit.accelerate(block)
    x = _randn(1, 6, 16)
    found = fastvit.report(block, x)
    assert found.served_by["attention: plain, float32, inference, head_dim 8, queries 6, keys 6"] == "sdpa: long (measured)"
    assert found.served_by["linear: gelu, float32, inference, rows 6, width 16, outputs 32"].startswith("vendor: exact float32")
    assert "head_dim 8, queries 6, keys 6 → sdpa: long (measured)" in str(found)
    assert found.to_dict()["served_by"] == found.served_by
    assert "→ sdpa: long" in found.to_html()
    assert fastvit.report(block).served_by == {}


def test_the_report_of_a_graphed_model_pauses_its_graphs(rules, monkeypatch):
    paused, own = [], acceleration.graphs.paused
    monkeypatch.setattr(acceleration.graphs, "paused", lambda model: paused.append("on") or own(model))
    monkeypatch.setattr(acceleration, "_kernels_serve", lambda model: True)
    monkeypatch.setattr(acceleration, "served_by", lambda *_: paused.append("asked") or {})
    block = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True).eval().to(DEVICE)
    fastvit.report(fastvit.accelerate(block), _randn(1, 6, 16))
    assert paused == ["on", "on", "asked"]
