"""Which whole models are measured on a CPU, in float32.

``small``: what every run has. ``large``, ``--part large``: larger ViTs and batches, SAM from an image to masks, training steps,
SAM's larger encoders; about 25 minutes on two cores, and up to 20 GiB. Where a call takes ten seconds or more, only the peers
that may be the fastest have a turn, and rounds are two. ViT-B at batch 256 would be half a minute a call, and is left out.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastvit._torchvision import ensure_importable

from . import floors, models, sam
from .cpu_contestants import (
    COMPILED,
    EXPORTED,
    PEERS,
    TIMM,
    TRANSFORMERS,
    Contestants,
    Mode,
    everything,
    inference,
    of_sam,
    one_point,
    same,
    step,
)
from .settings import Settings

TRAINED = 512  # pixels, of SAM's training step: at 1024 it would take minutes, and over 10 GiB
FUSED = {"sdpa": same}
NOT_HERE = "not run for this case"  # why a peer that a case leaves out has no time
POINTS = 4  # along either side of the picture


@dataclass(frozen=True)
class Case:
    """``contestants(row, folder)``: peers first, the first of whom says what is right.

    ``gflop`` of the whole input, None where it is not counted; ``seconds`` to time for, roughly; ``rounds`` at least.
    """

    title: str
    shape: list[int]
    gflop: float | None
    contestants: Contestants
    seconds: float = 0.0
    rounds: int = 3
    op: str = "model"
    direction: str = "forward"


def dinov2_small() -> nn.Module:
    ensure_importable()
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    return Dinov2Model(Dinov2Config(attn_implementation="sdpa", **sizes)).eval().requires_grad_(False)


def vit_base() -> nn.Module:
    ensure_importable()
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    return ViTModel(ViTConfig(attn_implementation="sdpa")).eval().requires_grad_(False)


def encoder(sizes: dict[str, Any]) -> nn.Module:
    """segment_anything's."""
    return sam.original(sizes).image_encoder


def encoder_of_transformers(sizes: dict[str, Any]) -> nn.Module:
    return sam.transformers_encoder(sizes, encoder(sizes)).model.vision_encoder


def gflop_of_sam(sizes: dict[str, Any]) -> float:
    counted = {"dim": sizes["dim"], "depth": sizes["depth"], "globals_": len(sizes["globals"]), "window": sizes["window"]}
    return floors.sam_encoder_flops(**counted, side=sizes["image"] // sam.PATCH, out=sizes["prompt_dim"]) / 1e9


def _vit(title: str, build: Callable, modes: Mapping[str, Mode], image: int, batch: int, gflop: float, *others: str, **more: Any):
    """``gflop`` of one image."""
    run = inference(build, modes, others)
    return Case(f"{title}, {image} px, batch {batch}", [batch, 3, image, image], batch * gflop, run, **more)


def _timm(settings: Settings, name: str, image: int, modes: Mapping[str, Mode], batch: int, *others: str, **more: Any) -> Case:
    batch, gflop = min(batch, 2) if settings.dry else batch, models.vit_gflop(name, image, settings)
    return _vit(f"timm {name}", functools.partial(models.build, name, settings), modes, image, batch, gflop, *others, **more)


def _sam(title: str, build: Callable, sizes: dict[str, Any], modes: Mapping[str, Mode], *others: str, **more: Any) -> Case:
    return _vit(
        f"{title} image encoder", functools.partial(build, sizes), modes, sizes["image"], 1, gflop_of_sam(sizes), *others, **more
    )


def _step(inferred: Case, build: Callable, modes: Mapping[str, Mode], rounds: int) -> Case:
    """A step of training of a model that is a case of inference."""
    return replace(
        inferred,
        title=f"{inferred.title}, training step",
        gflop=3 * (inferred.gflop or 0),
        contestants=step(build, modes),
        rounds=rounds,
        op="training",
        direction="step",
    )


def small(settings: Settings) -> list[Case]:
    vit, sizes = functools.partial(_timm, settings, "ViT-B/16", 224, TIMM), sam.sizes_of("SAM-B", settings)
    of_dinov2 = floors.vit_flops(518, 14, 384, 12, 1536) / 1e9
    of_vit = floors.vit_flops(224, **floors.VIT["ViT-B/16"]) / 1e9
    return [
        vit(8, *PEERS, seconds=18),
        vit(1, *PEERS, COMPILED, seconds=6),
        _vit("Hugging Face DINOv2-S", dinov2_small, TRANSFORMERS, 518, 1, of_dinov2, *PEERS, seconds=10),
        _vit("Hugging Face ViT-B/16", vit_base, TRANSFORMERS, 224, 8, of_vit, "openvino", seconds=6),
        _sam("segment_anything SAM-B", encoder, sizes, of_sam(sizes, "eager"), "openvino", seconds=30),
        _sam("Hugging Face SAM-B", encoder_of_transformers, sizes, FUSED, "openvino", seconds=25),
    ]


def large(settings: Settings) -> list[Case]:
    vit = functools.partial(_timm, settings)
    sizes, many, most = (sam.sizes_of(name, settings) for name in ("SAM-B", "SAM-L", "SAM-H"))
    trained, points = sizes if settings.dry else sizes | {"image": TRAINED}, 2 if settings.dry else POINTS
    side, whole = sizes["image"], functools.partial(sam.original, sizes)
    to_masks = functools.partial(Case, shape=[1, 3, side, side], op="sam", rounds=2)
    prompted = one_point(whole, of_sam(sizes, "eager", "sdpa"), PEERS)
    to_train = functools.partial(encoder, trained)
    return [
        vit("ViT-L/16", 224, TIMM, 1, *PEERS, seconds=12),
        vit("ViT-L/16", 224, TIMM, 8, *PEERS, rounds=2),
        vit("ViT-H/14", 224, TIMM, 1, *PEERS),
        vit("DINOv2-L/14", 518, FUSED, 1, *PEERS, rounds=2),
        vit("ViT-B/16", 224, FUSED, 64, *EXPORTED, rounds=2),
        to_masks(f"segment_anything SAM-B, {side} px, image and one point", gflop=gflop_of_sam(sizes), contestants=prompted),
        to_masks(
            f"segment_anything SAM-B, {side} px, masks at {points**2} points", gflop=None, contestants=everything(whole, points)
        ),
        _step(vit("ViT-B/16", 224, TIMM, 8), functools.partial(models.build, "ViT-B/16", settings), TIMM, rounds=3),
        _step(_sam("segment_anything SAM-B", encoder, trained, {}), to_train, of_sam(trained, "eager", "sdpa"), rounds=2),
        _sam("segment_anything SAM-L", encoder, many, of_sam(many, "sdpa"), "openvino", rounds=2),
        _sam("segment_anything SAM-H", encoder, most, of_sam(most, "sdpa"), "openvino", rounds=2),
    ]
