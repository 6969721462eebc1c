"""PyTorch's own encoder, decoder and multi-head attention, whose masks forbid where they are True, in all their options."""

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastvit
from benchmarks.families import TINY, noise, perturb
from tests.model_errors import (
    OUTPUT,
    assert_equal_gradients,
    fused,
    gradients,
    no_native_fast_path,
    relative,
    without_gradients,
)

DIM, HEADS, HIDDEN, TOKENS, BATCH, DEPTH = 48, 4, 96, 7, 3, 2


def encoder(**options):
    given = {"dropout": 0.0, "batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, **given)
    nested = given["batch_first"] and not given.get("norm_first", False)
    return perturb(nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=nested))


def source(batch_first: bool = True):
    x = noise(BATCH, TOKENS, DIM)
    return x if batch_first else x.transpose(0, 1).contiguous()


def causal(dtype=torch.float32):
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return mask if dtype == torch.bool else torch.zeros(TOKENS, TOKENS).masked_fill(mask, float("-inf"))


def forbidding(*shape: int, seed: int = 5):
    """True where nothing may be attended to; no row is without a key."""
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[..., 0] = False
    return mask


def padding():
    """Lengths 7, 5 and 2."""
    return torch.arange(TOKENS)[None] >= torch.tensor([7, 5, 2])[:, None]


MASKS = {
    "none": {},
    "bool": {"mask": forbidding(TOKENS, TOKENS)},
    "float": {"mask": noise(TOKENS, TOKENS, seed=6)},
    "of each head": {"mask": forbidding(BATCH * HEADS, TOKENS, TOKENS)},
    "float of each head": {"mask": noise(BATCH * HEADS, TOKENS, TOKENS, seed=6)},
    "causal": {"mask": causal(), "is_causal": True},
    "causal, found out": {"mask": causal(), "is_causal": None},
    "causal, bool": {"mask": causal(torch.bool), "is_causal": True},
    "padding": {"src_key_padding_mask": padding()},
    "padding in between": {"src_key_padding_mask": forbidding(BATCH, TOKENS)},
    "float padding": {"src_key_padding_mask": noise(BATCH, TOKENS, seed=7)},
    "causal and padding": {"mask": causal(torch.bool), "is_causal": True, "src_key_padding_mask": padding()},
    "bool and padding": {"mask": forbidding(TOKENS, TOKENS), "src_key_padding_mask": padding()},
    "float and float padding": {"mask": noise(TOKENS, TOKENS, seed=6), "src_key_padding_mask": noise(BATCH, TOKENS, seed=7)},
    "of each head and padding": {"mask": forbidding(BATCH * HEADS, TOKENS, TOKENS), "src_key_padding_mask": padding()},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_an_encoder(name, norm_first, batch_first, training):
    model = encoder(norm_first=norm_first, batch_first=batch_first).train(training)
    inputs = {"src": source(batch_first), **MASKS[name]}
    # The native fast path reads any number but zero as forbidding, and gives NaN or an error.
    with no_native_fast_path() if "float" in name else nullcontext():
        expected = without_gradients(model, inputs)
        trained = gradients(model, inputs) if training else None
        actual = without_gradients(fastvit.accelerate(model), inputs)
    assert relative(actual, expected) <= OUTPUT
    assert fused(model, DEPTH)
    if trained is not None:
        assert_equal_gradients(gradients(model, inputs), trained)
        assert fused(model, DEPTH)
    if MASKS[name]:
        assert relative(without_gradients(model, {"src": inputs["src"]}), expected) > 100 * OUTPUT


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_padded_rows_pass_as_nested_tensors(mode):
    """In inference the encoder drops what is padded before its first layer and puts zeros there after its last one."""
    seen = []
    model, x = encoder(), source()
    model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].is_nested))
    with mode():
        expected = model(x, src_key_padding_mask=padding())
        actual = fastvit.accelerate(model)(x, src_key_padding_mask=padding())
    assert fused(model, DEPTH)
    assert seen == [True, True]
    assert expected[padding()].eq(0).all()
    assert actual[padding()].eq(0).all()
    assert relative(actual, expected) <= OUTPUT
    with mode(), no_native_fast_path():
        padded = model(x, src_key_padding_mask=padding())
    assert seen[2:] == [False]
    assert relative(padded[~padding()], expected[~padding()]) <= OUTPUT


class Squared(nn.Module):
    def forward(self, x):
        return F.relu(x).square()


ACTIVATIONS = {
    "relu": "ReLU",
    "gelu": "GELU",
    F.gelu: "GELU",
    F.relu: "ReLU",
    nn.GELU("tanh"): "tanh GELU",
    torch.relu: "ReLU",
    F.silu: None,
    Squared(): None,
}


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: getattr(a, "__name__", str(a)))
def test_activations_of_an_encoder(activation, norm_first):
    model, inputs = encoder(activation=activation, norm_first=norm_first), {"src": source()}
    with no_native_fast_path():  # which takes any GELU for the one with erf
        expected = without_gradients(model, inputs)
    fastvit.accelerate(model)
    found, served = fastvit.report(model), ACTIVATIONS[activation]
    if served is None:
        assert list(found.skipped) == ["layers.0", "layers.1"]
        assert all("an activation without a fused form" in reason for reason in found.skipped.values())
        assert all("None" not in reason for reason in found.skipped.values())
    else:
        assert all(outcome.endswith(f" {served} MLP") for outcome in found.replaced.values())
        assert len(found.replaced) == DEPTH
    assert relative(without_gradients(model, inputs), expected) <= OUTPUT
    assert not fastvit.report(model).fallbacks


