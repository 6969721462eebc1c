"""The mask decoder of three libraries' Segment Anything, accelerated against itself."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fastvit
from tests.model_errors import assert_equal_gradients, gradients, relative
from tests.sams_for_acceleration import ERROR, LAST, assert_fused, image, masks_of, meta_sam, prompted, with_tables

DECODERS = ["segment_anything", "hf_sdpa", "hf_hq"]


@pytest.mark.parametrize("key", [*DECODERS, "hf_eager"])
def test_a_model_gives_the_masks_it_gave(key):
    model, inputs = prompted(key)
    with torch.no_grad():
        expected = masks_of(model(**inputs))
        actual = masks_of(fastvit.accelerate(model)(**inputs))
    assert relative(actual, expected) <= ERROR
    found = fastvit.report(model)
    assert found.skipped == {}
    assert len(found.replaced) == 6
    last = f"mask_decoder.transformer.{LAST}"  # eager attention returns its weights, which fused has none of
    eager = {last: "the attention implementation 'eager' returns the attention weights"}
    assert found.fallbacks == (eager if key == "hf_eager" else {})
    assert found.replaced[last] == "fused attention"
    assert found.replaced["mask_decoder.transformer.layers.0"] == "fused attention both ways + add+LayerNorm + ReLU MLP"


def decode(model: nn.Module, inputs: dict) -> torch.Tensor:
    """segment_anything's model runs without gradients: its decoder by itself, for two images in a batch."""
    if "batched_input" not in inputs:
        return masks_of(model(**inputs))
    embeddings = model.image_encoder(image())
    points = inputs["batched_input"][0]["point_coords"][:2], inputs["batched_input"][0]["point_labels"][:2]
    sparse, dense = model.prompt_encoder(points=points, boxes=None, masks=None)
    masks, scores = model.mask_decoder(embeddings[:1], model.prompt_encoder.get_dense_pe(), sparse, dense, True)
    return torch.cat([masks.flatten(), scores.flatten()])


@pytest.mark.parametrize("key", DECODERS)
def test_a_model_has_the_gradients_it_had(key):
    model, inputs = prompted(key)
    expected = gradients(model, inputs, lambda **inputs: decode(model, inputs))
    assert sum("mask_decoder.transformer" in name for name in expected) == 7 * 8 + 2 * 12 + 2
    fastvit.accelerate(model)
    assert_equal_gradients(gradients(model, inputs, lambda **inputs: decode(model, inputs)), expected)
    assert_fused(model, 6)


@pytest.mark.parametrize("key", DECODERS)
def test_a_decoder_in_bfloat16_errs_at_most_twice_as_much(key):
    transformer = prompted(key)[0].mask_decoder.transformer
    generator = torch.Generator().manual_seed(4)
    if key == "segment_anything":
        shapes = [(2, 32, 9, 9), (2, 32, 9, 9), (2, 6, 32)]
    else:
        shapes = [(2, 3, 6, 32), (6, 32, 9, 9), (6, 32, 9, 9)]
    given = [torch.randn(shape, generator=generator) for shape in shapes]

    def both(dtype: torch.dtype) -> torch.Tensor:
        cast = [t.to(dtype) for t in given]
        more = [] if key == "segment_anything" else [None]
        with torch.no_grad():
            return torch.cat([t.flatten() for t in transformer.to(dtype)(*cast, *more)])

    exact = both(torch.float64)
    eager = both(torch.bfloat16)
    transformer.float()
    fastvit.accelerate(transformer)
    actual = both(torch.bfloat16)
    assert_fused(transformer, 3)
    assert relative(actual, exact) <= 2 * relative(eager, exact) + torch.finfo(torch.bfloat16).eps / 2


def test_decoder_attentions_are_collected_as_before():
    model, inputs = prompted("hf_sdpa")
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True).mask_decoder_attentions
        actual = fastvit.accelerate(model)(**inputs, output_attentions=True).mask_decoder_attentions
    assert len(expected) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert relative(ours, theirs) <= ERROR
    assert not any("mask_decoder" in name for name in fastvit.report(model).fallbacks)
    assert len(fastvit.report(model).replaced) == 6


def test_similarities_and_targets_run_the_models_own_forward():
    model, inputs = prompted("hf_sdpa")
    similarity, target = torch.randn(2, 1, 1, 81), torch.randn(2, 1, 1, 32)
    with torch.no_grad():
        embeddings = model.get_image_embeddings(inputs["pixel_values"])
        call = {"image_embeddings": embeddings, "input_points": inputs["input_points"][:, :1], "target_embedding": target}
        expected = masks_of(model(**call, attention_similarity=similarity))
        fastvit.accelerate(model)
        assert relative(masks_of(model(**call, attention_similarity=similarity)), expected) <= ERROR
        reasons = fastvit.report(model).fallbacks
        assert reasons == {f"mask_decoder.transformer.layers.{i}": "it was called with attention_similarity" for i in (0, 1)}
        model(**call)
    assert_fused(model, 6)


