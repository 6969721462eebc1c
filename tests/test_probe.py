"""What the probe sees: attention that differs from softmax(scale·QKᵀ)·V for many tokens or for large scores only."""

import pytest
import torch
from torch import nn

import fastvit
from benchmarks.families import FAMILIES, TINY
from fastvit.integrations import probe
from fastvit.integrations.matching import find_layout
from tests.models_for_acceleration import perturb

DIM, HEADS = 48, 3


def plain(scores):
    return scores


def band(scores):
    return _near(scores, 4)


def sliding_window(scores):
    return _near(scores, 32)


def top_five(scores):
    if scores.shape[-1] <= 5:
        return scores
    return scores.masked_fill(scores < scores.topk(5, dim=-1).values[..., -1:], float("-inf"))


def clamped(scores):
    return scores.clamp(-8, 8)


def clamped_far_out(scores):
    return scores.clamp(-25, 25)


def capped(scores):
    return 60 * torch.tanh(scores / 60)


def _near(scores, distance: int):
    row, column = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])
    return scores.masked_fill((row - column).abs() > distance, float("-inf"))


OTHER = [band, sliding_window, top_five, clamped, clamped_far_out, capped]


def attend(query, key, value, change):
    return torch.softmax(change(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5), dim=-1) @ value


def timm_block(change, **options):
    from timm.layers import Attention
    from timm.models.vision_transformer import Block

    class Own(Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            out = attend(self.q_norm(query), self.k_norm(key), value, change)
            return self.proj(out.transpose(1, 2).flatten(2))

    return Block(DIM, HEADS, qkv_bias=True, attn_layer=Own, **options)


def hf_layer(change):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": HEADS, "intermediate_size": 2 * DIM}
    layer = ViTModel(ViTConfig(image_size=24, patch_size=8, **sizes)).layers[0]

    class Own(type(layer.attention)):
        def forward(self, hidden_states, *_, **__):
            split = (p(hidden_states).unflatten(2, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
            return self.o_proj(attend(*split, change).transpose(1, 2).flatten(2)), None

    layer.attention.__class__ = Own
    return layer


def sam_block(change, window_size: int = 0):
    from timm.models.vision_transformer_sam import Block

    class Own(type(Block(DIM, HEADS).attn)):
        def forward(self, x, rope=None):
            query, key, value = self.qkv(x).flatten(1, 2).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(attend(query, key, value, change).transpose(1, 2).reshape(x.shape))

    block = Block(DIM, HEADS, window_size=window_size, use_rel_pos=False)
    block.attn.__class__ = Own
    return block


def sam_window_block(change):
    return sam_block(change, window_size=7)


class DecoderAttention(nn.Module):
    """As segment_anything's."""

    def __init__(self, change):
        super().__init__()
        self.change, self.internal_dim, self.num_heads = change, DIM // 2, HEADS
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(DIM, DIM // 2) for _ in range(3))
        self.out_proj = nn.Linear(DIM // 2, DIM)

    def forward(self, q, k, v):
        projected = (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        split = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in projected)
        return self.out_proj(attend(*split, self.change).transpose(1, 2).flatten(2))


class TwoWayBlock(nn.Module):
    """As segment_anything's."""

    def __init__(self, change):
        super().__init__()
        for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"):
            setattr(self, name, DecoderAttention(change))
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(DIM) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM))

    def forward(self, queries, keys, query_pe, key_pe):
        q = queries + query_pe
        queries = self.norm1(queries + self.self_attn(q, q, queries))
        queries = self.norm2(queries + self.cross_attn_token_to_image(queries + query_pe, keys + key_pe, keys))
        queries = self.norm3(queries + self.mlp(queries))
        keys = self.norm4(keys + self.cross_attn_image_to_token(keys + key_pe, queries + query_pe, queries))
        return queries, keys


def timm_block_with_norms(change):
    return timm_block(change, qk_norm=True)


def why_different(module) -> str | None:
    layout = find_layout(module)
    assert not isinstance(layout, str | None), layout
    return probe.why_different(module, layout)


BLOCKS = [timm_block, timm_block_with_norms, hf_layer, sam_block, sam_window_block, DecoderAttention, TwoWayBlock]


@pytest.mark.parametrize("build", BLOCKS)
def test_softmax_attention_is_proved(build):
    assert why_different(build(plain)) is None


@pytest.mark.parametrize("change", OTHER)
@pytest.mark.parametrize("build", BLOCKS)
def test_attention_that_differs_for_many_tokens_or_large_scores_is_not(build, change):
    assert "computes something else" in why_different(build(change))


@pytest.mark.parametrize("change", OTHER)
def test_another_attention_is_left_alone_and_says_why(change):
    model = nn.ModuleList([perturb(timm_block(change))])
    assert "computes something else" in fastvit.report(fastvit.accelerate(model)).skipped["0"]


@pytest.mark.parametrize("key", sorted(FAMILIES))
def test_rounding_stays_far_below_the_tolerance(key, monkeypatch):
    """With scores this large too: what is served is proved with a quarter of the allowed error to spare and more."""
    monkeypatch.setattr(probe, "TOLERANCE", probe.TOLERANCE / 4)
    with torch.device("meta"):
        model = FAMILIES[key].build(TINY)
    fastvit.accelerate(model, dry_run=True)
    assert fastvit.report(model).replaced
