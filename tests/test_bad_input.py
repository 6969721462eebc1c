"""Wrong input raises TypeError or ValueError and names the argument, what it was, and what was expected, on each backend."""

import re

import numpy as np
import pytest
import torch
import torch._dynamo

import fastvit
from fastvit import functional

# Wrong devices need a second device: meta tensors are one that every machine has.
ELSEWHERE = "meta"

F32, F16, F8, INT = torch.float32, torch.float16, torch.float8_e4m3fn, torch.int64


def _t(*shape, dtype=F32, device=None):
    return torch.zeros(shape, dtype=dtype, device=device)


def _attention(**changes):
    arguments = {"query": _t(2, 4, 5, 8), "key": _t(2, 2, 6, 8), "value": _t(2, 2, 6, 16)}
    return functional.attention, arguments | changes


def _layer_norm(**changes):
    return functional.layer_norm, {"input": _t(2, 5, 8), "weight": _t(8), "bias": _t(8)} | changes


def _add_layer_norm(**changes):
    arguments = {"residual": _t(2, 5, 8), "branch": _t(2, 5, 8), "weight": _t(8), "bias": _t(8), "layer_scale": _t(8)}
    return functional.add_layer_norm, arguments | changes


def _linear(**changes):
    return functional.linear, {"input": _t(2, 5, 8), "weight": _t(6, 8), "bias": _t(6)} | changes


def _mlp(**changes):
    arguments = {"input": _t(2, 5, 8), "fc1_weight": _t(12, 8), "fc1_bias": _t(12), "fc2_weight": _t(6, 12), "fc2_bias": _t(6)}
    return functional.mlp, arguments | changes


