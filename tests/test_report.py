"""The report: shares of the arithmetic are counted right, and it reads well printed, stored and shown."""

import copy
import html.parser
import json
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fastvit
from fastvit import functional, reporting
from fastvit.integrations import swap
from tests.interruptions import contents
from tests.models_for_acceleration import (
    DEPTH,
    DIM,
    HIDDEN,
    TOKENS,
    OldViTLayer,
    Repeated,
    block_flops,
    hf_vit,
    image,
    perturb,
    timm_own_mlp,
    timm_vit,
    tokens,
)


@pytest.mark.parametrize("batch", [1, 3])
def test_flops_equal_a_count_by_hand(batch):
    model = fastvit.accelerate(timm_vit())
    found = fastvit.report(model, image(batch))
    patches, head = 2 * batch * 9 * DIM * 3 * 8 * 8, 2 * batch * DIM * 5
    assert found.flops == {f"blocks.{i}": block_flops(batch) for i in range(DEPTH)}
    assert found.total_flops == DEPTH * block_flops(batch) + patches + head
    assert found.fused_share == pytest.approx(DEPTH * block_flops(batch) / found.total_flops)
    assert fastvit.report(model).total_flops is None
    assert fastvit.report(model).fused_share is None


def test_vit_b_16_takes_35_gflop_an_image():
    from timm import create_model

    with torch.device("meta"):
        model = fastvit.accelerate(create_model("vit_base_patch16_224"))
        found = fastvit.report(model, torch.empty(1, 3, 224, 224))
    assert found.total_flops == pytest.approx(35.1e9, rel=0.01)
    assert found.fused_share == pytest.approx(0.993, abs=0.001)  # the rest: patches and head
    assert "fused: 99.3% of 35.1 GFLOP" in str(found)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_counted_whichever_implementation_runs(implementation):
    model = hf_vit()
    model.set_attn_implementation(implementation)
    found = fastvit.report(fastvit.accelerate(model), image())
    assert list(found.flops.values()) == [block_flops(2)] * 3


def test_keywords_are_inputs_too():
    model = fastvit.accelerate(hf_vit())
    assert fastvit.report(model, pixel_values=image()) == fastvit.report(model, image())


def test_every_call_is_counted():
    found = fastvit.report(fastvit.accelerate(Repeated(4)), tokens())
    assert found.flops == {"block": 4 * block_flops(2, tokens=7), "idle": 0}
    assert found.fused_share == 1


def test_what_a_block_calls_as_it_is_does_not_count_as_fused():
    model = timm_vit()
    blocks = {"blocks.0": model.blocks[0], "blocks.1": model.blocks[1]}
    called = {"blocks.0": ("mlp", "mlp.fc1", "gone"), "blocks.1": ()}
    flops, total = reporting.count_flops(model, (image(),), {}, blocks, called, nullcontext)
    mlp = 2 * 2 * TOKENS * 2 * DIM * HIDDEN
    assert flops == {"blocks.0": block_flops(2) - mlp, "blocks.1": block_flops(2)}
    assert total == fastvit.report(model, image()).total_flops


def test_a_block_inside_a_block_counts_once():
    model = timm_vit()
    blocks = {"outer": model.blocks[0], "inner": model.blocks[0].mlp}
    flops, _ = reporting.count_flops(model, (image(),), {}, blocks, {}, nullcontext)
    assert flops == {"outer": block_flops(2), "inner": 0}


ATTENTION_FLOPS = 2 * 2 * TOKENS * (4 * DIM * DIM + 2 * TOKENS * DIM)


def test_an_mlp_of_another_kind_does_not_count_as_fused():
    found = fastvit.report(fastvit.accelerate(timm_own_mlp()), image())
    assert set(found.flops.values()) == {ATTENTION_FLOPS}
    assert found.total_flops == fastvit.report(timm_own_mlp(), image()).total_flops


def test_an_adapter_does_not_count_as_fused():
    peft = pytest.importorskip("peft")
    model = timm_vit()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["fc1"], r=4), model)
    found = fastvit.report(fastvit.accelerate(model), image())
    assert set(found.flops.values()) == {ATTENTION_FLOPS + 2 * 2 * TOKENS * DIM * HIDDEN}
    adapters = DEPTH * 2 * 2 * TOKENS * 4 * (DIM + HIDDEN)
    assert found.total_flops == fastvit.report(timm_vit(), image()).total_flops + adapters


