"""The modes that models of each family are run in: autocast, other picture sizes, hooks, copies."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import fastvit
from benchmarks.families import FAMILIES, TINY, noise, output_of, perturb
from tests.model_errors import OUTPUT, build, fused, no_native_fast_path, relative, without_gradients

BLOCKS = {
    "hf_vit": "layers",
    "hf_dinov2": "encoder.layer",
    "hf_dinov3": "model.layer",
    "timm_vit": "blocks",
    "timm_eva02": "blocks",
    "torchvision_vit": "encoder.layers",
    "torch_post_norm": "layers",
}


# --- precision and layout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_autocast_errs_as_much_as_the_original(key, training):
    """Against float32; at most twice the original's error, half an eps of bfloat16 on top.

    Without torch's native fast path, which on a CPU does not know autocast: it refuses, or returns bfloat16 throughout.
    """
    model, inputs = build(key)
    exact = without_gradients(model, inputs)
    outputs = []
    for prepare in (fastvit.restore, fastvit.accelerate):
        prepare(model)
        with no_native_fast_path(), torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(output_of(model(**inputs)).detach())
    assert set(fastvit.report(model).fallbacks) <= {"head.attention"}
    assert outputs[1].dtype == outputs[0].dtype
    assert relative(outputs[1], exact) <= 2 * relative(outputs[0], exact) + torch.finfo(torch.bfloat16).eps / 2


def _pictures(key: str) -> bool:
    return any(t.dim() == 4 for t in FAMILIES[key].inputs(TINY, 1).values() if torch.is_tensor(t))


@pytest.mark.parametrize("key", [key for key in FAMILIES if _pictures(key)])
def test_channels_last_pictures(key):
    model, inputs = build(key)
    expected = without_gradients(model, inputs)
    inputs = {name: picture.to(memory_format=torch.channels_last) for name, picture in inputs.items()}
    fastvit.accelerate(model.to(memory_format=torch.channels_last))
    assert relative(without_gradients(model, inputs), expected) <= OUTPUT
    assert set(fastvit.report(model).fallbacks) <= {"head.attention"}


def _interpolated(key: str) -> tuple:
    option = {"interpolate_pos_encoding": True}
    if key in ("hf_vit", "hf_deit", "hf_siglip", "hf_clip"):
        return FAMILIES[key].build(TINY), option
    if key.startswith("timm"):
        return FAMILIES[key].build(TINY, dynamic_img_size=True), {}
    return FAMILIES[key].build(TINY), {}


SIZED = ["hf_vit", "hf_deit", "hf_dinov2", "hf_dinov2_registers", "hf_dinov3", "hf_siglip", "hf_clip", "timm_vit"]
SIZED += ["timm_registers", "timm_eva", "timm_eva02", "timm_dinov3", "timm_rope", "timm_rope_mixed"]


@pytest.mark.parametrize("key", SIZED)
def test_pictures_of_other_sizes_and_shapes(key):
    """More tokens, fewer, and one alone: positions are interpolated or rotated by the model, the blocks see other lengths."""
    model, options = _interpolated(key)
    name = next(iter(FAMILIES[key].inputs(TINY, 1)))
    for height, width in ((40, 16), (24, 56), (8, 8)):
        inputs = {name: noise(2, 3, height, width), **options}
        expected = without_gradients(fastvit.restore(model), inputs)
        actual = without_gradients(fastvit.accelerate(model), inputs)
        assert relative(actual, expected) <= OUTPUT
        assert set(fastvit.report(model).fallbacks) <= {"head.attention"}


@pytest.mark.parametrize("options", [{}, {"rope_type": "axial"}, {"rope_type": "axial", "attn_type": "rope"}], ids=str)
def test_packed_patches_of_pictures_of_several_sizes(options):
    """NaFlexViT: one batch of pictures with other numbers of patches, masked, each with rotary positions of its own."""
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    sizes = {"embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 2, "patch_size": 8, "pos_embed_grid_size": (3, 3)}
    model = perturb(NaFlexVit(NaFlexVitCfg(**sizes, **options), num_classes=5))
    grid = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"), dim=-1).reshape(1, 9, 2)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    inputs = {"x": noise(2, 9, 3 * 8 * 8), "patch_coord": torch.cat([grid, grid.flip(-1)]), "patch_valid": valid}
    expected = without_gradients(model, inputs)
    assert relative(without_gradients(fastvit.accelerate(model), inputs), expected) <= OUTPUT
    assert fused(model, 3)
    everything = {**inputs, "patch_valid": torch.ones_like(valid)}
    assert relative(without_gradients(model, everything), expected) > 100 * OUTPUT


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_on_the_left(implementation, backend, device):
    """The first tokens then have no key at all that they may attend to; eager's masks are the smallest finite number."""
    model, inputs = build("hf_clip_text", attn_implementation=implementation)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    inputs["attention_mask"][1, :5] = 0
    model, inputs = model.to(device), {name: t.to(device) for name, t in inputs.items()}
    expected = without_gradients(model, inputs)
    actual = without_gradients(fastvit.accelerate(model), inputs)
    assert fused(model, TINY.depth)
    assert actual.isfinite().all()
    assert relative(actual, expected) <= OUTPUT