@pytest.mark.parametrize("options", [{"bias": False}, {"layer_norm_eps": 0.5}, {"dtype": torch.float64}])
@pytest.mark.parametrize("norm_first", [True, False])
def test_other_options_of_an_encoder(options, norm_first):
    model = encoder(norm_first=norm_first, **options)
    inputs = {"src": source().to(options.get("dtype"))}
    expected, trained = without_gradients(model, inputs), gradients(model, inputs)
    fastvit.accelerate(model)
    assert relative(without_gradients(model, inputs), expected) <= OUTPUT
    assert_equal_gradients(gradients(model, inputs), trained)
    assert fused(model, DEPTH)


def test_one_sentence_without_a_batch_runs_the_encoders_own_forward():
    model, inputs = encoder(), {"src": source()[0]}
    expected = without_gradients(model, inputs)
    assert torch.equal(without_gradients(fastvit.accelerate(model), inputs), expected)
    reason = "the hidden states are not one tensor of shape (batch, tokens, channels)"
    assert fastvit.report(model).fallbacks == {"layers.0": reason, "layers.1": reason}


REFUSED = {
    "narrow": {"src": noise(BATCH, TOKENS, 8)},
    "mask of one query": {"src_mask": torch.zeros(1, TOKENS, dtype=torch.bool)},
    "mask of one key": {"src_mask": torch.zeros(TOKENS, 1, dtype=torch.bool)},
    "mask of each head alone": {"src_mask": torch.zeros(HEADS, TOKENS, TOKENS, dtype=torch.bool)},
    "mask in double precision": {"src_mask": torch.zeros(TOKENS, TOKENS, dtype=torch.float64)},
    "padding of one sequence": {"src_key_padding_mask": torch.zeros(1, TOKENS, dtype=torch.bool)},
    "padding of one key": {"src_key_padding_mask": torch.zeros(BATCH, 1, dtype=torch.bool)},
    "padding in double precision": {"src_key_padding_mask": torch.zeros(BATCH, TOKENS, dtype=torch.float64)},
}


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_layer_refuses_it_refuses_when_served(name, batch_first, norm_first):
    options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first}
    layer = perturb(nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, **options))
    inputs = {"src": source(), **REFUSED[name]}
    if not batch_first:
        inputs["src"] = inputs["src"].transpose(0, 1).contiguous()
    with pytest.raises((RuntimeError, AssertionError)) as expected:
        layer(**inputs)
    fastvit.accelerate(layer)
    with pytest.raises(expected.type) as actual:
        layer(**inputs)
    assert str(actual.value) == str(expected.value)
    assert fastvit.report(layer).fallbacks.keys() == {""}


def test_a_layer_alone_and_the_norm_after_an_encoder():
    layer = perturb(nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, dropout=0.0, batch_first=True))
    model = perturb(nn.TransformerEncoder(layer, DEPTH, norm=nn.LayerNorm(DIM), enable_nested_tensor=False))
    for module, blocks in ((layer, 1), (model, DEPTH)):
        expected = without_gradients(module, {"src": source()})
        assert relative(without_gradients(fastvit.accelerate(module), {"src": source()}), expected) <= OUTPUT
        assert fused(module, blocks)


# --- decoder --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
def test_both_attentions_of_a_decoder_layer_are_served(norm_first):
    layer = nn.TransformerDecoderLayer(DIM, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = perturb(nn.TransformerDecoder(layer, DEPTH))
    inputs = {"tgt": source(), "memory": noise(BATCH, 5, DIM, seed=1), "tgt_mask": causal(), "tgt_is_causal": True}
    inputs["memory_key_padding_mask"] = padding()[:, :5]
    expected, trained = without_gradients(model, inputs), gradients(model, inputs)
    fastvit.accelerate(model)
    assert relative(without_gradients(model, inputs), expected) <= OUTPUT
    assert_equal_gradients(gradients(model, inputs), trained)
    found = fastvit.report(model)
    assert list(found.replaced) == [f"layers.{i}.{name}" for i in range(DEPTH) for name in ("self_attn", "multihead_attn")]
    assert found.skipped == {f"layers.{i}": "unknown child 'multihead_attn' (MultiheadAttention)" for i in range(DEPTH)}
    assert not found.fallbacks


def test_no_warning_that_the_original_does_not_give():
    model = fastvit.accelerate(encoder())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(source(), mask=causal(), is_causal=True)
        model(source(), mask=forbidding(TOKENS, TOKENS))
    assert len(fastvit.report(model).replaced) == DEPTH < TINY.depth
