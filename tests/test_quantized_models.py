"""Models in FP8 and INT8: what a served block computes, what it refuses, and what the simulation says of accuracy."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import fastvit
from fastvit import agreement, quantization
from fastvit.integrations import swap
from fastvit.ops import quantized
from tests.conftest import ON_GPU
from tests.models_for_acceleration import MODELS, hf_dinov2, image, perturb, tensor_of, timm_vit
from tests.small_sam import SIDE, own_sam, small_sam
from tests.test_sam_accelerate import encoder

if ON_GPU and (_reason := quantized.why_not("fp8", torch.device("cuda"))):
    pytest.skip(_reason, allow_module_level=True)

ONE_BLOCK = {"hf_dinov2": {"num_hidden_layers": 1}, "hf_vit": {"num_hidden_layers": 1}, "timm_vit": {"depth": 1}}
ONE_BLOCK["hf_dinov2_swiglu"] = ONE_BLOCK["hf_dinov2"]


def _in_fp8(model, device, precision="fp8", **options):
    return fastvit.accelerate(model.to(device), precision=precision, backend="triton", **options)


def _check_served(model, x, device, precision):
    """Far closer to the simulation than 8 bits are to the model itself: what rounds otherwise is a few values at a tie."""
    exact = tensor_of(model(x))
    with quantization.simulated(model, precision):
        expected = tensor_of(model(x))
    report = fastvit.report(_in_fp8(model, device, precision))
    assert not report.skipped
    assert all(text.endswith(f"; in {precision.upper()}: mlp, qkv") for text in report.replaced.values())
    out = tensor_of(model(x))
    assert not fastvit.report(model).fallbacks
    rounding = (expected - exact).norm()
    assert rounding > 1e-4 * exact.norm(), "nothing was rounded"
    assert (out - expected).norm() < 0.35 * rounding
    assert torch.equal(tensor_of(fastvit.restore(model)(x)), exact)


SERVED = [("hf_dinov2", "fp8"), ("timm_vit", "int8"), ("hf_dinov2_swiglu", "int8")]
SERVED_TOO = [("timm_vit", "fp8"), ("hf_dinov2", "int8"), ("hf_vit", "fp8"), ("hf_vit", "int8"), ("hf_dinov2_swiglu", "fp8")]


@pytest.mark.parametrize(("name", "precision"), SERVED + [pytest.param(*c, marks=pytest.mark.slow) for c in SERVED_TOO])
@torch.no_grad()
def test_a_served_model_computes_what_is_simulated(device, name, precision):
    _check_served(MODELS[name](**ONE_BLOCK[name]).to(device), image().to(device), device, precision)


@pytest.mark.slow
@torch.no_grad()
def test_a_hidden_channel_far_above_the_others(device):
    """Its bound serves no other, so the hidden layer is scaled in blocks."""
    model = timm_vit(depth=1)
    model.blocks[0].mlp.fc1.weight[0] *= 1e4
    model.blocks[0].mlp.fc2.weight[:, 0] /= 1e4
    _check_served(model.to(device), image().to(device), device, "fp8")


@pytest.mark.slow
@torch.no_grad()
def test_a_gate_of_its_own_linear(device):
    """timm's SwiGLU: two linears from one input, the gate beside fc1; with rotary positions before them (EVA02)."""
    from timm.models.eva import Eva

    sizes = {"embed_dim": 48, "depth": 1, "num_heads": 3, "mlp_ratio": 2, "num_classes": 5}
    parts = {"swiglu_mlp": True, "use_rot_pos_emb": True, "qkv_fused": False, "qkv_bias": False}
    model = perturb(Eva(img_size=24, patch_size=8, **sizes, **parts))
    _check_served(model.to(device), image().to(device), device, "fp8")


def _own_vit():
    from fastvit.models import VisionTransformer

    sizes = {"dim": 48, "depth": 1, "num_heads": 3, "mlp_dim": 96}
    return perturb(VisionTransformer(image_size=24, patch_size=8, num_classes=5, **sizes)), image()


ENCODERS = {
    "fastvit's Sam": lambda: (own_sam(small_sam()).image_encoder, torch.randn(1, 3, SIDE, SIDE)),
    "fastvit's ViT": _own_vit,
    "segment_anything": lambda: (encoder("segment_anything", depth=2), image(1, 72)),
    "hf": lambda: (encoder("hf_sdpa", num_hidden_layers=2), image(1, 72)),
    "hf_hq": lambda: (encoder("hf_hq", num_hidden_layers=2), image(1, 72)),
    "timm": lambda: (encoder("timm", depth=2), image(1, 72)),
}


