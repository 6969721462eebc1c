"""A training step on a GPU: forward under bf16 autocast, mean-squared loss, backward and a fused AdamW step, ViT-B and SAM-B.

Peers: the model with PyTorch's fused attention where it has that (``sdpa``; segment_anything's is written out, ``eager``), and
compiled, by default and with max-autotune, whose CUDA graphs hold forward and backward.

What is checked beforehand is the gradient of all parameters together against float32's; each contestant trains its own copy.
"""

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fastvit

from . import contest, models, peers, results, sam
from .settings import Settings, Task

CASES = (("ViT-B/16 224", 64), ("SAM-B encoder", 1))


def tasks(settings: Settings) -> Iterator[Task]:
    for name, batch in CASES:
        batch = min(batch, 2) if settings.dry else batch
        side = sam.sizes_of("SAM-B", settings)["image"] if name.startswith("SAM") else 224
        row = results.new_row(f"{name}, batch {batch}", "training", "step", settings.dtype, [batch, 3, side, side])
        yield Task(row, functools.partial(run_step, name))


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def trainer(model: nn.Module, x: Tensor, target: Tensor, autocast: bool, forward: Callable | None = None) -> Callable[[], Tensor]:
    """A step; it returns the gradient of the first one, since collecting it is no part of training."""
    forward = model if forward is None else forward  # a compiled model may have no truth value
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=x.is_cuda)
    seen = torch.zeros(1)

    def step() -> Tensor:
        nonlocal seen
        first = seen.numel() == 1
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = (forward(x).float() - target).square().mean()
        loss.backward()
        if first:
            seen = gradients(model).cpu()
        optimizer.step()
        return seen

    return step


def run_step(name: str, row: results.Row, settings: Settings) -> None:
    batch = row["shape"][0]
    if name.startswith("SAM"):
        sizes = sam.sizes_of("SAM-B", settings)
        whole = sam.original(sizes)
        base, forward_gflop = whole.image_encoder, sam.gflop("SAM-B", settings)
    else:
        base, forward_gflop = models.build("ViT-B/16", settings), models.vit_gflop("ViT-B/16", 224, settings)
    row["gflop"] = 3 * batch * forward_gflop
    row["floor_ms"] = settings.floor_ms(row["gflop"])
    base = base.to(settings.device).requires_grad_(True)
    x = torch.randn(row["shape"], device=settings.device)
    with torch.no_grad():
        target = torch.randn_like(base(x))
    exact = trainer(copy.deepcopy(base), x, target, autocast=False)()
    plain = "eager" if name.startswith("SAM") else "sdpa"
    autotuned = functools.partial(peers.compiled, mode="max-autotune")
    variants: dict[str, Callable] = {plain: lambda model: model, "compile": peers.compiled, "compile_max_autotune": autotuned}

    def build(prepare: Callable, wrap: Callable) -> Callable[[], Callable]:
        def built() -> Callable[[], Tensor]:
            model = prepare(copy.deepcopy(base))
            return trainer(model, x, target, autocast=True, forward=wrap(model))

        return built

    others = {peer: build(lambda model: model, wrap) for peer, wrap in variants.items()}
    if plain == "sdpa":
        others["eager"] = build(models.written_out, variants[plain])
    if name.startswith("SAM"):

        def converted(model: nn.Module) -> nn.Module:
            return sam.transformers_encoder(sizes, model).to(x.device).requires_grad_(True)

        others["transformers_sdpa"] = build(converted, variants[plain])
    names = {plain: "accelerated", "compile": "accelerated_compile"}
    ours = {mine: build(fastvit.accelerate, variants[peer]) for peer, mine in names.items()}
    contest.run(row, settings, exact, others, ours)
