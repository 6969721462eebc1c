"""Models of full size, once each."""

import pytest
import torch

import fastvit
from benchmarks.families import BASE, FAMILIES
from tests.model_errors import OUTPUT, fused, relative, without_gradients

LARGE = BASE._replace(dim=1024, depth=24, heads=16, mlp=4096)

pytestmark = pytest.mark.full


@pytest.mark.parametrize(("key", "size"), [("hf_vit", BASE), ("timm_vit", LARGE)], ids=["hf-vit-b16", "timm-vit-l16"])
def test_full_size_models_equal_the_original(key, size):
    model, inputs = FAMILIES[key].build(size), FAMILIES[key].inputs(size, 1)
    expected = without_gradients(model, inputs)
    actual = without_gradients(fastvit.accelerate(model), inputs)
    assert fused(model, size.depth)
    assert torch.isfinite(expected).all()
    assert relative(actual, expected) <= OUTPUT
    assert fastvit.report(model, **inputs).fused_share >= 0.99
