"""What ``torch.compile`` makes of served blocks: what it checks at every call, whose operators are in the graph, and what
makes it compile anew."""

import copy
import operator
import pickle

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch._dynamo.testing import CompileCounter

import fastvit
from benchmarks.families import FAMILIES, TINY
from fastvit import backend, functional
from fastvit.integrations import swap
from fastvit.ops import dispatch

SMALL, LARGE = torch.zeros(2, 5, 32), torch.zeros(2, 50, 32)  # 131 000 and 1.6 M multiplications in a block of ``_vit``

pytestmark = pytest.mark.slow  # compiling takes seconds a model


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What is traced is served by Triton unless it is held to something else; a compiler is left what is small."""
    resolve = backend.resolve

    def served(tensor, *, setting=None) -> str:
        asked = setting or backend.get_backend()
        return resolve(tensor, setting=setting) if asked == "torch" or not torch.compiler.is_compiling() else "triton"

    def rules(op, index):
        small = ((("products", None, None, 500_000),), "original")
        return (*((small,) if op == "block" else ()), ((), "kernel"))

    rules._dynamo_marked_constant = True
    monkeypatch.setattr(dispatch, "_rules", rules)
    for module in (backend, functional):
        monkeypatch.setattr(module, "resolve", served)


def _vit(depth: int = 1):
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=32, num_heads=2, depth=depth, num_classes=3).eval()


class Graphs:
    """A backend that keeps what is called in each graph, and runs none of it."""

    def __init__(self):
        self.found: list[list[str]] = []

    def __call__(self, graph, _):
        calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        self.found.append([str(call) for call in calls if call is not operator.getitem])
        (result,) = graph.graph.output_node().args[0]
        return lambda *_: [torch.empty(tuple(map(int, result.meta["example_value"].shape)))]


def _graph_of(run, x) -> list[str]:
    graphs = Graphs()
    with torch.no_grad():
        torch.compile(run, fullgraph=True, backend=graphs)(x)
    [graph] = graphs.found
    return graph


def _is_ours(graph: list[str]) -> bool:
    return any("fastvit.attention_forward" in name for name in graph)


# --- guards ---------------------------------------------------------------------------------------------------------------


def _checked(model, inputs) -> list[str]:
    """What a compiled call checks of a model's third block."""
    found: list[str] = []

    def keep(entries):
        found.extend(f"{entry.guard_type} {entry.name}" for entry in entries)
        return [True] * len(entries)

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend="eager", options={"guard_filter_fn": keep})(**inputs)
    return [guard for guard in found if ("blocks" in guard or "layers" in guard) and "2" in guard.split("mlp")[0]]


@pytest.mark.parametrize("key", ["timm_vit", "hf_vit"])
def test_a_served_block_is_checked_in_no_more_places(on_a_gpu, monkeypatch, key):
    """What ``accelerate`` found out is a constant to a compiler; a check is what a compiled call repeats for every block."""
    size = TINY._replace(depth=3)
    model, inputs = FAMILIES[key].build(size).eval(), FAMILIES[key].inputs(size, 1)
    before = _checked(model, inputs)
    fastvit.accelerate(model)
    for serve, more in (("original", 4), ("kernel", 0)):
        monkeypatch.setattr(dispatch, "block", lambda x, elements, serve=serve: serve)
        now = _checked(model, inputs)
        assert before
        assert len(now) <= len(before) + more
        assert not [guard for guard in now if swap.ATTRIBUTE in guard]
        assert not [guard for guard in set(now) - set(before) if "HASATTR" in guard]  # each takes Python an exception


# --- whose operators ------------------------------------------------------------------------------------------------------


def test_small_work_is_the_compilers(on_a_gpu):
    graph = _graph_of(fastvit.accelerate(_vit()).blocks[0], SMALL)
    assert graph == _graph_of(_vit().blocks[0], SMALL)
    assert not _is_ours(graph)


@pytest.mark.parametrize(("options", "x"), [({}, LARGE), ({"backend": "triton"}, SMALL)])
def test_large_work_and_what_is_held_to_the_kernels_are_ours(on_a_gpu, options, x):
    assert _is_ours(_graph_of(fastvit.accelerate(_vit(), **options).blocks[0], x))


