"""Blocks with adapters, quantized linears and tensor subclasses in them, and models that Hugging Face accelerate dispatched."""

import copy
import functools

import pytest
import torch
from torch import nn

import fastvit
from benchmarks.families import FAMILIES, TINY
from tests.model_errors import OUTPUT, assert_equal_gradients, fused, gradients, relative, without_gradients


def family(key: str):
    return FAMILIES[key].build(TINY), FAMILIES[key].inputs(TINY, 2)


# --- LoRA ---------------------------------------------------------------------------------------------------------------

LORA = {
    "hf_vit": (["q_proj", "v_proj"], ["attention.q_proj", "attention.v_proj"]),
    "hf_dinov3_gated": (["o_proj", "gate_proj", "down_proj"], ["attention.o_proj", "mlp.gate_proj", "mlp.down_proj"]),
    "timm_vit": (["qkv", "fc1"], ["attn.qkv", "mlp.fc1"]),
    "timm_eva02": (["q_proj", "fc1_g"], ["attn.q_proj", "mlp.fc1_g"]),
    "torchvision_vit": (["mlp.0"], ["mlp.0"]),
}


def with_lora(key: str, dropout: float = 0.0):
    """A model with adapters whose second factor is not zero, as it would be before training."""
    peft = pytest.importorskip("peft")
    model, inputs = family(key)
    config = peft.LoraConfig(r=2, target_modules=LORA[key][0], lora_dropout=dropout, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval(), inputs


@pytest.mark.parametrize("key", LORA)
def test_lora_is_called_as_it_is_and_trained_as_before(key):
    model, inputs = with_lora(key)
    expected, trained = without_gradients(model, inputs), gradients(model, inputs)
    with model.disable_adapter():
        unadapted = without_gradients(model, inputs)
    fastvit.accelerate(model)
    found = fastvit.report(model)
    for outcome in found.replaced.values():
        notes = [f"{path} is called as it is (a Linear of peft's own, not a plain Linear)" for path in LORA[key][1]]
        assert sorted(outcome.split("; ")[1:]) == sorted(notes)
    assert relative(without_gradients(model, inputs), expected) <= OUTPUT
    assert_equal_gradients(gradients(model, inputs), trained)
    assert sum("lora_" in name for name in trained) == 2 * len(LORA[key][0]) * TINY.depth
    assert fused(model, TINY.depth)
    with model.disable_adapter():
        assert relative(without_gradients(model, inputs), unadapted) <= OUTPUT
    assert relative(unadapted, expected) > 100 * OUTPUT


def test_loras_dropout_draws_as_before():
    model, inputs = with_lora("timm_vit", dropout=0.5)
    model.train()
    outputs = []
    for prepare in (fastvit.restore, fastvit.accelerate):
        prepare(model)
        torch.manual_seed(3)
        outputs.append(without_gradients(model, inputs))
    assert fused(model, TINY.depth)
    assert relative(outputs[1], outputs[0]) <= OUTPUT
    assert relative(without_gradients(model.eval(), inputs), outputs[0]) > 100 * OUTPUT


@pytest.mark.parametrize("key", ["hf_vit", "timm_vit"])
def test_merged_lora_leaves_plain_linears(key):
    model, inputs = with_lora(key)
    expected = without_gradients(model, inputs)
    merged = fastvit.accelerate(model.merge_and_unload())
    assert all("called as it is" not in outcome for outcome in fastvit.report(merged).replaced.values())
    assert relative(without_gradients(merged, inputs), expected) <= OUTPUT
    assert fused(merged, TINY.depth)


def test_lora_put_into_an_accelerated_model_takes_effect():
    peft = pytest.importorskip("peft")
    model, inputs = family("hf_vit")
    fastvit.accelerate(model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    actual = without_gradients(adapted, inputs)
    assert set(fastvit.report(adapted).fallbacks) == {f"base_model.model.layers.{number}" for number in range(TINY.depth)}
    assert torch.equal(actual, without_gradients(fastvit.restore(adapted), inputs))


# --- quantized linears and tensor subclasses ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("key", ["hf_vit", "timm_vit", "hf_dinov3_gated"])
def test_dynamically_quantized_linears_are_called_as_they_are(key):
    model, inputs = family(key)
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    expected = without_gradients(model, inputs)
    fastvit.accelerate(model)
    outcomes = fastvit.report(model).replaced
    assert all(
        outcome.count("is called as it is (a Linear of torch's own, not a plain Linear)") >= 4 for outcome in outcomes.values()
    )
    actual = without_gradients(model, inputs)
    assert fused(model, TINY.depth)
    assert relative(actual, expected) <= OUTPUT


class Doubled(torch.Tensor):
    """A weight that computes something else than its numbers say: reading the numbers alone would show."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [torch.Tensor.as_subclass(a, torch.Tensor) * 2 if isinstance(a, Doubled) else a for a in args]
        if func is nn.functional.linear:
            return func(*plain, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("key", ["hf_vit", "timm_vit"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_weight_of_another_kind_keeps_its_own_arithmetic(key, when):
    model, inputs = family(key)
    plain = without_gradients(model, inputs)
    linear = next(m for name, m in model.named_modules() if name.endswith("fc1"))
    if when == "after":
        fastvit.accelerate(model)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Doubled), requires_grad=False)
    assert type(linear.weight) is Doubled
    if when == "before":
        fastvit.accelerate(model)
        noted = [outcome for outcome in fastvit.report(model).replaced.values() if "its weight is a Doubled" in outcome]
        assert len(noted) == 1
    actual = without_gradients(model, inputs)
    assert [("Doubled" in reason) for reason in fastvit.report(model).fallbacks.values()] == [True] * (when == "after")
    assert relative(actual, without_gradients(fastvit.restore(model), inputs)) <= OUTPUT
    assert relative(actual, plain) > 100 * OUTPUT


# --- models dispatched by Hugging Face accelerate -------------------------------------------------------------------------


def hook_blocks(model):
    hooks = pytest.importorskip("accelerate.hooks")
    for block in model.layers:
        hooks.add_hook_to_module(block, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


def dispatch(model):
    """What ``device_map`` does: hooks on every module."""
    return pytest.importorskip("accelerate").dispatch_model(model, {"": "cpu"}, force_hooks=True)


def offload_blocks(model):
    """A block's weights come from memory when the block is called, all at once."""
    names = [type(model.layers[0]).__name__]
    return pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu", preload_module_classes=names)


def offload_leaves(model):
    return pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")


HOOKED = [hook_blocks, dispatch, offload_blocks]


def count_calls(module) -> list:
    """Counts what passes through the hook that a module has."""
    calls, hook = [], module._hf_hook
    before = hook.pre_forward
    hook.pre_forward = lambda *args, **kwargs: calls.append(1) or before(*args, **kwargs)
    return calls


@pytest.mark.parametrize("hooked", HOOKED)
def test_a_hooked_block_is_served_inside_its_hook(hooked):
    model, inputs = family("hf_vit")
    expected = without_gradients(model, inputs)
    block = hooked(model).layers[1]
    held, forward, names = block._old_forward, block.forward, set(block.__dict__)
    assert isinstance(forward, functools.partial)
    calls = count_calls(block)
    fastvit.accelerate(model)
    assert relative(without_gradients(model, inputs), expected) <= OUTPUT
    assert fused(model, TINY.depth)
    assert block._old_forward.__func__ is type(block).forward
    assert calls == [1]
    fastvit.restore(model)
    assert block._old_forward.__func__ is held.__func__ is type(block).forward
    assert block._old_forward.__self__ is block
    assert block.forward is forward
    assert set(block.__dict__) == names
    assert torch.equal(without_gradients(model, inputs), expected)
    assert calls == [1, 1]


def test_gradients_pass_through_hooked_blocks():
    model, inputs = family("hf_dinov3")
    expected = gradients(model, inputs)
    fastvit.accelerate(dispatch(model))
    assert_equal_gradients(gradients(model, inputs), expected)
    assert fused(model, TINY.depth)


def test_hooks_that_load_each_linear_make_a_block_run_its_own_forward():
    model, inputs = family("hf_vit")
    expected = without_gradients(model, inputs)
    fastvit.accelerate(offload_leaves(model))
    assert torch.equal(without_gradients(model, inputs), expected)
    reasons = fastvit.report(model).fallbacks
    assert len(reasons) == TINY.depth
    assert all("accelerate's hooks" in reason for reason in reasons.values())


@pytest.mark.parametrize("change", [{"io_same_device": True}, {"no_grad": True}])
def test_a_hook_inside_a_block_that_does_more_is_honoured(change):
    model, inputs = family("hf_vit")
    fastvit.accelerate(dispatch(model))
    vars(model.layers[1].mlp.fc1._hf_hook).update(change)
    without_gradients(model, inputs)
    assert list(fastvit.report(model).fallbacks) == ["layers.1"]


def test_a_hooked_blocks_children_are_proved_without_their_hooks():
    """The hooks of children hold the children's own forwards, with the model's weights: no part of the proof."""
    model, inputs = family("timm_vit")
    expected = without_gradients(model, inputs)
    calls = count_calls(dispatch(model).blocks[0].attn.qkv)
    fastvit.accelerate(model)
    assert not calls
    assert relative(without_gradients(model, inputs), expected) <= OUTPUT
    assert fused(model, TINY.depth)


@pytest.mark.parametrize("hooked", [hook_blocks, dispatch])
def test_hooks_may_go_while_a_model_is_accelerated(hooked):
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = family("hf_vit")
    expected = without_gradients(model, inputs)
    fastvit.accelerate(hooked(model))
    hooks.remove_hook_from_module(model, recurse=True)
    for prepare in (lambda m: m, fastvit.restore, fastvit.accelerate):
        prepare(model)
        assert relative(without_gradients(model, inputs), expected) <= OUTPUT
        assert model.layers[0].forward.__func__ is type(model.layers[0]).forward
    assert fused(model, TINY.depth)


def test_hooks_may_come_while_a_model_is_accelerated():
    model, inputs = family("hf_vit")
    expected = without_gradients(model, inputs)
    dispatch(fastvit.accelerate(model))
    calls = count_calls(model.layers[0])
    assert relative(without_gradients(model, inputs), expected) <= OUTPUT
    assert fused(model, TINY.depth)
    assert calls == [1]
    assert torch.equal(without_gradients(fastvit.restore(model), inputs), expected)
    assert calls == [1, 1]


@pytest.mark.parametrize("hooked", [hook_blocks, dispatch])
def test_a_copy_of_a_hooked_model_runs_its_own_weights(hooked):
    model, inputs = family("hf_vit")
    fastvit.accelerate(hooked(model))
    expected = without_gradients(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layers[0].mlp.fc1.weight.mul_(2)
    calls = count_calls(twin.layers[0])
    changed = without_gradients(twin, inputs)
    assert fused(twin, TINY.depth)
    assert calls == [1]
    assert twin.layers[0]._old_forward.__self__ is twin.layers[0]
    assert relative(changed, without_gradients(fastvit.restore(twin), inputs)) <= OUTPUT
    assert relative(changed, expected) > 100 * OUTPUT
    assert torch.equal(without_gradients(model, inputs), expected)


def test_a_plan_and_a_scope_leave_hooks_as_they_were():
    model, inputs = family("hf_vit")
    block = hook_blocks(model).layers[0]
    held = block._old_forward.__func__
    with fastvit.accelerated(model):
        fastvit.accelerate(model, dry_run=True)
        assert block._old_forward.__func__ is type(block).forward is not held
        without_gradients(model, inputs)
        assert block.__dict__["_fastvit_serving"].fallback is None
    assert block._old_forward.__func__ is type(block).forward is held


def test_verify_looks_inside_hooks():
    model, inputs = family("hf_vit")
    result = fastvit.verify(fastvit.accelerate(dispatch(model)), **inputs)
    assert result.fused_blocks == TINY.depth
    assert result.passed
    assert result.first_out_of_line is None
