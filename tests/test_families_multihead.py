"""``torch.nn.MultiheadAttention`` served as a module of its own, in all its options."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastvit
from benchmarks.families import noise, perturb
from tests.model_errors import (
    OUTPUT,
    assert_equal_gradients,
    fused,
    gradients,
    no_native_fast_path,
    relative,
    seeded,
    without_gradients,
)
from tests.test_families_torch import BATCH, DIM, HEADS, TOKENS, causal, forbidding, padding, source


class Attend(nn.Module):
    """The output alone, so that a call's gradients and outputs compare as a model's."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, **{"batch_first": True, **options})

    def forward(self, query, key=None, value=None, **options):
        key = query if key is None else key
        return self.attention(query, key, key if value is None else value, **{"need_weights": False, **options})[0]


def sources(kind: str, batch_first: bool):
    """Of 7 tokens that attend to themselves, or to 5 others, whose values are their own or not."""
    tensors = {"query": source()}
    if kind != "self":
        tensors["key"] = noise(BATCH, 5, DIM, seed=1)
    if kind == "cross":
        tensors["value"] = noise(BATCH, 5, DIM, seed=2)
    return {name: t if batch_first else t.transpose(0, 1).contiguous() for name, t in tensors.items()}


def masks_of_attention(keys: int):
    bool_mask, float_mask = forbidding(TOKENS, keys), noise(TOKENS, keys, seed=6)
    bool_padding, float_padding = padding()[:, :keys], noise(BATCH, keys, seed=7)
    return [
        {},
        {"attn_mask": bool_mask},
        {"attn_mask": float_mask},
        {"attn_mask": forbidding(BATCH * HEADS, TOKENS, keys)},
        {"attn_mask": noise(BATCH * HEADS, TOKENS, keys, seed=6)},
        {"key_padding_mask": bool_padding},
        {"key_padding_mask": float_padding},
        {"attn_mask": bool_mask, "key_padding_mask": bool_padding},
        {"attn_mask": float_mask, "key_padding_mask": float_padding},
        {"attn_mask": float_mask, "key_padding_mask": bool_padding},
    ]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"dropout": 0.1}], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "shared", "cross"])
def test_masks_of_multihead_attention(kind, batch_first, options):
    model = perturb(Attend(batch_first=batch_first, **options))
    for mask in masks_of_attention(TOKENS if kind == "self" else 5):
        inputs = {**sources(kind, batch_first), **mask}
        expected, trained = without_gradients(fastvit.restore(model), inputs), gradients(model, inputs)
        fastvit.accelerate(model)
        actual = without_gradients(model, inputs)
        assert relative(actual, expected) <= OUTPUT
        assert_equal_gradients(gradients(model, inputs), trained)
        assert fused(model, 1)
        if mask:
            assert relative(without_gradients(model, sources(kind, batch_first)), expected) > 100 * OUTPUT


def test_causal_attention_without_a_mask_in_memory():
    model = perturb(Attend())
    inputs = {"query": source(), "attn_mask": causal(), "is_causal": True}
    expected = without_gradients(model, inputs)
    assert relative(without_gradients(fastvit.accelerate(model), inputs), expected) <= OUTPUT
    assert fused(model, 1)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        model(source(), is_causal=True)


def test_a_row_that_may_attend_to_nothing_is_zeros_where_torchs_own_path_in_inference_gives_nan():
    model, mask = perturb(Attend()), forbidding(TOKENS, TOKENS)
    mask[2] = True
    inputs = {"query": source(), "attn_mask": mask}
    native = without_gradients(model, inputs)
    with no_native_fast_path():
        expected = without_gradients(model, inputs)
    actual = without_gradients(fastvit.accelerate(model), inputs)
    assert fused(model, 1)
    assert native[:, 2].isnan().all()
    assert relative(actual, expected) <= OUTPUT
    assert torch.equal(actual[:, 2], model.attention.out_proj.bias.expand(BATCH, DIM))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "shared", "cross"])
def test_a_dropout_after_attention_draws_as_before(kind, batch_first):
    model, inputs = perturb(Attend(batch_first=batch_first)).train(), sources(kind, batch_first)
    outputs = []
    for prepare in (fastvit.restore, fastvit.accelerate):
        prepare(model)
        with seeded():
            outputs.append(F.dropout(model(**inputs), 0.5))
    assert fused(model, 1)
    assert relative(outputs[1], outputs[0]) <= OUTPUT


OWN = {
    "weights": ({}, {"need_weights": True}, "it was asked for the attention weights"),
    "weights of each head": (
        {},
        {"need_weights": True, "average_attn_weights": False},
        "it was asked for the attention weights",
    ),
    "dropout": ({"dropout": 0.5}, {"training": True, "need_weights": False}, "dropout of the attention weights is active"),
    "no batch": ({}, {"row": 0}, "query, key and value are not three tensors of shape (batch, tokens, channels)"),
}


