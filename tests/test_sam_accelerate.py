"""Image encoders of three libraries' Segment Anything, accelerated against themselves."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastvit
from fastvit.integrations import handoff
from tests.model_errors import assert_equal_gradients, gradients, relative, seeded
from tests.models_for_acceleration import timm_vit
from tests.sams_for_acceleration import (
    DIM,
    ERROR,
    LAST,
    SIDE,
    assert_fused,
    embedding,
    encoder,
    hf_sam,
    image,
    masks_of,
    meta_encoder,
    meta_sam,
    prompted,
    run,
    timm_encoder,
    with_tables,
)

ENCODERS = ["segment_anything", "hf_sdpa", "hf_eager", "hf_hq", "timm"]


@pytest.mark.parametrize("key", ENCODERS)
@pytest.mark.parametrize("batch", [1, 3])
def test_an_encoder_gives_what_it_gave(key, batch):
    model, x = encoder(key), image(batch)
    expected = run(model, x)
    actual = run(fastvit.accelerate(model), x)
    assert_fused(model, 3)
    assert relative(actual, expected) <= ERROR
    assert fastvit.verify(model, x).passed


@pytest.mark.parametrize("key", ENCODERS)
def test_an_encoder_has_the_gradients_it_had(key):
    model, inputs = encoder(key), {"pixel_values" if key.startswith("hf") else "x": image()}
    expected = gradients(model, inputs)
    assert {name for name, _ in model.named_parameters()} <= expected.keys()
    assert_equal_gradients(gradients(fastvit.accelerate(model), inputs), expected)
    assert_fused(model, 3)


@pytest.mark.parametrize("key", ENCODERS)
def test_an_encoder_in_bfloat16_errs_at_most_twice_as_much(key):
    model, x = encoder(key), image(3)
    exact = run(copy.deepcopy(model).double(), x.double())
    model, x = model.bfloat16(), x.bfloat16()
    eager = run(model, x)
    actual = run(fastvit.accelerate(model), x)
    assert_fused(model, 3)
    assert actual.dtype == torch.bfloat16
    assert relative(actual, exact) <= 2 * relative(eager, exact) + torch.finfo(torch.bfloat16).eps / 2


OPTIONS = {
    "no relative positions": ("segment_anything", {"use_rel_pos": False}),
    "no bias of queries, keys and values": ("segment_anything", {"qkv_bias": False}),
    "windows larger than the image": ("segment_anything", {"window_size": 14}),
    "windows that fill the image": ("segment_anything", {"window_size": 3}),
    "windows of one token": ("segment_anything", {"window_size": 1}),
    "all global": ("segment_anything", {"window_size": 0}),
    "no relative positions in transformers": ("hf_sdpa", {"use_rel_pos": False}),
    "no bias in transformers": ("hf_eager", {"qkv_bias": False}),
    "LayerScale": ("timm", {"init_values": 0.5}),
    "norms of queries and keys": ("timm", {"qk_norm": True}),
    "norms of queries and keys without bias": ("timm", {"qk_norm": True, "qkv_bias": False}),
    "neither in timm": ("timm", {"use_rel_pos": False, "qkv_bias": False}),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_an_encoder_with(what):
    key, options = OPTIONS[what]
    model, x = encoder(key, **options), image()
    expected = run(model, x)
    actual = run(fastvit.accelerate(model), x)
    assert_fused(model, 3)
    assert relative(actual, expected) <= ERROR


def test_tables_of_another_image_size_are_resized():
    """timm takes other sizes; its position table is resized, its relative ones by the attention."""
    model, x = timm_encoder(), image(size=104)
    expected = run(model, x)
    actual = run(fastvit.accelerate(model), x)
    assert_fused(model, 3)
    assert relative(actual, expected) <= ERROR


def test_blocks_of_images_that_are_not_square():
    block = meta_encoder().blocks
    for index in (0, 1):
        x = torch.randn(2, 5, 7, DIM, generator=torch.Generator().manual_seed(index))
        expected = block[index](x).detach()
        fastvit.accelerate(block[index])
        assert relative(block[index](x).detach(), expected) <= ERROR
        assert_fused(block[index], 1)


def test_the_report_tells_windows_from_the_image():
    replaced = fastvit.report(fastvit.accelerate(meta_encoder())).replaced
    assert replaced["blocks.0"] == "fused attention in windows of 4 + relative positions + add+LayerNorm + GELU MLP"
    assert replaced["blocks.1"] == "fused attention on the image + relative positions + add+LayerNorm + GELU MLP"
    plain = fastvit.report(fastvit.accelerate(meta_encoder(use_rel_pos=False))).replaced
    assert plain["blocks.0"] == "fused attention in windows of 4 + add+LayerNorm + GELU MLP"


def test_flops_of_blocks_are_counted():
    model = fastvit.accelerate(meta_encoder())
    found = fastvit.report(model, image(1))
    # qkv and proj of 12 × 12 tokens, scores and values of nine windows of 16; the MLP of 81; relative positions, which the
    # original multiplies too.
    windows, tokens, hidden = 9 * 16, 81, 2 * DIM
    products = windows * 4 * DIM * DIM + 2 * windows * 16 * DIM + 2 * windows * 4 * DIM + 2 * tokens * DIM * hidden
    assert found.flops["blocks.0"] == 2 * products
    assert 0.5 < found.fused_share < 1


# --- what a block of images must go on doing ----------------------------------------------------------------------------


@pytest.mark.parametrize("key", ENCODERS)
def test_restore_gives_back_every_bit(key):
    model, x = encoder(key), image()
    classes = [type(module) for module in model.modules()]
    names, expected = [set(module.__dict__) for module in model.modules()], run(model, x)
    before = copy.deepcopy(model.state_dict())
    fastvit.accelerate(model)
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), classes, strict=True))
    run(model, x)
    fastvit.restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert [set(module.__dict__) for module in model.modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(run(model, x), expected)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("again", [copied, pickled])
@pytest.mark.parametrize("key", ["segment_anything", "hf_sdpa"])
def test_copies_are_served_too(key, again):
    model, x = fastvit.accelerate(encoder(key)), image()
    twin = again(model)
    assert torch.equal(run(twin, x), run(model, x))
    assert_fused(twin, 3)


SMALL = {"depth": 2}, {"num_hidden_layers": 2}  # for what compiles or is interpreted: 5 × 5 tokens, of windows and global


def small(key: str) -> tuple[nn.Module, torch.Tensor]:
    size = {"image_size" if key.startswith("hf") else "img_size": 40}
    return encoder(key, **size, **SMALL[key.startswith("hf")]), image(1, 40)


@pytest.mark.parametrize("key", ["segment_anything", "hf_sdpa"])
@pytest.mark.slow
def test_the_whole_graph_compiles(key):
    model, x = small(key)
    expected = run(model, x)
    compiled = torch.compile(fastvit.accelerate(model), fullgraph=True, backend="aot_eager")
    out = embedding(compiled(x))
    assert relative(out.detach(), expected) <= ERROR
    out.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "rel_pos" in name)


@pytest.mark.parametrize("key", ["segment_anything", "hf_eager", "timm"])
def test_autocast(key):
    model, x = encoder(key), image()
    exact = run(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        eager = run(model, x)
        actual = run(fastvit.accelerate(model), x)
    assert_fused(model, 3)
    assert actual.dtype == eager.dtype
    assert relative(actual, exact) <= 2 * relative(eager, exact) + torch.finfo(torch.bfloat16).eps / 2


def test_checkpointing_computes_the_same_gradients():
    model, inputs = hf_sam().vision_encoder, {"pixel_values": image()}
    model.train()
    expected = gradients(model, inputs)
    fastvit.accelerate(model)
    model.gradient_checkpointing_enable()
    assert_equal_gradients(gradients(model, inputs), expected)
    assert_fused(model, 3)


def test_the_next_blocks_norm_is_handed_on(monkeypatch):
    """Block 0 ends with block 1's norm, across windows and image."""
    model, x = meta_encoder(), image()
    expected = run(model, x)
    fastvit.accelerate(model)
    collect, taken = handoff.collect, []

    def observed(x, norm):
        found = collect(x, norm)
        taken.append(found is not None)
        return found

    monkeypatch.setattr(handoff, "BACKENDS", ("triton", "torch"))
    monkeypatch.setattr(handoff, "collect", observed)
    assert relative(run(model, x), expected) <= ERROR
    assert taken == [False, True, True]