@pytest.mark.parametrize("name", [k if k[0] == "f" else pytest.param(k, marks=pytest.mark.slow) for k in ENCODERS])
@torch.no_grad()
def test_blocks_on_images_and_blocks_of_ones_own(device, name):
    """Windows that do not fill the grid, a global block, and blocks that are fused without ``accelerate``."""
    model, x = ENCODERS[name]()
    _check_served(model.to(device), x.to(device), device, "int8" if name == "fastvit's ViT" else "fp8")


@torch.no_grad()
def test_the_features_of_an_image_are_its_channels():
    """An encoder's output is (B, C, H, W): as many cosines as places, of C numbers each."""
    model, x = own_sam(small_sam()).image_encoder, torch.randn(1, 3, SIDE, SIDE)
    found = quantization.accuracy(model, x, min_cosine=0.9)
    same = quantization.accuracy(model, x, min_cosine=0.9, features=lambda out: out.permute(0, 2, 3, 1))
    other = quantization.accuracy(model, x, min_cosine=0.9, features=lambda out: out)
    assert found.feature_cosine == same.feature_cosine != other.feature_cosine
    assert {part for _, part in found.losses} == {"qkv", "mlp"}


@torch.no_grad()
def test_half_precision(device):
    """bfloat16 rounds between the operators as well: the served model errs little more than the simulated one."""
    model, x = timm_vit(depth=1).to(device), image(batch=1).to(device)
    exact = model(x)
    with quantization.simulated(model.bfloat16()):
        expected = model(x.bfloat16()).float()
    out = _in_fp8(model, device)(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 1.5 * (expected - exact).norm()


@torch.no_grad()
def test_the_report_says_what_is_in_fp8(device):
    report = fastvit.report(_in_fp8(hf_dinov2(num_hidden_layers=1), device))
    assert all(text.endswith("; in FP8: mlp, qkv") for text in report.replaced.values())
    report = fastvit.report(_in_fp8(timm_vit(depth=1, scale_mlp_norm=True), device))
    assert all("in its own dtype: 8-bit linears serve an MLP with nothing but" in text for text in report.replaced.values())
    model = timm_vit()
    planned = fastvit.report(_in_fp8(model, device, dry_run=True)).replaced
    assert all(text.endswith("; in FP8: mlp, qkv") for text in planned.values())
    assert not any(map(swap.is_served, model.modules()))


@torch.no_grad()
def test_changed_weights_are_rounded_again(device):
    model, x = _in_fp8(timm_vit(depth=1), device), image().to(device)
    before = model(x)
    linear = model.blocks[0].mlp.fc2
    state = {name: value.clone() for name, value in model.state_dict().items()}
    linear.weight.mul_(-1)
    changed = model(x)
    assert not torch.allclose(before, changed)
    model.load_state_dict(state)
    assert torch.equal(model(x), before)
    model.blocks[0].ls2.gamma.mul_(2)
    assert not torch.allclose(model(x), before)
    model.blocks[0].norm2.weight.mul_(1000)  # what the hidden layer's scale is made of
    assert model(x).isfinite().all()


@pytest.mark.slow
@torch.no_grad()
def test_copies_and_pickles_make_their_own(device):
    model, x = _in_fp8(timm_vit(depth=1), device), image().to(device)
    expected = model(x)
    keys = list(model.state_dict())
    weights = model.blocks[0].__dict__[swap.ATTRIBUTE].weights
    assert set(weights.made) == {"attn.qkv", "mlp.fc1", "mlp.fc1: hidden", "mlp.fc2"}
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin.blocks[0].__dict__[swap.ATTRIBUTE].weights.made
        assert torch.equal(twin(x), expected)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (lambda model: nullcontext(model.train()), "FP8 is for inference"),
        (lambda model: torch.enable_grad(), "FP8 has no gradients: call the model under torch.no_grad"),
        (lambda model: torch.autocast("cuda" if ON_GPU else "cpu"), "FP8 does not run under autocast"),
    ],
    ids=["training", "gradients", "autocast"],
)
def test_what_fp8_does_not_serve_runs_its_own_forward(device, state, reason):
    model = _in_fp8(timm_vit(depth=1), device)
    with torch.no_grad(), state(model):
        model(image().to(device))
    assert reason in fastvit.report(model).fallbacks["blocks.0"]