def test_with_dynamic_shapes_the_small_and_the_large_have_a_graph_each(on_a_gpu):
    graphs = Graphs()
    compiled = torch.compile(fastvit.accelerate(_vit()).blocks[0], fullgraph=True, backend=graphs, dynamic=True)
    with torch.no_grad():
        for tokens in (5, 50, 6, 60):
            compiled(torch.zeros(2, tokens, 32))
    assert [_is_ours(graph) for graph in graphs.found] == [False, True]


@pytest.mark.parametrize("x", [SMALL, LARGE])
def test_gradients_of_the_small_and_the_large(on_a_gpu, monkeypatch, x):
    """The kernels aside, which need a GPU: blocks on PyTorch's operators, and the original's forward."""
    monkeypatch.setattr(backend, "resolve", lambda tensor, *, setting=None: "torch")
    block = fastvit.accelerate(_vit()).blocks[0]
    if x is SMALL:
        monkeypatch.setattr(swap, "_is_compilers", lambda *_: True)
    grads = []
    for run in (_vit().blocks[0], torch.compile(block, fullgraph=True, backend="aot_eager")):
        upstream = torch.linspace(-1, 1, x.numel()).view(x.shape)
        leaf = (upstream + 0.5).requires_grad_()
        run(leaf).backward(upstream)
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_an_exported_graph_keeps_what_is_fused(on_a_gpu, monkeypatch):
    block = fastvit.accelerate(_vit()).blocks[0]
    for module in (backend, functional):
        monkeypatch.setattr(module, "resolve", lambda tensor, *, setting=None: "triton")
    program = torch.export.export(block, (SMALL,), strict=False)
    assert _is_ours([str(node.target) for node in program.graph.nodes])


# --- what compiles anew ---------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear, self.low = linear, nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x):
        return self.linear(x) + self.low(x)


def _adapt(model):
    model.blocks[0].mlp.fc1 = Adapted(model.blocks[0].mlp.fc1)


def _exchange_parameter(model):
    model.blocks[0].attn.qkv.weight = nn.Parameter(model.blocks[0].attn.qkv.weight * 2)


def _hook(model):
    model.blocks[0].mlp.fc2.register_forward_hook(lambda module, inputs, out: out * 2)


CHANGES = {
    "a parameter of the same shape": (_exchange_parameter, 0),
    "parameters in place": (lambda model: model.load_state_dict({k: v / 2 for k, v in model.state_dict().items()}), 0),
    "training": (lambda model: model.train(), 1),
    "a hook": (_hook, 1),
    "an adapter": (_adapt, 1),
    "another dtype": (lambda model: model.double(), 1),
    "other options": (lambda model: fastvit.accelerate(model, backend="torch"), 1),
    "its own forward": (fastvit.restore, 1),
}


@pytest.mark.parametrize("original", [False, True], ids=["fused", "original"])
def test_changes_after_compiling_are_seen(monkeypatch, original):
    """A hook is where PyTorch is asked to look at hooks: without that, no compiled model sees one that comes later."""
    if original:
        monkeypatch.setattr(swap, "_is_compilers", lambda *_: True)
    model, counter = fastvit.accelerate(_vit()), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad(), torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled(torch.rand(1, 3, 16, 16))
        for change, (apply, graphs) in CHANGES.items():
            before = counter.frame_count
            apply(model)
            image = torch.rand(1, 3, 16, 16, dtype=model.head.weight.dtype)
            torch.testing.assert_close(compiled(image), model(image))
            assert counter.frame_count == before + graphs, change


def test_copies_and_pickles_are_traced_as_what_they_are():
    model = fastvit.accelerate(_vit(), backend="torch")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model).replace(b"_fastvit_traced", b"_fastvit_tracez"))):
        assert swap._as_traced(twin.blocks[0].__dict__[swap.TRACED]).backend == "torch"
    fastvit.restore(model)
    assert swap.TRACED not in model.blocks[0].__dict__
