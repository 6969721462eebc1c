"""The examples of docs/segment_anything.md, run in their order with a small Sam and a small CLIP under the published names."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
pytest.importorskip("segment_anything")
pytest.importorskip("skimage")
pytest.importorskip("transformers")

import segment_anything

import fastvit.models
from fastvit.cli import main
from fastvit.models import load_sam
from fastvit.pipelines.results import finished_request
from tests.small_clip import save_clip
from tests.small_sam import face, small_sam
from tests.test_sam_checkpoints import hugging_face_twin

pytestmark = pytest.mark.slow

PAGE = Path(__file__).resolve().parents[1] / "docs" / "segment_anything.md"
ANY_MASK = {"points_per_side=32": "points_per_side=3, pred_iou_thresh=0, stability_score_thresh=0"}  # random weights find little


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """An empty folder to be in, with everything that the page's names stand for."""
    monkeypatch.chdir(tmp_path)
    torch.save(small_sam().state_dict(), "sam_vit_b_01ec64.pth")
    hugging_face_twin().save_pretrained("facebook/sam-vit-base")
    save_clip(Path("openai/clip-vit-base-patch32"))
    Image.fromarray(face()).save("photo.jpg")
    Path("photos").mkdir()
    Image.fromarray(face()[:, ::-1].copy()).save("photos/cat.png")
    monkeypatch.setattr(fastvit.models, "sam_vit_b", lambda checkpoint: load_sam(checkpoint))
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", lambda checkpoint: small_sam())


def test_the_pages_python_runs(names):
    found = {}
    for example in examples("python"):
        for given, smaller in ANY_MASK.items():
            example = example.replace(given, smaller)
        exec(example, found)
    assert len(examples("python")) >= 9
    assert found["better"][0].shape == (3, 96, 128)
    assert found["found"][1]["masks"].shape == (3, 3, 128, 96)
    assert found["masks"].shape == (3, 96, 128)
    assert found["best"] in found["records"]
    assert fastvit.report(found["theirs"]).replaced


@pytest.mark.parametrize("line", "".join(examples("sh")).splitlines(), ids=lambda line: line.partition("64.pth ")[2][:20])
def test_the_pages_commands_run(names, line, monkeypatch):
    grid = ["--points-per-side", "3", "--pred-iou-thresh", "0", "--stability-score-thresh", "0"]
    monkeypatch.setattr(sys, "argv", [*shlex.split(line), *(grid if "--everything" in line or "--text" in line else [])])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    (folder,) = (path.parent for path in Path().glob("*/*/masks.json") if path.parts[0] not in ("facebook", "openai"))
    assert finished_request(folder) is not None