def test_a_decoder_in_training_copied_and_under_hooks():
    model, inputs = prompted("segment_anything")
    expected = decode(model, inputs).detach()
    twin = copy.deepcopy(fastvit.accelerate(model))
    assert relative(decode(twin.train(), inputs).detach(), expected) <= ERROR
    assert_fused(twin, 6)
    twin.mask_decoder.transformer.layers[1].self_attn.k_proj.register_forward_hook(lambda *_: None)
    assert relative(decode(twin, inputs).detach(), expected) <= ERROR
    assert fastvit.report(twin).fallbacks == {"mask_decoder.transformer.layers.1": "self_attn.k_proj has forward hooks"}


@pytest.mark.slow
def test_a_decoder_compiles_in_one_graph():
    model, inputs = prompted("segment_anything")
    expected = decode(model, inputs).detach()
    transformer = fastvit.accelerate(model.mask_decoder).transformer
    model.mask_decoder.transformer = torch.compile(transformer, fullgraph=True, backend="aot_eager")
    assert relative(decode(model, inputs).detach(), expected) <= ERROR


@pytest.mark.parametrize("key", DECODERS)
def test_a_model_under_autocast(key):
    model, inputs = prompted(key)
    with torch.no_grad():
        exact = masks_of(model(**inputs))
        with torch.autocast("cpu", torch.bfloat16):
            eager = masks_of(model(**inputs))
            actual = masks_of(fastvit.accelerate(model)(**inputs))
    assert_fused(model, 6)
    assert actual.dtype == eager.dtype
    assert relative(actual, exact) <= 2 * relative(eager, exact) + torch.finfo(torch.bfloat16).eps / 2


def test_calls_that_only_the_original_serves():
    """Sizes that broadcast, and attention that drops weights in training (SAM 2's has a rate)."""
    from segment_anything.modeling.transformer import Attention

    class Dropping(Attention):
        dropout_p = 0.5

        def forward(self, q, k, v):
            return super().forward(q, k, nn.functional.dropout(v, self.dropout_p, self.training))

    attention = with_tables(Dropping(32, 4, downsample_rate=2))
    generator = torch.Generator().manual_seed(6)
    query, key, one = (torch.randn(batch, 5, 32, generator=generator) for batch in (3, 3, 1))
    expected = [attention(query, key, key).detach(), attention(query, one, one).detach()]
    fastvit.accelerate(attention)
    assert relative(attention(q=query, k=key, v=key).detach(), expected[0]) <= ERROR
    assert_fused(attention, 1)
    assert torch.equal(attention(query, one, one).detach(), expected[1])
    assert "not of one batch" in fastvit.report(attention).fallbacks[""]
    attention.train()
    attention(query, key, key)
    assert fastvit.report(attention).fallbacks == {"": "dropout of the attention weights is active"}

    block = prompted("segment_anything")[0].mask_decoder.transformer.layers[1]
    tokens, image_tokens, positions = (torch.randn(shape, generator=generator) for shape in ((3, 5, 32), (3, 9, 32), (1, 9, 32)))
    expected = block(tokens, image_tokens, tokens, positions)
    fastvit.accelerate(block)
    for ours, theirs in zip(block(tokens, image_tokens, tokens, positions), expected, strict=True):
        assert relative(ours, theirs) <= ERROR
    assert fastvit.report(block).fallbacks == {"": "positions are not of the shape of what they are added to"}


def test_a_changed_decoder_is_left_alone_or_runs_its_own_forward():
    from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock

    class Unscaled(Attention):
        def forward(self, q, k, v):
            return super().forward(4 * q, k, v)

    class Other(TwoWayAttentionBlock):
        def forward(self, queries, keys, query_pe, key_pe):
            queries, keys = super().forward(queries, keys, query_pe, key_pe)
            return queries, keys + query_pe.sum()

    model, inputs = prompted("segment_anything")
    transformer = model.mask_decoder.transformer
    transformer.final_attn_token_to_image.__class__ = Unscaled
    transformer.layers[0].__class__ = Other
    expected = decode(model, inputs).detach()
    found = fastvit.report(fastvit.accelerate(model))
    assert relative(decode(model, inputs).detach(), expected) <= ERROR
    names = {f"mask_decoder.transformer.{name}" for name in ("final_attn_token_to_image", "layers.0")}
    assert names == found.skipped.keys()
    assert "mask_decoder.transformer.layers.0.self_attn" in found.replaced  # its attentions are served by themselves
    transformer.layers[1].mlp.act = nn.GELU()
    decode(model, inputs)
    assert fastvit.report(model).fallbacks == {"mask_decoder.transformer.layers.1": "mlp.act is now a GELU (it was a ReLU)"}


def test_a_predictor_finds_the_same_masks_on_a_photograph():
    from segment_anything import SamPredictor
    from skimage.data import chelsea

    model = meta_sam()
    predictor = SamPredictor(model)

    def predict() -> tuple[np.ndarray, np.ndarray]:
        predictor.set_image(chelsea())
        points, labels = np.array([[150, 220], [300, 100]]), np.array([1, 0])
        return predictor.predict(points, labels, box=np.array([40, 30, 400, 280]))[:2]

    masks, scores = predict()
    fastvit.accelerate(model)
    again, scores_again = predict()
    assert_fused(model, 6)
    assert masks.any()
    assert not masks.all()
    union = (masks | again).sum()
    assert (masks & again).sum() >= 0.999 * union
    assert np.abs(scores - scores_again).max() <= ERROR