def test_one_module_called_by_two_blocks_is_taken_from_each_once():
    model = timm_vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    blocks = {"blocks.0": model.blocks[0], "blocks.1": model.blocks[1]}
    flops, _ = reporting.count_flops(model, (image(),), {}, blocks, dict.fromkeys(blocks, ("mlp",)), nullcontext)
    assert set(flops.values()) == {block_flops(2) - 2 * 2 * TOKENS * 2 * DIM * HIDDEN}


def test_a_block_on_its_own_forward_counts_none():
    model = fastvit.accelerate(timm_vit())
    model.blocks[1].attn.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model(image())
    found = fastvit.report(model, image())
    assert found.flops == {"blocks.0": block_flops(2), "blocks.1": 0, "blocks.2": block_flops(2)}
    assert found.fallbacks == {"blocks.1": "attn has forward hooks"}


def test_a_dry_run_is_counted_too():
    model = timm_vit()
    fastvit.accelerate(model, dry_run=True, exclude="blocks.0")
    found = fastvit.report(model, image())
    assert found.planned
    assert found.flops == {"blocks.1": block_flops(2), "blocks.2": block_flops(2)}


def test_a_model_that_is_not_accelerated_has_nothing_fused():
    found = fastvit.report(timm_vit(), image())
    assert (found.flops, found.fused_share) == ({}, 0)
    assert found.total_flops > 3 * block_flops(2)


def test_torchs_own_fast_path_is_counted():
    """It is one operator in inference, which the counter does not know."""
    layer = nn.TransformerEncoderLayer(DIM, 4, HIDDEN, batch_first=True, activation="gelu").eval()
    x = tokens(2, TOKENS)
    assert fastvit.report(layer, x).total_flops == block_flops(2)
    attention = nn.MultiheadAttention(DIM, 4, batch_first=True).eval()
    assert fastvit.report(attention, x, x, x).total_flops == ATTENTION_FLOPS
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("setting", ["auto", "triton", "torch"])
def test_fastvits_own_operators_are_counted(setting):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, 64)

        def forward(self, x):
            x = functional.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
            return functional.attention(*(x[:, None] for _ in range(3)))

    x = torch.randn(2, 256, 64)  # enough for oneDNN to serve it otherwise
    with fastvit.use_backend(setting):
        found = fastvit.report(Own(), x)
    assert found.total_flops == 2 * 2 * 256 * (2 * 64 * 128 + 2 * 256 * 64)


def small_siglip(**options) -> nn.Module:
    from timm import create_model

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": 1, "num_heads": 3}
    return create_model("vit_base_patch16_siglip_224", **sizes, **options).eval()


def test_a_pool_whose_query_is_a_parameter_is_counted():
    """It expands the parameter without gradients, a view that wants one and has no history."""
    model = fastvit.accelerate(small_siglip())
    x = image(size=32).requires_grad_()
    found = fastvit.report(model, x.expand(2, -1, -1, -1))
    assert found.flops == {"blocks.0": block_flops(2, tokens=16, hidden=4 * DIM)}
    assert found.total_flops > found.flops["blocks.0"]
    assert x.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.blocks.requires_grad_(False)
    fastvit.report(model, x)
    assert not any(parameter.requires_grad for parameter in model.blocks.parameters())


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 3, batch_first=True)

    def forward(self, x, **options):
        return self.attention(x, x, x, **options)[0]


def test_attention_that_is_asked_for_weights_does_not_count_as_fused():
    model, x = fastvit.accelerate(Pooled().eval()), tokens()
    asked, not_asked = fastvit.report(model, x), fastvit.report(model, x, need_weights=False)
    assert list(asked.replaced) == list(not_asked.replaced) == ["attention"]
    assert (asked.flops, asked.fused_share) == ({"attention": 0}, 0)
    assert not_asked.fused_share == 1
    assert asked.total_flops == not_asked.total_flops == not_asked.flops["attention"] > 0
    assert not model.attention.__dict__.get(swap.ATTRIBUTE).fallback


