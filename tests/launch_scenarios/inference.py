"""A call repeated without gradients, and whatever makes it another signature."""

import torch
from fastvit.kernels import _tuning

import fastvit
from benchmarks.overhead import _vit, operators
from fastvit import functional as F
from fastvit.ops import _recipes, dispatch, quantized
from fastvit.ops import block as one_block
from tests.launch_scenarios.harness import SCENARIOS, addresses, fresh, made, norm_inputs, repeated, scenario, without_addresses


def _repeats(name):
    return lambda: repeated(operators()[name], scratch=name == "mlp")


INFERENCE = [name for name in operators() if not name.endswith(("training", "backward"))]
SCENARIOS.update({f"repeats {name}": _repeats(name) for name in INFERENCE})


@scenario
def blocks_infer():
    model = _vit(depth=2, num_classes=0)
    fastvit.accelerate(model)
    for mode in (torch.no_grad, torch.inference_mode):
        x = fresh(1, 4, 32)
        with mode():
            noted, again = repeated(lambda x=x: model.blocks(x), scratch=True)
        assert len(noted) == 8
        assert x.data_ptr() in addresses(noted[0])
    limit, one_block.SMALL = one_block.SMALL, 100
    try:
        with torch.no_grad():
            assert without_addresses(made(lambda: model.blocks(fresh(1, 4, 32)))[1]) == without_addresses(again)
    finally:
        one_block.SMALL = limit
    hook = model.blocks[0].norm2.register_forward_hook(lambda module, args, out: out * 0)
    with torch.no_grad():
        assert len(made(lambda: model.blocks(fresh(1, 4, 32)))[1]) < 8, "a hook was passed over"
    hook.remove()


@scenario
def blocks_infer_with_sums_and_norms_in_their_products():
    model = _vit(depth=2, num_classes=0, mlp_ratio=16)
    fastvit.accelerate(model)
    with torch.no_grad():
        noted, _ = repeated(lambda: model.blocks(fresh(1, 4, 32)), scratch=True)
        assert [launch[0] for launch in noted].count("_add_up_norm") == 2
        with dispatch.collect() as found:
            model.blocks(fresh(1, 4, 32))
    assert found["linear_add_norm: half, rows 4, width 512, outputs 32"].startswith("kernel: ")


@scenario
def eight_bits():
    x, branch, w, b = fresh(2, 4, 256), fresh(2, 4, 256), fresh(256), fresh(256)
    weight = quantized.quantize_weight(fresh(256, 256), quantized.E4M3, b)
    rounded = quantized.quantize(x, quantized.E4M3)
    for call in (
        lambda: quantized.quantize(x, quantized.E4M3),
        lambda: quantized.linear(rounded, weight, torch.float16, residual=branch),
        lambda: quantized.linear_quantized(rounded, weight, "gelu"),
    ):
        repeated(call)
    made(lambda: quantized.add_layer_norm(x, branch, w, b, 1e-6, quantized.E4M3))
    (normalized, total), noted, ordinary = made(lambda: quantized.add_layer_norm(x, branch, w, b, 1e-6, quantized.E4M3))
    assert ordinary == 0
    assert {t.data_ptr() for t in (x, branch, w, b, *normalized, total)} <= set(noted[0][4])


@scenario
def compiled_graphs_repeat_operators_too():
    """Which they call through the dispatcher."""
    x, weight, bias = norm_inputs()
    _recipes.forget()
    repeated(lambda: torch.ops.fastvit.layer_norm_forward(x, weight, bias, 1e-6, "token"))
    assert all(_recipes._recipes.values())
    assert len(_recipes._recipes) == 1


@scenario
def alignment_is_part_of_the_signature():
    x, w, b = norm_inputs()
    repeated(lambda: F.layer_norm(x, w, b))
    odd = fresh(2 * 4 * 32 + 1)[1:].view(2, 4, 32)
    _, noted, ordinary = made(lambda: F.layer_norm(odd, w, b))
    assert ordinary == 1
    assert odd.data_ptr() in noted[0][4]
    _, aligned, _ = made(lambda: F.layer_norm(x, w, b))
    assert aligned[0][1] != noted[0][1], "one compilation served both alignments"


