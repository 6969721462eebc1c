"""Inference of whole ViTs in bf16 on a GPU: timm's models with random weights, accelerated in place, against themselves.

ViT-B, -L and -H at 224 px, batch 1, 8, 64 and 256; DINOv2-L at 518 px. A row has the median and 95th percentile of the latency,
peak memory above the weights, and ``mfu``: FLOPs (``floors``) over time, of what a large matrix product reaches. Images a
second are batch / time.
"""

import functools
from collections.abc import Iterator

import torch
from torch import nn

import fastvit
from fastvit._torchvision import ensure_importable

from . import contest, floors, results
from .settings import Settings, Task

BATCHES = (1, 8, 64, 256)
NAMES = {
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
    "DINOv2-L/14": "vit_large_patch14_dinov2",
}
CASES = [(name, 224, batch) for name in ("ViT-B/16", "ViT-L/16", "ViT-H/14") for batch in BATCHES]
CASES += [("DINOv2-L/14", 518, batch) for batch in (1, 8, 32)]
DRY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def build(name: str, settings: Settings) -> nn.Module:
    """timm's model in evaluation mode, no weight left at a value that makes its block do nothing."""
    ensure_importable()
    import timm

    torch.manual_seed(0)
    model = timm.create_model(NAMES[name], **(DRY if settings.dry else {}))
    for key, parameter in model.named_parameters():
        if key.endswith("gamma"):
            nn.init.constant_(parameter, 0.1)
    return model.eval().requires_grad_(False)


def vit_gflop(name: str, image: int, settings: Settings) -> float:
    sizes = floors.VIT[name] | ({"dim": 32, "depth": 2, "mlp_dim": 128} if settings.dry else {})
    return floors.vit_flops(image, **sizes, classes=0 if name.startswith("DINO") else 1000) / 1e9


def tasks(settings: Settings) -> Iterator[Task]:
    for name, image, batch in CASES:
        batch = min(batch, 2) if settings.dry else batch
        row = results.new_row(f"{name} {image}, batch {batch}", "model", "forward", settings.dtype, [batch, 3, image, image])
        yield Task(row, functools.partial(run_vit, name, image))


def run_vit(name: str, image: int, row: results.Row, settings: Settings) -> None:
    batch = row["shape"][0]
    row["gflop"] = batch * vit_gflop(name, image, settings)
    row["floor_ms"] = settings.floor_ms(row["gflop"])
    model = build(name, settings).to(settings.device)
    x = torch.randn(batch, 3, image, image, device=settings.device)
    exact = contest.inference(model, x)().cpu()
    model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    mine = fastvit.accelerate(contest.twin(model))
    served = fastvit.report(mine)
    if not served.replaced or served.fallbacks:
        raise RuntimeError(f"not served: {served.fallbacks or served.skipped or 'no block of a known layout'}")
    row["served_blocks"] = len(served.replaced)
    small = batch <= contest.GRAPHED_UP_TO
    others = contest.variants("eager", lambda: contest.inference(model, x), small, max_autotune=True)
    ours = contest.variants("accelerated", lambda: contest.inference(mine, x), small)
    contest.run(row, settings, exact, others, ours)