def test_counting_leaves_the_model_as_it_was():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.body = nn.BatchNorm2d(3), fastvit.accelerate(timm_vit(drop_path_rate=0.5))

        def forward(self, x):
            return self.body(self.norm(x)) + torch.rand(5)

    model = Normed().train()
    before, state, buffers = contents(model), torch.get_rng_state(), copy.deepcopy(model.state_dict())
    fastvit.report(model, image())
    for interruption in (RuntimeError("no more"), KeyboardInterrupt()):
        handle = model.body.norm.register_forward_pre_hook(lambda *_, interruption=interruption: raising(interruption))
        with pytest.raises(type(interruption)):
            fastvit.report(model, image())
        handle.remove()
    assert contents(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, buffers[name]) for name, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled
    assert not nn.modules.module._global_forward_pre_hooks


def raising(error, *_):
    raise error


# --- the report, to print, to store and to show -------------------------------------------------------------------------


class Table(html.parser.HTMLParser):
    """Reads a table, and that every tag is closed in its place."""

    VOID = ("meta", "br", "!doctype")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.rows, self.caption, self.tags = [], [], "", Counter()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if "caption" in self.open:
            self.caption += data


def eventful() -> nn.Module:
    """One block replaced, one on its own forward, one left alone; names and reasons with characters that HTML keeps."""
    model = nn.Sequential()
    for name in ("plain", "<b>own & forward</b>", "left"):
        model.add_module(name, perturb(OldViTLayer()))
    model.left.layernorm_before = nn.GroupNorm(1, DIM)
    fastvit.accelerate(model)
    model[1].intermediate.dense.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model[:2](tokens())
    return model


def test_a_page_has_a_row_for_every_module():
    model = eventful()
    found = fastvit.report(model)
    page = Table(found.to_html())
    assert page.tags["html"] == page.tags["table"] == 1
    assert not {"script", "link", "img", "b"} & set(page.tags)
    header, plain, own, left = page.rows
    assert header == ["module", "status", "what serves it, or why not"]
    assert plain == ["plain", "replaced", found.replaced["plain"]]
    assert own[:2] == ["<b>own & forward</b>", "own forward"]
    assert own[2].endswith("its last call ran its own forward: intermediate.dense has forward hooks")
    assert left == ["left", "left alone", "layernorm_before is a GroupNorm, not a LayerNorm"]
    assert "2 blocks replaced, 1 left as they were" in page.caption
    assert f"backend: {found.backend}" in page.caption
    fragment = found._repr_html_()
    assert Table(fragment).rows == page.rows
    assert "<html" not in fragment


def test_a_page_shows_the_share_where_it_was_counted():
    model = fastvit.accelerate(timm_vit(), exclude="blocks.0")
    found = fastvit.report(model, image())
    page = Table(found.to_html())
    assert page.rows[0][3] == "fused"
    assert [row[3] for row in page.rows[1:]] == ["776 kFLOP", "776 kFLOP", ""]
    assert block_flops(2) == 775680
    assert f"fused: {found.fused_share:.1%} of 2.66 MFLOP" in page.caption


@pytest.mark.parametrize("state", ["not accelerated", "nothing to replace", "would be replaced"])
def test_pages_and_lines_of_models_without_served_blocks(state):
    model = {"nothing to replace": lambda: fastvit.accelerate(nn.Linear(3, 3))}.get(state, timm_vit)()
    if state == "would be replaced":
        fastvit.accelerate(model, dry_run=True)
    found = fastvit.report(model)
    assert state in str(found)
    assert state in Table(found.to_html()).caption
    assert state in Table(found._repr_html_()).caption


def test_a_report_as_a_dictionary_is_plain():
    model = eventful()
    model.left = nn.Identity()
    found = fastvit.report(model, tokens())
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["replaced"] == found.replaced
    assert plain["skipped"] == found.skipped
    assert plain["fallbacks"] == found.fallbacks
    assert plain["flops"] == {"plain": block_flops(2, tokens=7), "<b>own & forward</b>": 0}
    assert plain["total_flops"] == 2 * block_flops(2, tokens=7)
    assert plain["fused_share"] == 0.5
    assert (plain["accelerated"], plain["planned"], plain["backend"]) == (True, False, found.backend)
    plain["replaced"].clear()
    assert found.replaced


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0, "0 FLOP"), (999, "999 FLOP"), (1000, "1 kFLOP"), (35_127_656_448, "35.1 GFLOP"), (5.6e15, "5600 TFLOP")],
)
def test_flops_to_read(flops, text):
    assert reporting._readable(int(flops)) == text
