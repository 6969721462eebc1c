"""Compilers over accelerated models of each family: ``torch.compile`` of the whole graph, and ``torch.export``."""

import operator
from collections import Counter

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import fastvit
from benchmarks.families import FAMILIES, TINY, output_of
from fastvit import backend, functional
from fastvit.ops import dispatch, onednn, onednn_attention
from tests.model_errors import (
    MECHANISMS,
    OUTPUT,
    assert_equal_gradients,
    gradients,
    no_native_fast_path,
    relative,
    without_gradients,
)

pytestmark = pytest.mark.slow  # compiling takes seconds a model


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(key: str):
    """One block: all of them compile to the same."""
    size = TINY._replace(depth=1)
    return FAMILIES[key].build(size), FAMILIES[key].inputs(size, 2)


def uncompiled(model, inputs):
    """Where it is traced, torch's encoder keeps what is padded."""
    with no_native_fast_path():
        return without_gradients(model, inputs)


@pytest.mark.parametrize("key", MECHANISMS)
def test_the_whole_graph_compiles(key):
    model, inputs = build(key)
    expected, trained = uncompiled(model, inputs), gradients(model, inputs)
    compiled = torch.compile(fastvit.accelerate(model), fullgraph=True, backend="aot_eager")
    assert relative(without_gradients(compiled, inputs), expected) <= OUTPUT
    again = gradients(model, inputs, compiled)
    for name in again.keys() - trained.keys():  # the compiled graph has the pooler's result for an output, too
        assert not again.pop(name).any()
    assert_equal_gradients(again, trained)
    assert not fastvit.report(model).fallbacks


@pytest.mark.parametrize("key", ["timm_eva02", "torch_post_norm"])
def test_inductor_computes_the_same(key):
    model, inputs = build(key)
    expected = uncompiled(model, inputs)
    compiled = torch.compile(fastvit.accelerate(model), fullgraph=True)
    assert relative(without_gradients(compiled, inputs), expected) <= OUTPUT


class Tensors(torch.nn.Module):
    """Export wants tensors in and out."""

    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors):
        return output_of(self.model(**dict(zip(self.names, tensors, strict=True))))


@pytest.mark.parametrize("key", [key for key in MECHANISMS if key != "torch_cross_attention"])
def test_export_gives_a_program_without_the_library(key):
    model, inputs = build(key)
    expected = uncompiled(model, inputs)
    program = torch.export.export(Tensors(fastvit.accelerate(model), list(inputs)).eval(), tuple(inputs.values()))
    assert not fastvit.report(model).fallbacks
    assert not [node for node in program.graph.nodes if "fastvit" in str(node.target)]
    with torch.no_grad():
        assert relative(program.module()(*inputs.values()), expected) <= OUTPUT


def of_a_compiled_block(key: str, dtype: torch.dtype, *shape: int) -> Counter:
    """What runs in a block's graph, views left out."""
    (block,) = fastvit.accelerate(build(key)[0].to(dtype)).blocks
    found: Counter = Counter()

    def count(graph, _):
        nodes = [node for node in graph.graph.nodes if node.op == "call_function" and node.target is not operator.getitem]
        found.update(str(node.target).split(".")[1] for node in nodes if not node.target.is_view)
        (result,) = graph.graph.output_node().args[0]
        return lambda *_: [torch.empty(result.meta["val"].shape)]  # nothing runs

    with torch.no_grad():
        torch.compile(block, fullgraph=True, backend=aot_autograd(fw_compiler=count))(torch.randn(*shape, dtype=dtype))
    return found


@pytest.mark.parametrize(
    ("key", "attention", "shape"),
    [
        ("timm_layer_scale", "attention_forward", (2, 10, TINY.dim)),
        ("sam_meta", "image_attention_forward", (2, 3, 3, TINY.dim)),
    ],
)
def test_a_compiled_block_copies_nothing(monkeypatch, key, attention, shape):
    """On Triton, where work is large: sums and norms are the compiler's to join; beside them are our operators and the vendor's
    products alone."""
    monkeypatch.setattr(dispatch, "block", lambda x, elements: "kernel")
    resolve = backend.resolve

    def on_a_gpu(tensor, setting=None) -> str:
        return "triton" if torch.compiler.is_compiling() else resolve(tensor, setting=setting)

    for module in (backend, functional):
        monkeypatch.setattr(module, "resolve", on_a_gpu)
    sums = "addcmul" if key == "timm_layer_scale" else "add"
    expected = {attention: 1, "linear_forward": 1, "addmm": 3, "native_layer_norm": 2, sums: 2}
    assert of_a_compiled_block(key, torch.bfloat16, *shape) == expected


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_compiled_on_a_cpu_products_stay_onednns(monkeypatch):
    monkeypatch.setattr(onednn, "cpu_vendor", lambda: "amd")
    monkeypatch.setattr(onednn, "MIN_PRODUCTS", 0)
    monkeypatch.setattr(onednn_attention, "LEAST_TOKENS", 10)
    found = of_a_compiled_block("timm_vit", torch.float32, 2, 10, TINY.dim)
    assert found == {"onednn_attention": 1, "onednn_linear": 4, "native_layer_norm": 2, "add": 2}
    q, k, v = torch.randn(2, 10, 3, 3, 16).permute(2, 0, 3, 1, 4)
    compiled = torch.compile(functional.attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), functional.attention(q, k, v))


def test_what_compiled_linears_leave_to_the_compiler(monkeypatch):
    monkeypatch.setattr(onednn, "cpu_vendor", lambda: "amd")
    monkeypatch.setattr(onednn, "MIN_PRODUCTS", 0)
    x, weight = torch.randn(2, 5), torch.randn(3, 5)

    def graph_of(function, *inputs) -> set[str]:
        names = set()

        def backend(graph, _):
            names.update(str(node.target) for node in graph.graph.nodes if "onednn" in str(node.target))
            return graph.forward

        torch.compiler.reset()
        out = torch.compile(function, fullgraph=True, backend=backend)(*inputs)
        torch.testing.assert_close(out, function(*inputs))
        return names

    linear = functional.linear
    assert graph_of(linear, x, weight)
    assert not graph_of(linear, x, weight.clone().requires_grad_())
    assert not graph_of(torch.func.vmap(linear, in_dims=(0, None)), x[None], weight)
    assert not graph_of(linear, x, weight.t().contiguous().t())
    with torch.backends.mkldnn.flags(enabled=False):
        assert not graph_of(linear, x, weight)
