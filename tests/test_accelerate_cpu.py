"""The CPU path of accelerated models: never more memory than the original, the same bits each time, no library imported."""

import subprocess
import sys

import pytest
import torch

import fastvit
from tests.models_for_acceleration import hf_dinov2, image, tensor_of


@pytest.fixture(autouse=True)
def _on_the_torch_backend():
    with fastvit.use_backend("torch"):
        yield


def test_a_block_under_vmap_writes_over_nothing():
    """vmap has no rule for addcmul(out=), which adds a branch under LayerScale where nothing is mapped."""
    model, pictures = hf_dinov2(num_hidden_layers=1), image()[:, None]
    with torch.no_grad():
        expected = tensor_of(model(pictures[0]))
        fastvit.accelerate(model)
        mapped = torch.func.vmap(lambda picture: model(picture).last_hidden_state)(pictures)
    torch.testing.assert_close(mapped[0], expected, rtol=1e-4, atol=1e-4)


def peak_activations(model, x) -> int:
    """Bytes of the tensors alive at once, at most, while ``model`` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(x)
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


@torch.no_grad()
def test_peak_memory_is_no_higher():
    model, x = hf_dinov2(hidden_size=96, mlp_ratio=4), image(2, 96)
    model(x)
    original = peak_activations(model, x)
    fastvit.accelerate(model)
    model(x)
    assert 0 < peak_activations(model, x) < original


@torch.no_grad()
def test_calls_repeat_bit_for_bit():
    model = fastvit.accelerate(hf_dinov2())
    assert torch.equal(tensor_of(model(image())), tensor_of(model(image())))


def test_accelerating_imports_no_model_library():
    code = (
        "import sys, torch, fastvit; fastvit.accelerate(torch.nn.Sequential(torch.nn.Linear(2, 2)));"
        "bad = {'transformers', 'timm', 'torchvision'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_functions_are_functions_whichever_loads_first():
    """``fastvit.accelerate`` was once the module of that name when another function had loaded it."""
    code = """
import importlib, sys
for first in ("verify", "accelerate", "report", "accelerated", "restore"):
    for name in [name for name in sys.modules if name.startswith("fastvit") and "ops" not in name and "kernels" not in name]:
        del sys.modules[name]
    fastvit = importlib.import_module("fastvit")
    assert not isinstance(getattr(fastvit, first), type(sys))
    assert not isinstance(fastvit.accelerate, type(sys))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