# (op with one thing wrong, the exception, the argument it names, what it shows of the argument)
CASES = {
    # attention
    "attention: query is no tensor": (_attention(query=[[1.0]]), TypeError, "query", "list"),
    "attention: key missing": (_attention(key=None), TypeError, "key", "None"),
    "attention: value missing": (_attention(value=None), TypeError, "value", "None"),
    "attention: query of rank 3": (_attention(query=_t(4, 5, 8)), ValueError, "query", "(4, 5, 8)"),
    "attention: key of rank 5": (_attention(key=_t(1, 2, 2, 6, 8)), ValueError, "key", "(1, 2, 2, 6, 8)"),
    "attention: value of rank 2": (_attention(value=_t(6, 16)), ValueError, "value", "(6, 16)"),
    "attention: heads that do not divide": (
        _attention(key=_t(2, 3, 6, 8), value=_t(2, 3, 6, 16)), ValueError, "key", "(2, 3, 6, 8)"),
    "attention: no key heads": (_attention(key=_t(2, 0, 6, 8), value=_t(2, 0, 6, 16)), ValueError, "key", "(2, 0, 6, 8)"),
    "attention: value with other heads": (_attention(value=_t(2, 4, 6, 16)), ValueError, "value", "(2, 4, 6, 16)"),
    "attention: value with other keys": (_attention(value=_t(2, 2, 7, 16)), ValueError, "value", "(2, 2, 7, 16)"),
    "attention: key with another head_dim": (_attention(key=_t(2, 2, 6, 9)), ValueError, "key", "(2, 2, 6, 9)"),
    "attention: key with another batch": (_attention(key=_t(3, 2, 6, 8)), ValueError, "key", "(3, 2, 6, 8)"),
    "attention: key in another dtype": (_attention(key=_t(2, 2, 6, 8, dtype=F16)), TypeError, "key", "(2, 2, 6, 8)"),
    "attention: integer query": (_attention(query=_t(2, 4, 5, 8, dtype=INT)), TypeError, "query", "(2, 4, 5, 8)"),
    "attention: integer value": (_attention(value=_t(2, 2, 6, 16, dtype=INT)), TypeError, "value", "(2, 2, 6, 16)"),
    "attention: integer mask": (_attention(attn_mask=_t(5, 6, dtype=INT)), TypeError, "attn_mask", "(5, 6)"),
    "attention: complex key": (_attention(key=_t(2, 2, 6, 8, dtype=torch.complex64)), TypeError, "key", "(2, 2, 6, 8)"),
    "attention: mask that does not broadcast": (_attention(attn_mask=_t(3, 1, 5, 6)), ValueError, "attn_mask", "(3, 1, 5, 6)"),
    "attention: mask with the axes swapped": (_attention(attn_mask=_t(6, 5)), ValueError, "attn_mask", "(6, 5)"),
    "attention: mask of rank 5": (_attention(attn_mask=_t(1, 2, 4, 5, 6)), ValueError, "attn_mask", "(1, 2, 4, 5, 6)"),
    "attention: boolean mask that does not broadcast": (
        _attention(attn_mask=_t(2, 6, dtype=torch.bool)), ValueError, "attn_mask", "(2, 6)"),
    "attention: head_dim over 256": (
        _attention(query=_t(2, 4, 5, 257), key=_t(2, 2, 6, 257)), ValueError, "query", "(2, 4, 5, 257)"),
    "attention: value's head_dim over 256": (_attention(value=_t(2, 2, 6, 300)), ValueError, "value", "(2, 2, 6, 300)"),
    "attention: head_dim 0": (_attention(query=_t(2, 4, 5, 0), key=_t(2, 2, 6, 0)), ValueError, "query", "(2, 4, 5, 0)"),
    "attention: no keys": (_attention(key=_t(2, 2, 0, 8), value=_t(2, 2, 0, 16)), ValueError, "key", "(2, 2, 0, 8)"),
    "attention: no queries": (_attention(query=_t(2, 4, 0, 8)), ValueError, "query", "(2, 4, 0, 8)"),
    "attention: key on another device": (
        _attention(key=_t(2, 2, 6, 8, device=ELSEWHERE)), ValueError, "key", "(2, 2, 6, 8) is on meta"),
    "attention: mask on another device": (
        _attention(attn_mask=_t(5, 6, device=ELSEWHERE)), ValueError, "attn_mask", "(5, 6) is on meta"),
    "attention: boolean mask on another device": (
        _attention(attn_mask=_t(5, 6, dtype=torch.bool, device=ELSEWHERE)), ValueError, "attn_mask", "(5, 6) is on meta"),
    "attention: rel_h alone": (_attention(rel_h=_t(2, 4, 5, 2)), ValueError, "rel_w", "None"),
    "attention: rel_w alone": (_attention(rel_w=_t(2, 4, 5, 3)), ValueError, "rel_h", "None"),
    "attention: rel of another grid": (
        _attention(rel_h=_t(2, 4, 5, 2), rel_w=_t(2, 4, 5, 4)), ValueError, "rel_w", "(2, 4, 5, 4)"),
    "attention: rel_h of other queries": (
        _attention(rel_h=_t(2, 4, 6, 2), rel_w=_t(2, 4, 5, 3)), ValueError, "rel_h", "(2, 4, 6, 2)"),
    "attention: rel_w of rank 3": (_attention(rel_h=_t(2, 4, 5, 2), rel_w=_t(4, 5, 3)), ValueError, "rel_w", "(4, 5, 3)"),
    "attention: integer rel_h": (
        _attention(rel_h=_t(2, 4, 5, 2, dtype=INT), rel_w=_t(2, 4, 5, 3)), TypeError, "rel_h", "(2, 4, 5, 2)"),
    "attention: scale is no number": (_attention(scale="x"), TypeError, "scale", "'x'"),
    "attention: is_causal is no bool": (_attention(is_causal="no"), TypeError, "is_causal", "'no'"),
    "attention: is_causal is an integer": (_attention(is_causal=2), TypeError, "is_causal", "2"),
    "attention: float8 query": (_attention(query=_t(2, 4, 5, 8, dtype=F8)), TypeError, "query", "(2, 4, 5, 8)"),
    "attention: float8 mask": (_attention(attn_mask=_t(5, 6, dtype=F8)), TypeError, "attn_mask", "(5, 6)"),
    # layer_norm
    "layer_norm: input is no tensor": (_layer_norm(input=1.0), TypeError, "input", "float"),
    "layer_norm: input without dimensions": (_layer_norm(input=_t(), weight=None, bias=None), ValueError, "input", "()"),
    "layer_norm: no channels": (_layer_norm(input=_t(2, 0), weight=_t(0), bias=None), ValueError, "input", "(2, 0)"),
    "layer_norm: weight of other channels": (_layer_norm(weight=_t(9)), ValueError, "weight", "(9,)"),
    "layer_norm: bias of rank 2": (_layer_norm(bias=_t(5, 8)), ValueError, "bias", "(5, 8)"),
    "layer_norm: weight in another half": (_layer_norm(weight=_t(8, dtype=F16)), TypeError, "weight", "(8,)"),
    "layer_norm: integer input": (_layer_norm(input=_t(2, 8, dtype=INT)), TypeError, "input", "(2, 8)"),
    "layer_norm: integer bias": (_layer_norm(bias=_t(8, dtype=INT)), TypeError, "bias", "(8,)"),
    "layer_norm: bias on another device": (_layer_norm(bias=_t(8, device=ELSEWHERE)), ValueError, "bias", "(8,) is on meta"),
    "layer_norm: unknown statistics": (_layer_norm(statistics="batch"), ValueError, "statistics", "'batch'"),
    "layer_norm: image statistics of rank 2": (
        _layer_norm(input=_t(5, 8), statistics="image"), ValueError, "input", "(5, 8)"),
    "layer_norm: eps is no number": (_layer_norm(eps="a"), TypeError, "eps", "'a'"),
    "layer_norm: negative eps": (_layer_norm(eps=-1e-6), ValueError, "eps", "-1e-06"),
    "layer_norm: eps is nan": (_layer_norm(eps=float("nan")), ValueError, "eps", "nan"),
    "layer_norm: float8 input": (
        _layer_norm(input=_t(2, 8, dtype=F8), weight=None, bias=None), TypeError, "input", "float8_e4m3fn"),
    # add_layer_norm
    "add_layer_norm: branch missing": (_add_layer_norm(branch=None), TypeError, "branch", "None"),
    "add_layer_norm: branch of another shape": (_add_layer_norm(branch=_t(1, 5, 8)), ValueError, "branch", "(1, 5, 8)"),
    "add_layer_norm: branch of another rank": (_add_layer_norm(branch=_t(5, 8)), ValueError, "branch", "(5, 8)"),
    "add_layer_norm: layer_scale of other channels": (
        _add_layer_norm(layer_scale=_t(7)), ValueError, "layer_scale", "(7,)"),
    "add_layer_norm: weight of other channels": (_add_layer_norm(weight=_t(7)), ValueError, "weight", "(7,)"),
    "add_layer_norm: two halves": (
        _add_layer_norm(residual=_t(2, 5, 8, dtype=torch.bfloat16), branch=_t(2, 5, 8, dtype=F16)),
        TypeError, "branch", "(2, 5, 8)"),
    "add_layer_norm: integer residual": (
        _add_layer_norm(residual=_t(2, 5, 8, dtype=INT)), TypeError, "residual", "(2, 5, 8)"),
    "add_layer_norm: integer layer_scale": (
        _add_layer_norm(layer_scale=_t(8, dtype=INT)), TypeError, "layer_scale", "(8,)"),
    "add_layer_norm: layer_scale in another half": (
        _add_layer_norm(layer_scale=_t(8, dtype=F16)), TypeError, "layer_scale", "(8,)"),
    "add_layer_norm: residual without dimensions": (
        _add_layer_norm(residual=_t(), branch=_t(), weight=None, bias=None, layer_scale=None), ValueError, "residual", "()"),
    "add_layer_norm: weight in another half": (
        _add_layer_norm(weight=_t(8, dtype=F16)), TypeError, "weight", "(8,)"),
    "add_layer_norm: branch on another device": (
        _add_layer_norm(branch=_t(2, 5, 8, device=ELSEWHERE)), ValueError, "branch", "(2, 5, 8) is on meta"),
    "add_layer_norm: eps is no number": (_add_layer_norm(eps=None), TypeError, "eps", "None"),
    "add_layer_norm: negative eps": (_add_layer_norm(eps=-1), ValueError, "eps", "-1"),
    # linear
    "linear: input is no tensor": (_linear(input=None), TypeError, "input", "NoneType"),
    "linear: weight missing": (_linear(weight=None), TypeError, "weight", "None"),
    "linear: input of other channels": (_linear(input=_t(2, 5, 9)), ValueError, "input", "(2, 5, 9)"),
    "linear: input without dimensions": (_linear(input=_t()), ValueError, "input", "()"),
    "linear: weight of rank 1": (_linear(weight=_t(8)), ValueError, "weight", "(8,)"),
    "linear: weight of rank 3": (_linear(weight=_t(1, 6, 8)), ValueError, "weight", "(1, 6, 8)"),
    "linear: weight without outputs": (_linear(weight=_t(0, 8), bias=None), ValueError, "weight", "(0, 8)"),
    "linear: bias of the inputs": (_linear(bias=_t(8)), ValueError, "bias", "(8,)"),
    "linear: weight in another dtype": (_linear(weight=_t(6, 8, dtype=F16)), TypeError, "weight", "(6, 8)"),
    "linear: bias in another dtype": (_linear(bias=_t(6, dtype=F16)), TypeError, "bias", "(6,)"),
    "linear: integer input": (_linear(input=_t(2, 8, dtype=INT)), TypeError, "input", "(2, 8)"),
    "linear: weight on another device": (
        _linear(weight=_t(6, 8, device=ELSEWHERE)), ValueError, "weight", "(6, 8) is on meta"),
    "linear: unknown activation": (_linear(activation="swish"), ValueError, "activation", "'swish'"),
    "linear: float8 tensors": (
        _linear(input=_t(2, 8, dtype=F8), weight=_t(6, 8, dtype=F8), bias=None), TypeError, "input", "float8_e4m3fn"),
    # mlp
    "mlp: input of other channels": (_mlp(input=_t(2, 5, 9)), ValueError, "input", "(2, 5, 9)"),
    "mlp: fc2_weight missing": (_mlp(fc2_weight=None), TypeError, "fc2_weight", "None"),
    "mlp: fc1_weight of rank 1": (_mlp(fc1_weight=_t(8)), ValueError, "fc1_weight", "(8,)"),
    "mlp: fc1_bias of the inputs": (_mlp(fc1_bias=_t(8)), ValueError, "fc1_bias", "(8,)"),
    "mlp: fc2_weight of another hidden size": (_mlp(fc2_weight=_t(6, 13)), ValueError, "fc2_weight", "(6, 13)"),
    "mlp: fc2_weight without outputs": (_mlp(fc2_weight=_t(0, 12), fc2_bias=None), ValueError, "fc2_weight", "(0, 12)"),
    "mlp: fc2_bias of the hidden size": (_mlp(fc2_bias=_t(12)), ValueError, "fc2_bias", "(12,)"),
    "mlp: fc2_weight in another dtype": (_mlp(fc2_weight=_t(6, 12, dtype=F16)), TypeError, "fc2_weight", "(6, 12)"),
    "mlp: integer fc1_bias": (_mlp(fc1_bias=_t(12, dtype=INT)), TypeError, "fc1_bias", "(12,)"),
    "mlp: fc2_bias on another device": (_mlp(fc2_bias=_t(6, device=ELSEWHERE)), ValueError, "fc2_bias", "(6,) is on meta"),
    "mlp: unknown activation": (_mlp(activation="silu"), ValueError, "activation", "'silu'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input(backend, device, case):
    (function, arguments), error, name, shown = CASES[case]
    moved = {
        key: value.to(device) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        for key, value in arguments.items()
    }
    with pytest.raises(error) as caught:
        function(**moved)
    message = str(caught.value)
    assert type(caught.value) is error  # not a subclass that something below happened to raise
    assert re.search(rf"\b{name}\b", message), message
    assert shown in message, message
    assert "expected" in message, message
    assert "\n" not in message


@pytest.mark.parametrize(
    "op", [_attention, _layer_norm, _add_layer_norm, _linear, _mlp], ids=lambda make: make.__name__.lstrip("_")
)
def test_the_good_input_beside_them_is_good(backend, device, op):
    """Each bad case changes one thing in arguments that work."""
    function, arguments = op()
    function(**{name: value.to(device) for name, value in arguments.items()})


@pytest.mark.parametrize("name", ["cuda", "TRITON", ""])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match=re.escape(f"backend is {name!r}; expected one of auto, triton, torch")):
        fastvit.use_backend(name).__enter__()
    assert fastvit.get_backend() == "auto"


def test_bad_input_under_autocast(device):
    """Autocast converts what can be converted; what is wrong stays wrong, with the same message."""
    with torch.autocast(device, dtype=torch.bfloat16), pytest.raises(ValueError, match="weight has shape"):
        functional.linear(_t(2, 8, device=device), _t(8, device=device))
    with torch.autocast(device, dtype=torch.bfloat16), pytest.raises(TypeError, match="input"):
        functional.linear(_t(2, 8, dtype=INT, device=device), _t(6, 8, device=device))


def test_numbers_of_every_kind_are_numbers(backend, device):
    """numpy's among them, and those that torch.compile makes symbolic."""
    q, x = _t(1, 1, 2, 8, device=device), _t(2, 8, device=device)
    for number in (1, 0.5, np.float32(0.5), np.float64(0.5), np.int64(1)):
        functional.attention(q, q, q, scale=number)
        functional.layer_norm(x, eps=number)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, x, scale, eps: (functional.attention(q, q, q, scale=scale), functional.layer_norm(x, eps=eps)),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for scale, eps in ((0.5, 1e-6), (0.25, 1e-5), (0.125, 1e-4)):
        compiled(q, x, scale, eps)