def test_on_the_kernels(device):
    model, x = (part.to(device) for part in small("segment_anything"))
    expected = run(model, x)
    actual = run(fastvit.accelerate(model, backend="triton"), x)
    assert_fused(model, 2)
    assert relative(actual, expected) <= ERROR


def test_attentions_are_collected_as_before():
    model, x = hf_sam(attention="eager").vision_encoder, image()
    with torch.no_grad():
        expected = model(x, output_attentions=True, output_hidden_states=True)
        fastvit.accelerate(model)
        actual = model(x, output_attentions=True, output_hidden_states=True)
        assert set(fastvit.report(model).fallbacks.values()) == {"attn has forward hooks"}
        hidden = model(x, output_hidden_states=True)
    assert_fused(model, 3)
    assert len(expected.attentions) == 3
    for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(hidden.hidden_states, expected.hidden_states, strict=True):
        assert relative(ours, theirs) <= ERROR


def test_a_hook_inside_is_called_and_a_hook_on_the_block_stays():
    model, x = meta_encoder(), image()
    expected, seen = run(model, x), []
    fastvit.accelerate(model)
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model.blocks[1].attn.proj.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert relative(run(model, x), expected) <= ERROR
    assert seen == [(2, 9, 9, DIM), (2, 9, 9, DIM)]
    assert fastvit.report(model).fallbacks == {"blocks.1": "attn.proj has forward hooks"}