@pytest.mark.parametrize("name", OWN)
def test_calls_that_multihead_attention_serves_itself(name):
    options, call, reason = OWN[name]
    call = dict(call)
    module = perturb(nn.MultiheadAttention(DIM, HEADS, batch_first=True, **options)).train(call.pop("training", False))
    x = source()[call.pop("row")] if "row" in call else source()
    outputs = []
    for prepare in (fastvit.restore, fastvit.accelerate):
        prepare(module)
        with seeded():
            outputs.append(module(x, x, x, **call))
    assert fastvit.report(module).fallbacks == {"": reason}
    assert torch.equal(outputs[1][0], outputs[0][0])
    assert (outputs[1][1] is None) == (outputs[0][1] is None) == (name == "dropout")
    assert outputs[1][1] is None or torch.equal(outputs[1][1], outputs[0][1])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kdim": 32, "vdim": 40}, "projects keys and values of other widths than the queries'"),
        ({"add_bias_kv": True}, "adds keys and values of its own (add_bias_kv or add_zero_attn)"),
        ({"add_zero_attn": True}, "adds keys and values of its own (add_bias_kv or add_zero_attn)"),
    ],
)
def test_multihead_attention_of_other_kinds_is_left_alone(options, reason):
    model = perturb(Attend(**options))
    inputs = {
        name: noise(BATCH, 5, options.get(f"{name[0]}dim", DIM), seed=i) for i, name in enumerate(("query", "key", "value"))
    }
    expected = without_gradients(model, inputs)
    fastvit.accelerate(model)
    assert fastvit.report(model).skipped == {"attention": reason}
    assert torch.equal(without_gradients(model, inputs), expected)


def test_a_subclass_of_multihead_attention_is_left_alone():
    class Own(nn.MultiheadAttention):
        def forward(self, query, key, value, **options):
            return super().forward(query, key, 2 * value, **options)

    model = Attend()
    model.attention = Own(DIM, HEADS, batch_first=True)
    fastvit.accelerate(perturb(model))
    assert fastvit.report(model).skipped == {"attention": "is a Own, not torch's MultiheadAttention"}


def zeros(*shape: int, dtype=torch.bool):
    return torch.zeros(shape, dtype=dtype)


# Of BATCH sequences of TOKENS queries and 5 keys; each is refused by torch, though most of them would broadcast.
REFUSED = {
    "keys of one sequence": {"key": zeros(1, 5, DIM, dtype=torch.float32)},
    "one query's sequence": {"query": zeros(1, TOKENS, DIM, dtype=torch.float32)},
    "more values than keys": {"value": zeros(BATCH, 6, DIM, dtype=torch.float32)},
    "values of one sequence": {"value": zeros(1, 5, DIM, dtype=torch.float32)},
    "narrow queries": {"query": zeros(BATCH, TOKENS, 8, dtype=torch.float32)},
    "narrow keys": {"key": zeros(BATCH, 5, 8, dtype=torch.float32)},
    "narrow values": {"value": zeros(BATCH, 5, 8, dtype=torch.float32)},
    "queries of another dtype": {"query": zeros(BATCH, TOKENS, DIM, dtype=torch.float64)},
    "padding of one sequence": {"key_padding_mask": zeros(1, 5)},
    "padding of more sequences": {"key_padding_mask": zeros(BATCH + 1, 5)},
    "padding of one key": {"key_padding_mask": zeros(BATCH, 1)},
    "padding of another dtype": {"key_padding_mask": zeros(BATCH, 5, dtype=torch.float64)},
    "mask of one query": {"attn_mask": zeros(1, 5)},
    "mask of one key": {"attn_mask": zeros(TOKENS, 1)},
    "mask of each head alone": {"attn_mask": zeros(HEADS, TOKENS, 5)},
    "mask of one head": {"attn_mask": zeros(1, TOKENS, 5)},
    "mask of each head for one query": {"attn_mask": zeros(BATCH * HEADS, 1, 5)},
    "mask in double precision": {"attn_mask": zeros(TOKENS, 5, dtype=torch.float64)},
    "mask in half precision": {"attn_mask": zeros(TOKENS, 5, dtype=torch.float16)},
    "mask of four dimensions": {"attn_mask": zeros(BATCH, HEADS, TOKENS, 5)},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused_by_torch(name, batch_first):
    model = perturb(Attend(batch_first=batch_first))
    inputs = {"query": source(), "key": noise(BATCH, 5, DIM, seed=1), **REFUSED[name]}
    if not batch_first:
        inputs |= {n: inputs[n].transpose(0, 1).contiguous() for n in ("query", "key", "value") if n in inputs}
    with pytest.raises((RuntimeError, AssertionError)) as expected:
        model(**inputs)
    fastvit.accelerate(model)
    with pytest.raises(expected.type) as actual:
        model(**inputs)
    assert str(actual.value) == str(expected.value)
    assert fastvit.report(model).fallbacks.keys() == {"attention"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_the_dtypes_that_torch_takes_stay_fused(dtype):
    """Beside its own, attention in half precision takes float32; under autocast any."""
    model = perturb(Attend()).to(torch.bfloat16)
    inputs = {"query": source().bfloat16(), "attn_mask": noise(TOKENS, TOKENS, seed=6).to(dtype)}
    expected = without_gradients(model, inputs)
    assert relative(without_gradients(fastvit.accelerate(model), inputs), expected) <= 2e-2
    assert fused(model, 1)
    model = perturb(Attend())
    inputs["query"] = source()
    with torch.autocast("cpu", torch.bfloat16):
        expected = without_gradients(model, inputs)
        assert relative(without_gradients(fastvit.accelerate(model), inputs), expected) <= 2e-2
    assert fused(model, 1)