@scenario
def one_tensor_in_two_places():
    x, y, w, b = fresh(2, 4, 32), fresh(2, 4, 32), fresh(32), fresh(32)
    for _ in range(3):
        _, noted, _ = made(lambda: F.add_layer_norm(x, x, w, b))
        assert noted[0][4].count(x.data_ptr()) == 2
    for _ in range(3):
        _, noted, _ = made(lambda: F.add_layer_norm(x, y, w, b))
        assert noted[0][4][:2] == (x.data_ptr(), y.data_ptr())


@scenario
def strides_and_sizes_are_part_of_the_signature():
    x, w, b = norm_inputs()
    repeated(lambda: F.layer_norm(x, w, b))
    wide = fresh(8, 64)[:, :32]
    _, noted, ordinary = made(lambda: F.layer_norm(wide, w, b))
    assert ordinary == 1
    assert 64 in noted[0][4]
    _, noted, _ = made(lambda: F.layer_norm(x[:1], w, b))
    assert noted[0][2] != (0, 1, 1)


@scenario
def eps_of_another_value_and_type():
    x, w, b = norm_inputs()
    for eps in (1e-6, 1e-5, 1, 1.0):
        for _ in range(3):
            _, noted, _ = made(lambda eps=eps: F.layer_norm(x, w, b, eps))
            assert any(type(v) is float and v == eps for v in noted[0][4])


@scenario
def tensors_negated_when_read():
    w, b = fresh(32), fresh(32)
    negative = torch.view_as_complex(torch.randn(4, 32, 2)).conj().imag
    assert negative.is_neg()
    for _ in range(2):
        _, noted, _ = made(lambda: F.layer_norm(negative, w.float(), b.float()))
        assert negative.data_ptr() not in noted[0][4]


@scenario
def bad_input_is_refused_after_good():
    x, w, b = norm_inputs()
    repeated(lambda: F.layer_norm(x, w, b))
    for arguments, error in (((x, w[:16], b), ValueError), ((x, w.double(), b), TypeError), ((x, w, b, -1.0), ValueError)):
        try:
            F.layer_norm(*arguments)
        except error:
            continue
        raise AssertionError(f"{arguments[1:]} were not refused")
    q = fresh(1, 2, 4, 16)
    made(lambda: F.attention(q, q, q, is_causal=True))
    try:
        F.attention(q, q, q, is_causal=1)
    except TypeError:
        return
    raise AssertionError("is_causal=1 was not refused")


@scenario
def what_a_rule_leaves_to_the_vendor():
    """It is decided once a signature; then nothing stands before PyTorch's operator, until somebody wants to know why."""
    asked, own = [], _tuning.rules
    rule = {"when": {"queries": [5, None]}, "serve": "sdpa", "why": "a test", "basis": "measured"}
    served = {"when": {}, "serve": "vendor", "why": "a test", "basis": "measured"}
    _tuning.rules = lambda op, target: asked.append(op) or ([rule, *own(op, target)] if op == "attention" else [served])
    dispatch.forget()
    try:
        q, k, v = fresh(1, 5, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        x, w, b = fresh(3, 16), fresh(8, 16), fresh(8)
        for op, call in (("attention", lambda: F.attention(q, k, v)), ("linear", lambda: F.linear(x, w, b, activation="relu"))):
            first, noted, _ = made(call)
            assert noted == []
            assert asked.pop() == op
            dispatch.forget()
            second, _, _ = made(call)
            assert asked == [], "it was decided again"
            assert torch.equal(first, second)
            assert first.stride() == second.stride()
            with dispatch.collect() as found:
                call()
            assert [way for way in found.values() if way.endswith("a test (measured)")]
            asked.clear()
        assert made(lambda: F.attention(q[:, :, :4], k, v))[1], "another signature"
    finally:
        _tuning.rules = own
        dispatch.forget()