def test_where_fp8_does_not_run_accelerate_says_why(monkeypatch):
    model = timm_vit(depth=1)
    with pytest.raises(ValueError, match="backend is 'torch', and FP8 has Triton kernels only; leave precision=None"):
        fastvit.accelerate(model, precision="fp8", backend="torch")
    reason = "FP8 needs compute capability 8.9, this GPU has 8.0"
    monkeypatch.setattr("fastvit.acceleration.why_not_in_8_bits", lambda precision, device: reason)
    with pytest.raises(ValueError, match=r"on cpu, FP8 needs compute capability 8\.9, this GPU has 8\.0"):
        fastvit.accelerate(model, precision="fp8", backend="triton")
    assert not any(map(swap.is_served, model.modules()))


# --- accuracy -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    model = timm_vit(depth=2)
    return model, quantization.accuracy(model, [image(seed=1), (image(seed=2),), {"x": image(seed=3)}], min_cosine=0.99)


def test_losses_are_those_of_one_part_alone(measured):
    _, found = measured
    parts = {(f"blocks.{index}", part) for index in range(2) for part in ("qkv", "mlp")}
    assert set(found.losses) == parts
    assert all(0 < loss < 0.1 for loss in found.losses.values())
    assert set(found.errors) == {f"blocks.{i}.{path}" for i in range(2) for path in ("attn.qkv", "mlp.fc1", "mlp.fc2")}
    assert all(0.005 < error < 0.06 for error in found.errors.values()), "3 bits of mantissa err by 1 to 5 %"
    assert 0 <= found.top1_agreement <= 1
    assert 0 < found.share < 1, "projections of the attention's output stay"


def test_parts_stay_until_the_loss_is_what_is_allowed(measured):
    model, _ = measured
    batches = [image(seed=1)]
    loose = quantization.accuracy(model, batches, min_cosine=0.5)
    assert not loose.kept
    assert loose.feature_cosine == pytest.approx(loose.full_cosine, abs=1e-12)
    everything = quantization.accuracy(model, batches, min_cosine=None)
    assert everything.feature_cosine == loose.feature_cosine
    assert everything.parts == {f"blocks.{index}": frozenset({"qkv", "mlp"}) for index in range(2)}
    assert everything.passed
    assert "reaches" not in str(everything)
    with pytest.raises(ValueError, match=r"this one has no block 'blocks\.1'"):
        everything.check_model(timm_vit(depth=1))
    middle = 1 - (1 - loose.full_cosine) / 2
    some = quantization.accuracy(model, batches, min_cosine=middle)
    assert some.passed
    assert 0 < len(some.kept) < 4
    assert some.share < loose.share
    assert "stays, alone it costs" in str(some)
    tight = quantization.accuracy(model, batches, min_cosine=1 - 1e-12)
    assert len(tight.kept) == 4
    assert tight.feature_cosine == pytest.approx(1, abs=1e-14)


