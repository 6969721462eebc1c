"""``fastvit segment`` on photographs, with a small Sam of random weights: what is written, skipped, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("segment_anything")
pytest.importorskip("skimage")
pytest.importorskip("transformers")

from fastvit import SamAutomaticMaskGenerator, SamPredictor, loading
from fastvit.cli import main, segment
from fastvit.models.sam import checkpoints
from fastvit.pipelines import results, rle, text
from tests.small_clip import save_clip
from tests.small_sam import face, own_sam, photograph, small_sam, spotting

POINT = ["--point", "60,40"]
GRID = ["--points-per-side", "4", "--pred-iou-thresh", "0.3", "--stability-score-thresh", "0"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "sam.pth"
    torch.save(small_sam().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def spots(monkeypatch):
    """The checkpoint's masks are where its prompts are, so that a grid finds several."""
    load = checkpoints.load_sam
    monkeypatch.setattr(checkpoints, "load_sam", lambda *args, **options: spotting(load(*args, **options)))


@pytest.fixture
def cat(tmp_path):
    path = tmp_path / "cat.png"
    Image.fromarray(face()).save(path)
    return path


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, weights):
    """Runs ``fastvit segment …`` in this process, in an empty folder: (exit code, stdout, stderr)."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments, checkpoint=weights) -> tuple[int, str, str]:
        given = [] if checkpoint is None else ["--checkpoint", checkpoint]
        monkeypatch.setattr(sys, "argv", ["fastvit", "segment", *map(str, [*arguments, *given])])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def assert_refused(outcome: tuple[int, str, str], says: str) -> None:
    code, _, error = outcome
    assert code != 0
    assert error.startswith("fastvit: ")
    assert error.count("\n") == 1, error
    assert says in error


def described(folder: Path) -> dict:
    return json.loads((folder / "masks.json").read_text())


def mask_of(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        assert opened.mode == "L"
        values = np.asarray(opened)
    assert set(np.unique(values)) <= {0, 255}
    return values > 0


def contents(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.iterdir())}


# Prompts


def test_a_point_gives_three_masks_best_first(command, cat):
    code, out, error = command(cat, *POINT)
    assert (code, error) == (0, "")
    assert f"{cat}: 3 masks written to {Path('out/cat')}" in out
    found = described(Path("out/cat"))
    predictor = SamPredictor(own_sam(small_sam()))
    predictor.set_image(face())
    masks, quality, _ = predictor.predict([[60, 40]], [1])
    assert (found["width"], found["height"]) == (128, 96)
    for record, index in zip(found["masks"], np.argsort(-quality), strict=True):
        np.testing.assert_array_equal(rle.decode_rle(record["segmentation"]), masks[index])
        np.testing.assert_array_equal(mask_of(Path("out/cat") / record["file"]), masks[index])
        assert record["predicted_iou"] == pytest.approx(quality[index])
        assert record["area"] == masks[index].sum()
        assert 0 <= record["stability_score"] <= 1
        rows, columns = masks[index].any(1).nonzero()[0], masks[index].any(0).nonzero()[0]
        assert record["bbox"] == [columns[0], rows[0], np.ptp(columns), np.ptp(rows)]
    assert isinstance(found["masks"][0]["segmentation"]["counts"], str)


def test_points_with_labels_and_a_box_give_one_mask(command, cat):
    prompt = ["--point", "60,40", "--point", "5,90.5", "--label", "1", "--label", "0", "--box", "20,10,100,80"]
    assert command(cat, *prompt)[0] == 0
    (record,) = described(Path("out/cat"))["masks"]
    predictor = SamPredictor(own_sam(small_sam()))
    predictor.set_image(face())
    masks, _, _ = predictor.predict([[60, 40], [5, 90.5]], [1, 0], [20, 10, 100, 80], multimask_output=False)
    np.testing.assert_array_equal(rle.decode_rle(record["segmentation"]), masks[0])


def test_a_label_changes_the_mask(command, cat):
    found = []
    for index, options in enumerate((["--label", "1"], ["--label", "0"], [])):
        assert command(cat, *POINT, *options, "--out", f"out{index}")[0] == 0
        found.append(described(Path(f"out{index}/cat"))["masks"])
    assert found[0] == found[2] != found[1]


def test_the_drawing_has_prompt_and_masks(command, cat, monkeypatch):
    """Everything outside a mask is grey; the mask, here the left half, is not; nor are the prompt's marks."""
    from fastvit.pipelines import tasks

    left = np.zeros((96, 128), bool)
    left[:, :64] = True
    monkeypatch.setattr(tasks.Prompt, "run", lambda self, picture: ([], [("left", [left])]))
    assert command(cat, *POINT)[0] == 0
    with Image.open("out/cat/overlay.png") as opened:
        drawn = np.asarray(opened.convert("RGB"), dtype=np.float32)
    panel = drawn[-400:-100, drawn.shape[1] // 2 + 40 : -60]
    colourful = np.ptp(panel, axis=-1).mean(0)
    middle = colourful.size // 2
    assert colourful[: middle - 10].min() > 10
    assert colourful[middle + 10 :].max() < 2
    green = (np.abs(drawn - np.array([0x19, 0xA9, 0x74])).max(-1) < 8).nonzero()
    assert 0.4 < np.mean(green[1]) / (drawn.shape[1] / 2) < 0.55, "the point's mark, at 60 of 128"


def test_half_precision_is_the_image_encoders(command, cat, monkeypatch):
    from fastvit.pipelines import tasks

    models, run = [], tasks.Prompt.run
    monkeypatch.setattr(tasks.Prompt, "run", lambda self, picture: models.append(self.predictor.model) or run(self, picture))
    assert command(cat, *POINT, "--dtype", "bf16")[0] == 0
    assert {p.dtype for p in models[0].image_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in models[0].mask_decoder.parameters()} == {torch.float32}
    assert len(described(Path("out/cat"))["masks"]) == 3


# Everything, and words


def test_everything_is_the_generators_largest_first(command, cat, spots):
    code, out, error = command(cat, "--everything", *GRID, "--crop-layers", "1", "--min-area", "20")
    assert (code, error) == (0, "")
    options = {"points_per_side": 4, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.0, "crop_n_layers": 1}
    generator = SamAutomaticMaskGenerator(spotting(own_sam(small_sam())), **options, min_mask_region_area=20)
    expected = sorted(generator.generate(face()), key=lambda record: -record["area"])
    found = described(Path("out/cat"))["masks"]
    assert len(found) == len(expected) > 5
    assert f"{len(found)} masks written" in out
    for record, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mask_of(Path("out/cat") / record["file"]), other["segmentation"])
        assert {**record, "segmentation": 0, "file": 0} == {**other, "segmentation": 0, "file": 0}


