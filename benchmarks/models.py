"""Inference of whole ViTs in bf16 on a GPU: timm's models with random weights, accelerated in place, against themselves.

ViT-B, -L and -H at 224 px, batch 1, 8, 64 and 256; DINOv2-L at 518 px. A row has the median and 95th percentile of the latency,
images a second, peak memory above the weights, joules an image, and ``mfu``: FLOPs (``floors``) over time, of what a large matrix
product reaches. Peers: the model written out (``eager``) and with PyTorch's fused attention (``sdpa``), compiled by default and
with max-autotune, whose CUDA graphs are its own, ONNX Runtime in float16 and TensorRT. Rows in FP8 and INT8 compete with what
torchao has of them, have the ``cosine`` of their features with float32's, and ``vs_bf16``: how much faster than fastvit in bf16.
"""

import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastvit
from fastvit import quantization
from fastvit._torchvision import ensure_importable
from fastvit.ops import quantized
from fastvit.reference_quantized import FORMATS

from . import contest, exports, floors, results
from .settings import Settings, Task

NAMES = {
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
    "DINOv2-L/14": "vit_large_patch14_dinov2",
}
SIZES = ("ViT-B/16", "ViT-L/16", "ViT-H/14")
CASES = [(name, 224, batch) for batch in (256, 1, 8, 64) for name in SIZES]  # what is asked for most comes first
CASES += [("DINOv2-L/14", 518, batch) for batch in (8, 1, 32)]
CASES_IN_8_BITS = [("ViT-L/16", 224, 64), ("ViT-H/14", 224, 64), ("ViT-L/16", 224, 256), ("ViT-H/14", 224, 256)]
TORCHAO = {"fp8": ("torchao_float8", exports.float8), "int8": ("torchao_int8", exports.int8)}
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


def written_out(model: nn.Module) -> nn.Module:
    """The same weights, attention by PyTorch's plain operators."""
    other = contest.twin(model)
    for module in other.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return other


def vit_gflop(name: str, image: int, settings: Settings) -> float:
    sizes = floors.VIT[name] | ({"dim": 32, "depth": 2, "mlp_dim": 128} if settings.dry else {})
    return floors.vit_flops(image, **sizes, classes=0 if name.startswith("DINO") else 1000) / 1e9


def tasks(settings: Settings) -> Iterator[Task]:
    kinds = ((CASES, run_vit, ""), *((CASES_IN_8_BITS, run_in_8_bits, precision) for precision in FORMATS))
    for cases, run, precision in kinds:
        for name, image, batch in cases:
            title = f"{name} {image}, batch {batch}" + (f", {precision}" if precision else "")
            shape = [min(batch, 2) if settings.dry else batch, 3, image, image]
            row = results.new_row(title, "model", "forward", precision or settings.dtype, shape)
            yield Task(row, functools.partial(run, name, image))


def subject(name: str, image: int, row: results.Row, settings: Settings) -> tuple[nn.Module, Tensor, Tensor]:
    """(the model in bf16, the images, the exact result), all but the last on the device."""
    batch = row["shape"][0]
    row["gflop"] = batch * vit_gflop(name, image, settings)
    row["floor_ms"] = settings.floor_ms(row["gflop"])
    model = build(name, settings).to(settings.device)
    x = torch.randn(row["shape"], device=settings.device)
    exact = torch.cat([contest.inference(model, part)() for part in x.split(64)]).cpu()
    return model.to(torch.bfloat16), x.to(torch.bfloat16), exact


def accelerated(model: nn.Module, row: results.Row, **options: Any) -> nn.Module:
    """Another module with these weights, accelerated; raises where nothing of it could be."""
    mine = fastvit.accelerate(contest.twin(model), **options)
    served = fastvit.report(mine)
    if not served.replaced or served.fallbacks:
        raise RuntimeError(f"not served: {served.fallbacks or served.skipped or 'no block of a known layout'}")
    row["served_blocks"] = len(served.replaced)
    return mine


def exported(model: nn.Module, x: Tensor, folder: Path, small: bool) -> dict[str, Callable[[], contest.Call]]:
    """ONNX Runtime, in float16, since its kernels for bfloat16 are few, and TensorRT in the model's own dtype."""

    def file() -> Path:
        exports.onnxruntime_provider(x)
        return exports.export(copy.deepcopy(model).half(), x.half(), folder / "model.onnx")

    found: dict[str, Callable[[], contest.Call]] = {"onnxruntime": lambda: exports.onnxruntime(file(), x.half())}
    if small:
        found["onnxruntime_graph"] = lambda: contest.Captured(exports.onnxruntime(file(), x.half(), cuda_graph=True))
    return found | {"tensorrt": lambda: exports.tensorrt(copy.deepcopy(model), x)}