DRAWS = {
    "attn_drop_rate": ("dropout of the attention weights is active",) * 3,
    "proj_drop_rate": ("dropout within the windows is active", None, "dropout within the windows is active"),
    "drop_path_rate": (None, None, "stochastic depth of single windows is active"),
}


@pytest.mark.parametrize("option", DRAWS)
def test_what_draws_within_windows_draws_what_it_drew(option):
    model, x = timm_encoder(**{option: 0.3}), image()
    evaluated = run(model, x)
    model.train()
    with seeded():
        expected = run(model, x)
    fastvit.accelerate(model)
    with seeded():
        actual = run(model, x)
    assert relative(actual, expected) <= ERROR
    reasons = {f"blocks.{index}": reason for index, reason in enumerate(DRAWS[option]) if reason}
    assert fastvit.report(model).fallbacks == reasons
    model.eval()
    assert relative(run(model, x), evaluated) <= ERROR
    assert_fused(model, 3)


def test_dropout_of_weights_in_transformers_eager_attention():
    model, x = hf_sam(attention="eager", attention_dropout=0.3).vision_encoder.train(), image()
    with seeded():
        expected = run(model, x)
    fastvit.accelerate(model)
    with seeded():
        assert torch.equal(run(model, x), expected)
    assert set(fastvit.report(model).fallbacks.values()) == {"dropout of the attention weights is active"}


def test_rotary_blocks_are_left_alone():
    model = timm_encoder(use_rel_pos=False, use_rope=True)
    assert fastvit.report(fastvit.accelerate(model)).skipped["blocks.0"] == "unknown child 'attn.rope' (RotaryEmbeddingCat)"


def test_mobile_encoders_are_left_alone_with_a_reason():
    """TinyViT, MobileSAM's encoder, has its norms elsewhere."""
    from timm.models.tiny_vit import TinyVit

    model = TinyVit(embed_dims=(16, 32, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), window_sizes=(2, 2, 2, 2))
    found = fastvit.report(fastvit.accelerate(model))
    assert found.replaced == {}
    assert set(found.skipped.values()) == {"its norms lie inside its attention and its MLP"}