def test_nothing_found_is_written_too(command, cat):
    code, out, _ = command(cat, "--everything", "--points-per-side", "2", "--pred-iou-thresh", "50")
    assert code == 0
    assert "0 masks written" in out
    assert described(Path("out/cat"))["masks"] == []
    assert sorted(contents(Path("out/cat"))) == ["masks.json", "overlay.png"]


def test_words_choose_among_everything(command, cat, spots, clip):
    code, _, error = command(cat, "--text", "an eye", "--clip", clip, "--top", "2", *GRID)
    assert (code, error) == (0, "")
    found = described(Path("out/cat"))["masks"]
    assert len(found) == 2
    assert found[0]["similarity"] >= found[1]["similarity"]
    options = {"points_per_side": 4, "pred_iou_thresh": 0.3, "stability_score_thresh": 0.0}
    records = SamAutomaticMaskGenerator(spotting(own_sam(small_sam())), **options).generate(face())
    ranked = text.rank_by_text(face(), records, "an eye", loading.load(clip), text.clip_processor(str(clip)))
    for record, match in zip(found, ranked, strict=False):
        np.testing.assert_array_equal(rle.decode_rle(record["segmentation"]), records[match.mask]["segmentation"])
        assert record["similarity"] == pytest.approx(match.similarity, abs=1e-4)


# Many pictures


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pictures"
    path.mkdir()
    for name, picture in (("b.png", face()), ("a.jpg", photograph("coffee")[:90, :60]), ("c.webp", face()[:, ::-1])):
        Image.fromarray(np.ascontiguousarray(picture)).save(path / name)
    (path / "notes.txt").write_text("no picture")
    (path / "._a.jpg").write_bytes(b"what some systems put beside a picture")
    return path