def run_vit(name: str, image: int, row: results.Row, settings: Settings) -> None:
    model, x, exact = subject(name, image, row, settings)
    mine = accelerated(model, row)
    small = row["shape"][0] <= contest.GRAPHED_UP_TO
    others = {"eager": lambda: contest.inference(written_out(model), x)}
    others |= contest.variants("sdpa", lambda: contest.inference(model, x), small, autotuned=True, compiled="compile")
    with tempfile.TemporaryDirectory() as folder:
        others |= exported(model, x, Path(folder), small)
        ours = contest.variants("accelerated", lambda: contest.inference(mine, x), small)
        if small:
            graphed = functools.cache(lambda: accelerated(model, row, cuda_graphs=True))
            ours["accelerated_cuda_graphs"] = lambda: contest.replayed(graphed(), contest.inference(graphed(), x))
        contest.run(row, settings, exact, others, ours)


def in_8_bits(model: nn.Module, x: Tensor, row: results.Row, settings: Settings) -> contest.Call:
    """The model accelerated in the row's format; a dry run, which has no GPU, simulates it."""
    precision = row["dtype"]
    if settings.dry:
        run: Callable[[Tensor], Tensor] = functools.partial(_simulated, accelerated(model, row), precision)
    else:
        run = accelerated(model, row, precision=calibrated(model, x, precision))
        row[f"{precision}_blocks"] = sum(f"; in {precision.upper()}: " in text for text in fastvit.report(run).replaced.values())
        if not row[f"{precision}_blocks"]:
            raise RuntimeError(f"no block of the model is served in {precision.upper()}")
    call = contest.inference(run, x)
    call()  # rounds the weights, which a compiled graph would do at every call
    return call


def calibrated(model: nn.Module, x: Tensor, precision: str) -> quantization.Accuracy:
    """Everything in 8 bits, with weights rounded for pictures like x, but others: some 8000 tokens."""
    count = max(2, round(32 * (224 / x.shape[-1]) ** 2))
    others = [torch.randn_like(x[:1]) for _ in range(count)]
    return quantization.accuracy(model, x[:1], precision=precision, min_cosine=None, calibration=others)


def _simulated(model: nn.Module, precision: str, x: Tensor) -> Tensor:
    with quantization.simulated(model, precision):
        return model(x)


def require(precision: str, settings: Settings) -> None:
    """Raises ``NotRun`` on a device that has no products in that format; a dry run simulates them."""
    reason = None if settings.dry else quantized.why_not(precision, torch.device(settings.device))
    if reason:
        raise results.NotRun(reason)


def run_in_8_bits(name: str, image: int, row: results.Row, settings: Settings) -> None:
    require(row["dtype"], settings)
    model, x, exact = subject(name, image, row, settings)
    compete_in_8_bits(model, x, exact, row, settings)


def compete_in_8_bits(model: nn.Module, x: Tensor, exact: Tensor, row: results.Row, settings: Settings) -> None:
    """Fills the row with its format's contestants, and with what fastvit takes for the same in bf16."""
    peer, theirs_of = TORCHAO[row["dtype"]]
    small = row["shape"][0] <= contest.GRAPHED_UP_TO
    rule = contest.Cosine()
    rule.found |= row.get("cosines", {})
    theirs = functools.cache(lambda: contest.inference(theirs_of(copy.deepcopy(model)), x))
    others = contest.variants(peer, theirs, small, autotuned=True)
    ours = contest.variants(f"accelerated_{row['dtype']}", functools.partial(in_8_bits, model, x, row, settings), small)
    found = contest.run(row, settings, exact, others, ours, rule)
    row["cosines"] = rule.found
    if row["ours_ms"]:
        row["cosine"] = rule.found[row["ours"]]
        in_bf16 = contest.variants("accelerated", lambda: contest.inference(accelerated(model, row), x), small)
        times = [found.attempt(name, build, of_peer=False) for name, build in in_bf16.items()]
        bf16_ms = [timed[1].ms for timed in times if isinstance(timed, tuple)]
        if bf16_ms:
            row |= {"bf16_ms": min(bf16_ms), "vs_bf16": min(bf16_ms) / row["ours_ms"]}
