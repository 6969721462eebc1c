"""Whole models on the CPU, float32, inference: the accelerated model against the unchanged one and what else serves it.

Peers: the original with PyTorch's fused attention (``sdpa``) and with attention written out (``eager``), as far as its library
has both, torch.compile of it, ONNX Runtime and OpenVINO on its export where they can be imported. Time: all on the same weights
in one process, in turns, so that whatever else the machine does hits all of them; reported are medians, and the ratios of
rounds. Memory: ours and the fastest peer's, each in a process of its own: peak resident size (``VmHWM``) above the model loaded,
the highest of a few calls.
Results are checked first.
"""

import argparse
import functools
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastvit
from fastvit._torchvision import ensure_importable

from . import accuracy, contest, exports, floors, measure, results
from .settings import Settings, Task

LEAST_ROUNDS = 3
ALLOWED_ERROR = 1e-4  # relative, float32, between implementations; as fastvit.verify allows


def dinov2_small_518(mode: str) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    return Dinov2Model(Dinov2Config(attn_implementation=mode, **sizes))


def vit_base_transformers(mode: str) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(attn_implementation=mode))


def vit_base_timm(mode: str) -> nn.Module:
    import timm

    model = timm.create_model("vit_base_patch16_224", num_classes=1000)
    for block in model.blocks:
        block.attn.fused_attn = mode == "sdpa"
    return model


def _disturb_positions(model):
    """Relative positions begin at zero, where some implementations could save themselves the work."""
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def sam_base_meta(mode: str) -> nn.Module:
    from segment_anything import sam_model_registry

    return _disturb_positions(sam_model_registry["vit_b"]().image_encoder)


def sam_base_transformers(mode: str) -> nn.Module:
    from transformers import SamConfig, SamModel, SamVisionConfig

    vision = SamVisionConfig(initializer_range=0.02, attn_implementation=mode)
    return _disturb_positions(SamModel(SamConfig(vision_config=vision, attn_implementation=mode)).vision_encoder)


@dataclass(frozen=True)
class Case:
    """``build(mode)`` the model; ``gflop`` of the whole input; ``seconds`` to time for, roughly; ``others``: the peers.

    The first of ``others`` is the mode that is accelerated. ``compiled``: torch.compile of the accelerated model runs too.
    """

    title: str
    build: Callable[[str], nn.Module]
    shape: list[int]
    gflop: float
    seconds: float
    others: tuple[str, ...]
    compiled: bool = False


MODES = ("sdpa", "eager")  # of the original
EXPORTED = ("onnxruntime", "openvino")
ALL_OTHERS = (*MODES, "compile", *EXPORTED)
COMPILED = "accelerated_compile"
VIT_B = floors.vit_flops(224, **floors.VIT["ViT-B/16"]) / 1e9
SAM_B = floors.sam_encoder_flops(**floors.SAM["SAM-B"]) / 1e9
DINOV2_S = floors.vit_flops(518, 14, 384, 12, 1536) / 1e9
CASES = {
    "vit-b-224-timm": Case("timm ViT-B/16, 224 px, batch 8", vit_base_timm, [8, 3, 224, 224], 8 * VIT_B, 18, ALL_OTHERS),
    "vit-b-224-timm-1": Case("timm ViT-B/16, 224 px, batch 1", vit_base_timm, [1, 3, 224, 224], VIT_B, 6, ALL_OTHERS, True),
    "dinov2-s-518": Case("Hugging Face DINOv2-S, 518 px, batch 1", dinov2_small_518, [1, 3, 518, 518], DINOV2_S, 10, ALL_OTHERS),
    "vit-b-224-hf": Case("Hugging Face ViT-B/16, 224 px, batch 8", vit_base_transformers, [8, 3, 224, 224], 8 * VIT_B, 6, MODES),
    "sam-b-1024-meta": Case(
        "segment_anything SAM-B image encoder, 1024 px, batch 1", sam_base_meta, [1, 3, 1024, 1024], SAM_B, 30, ("eager",)
    ),
    "sam-b-1024-hf": Case(
        "Hugging Face SAM-B image encoder, 1024 px, batch 1", sam_base_transformers, [1, 3, 1024, 1024], SAM_B, 25, ("sdpa",)
    ),
}


def build(case: str, mode: str) -> tuple[nn.Module, Tensor]:
    """(the model in that mode, the images): the same weights and images every time."""
    ensure_importable()
    torch.manual_seed(0)
    model = CASES[case].build(mode)
    return model.eval().requires_grad_(False), torch.randn(CASES[case].shape)


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def tasks(settings: Settings) -> Iterator[Task]:
    for name, case in CASES.items():
        row = results.new_row(case.title, "model", "forward", "fp32", case.shape)
        yield Task(row, functools.partial(run, name))


def _call(kind: str, model: nn.Module, x: Tensor, file: Path) -> Callable[[], Tensor]:
    """One call of the model by one of the contestants."""
    if kind in EXPORTED:
        return exports.onnxruntime(file, x) if kind == "onnxruntime" else exports.openvino(file, x)
    run = torch.compile(model, fullgraph=kind == COMPILED) if kind in ("compile", COMPILED) else model
    return contest.inference(lambda pixels: first(run(pixels)), x)