def test_folders_and_pictures_together(command, folder, cat):
    code, out, error = command(folder, cat, folder / "b.png", *POINT[:1], "30,40")
    assert (code, error) == (0, "")
    assert [line.partition(":")[0] for line in out.splitlines()] == [
        *(str(folder / name) for name in ("a.jpg", "b.png", "c.webp")),
        str(cat),
    ]
    assert sorted(path.name for path in Path("out").iterdir()) == ["a", "b", "c", "cat"]


def test_what_is_finished_is_skipped(command, folder):
    assert command(folder / "a.jpg", *POINT[:1], "30,40")[0] == 0
    before = contents(Path("out/a"))
    code, out, _ = command(folder, *POINT[:1], "30,40")
    assert code == 0
    assert "1 of 3 pictures are finished already" in out
    assert contents(Path("out/a")) == before
    code, out, _ = command(folder, *POINT[:1], "30,40")
    assert (code, out) == (0, "3 of 3 pictures are finished already (--overwrite does them again)\n")
    assert command(folder, *POINT[:1], "30,40", "--overwrite")[0] == 0
    after = contents(Path("out/a"))
    assert list(after) == list(before)
    assert after["masks.json"] > before["masks.json"]


def test_a_finished_run_loads_no_model(command, cat, monkeypatch):
    assert command(cat, *POINT)[0] == 0
    monkeypatch.setattr(checkpoints, "load_sam", lambda *_, **__: 1 / 0)
    assert command(cat, *POINT)[0] == 0


@pytest.mark.parametrize("harm", ["no description", "half a description", "a mask less"])
def test_what_is_not_complete_is_done_again(harm, command, cat):
    assert command(cat, *POINT)[0] == 0
    home = Path("out/cat")
    before = contents(home)
    if harm == "no description":
        (home / "masks.json").unlink()
    elif harm == "half a description":
        (home / "masks.json").write_text((home / "masks.json").read_text()[:200])
    else:
        (home / "mask_001.png").unlink()
    code, out, _ = command(cat, *POINT)
    assert code == 0
    assert "3 masks written" in out
    assert list(contents(home)) == list(before)
    assert results.finished_request(home) is not None


def test_another_question_is_not_written_over_the_first(command, cat):
    assert command(cat, *POINT)[0] == 0
    before = contents(Path("out/cat"))
    assert_refused(command(cat, "--point", "1,2"), "holds what was asked otherwise")
    assert contents(Path("out/cat")) == before
    assert command(cat, "--box", "1,2,30,40", "--overwrite")[0] == 0
    assert sorted(contents(Path("out/cat"))) == ["mask_000.png", "masks.json", "overlay.png"], "older masks are gone"


def test_pictures_of_one_name_and_two_kinds_lie_side_by_side(command, folder):
    Image.fromarray(face()[::-1].copy()).save(folder / "a.png")
    assert command(folder, *POINT[:1], "30,40")[0] == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["a_jpg", "a_png", "b", "c"]
    assert (described(Path("out/a_jpg"))["width"], described(Path("out/a_png"))["width"]) == (60, 128)
    assert "4 of 4 pictures are finished already" in command(folder, *POINT[:1], "30,40")[1]


def test_a_picture_that_has_changed_is_done_again(command, folder):
    assert command(folder, *POINT[:1], "30,40")[0] == 0
    Image.fromarray(face()[:50]).save(folder / "b.png")
    code, out, _ = command(folder, *POINT[:1], "30,40")
    assert code == 0
    assert "2 of 3 pictures are finished already" in out
    assert described(Path("out/b"))["height"] == 50


def test_weights_that_have_changed_are_another_question(command, cat, weights, tmp_path):
    own = tmp_path / "own.pth"
    shutil.copy(weights, own)
    assert command(cat, *POINT, checkpoint=own)[0] == 0
    torch.save(small_sam(seed=1).state_dict(), own)
    assert_refused(command(cat, *POINT, checkpoint=own), "or with weights that have changed since")
    assert command(cat, *POINT, "--overwrite", checkpoint=own)[0] == 0


