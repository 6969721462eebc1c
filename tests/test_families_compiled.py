"""Compilers over accelerated models of each family: ``torch.compile`` of the whole graph, and ``torch.export``."""

import pytest
import torch

import fastvit
from benchmarks.families import FAMILIES, TINY, output_of
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
