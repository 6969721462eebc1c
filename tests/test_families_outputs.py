"""What the libraries give besides the last hidden states: attention weights, hidden states, tuples, intermediate features."""

import pytest
import torch
from torch import Tensor

import fastvit
from benchmarks.families import FAMILIES, TINY
from tests.model_errors import OUTPUT, build, fused, relative

TRANSFORMERS = [key for key in FAMILIES if key.startswith("hf")]
TIMM = [key for key in FAMILIES if key.startswith("timm")]


def both(model, call):
    """(the original's, the accelerated model's)"""
    found = []
    for prepare in (fastvit.restore, fastvit.accelerate):
        prepare(model)
        with torch.no_grad():
            found.append(call(model))
    return found


def assert_equal_outputs(actual, expected) -> None:
    """Tensor by tensor, in the same containers."""
    assert type(actual) is type(expected)
    if isinstance(expected, Tensor):
        assert relative(actual, expected) <= OUTPUT
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        assert_equal_outputs(tuple(actual.values()), tuple(expected.values()))
    elif isinstance(expected, tuple | list):
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_equal_outputs(ours, theirs)
    else:
        assert actual == expected


def fallbacks(model) -> set[str]:
    """Those of blocks; SigLIP's pooling head always asks for attention weights."""
    return {name for name in fastvit.report(model).fallbacks if name != "head.attention"}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("key", TRANSFORMERS)
def test_attention_weights_are_collected_as_before(key, implementation):
    model, inputs = build(key, attn_implementation=implementation)
    expected, actual = both(model, lambda m: m(**inputs, output_attentions=True))
    assert len(fallbacks(model)) == TINY.depth
    assert_equal_outputs(actual, expected)
    assert len(actual.attentions) == (TINY.depth if implementation == "eager" else 0)  # sdpa has none to give


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("key", TRANSFORMERS)
def test_hidden_states_are_those_of_the_fused_blocks(key, implementation):
    model, inputs = build(key, attn_implementation=implementation)
    expected, actual = both(model, lambda m: m(**inputs, output_hidden_states=True))
    assert not fallbacks(model)
    assert_equal_outputs(actual, expected)
    assert len(actual.hidden_states) == TINY.depth + 1


@pytest.mark.parametrize("key", TRANSFORMERS)
def test_outputs_as_tuples(key):
    model, inputs = build(key)
    expected, actual = both(model, lambda m: m(**inputs, return_dict=False))
    assert isinstance(actual, tuple)
    assert not fallbacks(model)
    assert_equal_outputs(actual, expected)


@pytest.mark.parametrize("key", TIMM)
def test_features_of_timm(key):
    model, inputs = build(key)
    x = inputs["x"]
    calls = [
        lambda m: m.forward_features(x),
        lambda m: m.forward_head(m.forward_features(x), pre_logits=True),
        lambda m: m.forward_intermediates(x, indices=[0, 2], return_prefix_tokens=True),
        lambda m: m.forward_intermediates(x, indices=2, norm=True, intermediates_only=True, output_fmt="NLC"),
    ]
    if hasattr(model, "get_intermediate_layers"):
        calls.append(lambda m: m.get_intermediate_layers(x, n=2, return_prefix_tokens=True, norm=True))
    for call in calls:
        expected, actual = both(model, call)
        assert fused(model, TINY.depth)
        assert_equal_outputs(actual, expected)


def test_blocks_that_timm_prunes_are_gone():
    model, inputs = build("timm_vit")
    model.prune_intermediate_layers([1])
    expected, actual = both(model, lambda m: m.forward_features(inputs["x"]))
    assert fused(model, 2)
    assert_equal_outputs(actual, expected)


def test_features_of_torchvision():
    from torchvision.models.feature_extraction import create_feature_extractor

    model, inputs = build("torchvision_vit")
    with torch.no_grad():
        expected = create_feature_extractor(model, ["encoder.ln"])(inputs["x"])["encoder.ln"]
        tokens = model._process_input(inputs["x"])
        tokens = torch.cat([model.class_token.expand(2, -1, -1), tokens], dim=1)
        actual = fastvit.accelerate(model).encoder(tokens)
    assert fused(model, TINY.depth)
    assert relative(actual, expected) <= OUTPUT