def test_two_pictures_of_one_name_are_refused(command, folder, tmp_path):
    shutil.copy(folder / "b.png", tmp_path / "b.png")
    assert_refused(command(folder, tmp_path / "b.png", *POINT), "would both be written to out")
    assert not Path("out").exists()


def test_a_run_that_is_cut_off_leaves_nothing_half_done(command, folder, monkeypatch):
    replace, written = os.replace, []

    def cut_off(source, target):
        written.append(Path(target).name)
        if len(written) == 7:  # the second picture's second mask, after three masks, a drawing and a description
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    code, _, error = command(folder, *POINT[:1], "30,40")
    assert (code, error) == (130, "fastvit: interrupted; 1 of 3 done, run again to go on\n")
    monkeypatch.setattr(os, "replace", replace)
    assert results.finished_request(Path("out/a")) is not None
    assert list(contents(Path("out/b"))) == ["mask_000.png"], "and nothing of the file that was being written"
    code, out, _ = command(folder, *POINT[:1], "30,40")
    assert code == 0
    assert "1 of 3 pictures are finished already" in out
    assert all(results.finished_request(Path("out") / name) is not None for name in "abc")


PROGRAM = """
import sys, time
from fastvit.cli import main, segment

whole = segment._segment_one

def hang_at_the_second(task, picture, *rest):
    if picture.name == "b.png":
        print("waiting", flush=True)
        time.sleep(60)
    return whole(task, picture, *rest)

segment._segment_one = hang_at_the_second
main()
"""


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_a_rerun_goes_on(command, folder, weights):
    """A signal to a process of its own, as a terminal sends it: Typer catches what Python makes of it."""
    arguments = ["segment", str(folder), *POINT[:1], "30,40", "--checkpoint", str(weights)]
    root = Path(results.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it, and pass that on
    )
    assert process.stdout.readline().endswith("3 masks written to out/a\n")
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "fastvit: interrupted; 1 of 3 done, run again to go on\n"
    code, out, _ = command(folder, *POINT[:1], "30,40")
    assert code == 0
    assert "1 of 3 pictures are finished already" in out


def test_ctrl_c_before_the_first_picture(command, cat, monkeypatch):
    monkeypatch.setattr(segment, "to_do", interrupted)
    assert command(cat, *POINT) == (130, "", "fastvit: interrupted\n")


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_name_does_not_steer_the_terminal(command, tmp_path):
    Image.fromarray(face()).save(tmp_path / "[red]\x1b[31mcat.png")
    code, out, _ = command(tmp_path / "[red]\x1b[31mcat.png", *POINT)
    assert code == 0
    assert "\x1b" not in out
    assert "[red] [31mcat.png: 3 masks written to" in out


def test_a_picture_that_is_none_does_not_hold_up_the_others(command, folder):
    (folder / "broken.png").write_bytes(b"\x89PNG and no more")
    outcome = command(folder, *POINT[:1], "30,40")
    assert_refused(outcome, "1 of 4 pictures could not be segmented: ")
    assert "broken.png" in outcome[2]
    assert sorted(path.name for path in Path("out").iterdir()) == ["a", "b", "c"]


# What is refused


BAD = [
    (["--point", "60;40"], "--point 60;40: expected X,Y in pixels"),
    (["--point", "60,nan"], "--point 60,nan: expected X,Y"),
    (["--point", "500,40"], "cat.png: the point 500,40 is outside of its 128×96 pixels"),
    (["--box", "1,2,3"], "--box 1,2,3: expected X0,Y0,X1,Y1"),
    (["--box", "30,2,10,40"], "its first corner is to be above"),
    (["--box", "1,2,129,40"], "the box 1,2,129,40 reaches beyond its 128×96 pixels"),
    ([*POINT, "--label", "1", "--label", "0"], "2 --label for 1 --point"),
    ([*POINT, "--label", "2"], "--label"),
    ([], "say what to segment"),
    ([*POINT, "--everything"], "one of them alone"),
    (["--text", "cat"], "--text and --clip belong together"),
    ([*POINT, "--clip", "somewhere"], "--text and --clip belong together"),
    (["--text", " ", "--clip", "somewhere"], "--text is empty"),
    (["--everything", "--points-per-side", "4", "--crop-layers", "-1"], "--crop-layers"),
    (["--everything", "--pred-iou-thresh", "nan"], "--pred-iou-thresh nan: expected a number"),
    ([*POINT, "--model", "vit_b"], "either --checkpoint FILE or --model"),
]


