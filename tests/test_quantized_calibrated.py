"""Weights rounded for the inputs of a calibration, in FP8 and INT8; and the classes that 8 bits leave as they were."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import fastvit
from fastvit import agreement, quantization
from fastvit._torchvision import ensure_importable
from fastvit.integrations import swap
from fastvit.integrations.quantized import CalibratedWeight, bound_of_hidden
from fastvit.ops import quantized
from fastvit.reference_quantized import DAMPING, E4M3, INT8, dequantize, hidden_scale, quantize, quantize_fitted
from tests.conftest import ON_GPU
from tests.models_for_acceleration import hf_dinov2, hf_vit, image, timm_vit, torchvision_vit

if ON_GPU and (_reason := quantized.why_not("fp8", torch.device("cuda"))):
    pytest.skip(_reason, allow_module_level=True)

FORMATS = pytest.mark.parametrize("form", [E4M3, INT8], ids=["fp8", "int8"])


def correlated(rows, channels, seed):
    """Draws from one distribution, whose channels go together and differ in size."""
    mixed = torch.randn(channels, channels, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, channels)
    return torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed)) @ mixed


def moment_of(x):
    return x.t() @ x / len(x)


@FORMATS
def test_products_of_like_inputs_err_less(form):
    """By a third at least, of inputs that the rounding has not seen too; though every weight errs more."""
    weight, x, unseen = torch.randn(24, 150), correlated(3000, 150, seed=1), correlated(500, 150, seed=2)
    values, scale = quantize_fitted(weight, form, moment_of(x))
    nearest = dequantize(*quantize(weight, form))
    fitted = dequantize(values, scale)
    assert values.dtype == form
    assert torch.equal(scale, quantize(weight, form)[1])
    for inputs in (x, unseen):
        assert ((fitted - weight) @ inputs.t()).norm() < 0.67 * ((nearest - weight) @ inputs.t()).norm()
    assert (fitted - weight).norm() > (nearest - weight).norm()


@FORMATS
def test_errors_are_fed_back_as_the_inverse_moment_says(form):
    """One channel after another, as Hassibi and Stork's surgeon takes them: the inverse of what is left, made anew each time."""
    weight, moment = torch.randn(5, 140).double(), moment_of(correlated(2000, 140, seed=1)).double()
    values, scale = quantize_fitted(weight.float(), form, moment.float())
    damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(140)
    rest, left = weight.clone(), moment.diagonal().argsort(descending=True)
    expected = torch.empty_like(weight)
    while len(left):
        k, inverse = left[0], torch.linalg.inv(damped[left][:, left])
        units = (rest[:, k] / scale[:, 0]).clamp(-448, 448) if form == E4M3 else (rest[:, k] / scale[:, 0]).clamp(-127, 127)
        expected[:, k] = units.float().to(E4M3).double() if form == E4M3 else units.round()
        error = rest[:, k] - expected[:, k] * scale[:, 0]
        rest[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        left = left[1:]
    same = values.double() == expected
    assert same[:, moment.diagonal().argsort(descending=True)[:100]].double().mean() > 0.99, "one at a tie changes those after it"
    exact, wanted = (((v - weight) @ damped @ (v - weight).t()).trace() for v in (values.double() * scale, expected * scale))
    assert exact == pytest.approx(wanted.item(), rel=0.02)


@FORMATS
def test_inputs_without_a_common_direction_change_nothing(form):
    weight = torch.randn(16, 200)
    values, _ = quantize_fitted(weight, form, torch.eye(200))
    assert (values.float() == quantize(weight, form)[0].float()).float().mean() > 0.999, "but for ties"


@FORMATS
def test_channels_that_are_never_used_and_odd_weights(form):
    weight, moment = torch.randn(4, 40), moment_of(correlated(500, 40, seed=1))
    moment[7:9] = moment[:, 7:9] = 0
    weight[1], weight[2, 3] = 0, torch.nan
    values, scale = quantize_fitted(weight, form, moment)
    found = dequantize(values, scale)
    assert found[[0, 1, 3]].isfinite().all()
    assert not found[1].any()
    nearest = dequantize(*quantize(weight, form))
    assert torch.equal(found[0, 7:9], nearest[0, 7:9])
    assert dequantize(*quantize_fitted(weight, form, torch.zeros(40, 40)))[[0, 1, 3]].isfinite().all()


# --- models ---------------------------------------------------------------------------------------------------------------


def small(precision, labels=None, **options):
    torch.manual_seed(0)
    model = timm_vit(depth=1, num_classes=0)
    calibration = [image(seed=seed, batch=8) for seed in range(1, 5)]
    return model, quantization.accuracy(
        model, image(seed=9, batch=6), precision=precision, min_cosine=None, calibration=calibration, labels=labels, **options
    )


@FORMATS
def test_outputs_err_by_nothing_in_the_mean(form):
    x = correlated(2000, 64, seed=1) + 3
    rounded = dequantize(*quantize(x, form))
    weight, bias = torch.randn(8, 64), torch.randn(8)
    known = CalibratedWeight.of(weight, form, torch.cov(rounded.t()), x.mean(0), rounded.mean(0))
    out = rounded @ dequantize(*known.on(x.device)).t() + known.bias(bias, x.device)
    exact = F.linear(x, weight, bias)
    error = (out - exact).mean(0).norm() / exact.norm(dim=1).mean()
    assert error < 1e-5
    assert (F.linear(x, dequantize(*quantize(weight, form)), bias) - exact).mean(0).norm() > 20 * error * exact.norm(dim=1).mean()
    assert torch.equal(known.bias(None, x.device), known.shift)


@torch.no_grad()
def test_the_hidden_layers_bound_is_of_the_weights_as_rounded():
    """A calibration moves weights by more than a rounding, which the bound must not leave out."""
    weight, shift = torch.randn(8, 32), torch.full((8,), 1000.0)
    values, scale = quantize(2 * weight, E4M3)
    known = CalibratedWeight(E4M3, values.view(torch.uint8), scale, shift, frozenset(), frozenset())
    expected = hidden_scale(dequantize(values, scale), shift + 1, None, None)
    assert torch.equal(bound_of_hidden(known, weight, torch.ones(8), None, None), expected)
    assert expected > 2 * hidden_scale(weight, torch.ones(8), None, None)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@torch.no_grad()
def test_features_of_unseen_pictures_lose_less(precision):
    model, found = small(precision)
    assert set(found.calibrated) == {"blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"}
    assert "weights are rounded for the inputs of the calibration" in str(found)
    x = image(seed=30, batch=16)
    exact = model(x)
    with quantization.simulated(model, precision):
        nearest = model(x)
    with quantization.simulated(model, found):
        fitted = model(x)
    with quantization.simulated(model, precision, calibration=[image(seed=seed, batch=8) for seed in range(1, 5)]):
        assert torch.equal(model(x), fitted)
    assert (fitted - exact).norm() < 0.9 * (nearest - exact).norm()


@pytest.mark.parametrize("precision", ["fp8", pytest.param("int8", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_served_model_takes_what_was_calibrated(device, precision):
    model, found = small(precision)
    model, x = model.to(device), image().to(device)
    exact = model(x)
    with quantization.simulated(model, precision):
        nearest = model(x)
    with quantization.simulated(model, found):
        expected = model(x)
    fastvit.accelerate(model, precision=found, backend="triton")
    out = model(x)
    assert not fastvit.report(model).fallbacks
    assert (out - expected).norm() < 0.35 * (expected - exact).norm()
    assert (out - expected).norm() < 0.35 * (out - nearest).norm()
    twin = pickle.loads(pickle.dumps(model)).blocks[0].__dict__[swap.ATTRIBUTE].weights.calibrated
    assert twin.keys() == {"attn.qkv", "mlp.fc1", "mlp.fc2"}
    for name, weight in twin.items():
        again, before = (w.on(torch.device("cpu"))[0] for w in (weight, found.calibrated[f"blocks.0.{name}"]))
        assert torch.equal(again.view(torch.uint8), before.view(torch.uint8))
    model.blocks[0].mlp.fc2.weight.mul_(-1)
    with pytest.raises(
        ValueError, match=r"8 bits were calibrated for another weight or bias than mlp\.fc2 has now: call fastvit"
    ):
        model(x)


@torch.no_grad()
def test_a_calibration_is_for_its_weights():
    model, found = small("fp8")
    found.check_model(copy.deepcopy(model).bfloat16())
    found.check_model(copy.deepcopy(model).half().float())
    with (
        pytest.raises(ValueError, match="calibration is given with an Accuracy"),
        quantization.simulated(model, found, calibration=[]),
    ):
        pass
    found.check_model(model)


def with_other_mlp(block):
    block.mlp = torch.nn.Sequential(*block.mlp.children())


CHANGES = {
    "columns in another order": lambda b: b.attn.qkv.weight.copy_(b.attn.qkv.weight.flip(1)),
    "sums of rows as they were": lambda b: b.mlp.fc1.weight[:, :2].add_(torch.tensor([0.125, -0.125])),
    "one bit": lambda b: b.mlp.fc2.weight[0, 0].mul_(1 + 2**-23),
    "a bias": lambda b: b.mlp.fc1.bias.add_(1),
    "no bias": lambda b: b.mlp.fc1.register_parameter("bias", None),
    "a block of other parts": with_other_mlp,
    "a wrapped linear": lambda b: setattr(b.mlp, "fc1", torch.nn.Sequential(b.mlp.fc1)),
}


@torch.no_grad()
def test_every_change_of_a_calibrated_linear_is_seen():
    model, found = small("fp8")
    for change in CHANGES.values():
        other = copy.deepcopy(model)
        change(other.blocks[0])
        with pytest.raises(ValueError, match=r"calibrated for another weight or bias than blocks\.0\.[a-z0-9.]* has now"):
            found.check_model(other)


@torch.no_grad()
def test_a_norm_may_change_after_the_calibration():
    """The weights are still those that were rounded, and the norm, with its bound of the hidden layer, is the present one."""
    model, found = small("fp8")
    norm = model.blocks[0].norm2
    norm.weight.mul_(16)
    norm.bias.add_(15)
    found.check_model(model)
    x = image(seed=30, batch=4)
    exact = model(x)
    with quantization.simulated(model, "fp8"):
        nearest = model(x)
    with quantization.simulated(model, found):
        stale = model(x)
    assert (stale - exact).norm() < 4 * (nearest - exact).norm(), "no longer for its inputs, and no more than that"


@torch.no_grad()
def test_memory_for_one_linear_at_a_time_is_enough(monkeypatch):
    _, found = small("int8")
    monkeypatch.setattr("fastvit.simulation.MOMENTS", 1)
    _, other = small("int8")
    for name, weight in found.calibrated.items():
        assert torch.equal(weight.bits, other.calibrated[name].bits)


def test_what_is_no_calibration():
    model = timm_vit(depth=1)
    with pytest.raises(ValueError, match="calibration is empty"):
        quantization.accuracy(model, image(), calibration=[])
    with pytest.raises(ValueError, match=r"calibration gives blocks\.0\.attn\.qkv an input that is infinite or NaN"):
        quantization.accuracy(model, image(), calibration=[image() * torch.inf])


# --- classes --------------------------------------------------------------------------------------------------------------


def test_nearest_neighbours_vote():
    """None votes for itself; one at cosine 0.9 counts for more than two at 0.8; at most 20 vote, or the least class less one."""
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.19**0.5], [0.8, 0.6], [0.8, -0.6]] + [[-1.0, 0.0]] * 4)
    labels = torch.tensor([7, 7, 2**40, 2**40, 7, 7, 2**40, 2**40])
    assert agreement.nearest(bank, bank, labels).tolist()[0] == 7
    assert (2 * torch.tensor(0.8 / 0.07).exp() < torch.tensor(0.9 / 0.07).exp()).item()
    many = torch.tensor([[1.0, 0.0]] * 21 + [[0.999, (1 - 0.999**2) ** 0.5]] * 40)
    said = agreement.nearest(many, many, torch.tensor([0] * 21 + [1] * 40))
    assert said.tolist()[:21] == [0] * 21, "of 60 others all but 20 are of class 1"
    pairs = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert agreement.nearest(pairs, pairs, torch.tensor([0, 0, 1, 1])).tolist() == [0, 0, 1, 1]


def test_what_is_not_finite_agrees_with_nothing():
    logits = torch.tensor([[0.0, 1.0], [torch.nan, 0.0]])
    said = agreement.classes([logits], [logits], None, True)
    assert agreement.share(said, said) == 0.5
    pairs = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [torch.nan, 1.0]])
    said = agreement.classes([pairs], [pairs], torch.tensor([0, 0, 1, 1, 1]), False)
    assert said.tolist() == [0, 0, 1, 1, -1]
    assert agreement.share(said, said) == 0.8


