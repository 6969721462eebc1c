"""Whole models on the CPU, float32, inference: the accelerated model against the unchanged one and what else serves it.

Peers: the original in its library's fused mode, torch.compile of it, ONNX Runtime and OpenVINO on its export where they can be
imported. Time: all on the same weights in one process, in turns, so that whatever else the machine does hits all of them;
reported are medians, and the ratios of rounds. Memory: each in a process of its own, peak resident size (``VmHWM``) above the
model loaded, the highest of a few calls. Results are checked first.
"""

import argparse
import functools
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastvit
from fastvit._torchvision import ensure_importable

from . import accuracy, contest, floors, measure, results
from .settings import Settings, Task

ALLOWED_ERROR = 1e-4  # relative, float32, between implementations; as fastvit.verify allows


def dinov2_small_518():
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    return Dinov2Model(config), torch.randn(1, 3, 518, 518)


def vit_base_transformers():
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig()), torch.randn(8, 3, 224, 224)


def vit_base_timm():
    import timm

    return timm.create_model("vit_base_patch16_224", num_classes=1000), torch.randn(8, 3, 224, 224)


def _disturb_positions(model):
    """Relative positions begin at zero, where some implementations could save themselves the work."""
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def sam_base_meta():
    from segment_anything import sam_model_registry

    return _disturb_positions(sam_model_registry["vit_b"]().image_encoder), torch.randn(1, 3, 1024, 1024)


def sam_base_transformers():
    from transformers import SamConfig, SamModel, SamVisionConfig

    config = SamConfig(vision_config=SamVisionConfig(initializer_range=0.02).to_dict())
    return _disturb_positions(SamModel(config).vision_encoder), torch.randn(1, 3, 1024, 1024)


@dataclass(frozen=True)
class Case:
    """``gflop`` of the whole input; ``seconds`` to time for, roughly; ``others``: peers beside the original."""

    title: str
    build: Callable[[], tuple[nn.Module, Tensor]]
    shape: list[int]
    gflop: float
    seconds: float
    others: tuple[str, ...]


ALL_OTHERS = ("compile", "onnxruntime", "openvino")
VIT_B = floors.vit_flops(224, **floors.VIT["ViT-B/16"]) / 1e9
SAM_B = floors.sam_encoder_flops(**floors.SAM["SAM-B"]) / 1e9
DINOV2_S = floors.vit_flops(518, 14, 384, 12, 1536) / 1e9
PICTURES = {"small": [8, 3, 224, 224], "518": [1, 3, 518, 518], "1024": [1, 3, 1024, 1024]}
CASES = {
    "dinov2-s-518": Case("Hugging Face DINOv2-S, 518 px, batch 1", dinov2_small_518, PICTURES["518"], DINOV2_S, 12, ALL_OTHERS),
    "vit-b-224-hf": Case("Hugging Face ViT-B/16, 224 px, batch 8", vit_base_transformers, PICTURES["small"], 8 * VIT_B, 12, ()),
    "vit-b-224-timm": Case("timm ViT-B/16, 224 px, batch 8", vit_base_timm, PICTURES["small"], 8 * VIT_B, 24, ALL_OTHERS),
    "sam-b-1024-meta": Case(
        "segment_anything SAM-B image encoder, 1024 px, batch 1", sam_base_meta, PICTURES["1024"], SAM_B, 30, ()
    ),
    "sam-b-1024-hf": Case(
        "Hugging Face SAM-B image encoder, 1024 px, batch 1", sam_base_transformers, PICTURES["1024"], SAM_B, 25, ()
    ),
}


def build(case: str) -> tuple[nn.Module, Tensor]:
    ensure_importable()
    torch.manual_seed(0)
    model, x = CASES[case].build()
    return model.eval().requires_grad_(False), x


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def tasks(settings: Settings) -> Iterator[Task]:
    for name, case in CASES.items():
        row = results.new_row(case.title, "model", "forward", "fp32", case.shape)
        yield Task(row, functools.partial(run, name))


