"""Every family in training: dropout and stochastic depth under one seed, checkpointing, frozen parameters."""

import pytest
import torch
from torch import nn

import fastvit
from benchmarks.families import TINY
from fastvit.integrations import swap
from tests.model_errors import (
    MECHANISMS,
    OUTPUT,
    assert_equal_gradients,
    build,
    count,
    fused,
    gradients,
    relative,
    seeded,
    without_gradients,
)


def _no_weights_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0


DROPOUT = {
    "hf_vit": {"hidden_dropout_prob": 0.2},
    "hf_dinov2": {"hidden_dropout_prob": 0.2, "drop_path_rate": 0.4},
    "hf_dinov3": {"drop_path_rate": 0.4},
    "hf_dinov3_gated": {"drop_path_rate": 0.4},
    "timm_layer_scale": {"proj_drop_rate": 0.2, "drop_path_rate": 0.4},
    "timm_qk_norm": {"proj_drop_rate": 0.2, "drop_path_rate": 0.4},
    "timm_eva": {"proj_drop_rate": 0.2, "drop_path_rate": 0.4},
    "timm_eva02": {"proj_drop_rate": 0.2, "drop_path_rate": 0.4},
    "timm_eva02_packed": {"proj_drop_rate": 0.2, "drop_path_rate": 0.4},
    "torchvision_vit": {"dropout": 0.2},
    "torch_pre_norm": {"dropout": 0.2},
    "torch_post_norm": {"dropout": 0.2},
    "torch_tokens_first": {"dropout": 0.2},
}


@pytest.mark.parametrize("key", DROPOUT)
def test_dropout_and_drop_path_draw_as_before(key):
    model, inputs = build(key, 3, **DROPOUT[key])
    still = without_gradients(model, inputs)
    _no_weights_dropout(model.train())
    runs = []
    for prepare in (fastvit.restore, fastvit.accelerate):
        prepare(model)
        with seeded():
            runs.append((without_gradients(model, inputs), gradients(model, inputs)))
    assert fused(model, TINY.depth)
    assert relative(runs[1][0], runs[0][0]) <= OUTPUT
    assert_equal_gradients(runs[1][1], runs[0][1])
    assert relative(runs[0][0], still) > 100 * OUTPUT


@pytest.mark.parametrize("key", ["timm_vit", "timm_eva02", "timm_dinov3", "timm_rope_mixed"])
def test_tokens_dropped_in_training_keep_their_positions(key):
    """Every picture of a batch then has other tokens, and rotary positions of its own."""
    model, inputs = build(key, 3, patch_drop_rate=0.5)
    still = without_gradients(model, inputs)
    model.train()
    runs = []
    for prepare in (fastvit.restore, fastvit.accelerate):
        prepare(model)
        with seeded():
            runs.append((without_gradients(model, inputs), gradients(model, inputs)))
    assert fused(model, TINY.depth)
    assert relative(runs[1][0], runs[0][0]) <= OUTPUT
    assert_equal_gradients(runs[1][1], runs[0][1])
    assert relative(runs[0][0], still) > 100 * OUTPUT


WEIGHTS_DROPOUT = {
    "hf_vit": {"attention_probs_dropout_prob": 0.3},
    "hf_dinov2": {"attention_probs_dropout_prob": 0.3},
    "hf_dinov3": {"attention_dropout": 0.3},
    "hf_siglip": {"attention_dropout": 0.3},
    "hf_clip": {"attention_dropout": 0.3},
    "hf_clip_text": {"attention_dropout": 0.3},
    "timm_vit": {"attn_drop_rate": 0.3},
    "timm_eva02": {"attn_drop_rate": 0.3},
    "torchvision_vit": {"attention_dropout": 0.3},
    "torch_pre_norm": {"dropout": 0.3},
    "torch_attention": {"dropout": 0.3},
}


@pytest.mark.parametrize("key", WEIGHTS_DROPOUT)
def test_dropout_of_attention_weights_makes_a_block_run_its_own_forward(key):
    model, inputs = build(key, **WEIGHTS_DROPOUT[key])
    with seeded():
        expected = without_gradients(model.train(), inputs)
    fastvit.accelerate(model)
    with seeded():
        assert torch.equal(without_gradients(model, inputs), expected)
    reasons = fastvit.report(model).fallbacks
    assert len([r for r in reasons.values() if r == "dropout of the attention weights is active"]) == count(key)
    without_gradients(model.eval(), inputs)
    assert set(fastvit.report(model).fallbacks) <= {"head.attention"}


@pytest.mark.parametrize("key", ["hf_vit", "hf_dinov2", "hf_dinov3", "hf_siglip", "hf_clip_text", "timm_vit", "timm_eva02"])
def test_checkpointing_recomputes_the_fused_blocks(key, monkeypatch):
    model, inputs = build(key)
    with seeded():  # DINOv3 draws where its rotary positions are
        expected = gradients(model.train(), inputs)
    fastvit.accelerate(model)
    if key.startswith("timm"):
        model.set_grad_checkpointing()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls, compute = [], swap.compute
    monkeypatch.setattr(swap, "compute", lambda *args: calls.append(1) or compute(*args))
    with seeded():
        assert_equal_gradients(gradients(model, inputs), expected)
    assert len(calls) == 2 * TINY.depth
    assert set(fastvit.report(model).fallbacks) <= {"head.attention"}


@pytest.mark.parametrize("key", MECHANISMS)
def test_frozen_parameters_get_no_gradient(key):
    model, inputs = build(key)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name and "ln" not in name and not name.endswith("bias"))
    expected = gradients(model, inputs)
    assert_equal_gradients(gradients(fastvit.accelerate(model), inputs), expected)
    assert fused(model, count(key))