def logits_of(model, chosen=None):
    return agreement.are_logits(model, model(image()), chosen)


@torch.no_grad()
def test_what_is_logits_is_said_by_the_model():
    from transformers import ViTForImageClassification

    whole = timm_vit(depth=1)
    assert logits_of(whole)
    assert not logits_of(whole, lambda out: out)
    whole.reset_classifier(0)
    assert not logits_of(whole)
    assert not logits_of(timm_vit(depth=1, num_classes=0, global_pool="avg"))
    assert not logits_of(hf_dinov2(num_hidden_layers=1), lambda out: out.last_hidden_state[:, 0])
    assert not logits_of(hf_dinov2(num_hidden_layers=1))
    assert logits_of(ViTForImageClassification(hf_vit(num_hidden_layers=1).config))
    ensure_importable()
    other = torchvision_vit()
    assert logits_of(other)
    other.heads = torch.nn.Identity()
    assert not logits_of(other)


@torch.no_grad()
def test_top1_of_labelled_pictures():
    tokens = hf_dinov2(num_hidden_layers=1)
    x = torch.cat(
        [image(batch=1, seed=0) + 0.01 * image(batch=4, seed=5), image(batch=1, seed=1) + 0.01 * image(batch=4, seed=6)]
    )
    labels = [0] * 4 + [1] * 4
    found = quantization.accuracy(tokens, x, min_cosine=0.5, labels=labels)
    assert found.top1 == found.top1_exact == found.top1_agreement == 1.0
    assert "top-1 agreement: 100.0% (100.0% right, 100.0% without)" in str(found)
    wrong = quantization.accuracy(tokens, x, min_cosine=0.5, labels=torch.tensor(labels).roll(2))
    assert wrong.top1_exact < 1.0
    assert wrong.top1_agreement == 1.0
    assert quantization.accuracy(tokens, x, min_cosine=0.5).top1_agreement is None