def _of_export(kind: str, file: Path, x: Tensor) -> Callable[[], Tensor]:
    """A call of the exported model in another library."""
    if kind == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        fed = {session.get_inputs()[0].name: x.numpy()}
        return lambda: torch.from_numpy(session.run(None, fed)[0])
    import openvino

    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()})
    return lambda: torch.from_numpy(compiled([x.numpy()])[0])


def _call(kind: str, model: nn.Module, x: Tensor, file: Path) -> Callable[[], Tensor]:
    """One call of the model by one of the contestants."""
    if kind in ("onnxruntime", "openvino"):
        return _of_export(kind, file, x)
    run = torch.compile(model) if kind == "compile" else model
    return contest.inference(lambda pixels: first(run(pixels)), x)


def _export(model: nn.Module, x: Tensor, file: Path) -> None:
    if not file.exists():
        with torch.no_grad():
            torch.onnx.export(model, (x,), str(file), dynamo=False, opset_version=17)


def run(name: str, row: results.Row, settings: Settings) -> None:
    """Fills the row: everything checked against the original, then timed in turns, then each one's memory."""
    case = CASES[name]
    row |= {"gflop": case.gflop, "floor_ms": settings.floor_ms(case.gflop)}
    model, x = build(name)
    mine = fastvit.accelerate(contest.twin(model))
    served = fastvit.report(mine)
    if not served.replaced:
        raise RuntimeError("not served: no block of a known layout")
    row["served_blocks"] = len(served.replaced)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        calls = {"original": _call("original", model, x, file)}
        exact = calls["original"]()

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
            reason = None if kind in case.others else "not run for this case"
            try:
                reason = reason or settings.why_not_compiled() or _missing(kind)
                if reason is None:
                    if kind != "compile":
                        _export(model, x, file)
                    admit(kind, contest.twin(model))
            except Exception as error:  # whatever a peer throws, it does not serve this case
                reason = results.describe(error)
            if reason is not None:
                row["unavailable"][kind] = reason
        timings = measure.interleaved(calls, settings.budget_s(case.seconds))
        peaks = {kind: peak_memory_of(name, kind, file) for kind in calls}
    _fill(row, timings, peaks)


def _missing(kind: str) -> str | None:
    needed = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx")}.get(kind, ())
    absent = [module for module in needed if importlib.util.find_spec(module) is None]
    return f"{absent[0]} is not installed" if absent else None


def _fill(row: results.Row, timings: dict[str, measure.Timing], peaks: dict[str, float]) -> None:
    mine = timings.pop("accelerated")
    row["peers"] = {kind: timing.ms for kind, timing in timings.items()}
    row["peers_spread"] = {kind: timing.spread for kind, timing in timings.items()}
    row["peers_cpu_ms"] = {kind: timing.cpu_ms for kind, timing in timings.items()}
    row["peers_peak_mb"] = {kind: peaks[kind] for kind in timings}
    row |= {"ours_ms": mine.ms, "ours_spread": mine.spread, "ours_cpu_ms": mine.cpu_ms, "p95_ms": mine.p95_ms}
    row |= {"peak_mb": peaks["accelerated"], "rounds": len(mine.samples)}
    row |= measure.paired(timings[results.fastest_peer(row) or "original"], mine)


def peak_memory_of(case: str, kind: str, file: Path) -> float:
    """MiB that calls add to the loaded model at their highest, in a process of its own."""
    command = [sys.executable, "-m", f"{__name__.rpartition('.')[0]}.cpu_models", case, kind, str(file)]
    path = os.pathsep.join(filter(None, [str(results.ROOT_OF_IMPORTS), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    return int(ran.stdout.splitlines()[-1]) / 2**20


def peak_memory(case: str, kind: str, file: Path) -> int:
    """Bytes of peak resident size above the loaded model, in this process."""
    if kind in ("onnxruntime", "openvino"):
        model, x = nn.Identity(), torch.randn(CASES[case].shape)
    else:
        model, x = build(case)
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
