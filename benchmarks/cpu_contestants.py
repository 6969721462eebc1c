"""Everyone who computes the same as a whole model on a CPU, in float32, on the same weights: what builds their calls, by name.

They are built when their turn comes, each also alone, in the process that measures its memory. Peers: the original with PyTorch's
fused attention (``sdpa``; of segment_anything's encoder, which has none, transformers' with its weights) and with attention
written out (``eager``), torch.compile of the original, ONNX Runtime and OpenVINO on its export. From an image to a mask they
differ in the image encoder; prompt encoder and mask decoder are segment_anything's, accelerated where the encoder is.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastvit
from fastvit._torchvision import ensure_importable

from . import contest, exports, models, sam, training
from .results import Row

EXPORTED = ("onnxruntime", "openvino")
PEERS = ("sdpa", "eager", "compile", *EXPORTED)
OURS, COMPILED = "accelerated", "accelerated_compile"

Contestants = Callable[[Row, Path], contest.Builders]  # a folder for exports
Build = Callable[[], Any]
Mode = Callable[[Any], Any]  # what makes of the original another way to run it


def same(model: nn.Module) -> nn.Module:
    return model


def written_out(model: Any) -> nn.Module:
    """The same weights of a model of transformers', attention by PyTorch's plain operators."""
    other = contest.twin(model)
    other.set_attn_implementation("eager")
    return other


TIMM: dict[str, Mode] = {"sdpa": same, "eager": models.written_out}
TRANSFORMERS: dict[str, Mode] = {"sdpa": same, "eager": written_out}


def of_sam(sizes: dict[str, Any], *names: str) -> dict[str, Mode]:
    """Those of the modes of segment_anything's image encoder."""
    modes = {"eager": same, "sdpa": functools.partial(sam.transformers_encoder, sizes)}
    return {name: modes[name] for name in names}


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def images(row: Row) -> Tensor:
    """The same images every time."""
    torch.manual_seed(0)
    return torch.randn(row["shape"])


def inference(build: Build, modes: Mapping[str, Mode], others: tuple[str, ...] = ()) -> Contestants:
    """Calls of the model that ``build`` gives: ``modes`` of it, then those of ``PEERS`` and of our own that ``others`` names."""

    def contestants(row: Row, folder: Path) -> contest.Builders:
        ensure_importable()
        model, x, file = functools.cache(build), images(row), folder / "model.onnx"

        def call(run: Callable) -> contest.Call:
            return contest.inference(lambda pixels: first(run(pixels)), x)

        def exported(run: Callable) -> contest.Call:
            return run(file if file.exists() else exports.export(model(), x, file), x)

        found: dict[str, Callable[[], contest.Call]] = {
            name: functools.partial(lambda mode: call(mode(model())), mode) for name, mode in modes.items()
        }
        found["compile"] = lambda: call(torch.compile(contest.twin(model())))
        found["onnxruntime"] = lambda: exported(exports.onnxruntime)
        found["openvino"] = lambda: exported(exports.openvino)
        found[OURS] = lambda: call(models.accelerated(model(), row))
        found[COMPILED] = lambda: call(torch.compile(models.accelerated(model(), row), fullgraph=True))
        return {name: build for name, build in found.items() if name in (*modes, *others, OURS)}

    return contestants


def one_point(build: Build, modes: Mapping[str, Mode], others: tuple[str, ...] = ()) -> Contestants:
    """Low-resolution masks of one point in an image by segment_anything's Sam, everyone's image encoder in turn."""

    def contestants(row: Row, folder: Path) -> contest.Builders:
        whole, x = functools.cache(build), images(row)
        encoders = inference(lambda: whole().image_encoder, modes, others)(row, folder)

        def decoded(build: Build) -> contest.Call:
            encode = build()
            return contest.inference(sam.encode_and_decode(whole(), lambda _: encode()), x)

        def ours() -> contest.Call:
            mine = models.accelerated(whole(), row)
            return contest.inference(sam.encode_and_decode(mine, mine.image_encoder), x)

        return {name: functools.partial(decoded, build) for name, build in encoders.items()} | {OURS: ours}

    return contestants


def everything(build: Build, side: int) -> Contestants:
    """All masks in one picture, a grid of ``side``² points, by segment_anything's generator and by ours (``sam.Everything``)."""

    def contestants(row: Row, folder: Path) -> contest.Builders:
        whole = functools.cache(build)
        mine = functools.cache(lambda: models.accelerated(whole(), row))
        picture = images(row)[0].mul(40).add(128).clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()

        @functools.cache
        def options() -> dict[str, Any]:
            quality = sam.rated(fastvit.SamPredictor(mine()), picture, side**2)[1]
            kept = {"pred_iou_thresh": quality.quantile(0.9).item(), "stability_score_thresh": 0.0}
            return {"points_per_side": side, "points_per_batch": side**2, **kept}

        def theirs() -> contest.Call:
            from segment_anything import SamAutomaticMaskGenerator, SamPredictor

            return sam.Everything(SamAutomaticMaskGenerator(whole(), **options()), SamPredictor(whole()), picture)

        def ours() -> contest.Call:
            generator = fastvit.SamAutomaticMaskGenerator(mine(), **options())
            return sam.Everything(generator, fastvit.SamPredictor(mine()), picture)

        return {"eager": theirs, OURS: ours}

    return contestants


def step(build: Build, modes: Mapping[str, Mode]) -> Contestants:
    """Training steps (``training``), in float32 throughout, each on a copy of its own."""

    def contestants(row: Row, folder: Path) -> contest.Builders:
        base, x = build().requires_grad_(True), images(row)
        with torch.no_grad():
            target = torch.randn_like(base(x))

        def train(mode: Mode, wrap: Mode = same) -> contest.Call:
            model = mode(copy.deepcopy(base)).requires_grad_(True)
            return training.trainer(model, x, target, autocast=False, forward=wrap(model))

        found = {name: functools.partial(train, mode) for name, mode in modes.items()}
        compiled = {"compile": functools.partial(train, same, torch.compile)}
        return {**found, **compiled, OURS: functools.partial(train, fastvit.accelerate)}

    return contestants