@torch.no_grad()
def test_top1_of_logits():
    model, x = timm_vit(depth=1), image(batch=4)
    right = model(x).argmax(1)
    assert quantization.accuracy(model, x, min_cosine=0.5, labels=right).top1_exact == 1.0
    found = quantization.accuracy(model, x, min_cosine=0.5, labels=(right + 1) % 5)
    assert found.top1_exact == 0.0
    assert found.top1 == 0.0 or found.top1_agreement < 1


NO_LABELS = {
    "too few": [0, 1],
    "fractions": [0.0] * 6,
    "negative": [0, 1, 0, 1, 0, -1],
    "truths": [True, False] * 3,
    "complex": torch.ones(6, dtype=torch.complex64),
    "none": [None] * 6,
    "a mapping": {0: 1},
    "words": ["a"] * 6,
}


@pytest.mark.parametrize("labels", NO_LABELS.values(), ids=NO_LABELS.keys())
def test_what_is_no_label(labels):
    with pytest.raises(ValueError, match=r"labels are .*; expected an integer from 0 on for each of 6 pictures"):
        small("fp8", labels=labels)


def test_labels_that_tell_nothing():
    model = timm_vit(depth=1)
    with pytest.raises(ValueError, match=r"labels go up to 5; expected them below 5, the classes of the model's logits"):
        quantization.accuracy(model, image(), labels=[0, 5])
    for labels in ([0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match=r"labels have . classes, the smallest of . pictures; expected 2 classes or more"):
            quantization.accuracy(model, image(batch=4), features=lambda out: out, labels=labels)


BAD = {
    "no pictures": ({"inputs": image()[:0]}, ValueError, r"inputs holds a tensor \(0, 3, 24, 24\); expected a picture or more"),
    "calibration": ({"calibration": [image(), image()[:0]]}, ValueError, r"calibration holds a tensor \(0, 3, 24, 24\)"),
    "a fraction": ({"promote": 1.5}, ValueError, r"promote is 1\.5 for 'fp8'; expected None, or for 'fp8' a number"),
    "a word": ({"min_cosine": "0.9"}, ValueError, r"min_cosine is '0\.9'; expected a number between 0 and 1"),
    "an integer": ({"inputs": [3]}, TypeError, r"inputs holds a int; expected tensors"),
    "words": ({"inputs": "abc"}, TypeError, r"inputs holds a str; expected tensors"),
}


@pytest.mark.parametrize(("given", "error", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input(given, error, said):
    with pytest.raises(error, match=said):
        quantization.accuracy(timm_vit(depth=1), **{"inputs": image(), **given})


def test_cosines_are_what_they_were():
    a, b = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    expected = 1 - F.cosine_similarity(a.double(), b.double(), dim=-1).mean(1)
    torch.testing.assert_close(agreement.losses([a], [b]), expected)