def test_the_interval_of_a_mean():
    """Student's t: of 1, 2, 3, 4 the mean is below 2.5 + 2.353 · 1.291 / 2 with 95 % confidence; many tell nearly all."""
    assert agreement.upper(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(4.0188, abs=1e-4)
    assert agreement.upper(torch.tensor([1.0, 3.0])) == pytest.approx(2 + 6.314, abs=1e-3)
    assert agreement.upper(torch.tensor([7.0])) == 7
    assert agreement.upper(torch.arange(21.0)) == pytest.approx(10 + 1.725 * 6.2048 / 21**0.5, abs=5e-3)
    draws = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    assert sum(agreement.upper(row) > 0 for row in draws) / 2000 == pytest.approx(0.95, abs=0.02)


def test_pictures_that_differ_leave_more_in_the_models_dtype(measured):
    model, found = measured
    assert found.pictures == 6
    assert found.cosine_bound < found.feature_cosine
    assert found.passed == (found.cosine_bound >= found.min_cosine)
    one = quantization.accuracy(model, image(batch=1, seed=1), min_cosine=found.full_cosine)
    assert one.cosine_bound is None
    assert one.pictures == 1
    assert "one picture, which says nothing of others" in str(one)
    several = quantization.accuracy(model, image(batch=3, seed=1), min_cosine=found.full_cosine)
    assert several.cosine_bound >= found.full_cosine or not several.parts
    assert several.kept, "the mean of all is at the limit, so its interval is beyond"


def test_accelerate_takes_the_format_from_what_was_measured(device, measured):
    choice = quantization.Accuracy(**{**vars(measured[1]), "precision": "int8", "parts": {"blocks.1": frozenset({"qkv"})}})
    planned = fastvit.report(fastvit.accelerate(copy.deepcopy(measured[0]), precision=choice, dry_run=True)).replaced
    assert planned["blocks.1"].endswith("; in INT8: qkv (mlp would cost too much accuracy)")
    assert "; in INT8: nothing" in planned["blocks.0"]


@pytest.mark.slow
@torch.no_grad()
def test_accelerate_obeys(device, measured):
    """A part that stays beside one that does not, and a block after another kind of block."""
    model, found = copy.deepcopy(measured[0]).to(device), measured[1]
    for parts in ({"blocks.1": frozenset({"qkv"})}, {"blocks.0": frozenset({"mlp"}), "blocks.1": frozenset({"qkv", "mlp"})}):
        choice = quantization.Accuracy(**{**vars(found), "parts": parts})
        x = image().to(device)
        exact = model(x)
        with quantization.simulated(model, choice):
            expected = model(x)
        fastvit.accelerate(model, precision=choice, backend="triton")
        assert (model(x) - expected).norm() < 0.35 * (expected - exact).norm()
        texts = fastvit.report(model).replaced
        assert {name for name in texts if "in FP8: nothing" not in texts[name]} == set(parts)
        assert not fastvit.report(model).fallbacks
        fastvit.restore(model)


@torch.no_grad()
def test_measuring_leaves_the_model_as_it_was():
    model = fastvit.accelerate(timm_vit(depth=1)).train()
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    quantization.accuracy(model, image(), min_cosine=0.9)
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == before
    assert model.training


def test_bad_input():
    model = timm_vit(depth=1)
    with pytest.raises(ValueError, match="inputs is empty"):
        quantization.accuracy(model, [])
    with pytest.raises(ValueError, match=r"min_cosine is 2; expected a number between 0 and 1"):
        quantization.accuracy(model, image(), min_cosine=2)
    with pytest.raises(TypeError, match="model is str"):
        quantization.accuracy("vit", image())
    with pytest.raises(ValueError, match="no block that 8-bit linears can serve"):
        quantization.accuracy(torch.nn.Linear(3, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"model has no block that 8-bit linears can serve .*an MLP with nothing but"):
        quantization.accuracy(timm_vit(scale_mlp_norm=True), image())
    with pytest.raises(ValueError, match=r"precision is 'int4'; expected 'fp8' or 'int8'"):
        quantization.accuracy(model, image(), precision="int4")
    with pytest.raises(ValueError, match=r"precision is 'bf16'; expected 'fp8' or 'int8'"), quantization.simulated(model, "bf16"):
        pass


@torch.no_grad()
def test_sums_of_tensor_cores_can_be_simulated():
    """They change the result, by far less than rounding does."""
    model, x = timm_vit(depth=1), image(batch=1)
    exact = model(x)
    with quantization.simulated(model):
        expected = model(x)
    with quantization.simulated(model, promote=0):
        out = model(x)
    assert 0 < (out - expected).norm() < 0.3 * (expected - exact).norm()
    found = quantization.accuracy(model, x, min_cosine=0.5, promote=0)
    assert found.feature_cosine == pytest.approx(F.cosine_similarity(out, exact).double().mean().item(), abs=1e-5)
    for precision, promote in (("int8", 0), ("fp8", -1)):
        with pytest.raises(ValueError, match=f"promote is {promote} for '{precision}'; expected None, or for 'fp8' a number"):
            quantization.accuracy(model, x, precision=precision, promote=promote)


def test_features_of_ones_own():
    found = quantization.accuracy(hf_dinov2(num_hidden_layers=1), image(), features=lambda out: out.pooler_output)
    assert found.top1_agreement is None, "channels are no classes"
    assert quantization.accuracy(hf_dinov2(num_hidden_layers=1), image()).top1_agreement is None


@pytest.mark.slow
@torch.no_grad()
def test_compiled(device):
    model, x = _in_fp8(timm_vit(depth=1), device), image().to(device)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    assert F.cosine_similarity(compiled(x), expected).min() > 0.9999