def run(name: str, row: results.Row, settings: Settings) -> None:
    """Fills the row: everything checked against the original, then timed in turns, then each one's memory."""
    case = CASES[name]
    row |= {"gflop": case.gflop, "floor_ms": settings.floor_ms(case.gflop), "took_s": {}}
    model, x = build(name, case.others[0])
    mine = fastvit.accelerate(contest.twin(model))
    served = fastvit.report(mine)
    if not served.replaced:
        raise RuntimeError("not served: no block of a known layout")
    row["served_blocks"] = len(served.replaced)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        calls = {case.others[0]: _call(case.others[0], model, x, file)}
        exact = calls[case.others[0]]()

        def admit(kind: str, model: nn.Module) -> float:
            """Checks, which warms it too."""
            call = _call(kind, model, x, file)
            error = accuracy.relative_error([call()], [exact])
            if not error <= ALLOWED_ERROR:
                raise accuracy.WrongResult(f"{kind} errs by {error:.2g}, allowed {ALLOWED_ERROR:.2g}")
            calls[kind] = call
            return error

        row["max_error"] = admit("accelerated", mine)
        for kind in ALL_OTHERS:
            if kind in calls:
                continue
            start = time.perf_counter()
            reason = None if kind in case.others else "not run for this case"
            try:
                reason = reason or _why_not(kind, settings)
                if reason is None:
                    if kind in EXPORTED:
                        exports.export(model, x, file)
                    admit(kind, build(name, "eager")[0] if kind == "eager" else contest.twin(model))
                    row["took_s"][kind] = round(time.perf_counter() - start, 1)
            except Exception as error:  # whatever a peer throws, it does not serve this case
                reason = results.describe(error)
            if reason is not None:
                row["unavailable"][kind] = reason
        if case.compiled and settings.why_not_compiled() is None:
            start = time.perf_counter()
            admit(COMPILED, fastvit.accelerate(contest.twin(model)))
            row["took_s"][COMPILED] = round(time.perf_counter() - start, 1)
        timings = measure.interleaved(calls, settings.budget_s(case.seconds), least=1 if settings.quick else LEAST_ROUNDS)
        _fill(row, timings)
        start = time.perf_counter()
        row["peak_mb"] = peak_memory_of(name, "accelerated", file)
        best = results.fastest_peer(row)
        if best:
            row["peers_peak_mb"][best] = peak_memory_of(name, best, file)
        row["took_s"]["memory"] = round(time.perf_counter() - start, 1)


def _why_not(kind: str, settings: Settings) -> str | None:
    if kind in MODES:
        return None
    needed = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx")}.get(kind, ())
    absent = [module for module in needed if importlib.util.find_spec(module) is None]
    return f"{absent[0]} is not installed" if absent else settings.why_not_compiled()


def _fill(row: results.Row, timings: dict[str, measure.Timing]) -> None:
    mine, compiled = timings.pop("accelerated"), timings.pop(COMPILED, None)
    if compiled is not None:
        row["ours_variants"] = {"accelerated": mine.ms, COMPILED: compiled.ms}
    row["peers"] = {kind: timing.ms for kind, timing in timings.items()}
    row["peers_spread"] = {kind: timing.spread for kind, timing in timings.items()}
    row["peers_cpu_ms"] = {kind: timing.cpu_ms for kind, timing in timings.items()}
    row["peers_p95_ms"] = {kind: timing.p95_ms for kind, timing in timings.items()}
    row["peers_peak_mb"] = dict.fromkeys(timings)
    row |= {"ours_ms": mine.ms, "ours_spread": mine.spread, "ours_cpu_ms": mine.cpu_ms, "p95_ms": mine.p95_ms}
    row |= {"rounds": len(mine.samples), "images_s": 1e3 * row["shape"][0] / mine.ms}
    row |= {"energy_absent": "not counted on a CPU", "mfu": row["floor_ms"] / mine.ms}
    row |= measure.paired(timings[results.fastest_peer(row) or next(iter(timings))], mine)


def peak_memory_of(case: str, kind: str, file: Path) -> float:
    """MiB that calls add to the loaded model at their highest, in a process of its own."""
    command = [sys.executable, "-m", f"{__name__.rpartition('.')[0]}.cpu_models", case, kind, str(file)]
    path = os.pathsep.join(filter(None, [str(results.ROOT_OF_IMPORTS), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    return int(ran.stdout.splitlines()[-1]) / 2**20


def peak_memory(case: str, kind: str, file: Path) -> int:
    """Bytes of peak resident size above the loaded model, in this process."""
    if kind in EXPORTED:
        model, x = nn.Identity(), torch.randn(CASES[case].shape)
    else:
        model, x = build(case, "eager" if kind == "eager" else CASES[case].others[0])
        if kind == "accelerated":
            fastvit.accelerate(model)
    call = _call(kind, model, x, file)
    if kind == "compile":
        call()  # what the compiler itself takes is not the model's
    measure.forget_peak()  # loading's own; where that is refused, loading's peak may hide the calls'
    before = measure.status_bytes("VmRSS")
    for _ in range(3 if CASES[case].gflop < 500 else 2):
        call()
    return measure.status_bytes("VmHWM") - before


def machine() -> dict:
    """What the numbers depend on, in the form of the file of families."""
    return {
        "commit": results.short(results.commit()),
        "cpu": results.cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Peak memory of one contestant in a case, in bytes")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("kind")
    parser.add_argument("file", type=Path)
    print(peak_memory(**vars(parser.parse_args())))
