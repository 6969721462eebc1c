"""Every family on the Triton kernels: in the interpreter, or on a GPU where there is one."""

import copy

import pytest
import torch

import fastvit
from benchmarks.families import FAMILIES, Size, output_of
from tests.model_errors import OUTPUT, assert_equal_gradients, cast, gradients, no_native_fast_path, relative, without_gradients

SMALL = Size(32, 2, 2, 64, 16, 8)
IN_THE_FAST_SUITE = ("timm_vit", "hf_dinov3", "torch_post_norm", "torch_cross_attention")
SERVED = {"hf_siglip": 3, "torch_attention": 1, "torch_cross_attention": 1}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("triton_backend")]


def family(key: str, device: str):
    inputs = FAMILIES[key].inputs(SMALL, 2)
    return FAMILIES[key].build(SMALL).to(device), {n: t.to(device) if torch.is_tensor(t) else t for n, t in inputs.items()}


def on_the_kernels(model, key: str) -> bool:
    found = fastvit.report(model)
    assert found.backend == "triton"
    assert not {name: reason for name, reason in found.fallbacks.items() if name != "head.attention"}
    return len(found.replaced) == SERVED.get(key, SMALL.depth)


@pytest.mark.parametrize("key", [k if k in IN_THE_FAST_SUITE else pytest.param(k, marks=pytest.mark.slow) for k in FAMILIES])
def test_outputs_and_gradients_on_the_kernels(key, device):
    """Inference, where a block ends with the next one's norm, and training, which keeps what backward needs."""
    model, inputs = family(key, device)
    with no_native_fast_path():  # whose nested tensors the next test has
        expected, trained = without_gradients(model, inputs), gradients(model, inputs)
        fastvit.accelerate(model)
        assert relative(without_gradients(model, inputs), expected) <= OUTPUT
        assert on_the_kernels(model, key)
        assert_equal_gradients(gradients(model, inputs), trained)
        assert on_the_kernels(model, key)


@pytest.mark.parametrize("key", IN_THE_FAST_SUITE)
def test_bfloat16_on_the_kernels_errs_at_most_twice_as_much_as_the_original(key, device):
    """Both against float64; half an eps on top, because any result must be rounded to bfloat16 once."""
    model, inputs = family(key, device)
    with no_native_fast_path():
        exact = without_gradients(copy.deepcopy(model).double(), cast(inputs, torch.float64))
        model, inputs = model.bfloat16(), cast(inputs, torch.bfloat16)
        eager = without_gradients(model, inputs)
        actual = without_gradients(fastvit.accelerate(model), inputs)
    assert on_the_kernels(model, key)
    assert actual.dtype == torch.bfloat16
    assert relative(actual, exact) <= 2 * relative(eager, exact) + torch.finfo(torch.bfloat16).eps / 2


def test_nested_tensors_on_the_kernels(device):
    model, inputs = family("torch_post_norm", device)
    with torch.no_grad():
        expected = output_of(model(**inputs))
        actual = output_of(fastvit.accelerate(model)(**inputs))
    assert on_the_kernels(model, "torch_post_norm")
    assert relative(actual, expected) <= OUTPUT
    assert actual[inputs["src_key_padding_mask"]].eq(0).all()