@pytest.mark.parametrize(("options", "says"), BAD, ids=[case[1] for case in BAD])
def test_mistakes_are_one_line(options, says, command, cat):
    assert_refused(command(cat, *options), says)
    assert not list(Path().iterdir()), "a mistake leaves nothing behind"


def test_weights_that_are_none(command, cat, tmp_path):
    assert_refused(command(cat, *POINT, checkpoint=None), "give SAM's weights")
    assert_refused(command(cat, *POINT, checkpoint=tmp_path / "absent.pth"), "absent.pth")
    (tmp_path / "text.pth").write_text("no weights")
    assert_refused(command(cat, *POINT, checkpoint=tmp_path / "text.pth"), "text.pth")


@pytest.mark.parametrize("question", [POINT, ["--everything", "--points-per-side", "2"]], ids=["a point", "everything"])
def test_weights_that_give_no_numbers(question, command, cat, tmp_path):
    torch.save({name: tensor * float("nan") for name, tensor in small_sam().state_dict().items()}, tmp_path / "nan.pth")
    outcome = command(cat, *question, checkpoint=tmp_path / "nan.pth")
    assert_refused(outcome, "cat.png: the model gives no numbers (NaN); its weights are damaged")
    assert not Path("out").exists()


def test_a_score_that_is_no_number_is_null(tmp_path):
    counts = rle.compress_rle(rle.encode_rle(torch.zeros(1, 2, 2, dtype=torch.bool))[0])
    record = {"segmentation": counts, "stability_score": float("nan"), "area": 0}
    results.write_result(tmp_path / "cat", {}, (2, 2), [record], lambda path: path.write_bytes(b""))
    text = (tmp_path / "cat" / "masks.json").read_text()
    assert json.loads(text, parse_constant=lambda name: 1 / 0)["masks"][0]["stability_score"] is None


def test_names_that_no_file_can_have(command, cat):
    assert_refused(command("a" * 300 + ".jpg", *POINT), "aaa.jpg: File name too long")
    assert_refused(command(cat, *POINT, checkpoint="a" * 300), "cannot be looked for (File name too long)")
    assert_refused(command(cat, *POINT, checkpoint="~nobody9/x.pth"), "~nobody9/x.pth: no such folder")
    assert not Path("out").exists()


def test_what_may_not_be_read_says_so(command, cat, monkeypatch):
    """Permissions do not bind every user that tests run as: the refusal of the file system is played."""

    def refuse(self, *args, **kwargs):
        if self.name == "cat.png":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    for name, says in (("open", "cat.png: may not be read (Permission denied)"), ("stat", "cat.png: Permission denied")):
        real = getattr(type(cat), name)
        with monkeypatch.context() as patch:
            patch.setattr(type(cat), name, refuse)
            assert_refused(command(cat, *POINT), says)


def test_pictures_that_are_none(command, tmp_path):
    assert_refused(command(tmp_path / "absent.jpg", *POINT), "absent.jpg: no such file")
    (tmp_path / "empty").mkdir()
    assert_refused(command(tmp_path / "empty", *POINT), "no pictures in this folder")


def test_a_clip_that_compares_nothing(command, cat, tmp_path):
    import transformers

    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
    transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    outcome = command(cat, "--text", "cat", "--clip", tmp_path / "vit", "--points-per-side", "2")
    assert_refused(outcome, "ViTModel does not compare pictures with texts")


def test_a_place_that_cannot_be_written(command, cat, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert_refused(command(cat, *POINT, "--out", tmp_path / "file"), "file")


def test_published_weights_have_names():
    assert segment._weights(None, segment.Model.vit_h) == "facebook/sam-vit-huge"
    assert set(segment.PUBLISHED) == {size.value for size in segment.Model}


def test_help_has_an_example(command):
    code, out, _ = command("--help", checkpoint=None)
    assert code == 0
    assert "Example: fastvit segment photo.jpg" in " ".join(out.split())