# --- copies ---------------------------------------------------------------------------------------------------------------


def _saved_whole(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved_whole])
@pytest.mark.parametrize("key", FAMILIES)
def test_copies_are_served_with_weights_of_their_own(key, copied):
    model, inputs = build(key)
    expected = without_gradients(fastvit.accelerate(model), inputs)
    twin = copied(model)
    assert type(twin) is type(model)
    assert len(fastvit.report(twin).replaced) == len(fastvit.report(model).replaced)
    assert torch.equal(without_gradients(twin, inputs), expected)
    assert set(fastvit.report(twin).fallbacks) <= {"head.attention"}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert torch.equal(without_gradients(model, inputs), expected)
    changed = without_gradients(twin, inputs)
    assert relative(changed, without_gradients(fastvit.restore(twin), inputs)) <= OUTPUT
    assert relative(changed, expected) > 100 * OUTPUT


@pytest.mark.parametrize("key", FAMILIES)
def test_a_state_dict_goes_both_ways(key):
    model, inputs = build(key)
    other = FAMILIES[key].build(TINY)
    expected = without_gradients(model, inputs)
    assert relative(without_gradients(other, inputs), expected) > 100 * OUTPUT
    fastvit.accelerate(other).load_state_dict(model.state_dict())
    assert relative(without_gradients(other, inputs), expected) <= OUTPUT
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(other.state_dict())
    assert torch.equal(without_gradients(model, inputs), expected)


# --- hooks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", BLOCKS)
def test_hooks_on_a_block_see_what_they_saw(key):
    model, inputs = build(key)
    seen: list[Tensor] = []

    def look(module, args, kwargs, output):
        for tensor in (args[0] if args else kwargs["hidden_states"], output):
            seen.append(tensor.to_padded_tensor(0.0) if tensor.is_nested else tensor.clone())
        return output * 1.5

    model.get_submodule(BLOCKS[key])[1].register_forward_hook(look, with_kwargs=True)
    expected = without_gradients(model, inputs)
    without_gradients(fastvit.accelerate(model), inputs)
    actual = without_gradients(model, inputs)
    assert fused(model, TINY.depth)
    assert relative(actual, expected) <= OUTPUT
    assert len(seen) == 6
    for ours, theirs in zip(seen[4:], seen[:2], strict=True):
        assert relative(ours, theirs) <= OUTPUT


@pytest.mark.parametrize("key", BLOCKS)
def test_hooks_inside_a_block_run_and_their_changes_take_effect(key):
    model, inputs = build(key)
    linears = {name: m for name, m in model.get_submodule(BLOCKS[key])[1].named_modules() if type(m) is nn.Linear}
    for path, linear in linears.items():
        handle = linear.register_forward_hook(lambda module, args, output: output * 1.5)
        expected = without_gradients(fastvit.restore(model), inputs)
        actual = without_gradients(fastvit.accelerate(model), inputs)
        assert fastvit.report(model).fallbacks == {f"{_name_of(model, BLOCKS[key], 1)}": f"{path} has forward hooks"}
        assert relative(actual, expected) <= OUTPUT
        handle.remove()
    without_gradients(model, inputs)
    assert fused(model, TINY.depth)


def _name_of(model, blocks: str, number: int) -> str:
    block = model.get_submodule(blocks)[number]
    return next(name for name, module in model.named_modules() if module is block)