def test_a_mobile_sam_has_its_decoder_served():
    from timm.models.tiny_vit import TinyVit

    class Mobile(nn.Module):
        """The grid of 9 × 9 that the decoder expects, from TinyViT's."""

        def __init__(self):
            super().__init__()
            sizes = {"embed_dims": (16, 16, 16, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
            self.trunk = TinyVit(**sizes, window_sizes=(2, 2, 2, 2))
            self.img_size = SIDE

        def forward(self, x):
            return nn.functional.interpolate(self.trunk.forward_features(x), (9, 9), mode="bilinear")

    model, inputs = prompted("segment_anything")
    model.image_encoder = with_tables(Mobile())
    expected = masks_of(model(**inputs))
    actual = masks_of(fastvit.accelerate(model)(**inputs))
    assert relative(actual, expected) <= ERROR
    found = fastvit.report(model)
    assert set(found.replaced) == {f"mask_decoder.transformer.{name}" for name in ("layers.0", "layers.1", LAST)}
    assert found.skipped
    assert all(name.startswith("image_encoder.trunk.") for name in found.skipped)
    assert set(found.skipped.values()) == {"its norms lie inside its attention and its MLP"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["samvit_base_patch16", "samvit_huge_patch16"])
def test_timms_names_are_served(name):
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    found = fastvit.report(fastvit.accelerate(model, dry_run=True))
    assert found.skipped == {}
    assert set(found.replaced) == {f"blocks.{index}" for index in range(len(model.blocks))}


def test_a_block_that_computes_something_else_is_left_alone():
    from segment_anything.modeling.image_encoder import Block

    class Masked(Block):
        """Without the tokens that fill the last windows."""

        def forward(self, x):
            whole = super().forward(x[:, : x.shape[1] // 4 * 4, : x.shape[2] // 4 * 4]) if x.shape[1] > 4 else super().forward(x)
            return torch.nn.functional.pad(whole, (0, 0, 0, x.shape[2] - whole.shape[2], 0, x.shape[1] - whole.shape[1]))

    class Scaled(Block):
        """Tables that are not taken from the query as it is."""

        def forward(self, x):
            return super().forward(x) + 0.01 * self.attn.rel_pos_h.sum()

    for kind in (Masked, Scaled):
        model = meta_encoder()
        model.blocks[0].__class__ = kind
        found = fastvit.report(fastvit.accelerate(model))
        assert list(found.replaced) == ["blocks.1", "blocks.2"]
        assert "blocks.0" in found.skipped


class LowRank(nn.Module):
    """What adapters of SAM put in place of the packed projection: low-rank changes of queries and values."""

    def __init__(self, qkv: nn.Linear, rank: int = 2):
        super().__init__()
        dim = qkv.in_features
        self.qkv, self.query, self.value = qkv, nn.Linear(dim, rank, bias=False), nn.Linear(dim, rank, bias=False)
        self.query_up, self.value_up = nn.Linear(rank, dim, bias=False), nn.Linear(rank, dim, bias=False)

    def forward(self, x):
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return torch.cat([query + self.query_up(self.query(x)), key, value + self.value_up(self.value(x))], dim=-1)


def test_adapters_of_the_projection_are_called_as_they_are():
    model, x = meta_encoder(), image()
    for block in model.blocks:
        block.attn.qkv = LowRank(block.attn.qkv)
    expected, slopes = run(model, x), gradients(model, {"x": x})
    actual = run(fastvit.accelerate(model), x)
    assert_fused(model, 3)
    assert relative(actual, expected) <= ERROR
    assert "attn.qkv is called as it is" in fastvit.report(model).replaced["blocks.0"]
    assert_equal_gradients(gradients(model, {"x": x}), slopes)
    seen = []
    for block in model.blocks:  # one within windows would see the image instead
        block.attn.qkv.query.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    run(model, x)
    assert seen == [(18, 4, 4, 2), (2, 9, 9, 2), (18, 4, 4, 2)]
    assert fastvit.report(model).fallbacks == {"blocks.0": "attn.qkv has hooks", "blocks.2": "attn.qkv has hooks"}


def test_attention_maps_say_that_there_are_none():
    for model in (meta_encoder(), fastvit.accelerate(meta_encoder())):
        with pytest.raises(ValueError, match="it attends on an image"):
            fastvit.attention_maps(model, image(1))


def test_attention_maps_of_an_encoder_beside_a_mask_decoder():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = timm_vit(), meta_sam().mask_decoder

        def forward(self, x):
            return self.encoder(x)

    model, x = Both(), image(1, 24)
    expected = fastvit.attention_maps(model.encoder, x)
    for found in (fastvit.attention_maps(model, x), fastvit.attention_maps(fastvit.accelerate(model), x)):
        assert len(found) == 3
        for ours, theirs in zip(found, expected, strict=True):
            assert relative(ours, theirs) <= ERROR


def test_masks_run_a_blocks_own_forward():
    from segment_anything.modeling.image_encoder import Block

    class Masked(Block):
        def forward(self, x, attn_mask=None):
            return super().forward(x if attn_mask is None else x * attn_mask)

    block, x = meta_encoder().blocks[0], torch.randn(2, 5, 7, DIM, generator=torch.Generator().manual_seed(0))
    block.__class__ = Masked
    mask = (x[..., :1] > 0).float()
    expected = block(x, mask).detach()
    fastvit.accelerate(block)
    assert torch.equal(block(x, mask).detach(), expected)
    assert fastvit.report(block).fallbacks == {"": "it was called with a mask, which attention on an image has none of"}
    block(x, attn_mask=None)
    assert_fused(block, 1)
