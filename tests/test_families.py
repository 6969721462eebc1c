"""Every model family that ``accelerate`` serves against the same model left alone: values, gradients, and what comes back."""

import copy

import pytest
import torch

import fastvit
from benchmarks.families import FAMILIES, TINY, Size, output_of
from tests.model_errors import OUTPUT, assert_equal_gradients, cast, gradients, relative, without_gradients

# How many modules of a family are served: its blocks, unless it is a single attention or has one in its pooling head.
SERVED = {"hf_siglip": TINY.depth + 1, "torch_attention": 1, "torch_cross_attention": 1}
# What runs its own forward, and why: SigLIP's pooling takes the default of MultiheadAttention, which is to return weights.
FALLBACKS = {"hf_siglip": {"head.attention": "it was asked for the attention weights"}}
WIDE = Size(192, 3, 3, 768, 64, 8)  # the patch embedding and the head no longer count

pytestmark = pytest.mark.parametrize("key", FAMILIES)


def served(key: str) -> int:
    return SERVED.get(key, TINY.depth)


def on_the_fused_path(key: str, model) -> bool:
    """Whether the last call was: a test must not pass by a block's own forward."""
    found = fastvit.report(model)
    assert found.fallbacks == FALLBACKS.get(key, {})
    assert not found.skipped
    return len(found.replaced) == served(key)


@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_equal_the_original(key, batch):
    model, inputs = FAMILIES[key].build(TINY), FAMILIES[key].inputs(TINY, batch)
    expected = without_gradients(model, inputs)
    actual = without_gradients(fastvit.accelerate(model), inputs)
    assert on_the_fused_path(key, model)
    assert actual.dtype == expected.dtype
    assert relative(actual, expected) <= OUTPUT


@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_of_parameters_and_inputs_equal_the_original(key, batch):
    model, inputs = FAMILIES[key].build(TINY), FAMILIES[key].inputs(TINY, batch)
    expected = gradients(model, inputs)
    actual = gradients(fastvit.accelerate(model), inputs)
    assert on_the_fused_path(key, model)
    assert_equal_gradients(actual, expected)


def test_bfloat16_errs_at_most_twice_as_much_as_the_original(key):
    """Both against float64; half an eps on top, because any result must be rounded to bfloat16 once."""
    model, inputs = FAMILIES[key].build(TINY), FAMILIES[key].inputs(TINY, 3)
    exact = without_gradients(copy.deepcopy(model).double(), cast(inputs, torch.float64))
    model, inputs = model.bfloat16(), cast(inputs, torch.bfloat16)
    eager = without_gradients(model, inputs)
    actual = without_gradients(fastvit.accelerate(model), inputs)
    assert on_the_fused_path(key, model)
    assert actual.dtype == torch.bfloat16
    assert relative(actual, exact) <= 2 * relative(eager, exact) + torch.finfo(torch.bfloat16).eps / 2


def test_restore_gives_back_every_bit(key):
    model, inputs = FAMILIES[key].build(TINY), FAMILIES[key].inputs(TINY, 3)
    before = copy.deepcopy(model.state_dict())
    classes, names = [type(module) for module in model.modules()], [set(module.__dict__) for module in model.modules()]
    expected = without_gradients(model, inputs)
    fastvit.accelerate(model)
    without_gradients(model, inputs)
    assert on_the_fused_path(key, model)
    assert [type(module).__name__ for module in model.modules()] == [cls.__name__ for cls in classes]
    fastvit.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == names
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(without_gradients(model, inputs), expected)


def test_nine_tenths_of_the_arithmetic_are_fused(key):
    """Counted after a call, so that a block which ran its own forward does not count."""
    model, inputs = fastvit.accelerate(FAMILIES[key].build(WIDE)), FAMILIES[key].inputs(WIDE, 1)
    without_gradients(model, inputs)
    assert on_the_fused_path(key, model)
    assert fastvit.report(model, **inputs).fused_share >= 0.9


def test_training_equals_the_original(key):
    """Two steps of SGD: the second sees weights that the first has written."""
    model, inputs = FAMILIES[key].build(TINY), FAMILIES[key].inputs(TINY, 3)
    twin = fastvit.accelerate(copy.deepcopy(model))
    untrained = without_gradients(model, inputs)
    outputs = []
    for trained in (model, twin):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            output_of(trained(**inputs)).square().mean().backward()
            optimizer.step()
        outputs.append(without_gradients(trained, inputs))
    assert on_the_fused_path(key, twin)
    assert relative(outputs[1], outputs[0]) <= OUTPUT
    assert relative(untrained, outputs[0]) > 100 * OUTPUT
